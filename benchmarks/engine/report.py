"""What a benchmark leaves behind: one table on the terminal, and the same as JSON and Markdown in a folder."""

import argparse
import json
import os
import platform
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parents[1] / "results"


@dataclass
class Report:
    """One benchmark's result. `rows` are what is shown; `data` is everything that was measured, for JSON only."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    data: list[dict[str, Any]] = field(default_factory=list)

    def publish(self, options: argparse.Namespace) -> None:
        """Print the table, and write `<name>.json` and `<name>.md`."""
        environment = describe_environment(options.date)
        print(self._table())
        for note in self.notes:
            print(note)
        folder: Path = options.results
        folder.mkdir(parents=True, exist_ok=True)
        given = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        given.pop("results")
        document = {
            "benchmark": self.name,
            "environment": environment,
            "options": given,
            "columns": self.columns,
            "rows": self.rows,
            "notes": self.notes,
            "data": self.data,
        }
        (folder / f"{self.name}.json").write_text(json.dumps(document, indent=1) + "\n")
        (folder / f"{self.name}.md").write_text(self._markdown(environment, given))
        print(f"written: {folder / self.name}.json and .md")

    def _table(self) -> str:
        lines = [self.columns, *self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.columns))]
        shown = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        return "\n".join([self.title, shown[0], "  ".join("-" * width for width in widths), *shown[1:]])

    def _markdown(self, environment: Mapping[str, Any], given: Mapping[str, Any]) -> str:
        around = ", ".join(f"{key} {value}" for key, value in environment.items())
        options = " ".join(f"{key}={value}" for key, value in given.items())
        return "\n".join(
            [
                f"# {self.title}",
                "",
                f"Environment: {around}.  ",
                f"Options: `{options}`.",
                "",
                _line(self.columns),
                _line(["---"] * len(self.columns)),
                *[_line(row) for row in self.rows],
                "",
                *[f"- {note}" for note in self.notes],
                "",
            ]
        )


def describe_environment(date: str) -> dict[str, Any]:
    """Where the numbers come from. The date is the caller's: it is an argument, so that nothing here reads a clock."""
    return {
        "date": date,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "load": round(os.getloadavg()[0], 2),
    }


def options_of(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--date", default="not given", help="goes into the result, as it is")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result (default: %(default)s)")
    return parser


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
