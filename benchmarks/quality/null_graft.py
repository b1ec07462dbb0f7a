"""Does the judge remove what cannot help? Only `lowrank` may be grown, which adds no capacity to a full-rank host.

`python benchmarks/quality/null_graft.py` runs `digits` so for each seed through the whole stack and writes
`benchmarks/results/null_graft.md` and `.json`. A kept graft here is a mistake of the judge.
"""

import argparse

from comparison import SEEDS
from comparison import as_data
from comparison import by_seed
from comparison import summary
from grown import kept
from report import Table
from report import write_results
from store import Store
from untuned import grown_arm
from untuned import host_arm

NAME = "null_graft"
QUICK_START = "digits"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    store = Store(NAME)
    host = host_arm(store, QUICK_START, given.seeds, given.processes)
    grown = grown_arm(store, QUICK_START, given.seeds, {"tamiyo.blueprints": "[lowrank]"}, "lowrank grafts")
    rows, clean, judged, mistaken = [], 0, 0, 0
    for seed, record in sorted(grown.records[grown.chosen].items()):
        verdicts = [each for each in record["adaptations"] if each.get("judge")]
        stayed = kept(record)
        judged, mistaken, clean = judged + len(verdicts), mistaken + len(stayed), clean + (not stayed)
        for each in verdicts:
            rows.append([str(seed), f"`{each['site']}`", str(each["epoch"]), each["state"], str(each["reason"])])
    share = f"{judged - mistaken} of {judged} judged grafts were culled"
    verdict = f"In **{clean} of {len(given.seeds)}** seeds every null graft was culled; {share}."
    if judged == 0:
        verdict = "**INCOMPLETE: nothing was grafted, so nothing is shown.**"
    tables = [
        Table("Every verdict", ["seed", "site", "epoch", "state", "reason"], rows),
        summary([host, grown], host, grown),
        by_seed([host, grown], "test", "Test loss / accuracy by seed"),
    ]
    data = {"judged": judged, "kept": mistaken, "seeds_clean": clean, "arms": as_data([host, grown])}
    print(write_results(NAME, "Null grafts", [verdict, f"Code {store.code}."], tables, data).read_text())


if __name__ == "__main__":
    main()
