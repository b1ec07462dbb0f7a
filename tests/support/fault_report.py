"""A pytest plugin that notes how every test of a fault row ended, and writes the table: see `scripts/test-faults`."""

import platform
from collections.abc import Iterable
from datetime import UTC
from datetime import datetime

import pytest
import torch
from fault_table import NOT_RUN
from fault_table import PAGE
from fault_table import Result
from fault_table import page
from fault_table import read_results
from fault_table import write_results

_WORST = ("passed", "skipped", "failed")


class FaultReport:
    """Collects marks and outcomes. A run of some tests leaves what is known of the others; a run over the whole tree
    forgets those that are gone."""

    def __init__(self) -> None:
        self._found: dict[str, Result] = {}
        self._left_out: dict[str, Result] = {}
        self._whole = False

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._whole = not session.config.args or session.config.args == session.config.getini("testpaths")
        for item in session.items:
            rows = _rows(item)
            if rows:
                name = item.nodeid.partition("[")[0]
                known = self._found.get(name)
                slow = item.get_closest_marker("slow") is not None
                self._found[name] = Result(
                    test=name,
                    rows=rows if known is None else tuple(dict.fromkeys((*known.rows, *rows))),
                    tier="slow" if slow else "fast",
                    outcome="passed",
                    cases=1 if known is None else known.cases + 1,
                )

    def pytest_deselected(self, items: Iterable[pytest.Item]) -> None:
        """A test that was not chosen stands in the table too, with what is known of it."""
        for item in items:
            rows = _rows(item)
            if rows:
                name = item.nodeid.partition("[")[0]
                tier = "slow" if item.get_closest_marker("slow") is not None else "fast"
                self._left_out.setdefault(name, Result(test=name, rows=rows, tier=tier, outcome=NOT_RUN, cases=0))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        known = self._found.get(report.nodeid.partition("[")[0])
        if known is not None and _WORST.index(report.outcome) > _WORST.index(known.outcome):
            self._found[known.test] = Result(**{**vars(known), "outcome": report.outcome})

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if session.testscollected == 0 or session.config.option.collectonly or session.shouldstop:
            return
        known = {result.test: result for result in read_results()}
        seen = self._left_out | self._found
        if self._whole:
            known = {name: result for name, result in known.items() if name in seen}
        changed = {
            name: result
            for name, result in self._left_out.items()
            if name not in known or (known[name].rows, known[name].tier) != (result.rows, result.tier)
        }
        results = tuple((known | changed | self._found).values())
        ran_on = (
            f"{datetime.now(UTC):%Y-%m-%d}, Python {platform.python_version()}, torch {torch.__version__}, "
            f"{platform.system()} {platform.machine()}"
        )
        write_results(results, ran_on)
        PAGE.write_text(page(results, ran_on))


def _rows(item: pytest.Item) -> tuple[str, ...]:
    marks: Iterable[pytest.Mark] = item.iter_markers("fault")
    return tuple(dict.fromkeys(str(row) for mark in marks for row in mark.args))


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(FaultReport(), "fault-report")
