"""`docs/faults.md` is what its data says, and the data is of the tests that there are."""

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_table import NOT_INJECTED
from fault_table import PAGE
from fault_table import RESULTS
from fault_table import ROOT
from fault_table import ROWS
from fault_table import page
from fault_table import read_results

WANTED = {
    *(f"A{number}" for number in range(1, 16)),
    *(f"B{number}" for number in range(1, 7)),
    *(f"C{number}" for number in (1, 3, 4, 5, 6, 7, 8, 9)),
    *(f"D{number}" for number in range(1, 10)),
    *(f"E{number}" for number in range(1, 8)),
    *(f"F{number}" for number in range(1, 6)),
    *(f"G{number}" for number in range(1, 5)),
    *("H1", "H4", "H5", "J"),
    *(f"I{number}" for number in range(1, 13)),
}


def rows_of(node: ast.AST) -> set[str]:
    """The rows of every `pytest.mark.fault(...)` within."""
    return {
        str(argument.value)
        for call in ast.walk(node)
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.mark.fault"
        for argument in call.args
        if isinstance(argument, ast.Constant)
    }


def marked() -> Iterator[tuple[str, set[str]]]:
    """Every test of the tree that is marked with rows, as pytest names it."""
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        yield from marked_in(ast.parse(path.read_text()), path.relative_to(ROOT))


def marked_in(tree: ast.Module, path: Path) -> Iterator[tuple[str, set[str]]]:
    for_all = set().union(
        *(
            rows_of(node)
            for node in tree.body
            if isinstance(node, ast.Assign) and any(ast.unparse(target) == "pytestmark" for target in node.targets)
        )
    )
    yield from _marked_below(tree.body, path.as_posix(), for_all)


def _marked_below(body: list[ast.stmt], prefix: str, rows: set[str]) -> Iterator[tuple[str, set[str]]]:
    for node in body:
        if isinstance(node, ast.ClassDef):
            own = set().union(*map(rows_of, node.decorator_list))
            yield from _marked_below(node.body, f"{prefix}::{node.name}", rows | own)
            # A state machine is a test by its `TestCase`, which has no function to be seen here.
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
            found = rows.union(*map(rows_of, node.decorator_list))
            if found:
                yield f"{prefix}::{node.name}", found


def test_the_search_finds_marks_wherever_they_stand() -> None:
    code = (
        'pytestmark = [pytest.mark.fault("A1")]\n@pytest.mark.fault("B2", "I3")\ndef test_a(): ...\ndef test_b(): ...'
    )
    found = dict(marked_in(ast.parse(code), Path("t.py")))
    assert found == {"t.py::test_a": {"A1", "B2", "I3"}, "t.py::test_b": {"A1"}}


def test_the_table_knows_every_row_of_the_matrix() -> None:
    assert set(ROWS) == WANTED
    assert set(NOT_INJECTED) <= set(ROWS)


def test_marks_name_rows_that_there_are() -> None:
    assert {f"{test}: {row}" for test, rows in marked() for row in rows - set(ROWS)} == set()


def test_the_page_is_what_the_data_says() -> None:
    assert PAGE.read_text() == page(read_results(), json.loads(RESULTS.read_text())["ran_on"])


def test_the_data_is_of_the_tests_that_there_are() -> None:
    known = {result.test: set(result.rows) for result in read_results()}
    # Single cases may be of further rows.
    stale = sorted(test for test, rows in marked() if not rows <= known.get(test, set()))
    assert stale == [], "run scripts/test-faults with these"
    files = {test.partition("::")[0] for test in known}
    assert [file for file in sorted(files) if not (ROOT / file).exists()] == []


@pytest.mark.parametrize("row", sorted(WANTED))
def test_every_row_has_a_test_that_passed_or_a_reason(row: str) -> None:
    outcomes = [result.outcome for result in read_results() if row in result.rows]
    assert "failed" not in outcomes
    assert "passed" in outcomes or row in NOT_INJECTED
