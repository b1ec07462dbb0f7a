"""Tables of a benchmark as Markdown for readers and JSON for programs, and the statistics that stand in them."""

import json
import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from statistics import stdev
from typing import Any

import torch
from scipy import stats

RESULTS = Path(__file__).resolve().parent.parent / "results"


@dataclass(frozen=True)
class Table:
    """Cells are shown as they are; `notes` are paragraphs below the table."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Paired:
    """A paired difference: its mean, half of its 95 % interval (Student's t) and how many are below zero."""

    mean: float
    half: float
    below: int
    count: int

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ± {self.half:.3f} ({self.below}/{self.count})"


def paired(these: Sequence[float], those: Sequence[float]) -> Paired:
    """These minus those, pair by pair."""
    differences = [a - b for a, b in zip(these, those, strict=True)]
    count = len(differences)
    half = math.nan
    if count > 1:
        half = float(stats.t.ppf(0.975, count - 1)) * stdev(differences) / math.sqrt(count)
    return Paired(fmean(differences), half, sum(difference < 0 for difference in differences), count)


def write_results(name: str, title: str, introduction: Sequence[str], tables: Sequence[Table], data: Any) -> Path:
    """`results/<name>.md` and `results/<name>.json`; returns the first."""
    lines = [f"# {title}", "", *(line for text in introduction for line in (text, ""))]
    for table in tables:
        lines += [f"## {table.title}", "", _row(table.columns), _row(["---"] * len(table.columns))]
        lines += [*map(_row, table.rows), "", *(line for note in table.notes for line in (note, ""))]
    lines += [
        f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}, torch {torch.__version__}"
    ]
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    path.with_suffix(".json").write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return path


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
