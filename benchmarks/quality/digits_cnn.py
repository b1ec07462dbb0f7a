"""Does growth help a convolutional network on `digits-cnn`? The host with its best learning rate of the grid, and both
arms at the quick start's own.

`python benchmarks/quality/digits_cnn.py` writes `benchmarks/results/digits_cnn.md` and `.json`. The grown arm gets no
grid here, which favours the host.
"""

import argparse

from arms import StaticRun
from comparison import GRID
from comparison import SEEDS
from comparison import Arm
from comparison import as_data
from comparison import best_rate
from comparison import by_seed
from comparison import edge_warnings
from comparison import rates
from comparison import summary
from digits import grid_of
from grown import told
from report import Table
from report import write_results
from store import Store
from untuned import grown_arm

NAME = "digits_cnn"
QUICK_START = "digits-cnn"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--grid", type=float, nargs="+", default=list(GRID))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    store = Store(NAME)
    grown = grown_arm(store, QUICK_START, given.seeds)
    grid = sorted({*given.grid, grown.chosen})
    runs = {(lr, seed): StaticRun(QUICK_START, seed, lr) for lr in grid for seed in given.seeds}
    records = grid_of(store, "host", runs, given.processes)
    host = Arm("host, no growth", records, best_rate(records))
    own = Arm("host at the quick start's own lr", records, grown.chosen, tuned=False)
    arms = [host, own, grown]
    adaptations = [[str(seed), told(record)] for seed, record in sorted(grown.records[grown.chosen].items())]
    tables = [
        summary(arms, host, grown),
        by_seed(arms, "test", "Test loss / accuracy by seed"),
        by_seed(arms, "val", "Validation loss / accuracy by seed"),
        rates([host]),
        Table("What the grown runs did", ["seed", "adaptations"], adaptations),
    ]
    introduction = [*edge_warnings(arms), f"Seeds {given.seeds}; code {store.code}."]
    print(write_results(NAME, "Growth of a convolutional network", introduction, tables, as_data(arms)).read_text())


if __name__ == "__main__":
    main()
