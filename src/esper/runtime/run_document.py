"""What Urza knows of one run, as users read it: the run document, its history, and the files of its output folder."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esper.contracts.enums import AdaptationState
from esper.contracts.enums import DecisionKind
from esper.contracts.enums import Outcome
from esper.contracts.operational import Adaptation
from esper.contracts.operational import AdaptationDecision
from esper.contracts.operational import Compute
from esper.contracts.operational import EpochReport
from esper.contracts.operational import Fact
from esper.contracts.orders import RunDocument
from esper.contracts.orders import RunRecord
from esper.errors import ConfigurationError
from esper.runtime.configuration import check_output
from esper.runtime.configuration import dump_config
from esper.runtime.urza.ledger import Drift
from esper.runtime.urza.ledger import Rewind

ENDED = frozenset({Outcome.COMPLETED, Outcome.STOPPED, Outcome.FAILED})
_FOLDER_HINT = "Name another folder with --output"
METRICS_FILE = "metrics.jsonl"
HISTORY_FILE = "history.json"
CONFIG_FILE = "config.yaml"


@dataclass(frozen=True)
class RunView:
    """Everything that Urza holds of one run at one moment; each tuple in the order of epochs or of numbers."""

    record: RunRecord
    reports: tuple[EpochReport, ...] = ()
    decisions: tuple[AdaptationDecision, ...] = ()
    adaptations: tuple[Adaptation, ...] = ()
    facts: tuple[Fact, ...] = ()
    rewinds: tuple[Rewind, ...] = ()
    drifts: tuple[Drift, ...] = ()

    @property
    def ended(self) -> bool:
        return self.record.outcome in ENDED

    @property
    def last(self) -> EpochReport | None:
        return self.reports[-1] if self.reports else None


def run_document(view: RunView, *, web_ui: str | None, output: str | None) -> RunDocument:
    """The public face of a run (`interface.md` section 2)."""
    record, last, finished = view.record, view.last, view.record.finished
    end = finished.parameters if finished else last.parameters if last else record.parameters_start
    return RunDocument(
        run_id=record.run_id,
        workflow_id=record.run_id,
        outcome=record.outcome,
        epochs=max(record.epochs, last.epoch if last else 0),
        steps=max(record.steps, last.step if last else 0),
        device=record.device,
        threads=record.threads,
        restarts=record.restarts,
        metrics=_metrics(view),
        parameters={"start": record.parameters_start, "end": end},
        compute=Compute(
            training_flops=sum(report.training_flops for report in view.reports),
            probe_flops=sum(report.probe_flops for report in view.reports),
        ),
        adaptations=tuple(_adaptation(adaptation) for adaptation in view.adaptations),
        decisions=len(view.decisions),
        missed=sum(adaptation.state is AdaptationState.MISSED for adaptation in view.adaptations),
        stall_s=round(sum(report.stall_seconds for report in view.reports), 3),
        divergences=record.divergences,
        digest=finished.digest if finished else None,
        data_digest=finished.data_digest if finished else None,
        web_ui=web_ui,
        output=output,
        warnings=record.warnings,
        error=record.failure,
        lineage=record.lineage,
    )


def document_json(document: RunDocument) -> dict[str, Any]:
    """The document with its public key names."""
    return document.model_dump(mode="json", by_alias=True)


def list_entry(record: RunRecord) -> dict[str, Any]:
    """One run in `list --json`."""
    return {
        "run_id": record.run_id,
        "name": record.name,
        "outcome": record.outcome.value,
        "created": record.created,
        "epochs": record.epochs,
        "max_epochs": record.config.run.max_epochs,
        "steps": record.steps,
        "digest": record.finished.digest if record.finished else None,
        "parent": record.lineage.parent if record.lineage else None,
    }


def seeds_document(view: RunView) -> list[dict[str, Any]]:
    """Every seed of the run as the last report saw it; empty before the first one."""
    if view.last is None:
        return []
    return [
        {"kind": node.contract.kind, **seed.model_dump(mode="json")}
        for node in view.last.graph.nodes
        for seed in node.seeds
    ]


def seed_states(report: EpochReport) -> dict[str, int]:
    """How many seeds are in each state, the most frequent last so that what lives is read first."""
    counts = Counter(seed.state.value for node in report.graph.nodes for seed in node.seeds)
    return dict(sorted(counts.items(), key=lambda item: (item[1], item[0])))


def history_document(view: RunView) -> dict[str, Any]:
    """Every decision with its evidence, and what came of it: delivery, apply step and outcome. Beside them where the
    run went back from a damaged checkpoint, and where it went on with what was not as it had been."""
    by_epoch = {adaptation.epoch: adaptation for adaptation in view.adaptations}
    facts: dict[str, list[dict[str, Any]]] = {}
    for fact in view.facts:
        facts.setdefault(fact.adaptation_id, []).append(fact.model_dump(mode="json"))
    entries = []
    for decision in view.decisions:
        ordered = by_epoch.get(decision.epoch) if decision.kind is DecisionKind.GERMINATE else None
        entry = decision.model_dump(mode="json", exclude={"run_id"})
        entry["adaptation"] = None
        if ordered is not None:
            entry["adaptation"] = ordered.model_dump(mode="json")
            entry["adaptation"]["facts"] = facts.get(ordered.adaptation_id, [])
        entries.append(entry)
    return {
        "schema": 1,
        "run_id": view.record.run_id,
        "decisions": entries,
        "rewinds": [asdict(rewind) for rewind in view.rewinds],
        "drifts": [{"step": drift.step, "fields": dict(drift.fields)} for drift in view.drifts],
    }


def metrics_lines(view: RunView) -> str:
    """`metrics.jsonl`: one JSON object an epoch."""
    return "".join(json.dumps(_epoch_line(report), allow_nan=False) + "\n" for report in view.reports)


def own_files(view: RunView) -> dict[str, bytes]:
    """The output files that follow from Urza's rows alone, whether the run has ended or not."""
    return {
        CONFIG_FILE: dump_config(view.record.config).encode(),
        METRICS_FILE: metrics_lines(view).encode(),
        HISTORY_FILE: (json.dumps(history_document(view), indent=2, allow_nan=False) + "\n").encode(),
    }


def check_output_folder(text: str) -> Path:
    """The absolute path of an output folder that can be written later. Creates nothing.

    Raises `ConfigurationError` (ESP-208) for what is no path, a relative path that leads out of the current
    folder, and all that `check_output` refuses.
    """
    if "\0" in text or not text.strip():
        raise ConfigurationError("ESP-208", f"output folder {text!r}: is not a path", hint=_FOLDER_HINT)
    try:
        given = Path(text).expanduser()
        here = Path.cwd().resolve()
        leads = here.joinpath(given).resolve()
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigurationError("ESP-208", f"output folder {text!r}: {reason}", hint=_FOLDER_HINT) from error
    if ".." in given.parts and not given.is_absolute() and not leads.is_relative_to(here):
        raise ConfigurationError(
            "ESP-208",
            f"output folder {text!r}: the path leads out of the current folder",
            hint=f"Give it as an absolute path if {leads} is meant",
        )
    return check_output(given)


def write_output_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write all files or none: they are written beside the folder, which then appears at once."""
    beside = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside.mkdir()
        try:
            for name, data in files.items():
                (beside / name).write_bytes(data)
            beside.replace(folder)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise
    except OSError as error:
        raise ConfigurationError(
            "ESP-208",
            f"output folder {str(folder)!r} cannot be written: {error.strerror or error}",
            hint="The files lie in Urza; write them elsewhere with `esper-cli export RUN --output DIR`",
        ) from error


def _metrics(view: RunView) -> dict[str, float | int | None]:
    metrics: dict[str, float | int | None] = {"train_loss": None, "val_loss": None}
    if view.last is not None:
        metrics["train_loss"] = view.last.metrics.train_loss
        metrics["val_loss"] = view.last.metrics.val_loss
        metrics |= {f"val_{name}": value for name, value in view.last.metrics.extra.items()}
    if view.record.finished is not None:
        metrics |= view.record.finished.metrics
    metrics["best_epoch"] = (
        min(view.reports, key=lambda report: report.metrics.val_loss).epoch if view.reports else None
    )
    return metrics


def _adaptation(adaptation: Adaptation) -> dict[str, Any]:
    names = {"adaptation_id", "epoch", "site", "seed", "blueprint", "kernel", "apply_step", "state", "reason", "judge"}
    return adaptation.model_dump(mode="json", include=names)


def _epoch_line(report: EpochReport) -> dict[str, Any]:
    return {
        "epoch": report.epoch,
        "step": report.step,
        "train_loss": report.metrics.train_loss,
        "val_loss": report.metrics.val_loss,
        **{f"val_{name}": value for name, value in report.metrics.extra.items()},
        "learning_rate": report.learning_rate,
        "samples": report.samples,
        "parameters": report.parameters,
        "training_flops": report.training_flops,
        "probe_flops": report.probe_flops,
        "busy_seconds": report.busy_seconds,
        "stall_seconds": report.stall_seconds,
        "seeds": seed_states(report),
    }
