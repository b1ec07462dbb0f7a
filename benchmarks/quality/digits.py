"""Does growth help on `digits`, and beside what? Every arm with its own learning rate from one grid, every row shown.

`python benchmarks/quality/digits.py` measures what is missing (about 25 minutes on two idle cores; an interrupted
benchmark goes on where it stood) and writes `benchmarks/results/digits.md` and `.json`.
"""

import argparse
from collections.abc import Mapping
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from arms import StaticRun
from arms import hidden_width_of_size
from arms import quick_start
from arms import train_static
from comparison import GRID
from comparison import SEEDS
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

NAME = "digits"
INTRODUCTION = (
    "Growth recovers from a network chosen too small; it need not beat one chosen right. Means over the seeds at the "
    "end of training; the learning rate of every arm is the one of the grid with the lowest mean validation loss.",
    "(a) the host of the quick start (64-10-10-10) without growth; (b) the same run with growth through the whole "
    "stack: the policy finds place and time; (c) the architecture that (b) ended with, seed by seed, there from step 0 "
    "with fresh first weights and a zero last operation; (d) a plain network 64-h-h-10 with as many parameters. “Equal "
    "FLOPs”: as many epochs as cost what (b) cost, twins and probes included, with the schedule over these epochs.",
)


def grid_of(store: Store, name: str, runs: Mapping[tuple[float, int], StaticRun], processes: int) -> dict[float, Any]:
    """`records[lr][seed]` of one static arm."""
    keys = {f"{name}-{lr:g}-{seed}": (lr, seed) for lr, seed in runs}
    found = in_processes(store, {key: runs[place] for key, place in keys.items()}, train_static, processes=processes)
    return nested({place: found[key] for key, place in keys.items()})


def nested(records: Mapping[tuple[float, int], Any]) -> dict[float, Any]:
    ordered: dict[float, Any] = {}
    for (lr, seed), record in sorted(records.items()):
        ordered.setdefault(lr, {})[seed] = record
    return ordered


def measure(store: Store, grid: Sequence[float], seeds: Sequence[int], processes: int) -> list[Arm]:
    """All arms, (a) first and the grown one second."""
    places = [(lr, seed) for lr in grid for seed in seeds]
    with ThreadPoolExecutor(1) as pool:
        hosts = pool.submit(
            grid_of, store, "host", {(lr, seed): StaticRun(NAME, seed, lr) for lr, seed in places}, processes - 1 or 1
        )
        runs = {f"grown-{lr:g}-{seed}": (lr, seed) for lr, seed in places}
        found = in_stack(store, {key: GrownRun(NAME, seed, lr) for key, (lr, seed) in runs.items()})
        host_records = hosts.result()
    grown_records = nested({place: found[key] for key, place in runs.items()})
    rate = best_rate(grown_records)
    own_rate = quick_start(NAME, seed=0).optimizer.lr
    end = grown_records[rate]

    def static(title: str, name: str, **fields: Mapping[int, Any]) -> Arm:
        # The growth that these arms copy is that of the chosen rate, so it is part of what they are called by.
        chosen = {(lr, s): StaticRun(NAME, s, lr, **{key: by[s] for key, by in fields.items()}) for lr, s in places}
        records = grid_of(store, f"{name}-of-{rate:g}", chosen, processes)
        return Arm(title, records, best_rate(records))

    growth = {seed: end[seed]["growth"] for seed in seeds}
    flops = {seed: end[seed]["flops"] for seed in seeds}
    hidden = {seed: hidden_width_of_size(end[seed]["parameters"]) for seed in seeds}
    arms = [
        Arm("(a) host, no growth, equal steps", host_records, best_rate(host_records)),
        Arm("(b) grown", grown_records, rate),
        static("(c) final architecture from the start, equal steps", "final-steps", grown=growth),
        static("(c) final architecture from the start, equal FLOPs", "final-flops", grown=growth, flops=flops),
        static("(d) plain net of equal size, equal steps", "plain-steps", hidden=hidden),
        static("(d) plain net of equal size, equal FLOPs", "plain-flops", hidden=hidden, flops=flops),
        static("(a) host, no growth, equal FLOPs", "host-flops", flops=flops),
    ]
    if own_rate in grid:
        arms.append(Arm("(a) at the quick start's own lr", host_records, own_rate, tuned=False))
        arms.append(Arm("(b) at the quick start's own lr", grown_records, own_rate, tuned=False))
    return arms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--grid", type=float, nargs="+", default=list(GRID))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--name", default=NAME, help="of the files in benchmarks/results")
    given = parser.parse_args()
    store = Store(NAME)
    arms = measure(store, given.grid, given.seeds, given.processes)
    host, grown = arms[:2]
    adaptations = [[str(seed), told(record)] for seed, record in sorted(grown.records[grown.chosen].items())]
    tables = [
        summary(arms, host, grown),
        by_seed(arms, "test", "Test loss / accuracy by seed"),
        by_seed(arms, "val", "Validation loss / accuracy by seed"),
        rates([arm for arm in arms if arm.tuned]),
        Table("What the grown runs did", ["seed", "adaptations"], adaptations),
    ]
    introduction = [*edge_warnings(arms), *INTRODUCTION, f"Seeds {given.seeds}; code {store.code}."]
    print(write_results(given.name, "Growth on handwritten digits", introduction, tables, as_data(arms)).read_text())


if __name__ == "__main__":
    main()
