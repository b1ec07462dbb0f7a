"""What must never stand in the source: ways to run what a stranger wrote, and contracts that differ at replay."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import esper

SOURCE = Path(next(iter(esper.__path__)))

BANNED_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "yaml"}
BANNED_CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "torch.save", "torch.jit.load",
    "torch.export.load", "numpy.load", "np.load", "yaml.load", "subprocess.getoutput", "subprocess.getstatusoutput",
}  # fmt: skip
UNREPEATABLE = {
    "now",
    "utcnow",
    "today",
    "time",
    "monotonic",
    "uuid1",
    "uuid4",
    "random",
    "token_hex",
    "urandom",
    "randint",
}


def trees() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(SOURCE.rglob("*.py")):
        yield str(path.relative_to(SOURCE)), ast.parse(path.read_text())


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def sinks(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in BANNED_MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in BANNED_MODULES:
            yield f"from {node.module}"
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            if name in BANNED_CALLS:
                yield f"{name}()"
            yield from (
                f"{name}(shell=...)"
                for keyword in node.keywords
                if keyword.arg == "shell" and not (isinstance(keyword.value, ast.Constant) and not keyword.value.value)
            )


def test_nothing_unpickles_evaluates_or_asks_a_shell() -> None:
    assert [f"{name}: {sink}" for name, tree in trees() for sink in sinks(tree)] == []


@pytest.mark.parametrize(
    "code",
    ["import pickle", "from pickle import loads", "import torch\ntorch.load('x')", "eval('1')", "exec('1')",
     "import yaml", "import subprocess\nsubprocess.run('ls', shell=True)", "import os\nos.system('ls')"],
)  # fmt: skip
def test_the_search_finds_what_it_is_for(code: str) -> None:
    assert list(sinks(ast.parse(code)))


def unrepeatable_defaults(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.ClassDef):
            continue
        for statement in node.body:
            value = statement.value if isinstance(statement, ast.AnnAssign | ast.Assign) else None
            for inner in ast.walk(value) if value is not None else ():
                name = dotted(inner) if isinstance(inner, ast.Attribute | ast.Name) else ""
                if name.rpartition(".")[2] in UNREPEATABLE:
                    yield f"{node.name}: {name}"


def test_contracts_have_the_same_defaults_at_replay() -> None:
    found = [
        f"{name}: {default}"
        for name, tree in trees()
        if name.startswith("contracts/")
        for default in unrepeatable_defaults(tree)
    ]
    assert found == []


def test_the_search_for_clocks_finds_one() -> None:
    clock = "class A(Contract):\n    at: float = Field(default_factory=time.time)"
    identity = "class A(Contract):\n    id: str = Field(default_factory=lambda: str(uuid4()))"
    assert list(unrepeatable_defaults(ast.parse(clock)))
    assert list(unrepeatable_defaults(ast.parse(identity)))
    assert not list(unrepeatable_defaults(ast.parse("class A(Contract):\n    at: str = Field(default='now')")))


def test_contracts_are_strict_frozen_and_finite() -> None:
    from esper.contracts.base import Contract

    assert dict(Contract.model_config) == {"strict": True, "extra": "forbid", "allow_inf_nan": False, "frozen": True}
