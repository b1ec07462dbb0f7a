"""The floors of the house, by what the source says: imports only go down, and never in a circle."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import esper

SOURCE = Path(next(iter(esper.__path__)))

FLOORS = {
    "cli": 0,
    "commands": 1,
    "worker": 2,
    "workflows": 3,
    "activities": 3,
    "runtime": 4,
    "contracts": 5,
    "errors": 6,
}
"""From the top. A module may import from its own floor and from the floors below it."""

DATA_FOR_ALL = "esper.activities.names"
"""Names and contracts only; workflows reach activities by it."""

LIBRARIES = ("temporalio", "sqlalchemy", "aiosqlite", "alembic", "boto3", "botocore", "torch_geometric")


@cache
def modules() -> dict[str, ast.Module]:
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(), str(path))
    return found


def imports(tree: ast.AST, *, lazy: bool = True) -> Iterator[str]:
    """The modules that are imported, as dotted names; without `lazy` only those that importing it imports."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif lazy or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from imports(node, lazy=lazy)


def own(name: str) -> str | None:
    """The module of ours that a dotted name lies in."""
    while name:
        if name in modules():
            return name
        name = name.rpartition(".")[0]
    return None


def own_imports(name: str, *, lazy: bool = True) -> set[str]:
    found = {own(target) for target in imports(modules()[name], lazy=lazy) if target.split(".")[0] == "esper"}
    return {target for target in found if target is not None} - {name}


def floor(name: str) -> int | None:
    parts = name.split(".")
    return FLOORS.get(parts[1]) if len(parts) > 1 else None


def test_every_module_has_a_floor() -> None:
    assert [name for name in modules() if floor(name) is None] == ["esper", "esper.__main__"]


def test_imports_only_go_down() -> None:
    wrong = [
        f"{name} imports {target}"
        for name in modules()
        for target in own_imports(name)
        if (here := floor(name)) is not None and (there := floor(target)) is not None and there < here
    ]
    assert wrong == []


def test_workflows_know_activities_by_name_only() -> None:
    wrong = [
        f"{name} imports {target}"
        for name in modules()
        for target in own_imports(name)
        if name.startswith("esper.workflows")
        and (target.startswith("esper.activities") and target not in (DATA_FOR_ALL, "esper.activities"))
    ]
    assert wrong == []


def test_there_are_no_circles() -> None:
    graph = {name: own_imports(name) for name in modules()}
    done: set[str] = set()

    def walk(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for target in sorted(graph[name]):
                walk(target, (*path, name))
            done.add(name)

    for name in graph:
        walk(name, ())
    assert done == set(graph)


@pytest.mark.parametrize("part", ["kasmina", "tezzeret"])
def test_the_library_needs_no_service(part: str) -> None:
    inside = [name for name in modules() if name.startswith(f"esper.runtime.{part}")]
    reached: set[str] = set()
    waiting = list(inside)
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += own_imports(name)
    wrong = [
        f"{name} imports {target}"
        for name in sorted(reached)
        for target in imports(modules()[name])
        if target.split(".")[0] in LIBRARIES
    ]
    assert len(inside) > 1
    assert wrong == []


def test_tezzeret_does_not_know_kasmina() -> None:
    assert not [
        name
        for name in modules()
        if name.startswith("esper.runtime.tezzeret")
        and any(target.startswith("esper.runtime.kasmina") for target in own_imports(name))
    ]


def test_contracts_and_errors_know_no_torch() -> None:
    wrong = [
        f"{name} imports {target}"
        for name in modules()
        if name.startswith("esper.contracts") or name == "esper.errors"
        for target in imports(modules()[name])
        if target.split(".")[0] not in ("esper", "pydantic", "pydantic_core", "typing", "enum", "annotated_types")
        and target.split(".")[0] in ("torch", "numpy", *LIBRARIES)
    ]
    assert wrong == []


def test_torch_geometric_belongs_to_tamiyo() -> None:
    users = [
        name
        for name in modules()
        if any(target.split(".")[0] == "torch_geometric" for target in imports(modules()[name]))
    ]
    assert [name for name in users if not name.startswith("esper.runtime.tamiyo.")] == []


def test_package_faces_are_empty() -> None:
    full = [
        str(path.relative_to(SOURCE))
        for path in SOURCE.rglob("__init__.py")
        if path.parent != SOURCE and path.read_text().strip()
    ]
    assert full == []


def test_no_file_hides_two_ideas() -> None:
    long = {
        str(path.relative_to(SOURCE)): lines
        for path in SOURCE.rglob("*.py")
        if (lines := len(path.read_text().splitlines())) > 500
    }
    assert long == {}


def test_no_folder_is_called_anything() -> None:
    vague = {"utils", "util", "helpers", "helper", "common", "misc"}
    assert [str(path) for path in SOURCE.rglob("*") if path.stem in vague] == []
