"""Does growth help a small transformer on text (`charlm`), and beside what? Every arm with a learning rate of its own.

`python benchmarks/quality/charlm.py` measures what is missing (about half an hour of one core; an interrupted benchmark
goes on where it stood) and writes `benchmarks/results/charlm.md` and `.json`. Text is dear, so the learning rate of an
arm is chosen on the first seed alone, at equal steps; everything else is trained at that rate.
"""

import argparse
import math
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

from arms import StaticRun
from arms import quick_start
from arms import train_static
from comparison import Arm
from comparison import as_data
from comparison import best_rate
from comparison import by_seed
from comparison import edge_warnings
from comparison import rates
from comparison import summary
from grown import GrownRun
from grown import in_stack
from grown import told
from report import Table
from report import write_results
from store import Store
from workers import in_processes

from esper.runtime.tolaria.data.quick_starts import charlm

NAME = "charlm"
GRID = (0.005, 0.01, 0.02)
SEEDS = (0, 1, 2)
WIDEST_STEP = 3
"""How often a grid is doubled or halved beyond its edge before that is told as incomplete."""
INTRODUCTION = (
    "Growth recovers from a network chosen too small; it need not beat one chosen right. Losses are nats a character "
    "at the end of training. The learning rate of every arm is the one with the lowest validation loss **on the first "
    "seed**, from a grid that goes on beyond its edge for as long as the edge is best; the other seeds are trained at "
    "that rate only, and the arms of equal FLOPs at the rate of the same network at equal steps.",
    "(a) the host of the quick start, whose perceptron has 2 units, without growth; (b) the same run with growth "
    "through the whole stack: the policy finds place and time; (c) the architecture that (b) ended with, seed by seed, "
    "there from step 0 with fresh first weights and a zero last operation; (d) the same GPT with a wider perceptron "
    "and as many parameters. “Equal FLOPs”: as many epochs as cost what (b) cost, twins and probes included, with the "
    "schedule over these epochs.",
)

Records = dict[float, dict[int, Any]]
Measure = Callable[[Sequence[tuple[float, int]]], Mapping[tuple[float, int], Any]]


def tuned(title: str, grid: Sequence[float], seeds: Sequence[int], measure: Measure) -> Arm:
    """An arm whose learning rate is chosen on the first seed. `measure` trains (learning rate, seed) pairs."""
    records: Records = {rate: {} for rate in grid}

    def add(places: Sequence[tuple[float, int]]) -> None:
        for (rate, seed), record in measure(places).items():
            records.setdefault(rate, {})[seed] = record

    add([(rate, seeds[0]) for rate in grid])
    for _ in range(WIDEST_STEP):
        best = best_rate(records)
        if best not in (min(records), max(records)):
            break
        add([(best * (2.0 if best == max(records) else 0.5), seeds[0])])
    best = best_rate(records)
    add([(best, seed) for seed in seeds[1:]])
    return Arm(title, dict(sorted(records.items())), best)


def perceptron_width_of_size(parameters: int) -> int:
    """The `hidden` of `charlm` whose number of parameters is nearest: that number is linear in the width."""
    one, two = (sum(p.numel() for p in charlm(hidden=hidden).model().parameters()) for hidden in (1, 2))
    return max(1, 1 + round((parameters - one) / (two - one)))


def measure_all(store: Store, grid: Sequence[float], seeds: Sequence[int]) -> list[Arm]:
    """All arms, (a) first and the grown one second."""

    def in_runs(places: Sequence[tuple[float, int]]) -> Mapping[tuple[float, int], Any]:
        work = {f"grown-{lr:g}-{seed}": GrownRun(NAME, seed, lr) for lr, seed in places}
        found = in_stack(store, work)
        return {place: found[key] for place, key in zip(places, work, strict=True)}

    def in_loops(name: str, **fields: Mapping[int, Any]) -> Measure:
        def measure(places: Sequence[tuple[float, int]]) -> Mapping[tuple[float, int], Any]:
            work = {
                f"{name}-{lr:g}-{seed}": StaticRun(NAME, seed, lr, **{key: by[seed] for key, by in fields.items()})
                for lr, seed in places
            }
            found = in_processes(store, work, train_static, processes=1)
            return {place: found[key] for place, key in zip(places, work, strict=True)}

        return measure

    grown = tuned("(b) grown", grid, seeds, in_runs)
    end = grown.records[grown.chosen]
    flops = {seed: end[seed]["flops"] for seed in seeds}
    of = f"of-{grown.chosen:g}"
    forms: dict[str, tuple[str, dict[str, Mapping[int, Any]]]] = {
        "host": ("(a) host, no growth", {}),
        f"final-{of}": (
            "(c) final architecture from the start",
            {"grown": {seed: end[seed]["growth"] for seed in seeds}},
        ),
        f"plain-{of}": (
            "(d) plain net of equal size",
            {"hidden": {seed: perceptron_width_of_size(end[seed]["parameters"]) for seed in seeds}},
        ),
    }
    steps = {
        name: tuned(f"{title}, equal steps", grid, seeds, in_loops(name, **fields))
        for name, (title, fields) in forms.items()
    }
    arms = [steps["host"], grown, *(arm for name, arm in steps.items() if name != "host")]
    for name, (title, fields) in forms.items():
        rate = steps[name].chosen
        found = in_loops(f"{name}-flops-{of}", **fields, flops=flops)([(rate, seed) for seed in seeds])
        records = {rate: {seed: record for (_, seed), record in found.items()}}
        arms.append(Arm(f"{title}, equal FLOPs", records, rate, tuned=False))
    return arms


def of_first_seed(arm: Arm, seed: int) -> Arm:
    """The arm with the runs that its learning rate was chosen on, and no others."""
    return Arm(arm.title, {rate: {seed: records[seed]} for rate, records in arm.records.items()}, arm.chosen)


def at_chosen_rate(arm: Arm) -> Arm:
    """The arm with the runs of its learning rate, which alone were made for every seed."""
    return Arm(arm.title, {arm.chosen: arm.records[arm.chosen]}, arm.chosen)


def bits_by_seed(arms: Sequence[Arm], seeds: Sequence[int]) -> Table:
    rows = [
        [arm.title, *(f"{arm.records[arm.chosen][seed]['test_loss'] / math.log(2.0):.3f}" for seed in seeds)]
        for arm in arms
    ]
    return Table("Test bits a character by seed", ["arm", *(f"seed {seed}" for seed in seeds)], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--grid", type=float, nargs="+", default=list(GRID))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    given = parser.parse_args()
    store = Store(NAME)
    arms = measure_all(store, sorted(given.grid), given.seeds)
    host, grown = arms[:2]
    adaptations = [[str(seed), told(record)] for seed, record in sorted(grown.records[grown.chosen].items())]
    shown = [at_chosen_rate(arm) for arm in arms]
    searched = rates([of_first_seed(arm, given.seeds[0]) for arm in arms if arm.tuned])
    tables = [
        summary(arms, host, grown),
        bits_by_seed(arms, given.seeds),
        by_seed(shown, "test", "Test loss / accuracy by seed"),
        by_seed(shown, "val", "Validation loss / accuracy by seed"),
        Table("Validation loss of the first seed at every learning rate", searched.columns, searched.rows),
        Table("What the grown runs did", ["seed", "adaptations"], adaptations),
    ]
    epochs = quick_start(NAME, seed=0).run.max_epochs
    text = charlm().data_digest
    introduction = [*edge_warnings(arms), *INTRODUCTION]
    introduction.append(f"Seeds {given.seeds}; {epochs} epochs at equal steps; text {text}; code {store.code}.")
    print(write_results(NAME, "Growth of a small GPT on text", introduction, tables, as_data(arms)).read_text())


if __name__ == "__main__":
    main()
