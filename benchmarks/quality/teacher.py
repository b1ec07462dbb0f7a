"""Is a planted narrow layer found and repaired? The `teacher` quick start has one layer of width two: `layers.2`.

`python benchmarks/quality/teacher.py` runs it through the whole stack for each seed, beside the same run without
growth, and writes `benchmarks/results/teacher.md` and `.json`.
"""

import argparse

from comparison import SEEDS
from comparison import Arm
from comparison import as_data
from comparison import by_seed
from comparison import summary
from grown import kept
from grown import told
from report import Table
from report import write_results
from store import Store
from untuned import grown_arm
from untuned import host_arm

NAME = "teacher"
PLANTED = "layers.2"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    store = Store(NAME)
    host = host_arm(store, NAME, given.seeds, given.processes)
    grown = grown_arm(store, NAME, given.seeds)
    rows, found = [], 0
    for seed, record in sorted(grown.records[grown.chosen].items()):
        repaired = any(each["blueprint"] == "widen" and each["site"] == PLANTED for each in kept(record))
        found += repaired
        rows.append([str(seed), "yes" if repaired else "no", told(record)])
    verdict = f"The planted layer `{PLANTED}` was widened and the widening kept in **{found} of {len(rows)}** seeds."
    arms: list[Arm] = [host, grown]
    tables = [
        Table("What the runs did", ["seed", "widened and kept", "adaptations"], rows),
        summary(arms, host, grown),
        by_seed(arms, "test", "Test loss by seed"),
    ]
    introduction = [verdict, f"Both arms at the quick start's own learning rate. Code {store.code}."]
    data = {"planted": PLANTED, "repaired": found, "seeds": len(rows), "arms": as_data(arms)}
    print(write_results(NAME, "A planted narrow layer", introduction, tables, data).read_text())


if __name__ == "__main__":
    main()
