"""Arms beside each other: the learning rate of each from one grid, means, paired differences, and all rows."""

import math
import sys
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from report import Table
from report import paired

GRID = (0.0015, 0.003, 0.006, 0.012, 0.024, 0.048, 0.096)
SEEDS = (0, 1, 2, 3, 4)

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Arm:
    """`records[lr][seed]`: what was measured. `chosen` is the learning rate that the table shows."""

    title: str
    records: Mapping[float, Mapping[int, Record]]
    chosen: float
    tuned: bool = True

    def column(self, name: str) -> list[float]:
        return [float(record[name]) for _, record in sorted(self.records[self.chosen].items())]

    @property
    def at_edge(self) -> bool:
        return self.tuned and self.chosen in (min(self.records), max(self.records))


def best_rate(records: Mapping[float, Mapping[int, Record]]) -> float:
    """The learning rate with the lowest mean validation loss over the seeds; one that diverged is never it."""

    def mean_loss(rate: float) -> float:
        losses = [float(record["val_loss"]) for record in records[rate].values()]
        return fmean(losses) if all(map(math.isfinite, losses)) else math.inf

    return min(records, key=mean_loss)


def edge_warnings(arms: Sequence[Arm]) -> list[str]:
    """One loud sentence for each arm whose best learning rate is the first or last of the grid; also on stderr."""
    found = [
        f"**INCOMPLETE: the best learning rate of “{arm.title}” is {arm.chosen:g}, at the edge of the grid "
        f"{min(arm.records):g}..{max(arm.records):g}. A better one may lie beyond it.**"
        for arm in arms
        if arm.at_edge
    ]
    for sentence in found:
        print(sentence, file=sys.stderr)
    return found


def summary(arms: Sequence[Arm], reference: Arm, grown: Arm) -> Table:
    """One row for each arm: means over the seeds, and paired differences to the reference and to the grown arm."""
    rows = []
    for arm in arms:
        flops = fmean(arm.column("flops")) / fmean(grown.column("flops"))
        rows.append(
            [
                arm.title,
                f"{arm.chosen:g}{' (EDGE)' if arm.at_edge else '' if arm.tuned else ' (not tuned)'}",
                _spread(arm.column("parameters")),
                _spread(arm.column("epochs")),
                f"{flops:.2f}",
                f"{fmean(arm.column('val_loss')):.3f}",
                _percent(arm, "val"),
                f"{fmean(arm.column('test_loss')):.3f}",
                _percent(arm, "test"),
                *(_difference(arm, reference, f"{part}_loss") for part in ("val", "test")),
                _difference(arm, grown, "test_loss"),
            ]
        )
    columns = ["arm", "lr", "parameters", "epochs", "FLOPs / grown", "val loss", "val acc", "test loss", "test acc"]
    columns += ["Δ val loss to host", "Δ test loss to host", "Δ test loss to grown"]
    notes = [
        "Δ: paired by seed, mean ± half of the 95 % interval (Student's t), in brackets how many seeds are lower "
        "(better). FLOPs of the grown arm count training, probes, birth checks and twins.",
    ]
    return Table("Arms", columns, rows, notes)


def by_seed(arms: Sequence[Arm], part: str, title: str) -> Table:
    """`loss / accuracy` of every seed (only the loss where the task has no accuracy)."""
    seeds = sorted(next(iter(arms[0].records.values())))
    rows = [[arm.title, *(_cell(arm.records[arm.chosen][seed], part) for seed in seeds)] for arm in arms]
    return Table(title, ["arm", *(f"seed {seed}" for seed in seeds)], rows)


def rates(arms: Sequence[Arm]) -> Table:
    """Mean validation loss at every learning rate; the chosen one in bold."""
    grid = sorted({rate for arm in arms for rate in arm.records})
    rows = []
    for arm in arms:
        cells = []
        for rate in grid:
            records = arm.records.get(rate)
            text = "" if records is None else f"{fmean(float(each['val_loss']) for each in records.values()):.3f}"
            cells.append(f"**{text}**" if rate == arm.chosen else text)
        rows.append([arm.title, *cells])
    return Table("Mean validation loss at every learning rate", ["arm", *(f"{rate:g}" for rate in grid)], rows)


def as_data(arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """Everything that was measured, for the JSON file."""
    return [
        {
            "arm": arm.title,
            "lr": arm.chosen,
            "tuned": arm.tuned,
            "at_edge": arm.at_edge,
            "records": {f"{rate:g}": _by_seed(records) for rate, records in arm.records.items()},
        }
        for arm in arms
    ]


def _by_seed(records: Mapping[int, Record]) -> dict[str, dict[str, Any]]:
    return {str(seed): {name: v for name, v in each.items() if name != "growth"} for seed, each in records.items()}


def _difference(arm: Arm, other: Arm, name: str) -> str:
    return "" if arm is other else str(paired(arm.column(name), other.column(name)))


def _percent(arm: Arm, part: str) -> str:
    if f"{part}_accuracy" not in next(iter(arm.records[arm.chosen].values())):
        return ""
    return f"{fmean(arm.column(f'{part}_accuracy')):.1%}"


def _spread(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g}-{high:g}"


def _cell(record: Record, part: str) -> str:
    accuracy = record.get(f"{part}_accuracy")
    loss = f"{float(record[f'{part}_loss']):.3f}"
    return loss if accuracy is None else f"{loss} / {float(accuracy):.1%}"
