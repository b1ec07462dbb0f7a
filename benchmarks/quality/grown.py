"""The arms that grow: real runs through the whole stack, and what a table shows of them."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from time import monotonic
from typing import Any

from home import local_home
from store import Store

KEPT = "fossilized"
SHOWN = ("val_loss", "val_accuracy", "test_loss", "test_accuracy")


@dataclass(frozen=True)
class GrownRun:
    """One run of a quick start with growth; `settings` are given with `--set` beside seed and learning rate."""

    quick_start: str
    seed: int
    lr: float | None = None
    settings: Mapping[str, str] = field(default_factory=dict)

    def chosen(self) -> dict[str, object]:
        own = {"run.seed": self.seed, "run.device": "cpu", "run.threads": 1, **self.settings}
        return own if self.lr is None else {**own, "optimizer.lr": self.lr}


def in_stack(store: Store, work: Mapping[str, GrownRun]) -> dict[str, dict[str, Any]]:
    """Each run's document with its metrics, size and FLOPs beside; one run after another on one local stack.

    `flops` is everything the run computed: its training, its probes and its twins.
    """
    missing = {key: run for key, run in work.items() if store.get(key) is None}
    if missing:
        began = monotonic()
        with local_home() as home:
            for done, (key, run) in enumerate(missing.items(), start=1):
                document = home.start_run(run.quick_start, f"{run.quick_start}-{done}", run.chosen())
                if document["outcome"] != "completed":
                    raise RuntimeError(f"{key}: the run ended as {document['outcome']}")
                store.put(key, document)
                print(f"{store.folder.name} {key}: {done}/{len(missing)}, {monotonic() - began:.0f} s", file=sys.stderr)
    return {key: _flat(store.get(key)) for key in work}


def kept(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The adaptations of a run that were judged and stayed."""
    return [each for each in document["adaptations"] if each["state"] == KEPT]


def told(document: Mapping[str, Any]) -> str:
    """Every adaptation of a run in one cell: what, where, when and what became of it."""
    cells = [
        f"{each['blueprint']} at `{each['site']}`, epoch {each['epoch']}: {each['state']}"
        for each in document["adaptations"]
    ]
    return "; ".join(cells) or "nothing was ordered"


def _flat(document: dict[str, Any]) -> dict[str, Any]:
    compute = document["compute"]
    return {
        **{name: value for name, value in document["metrics"].items() if name in SHOWN and value is not None},
        "parameters": document["parameters"]["end"],
        "epochs": document["epochs"],
        "flops": compute["training_flops"] + compute["probe_flops"],
        "probe_flops": compute["probe_flops"],
        "adaptations": document["adaptations"],
        "growth": document["growth"],
        "digest": document["digest"],
    }
