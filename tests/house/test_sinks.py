"""What must never stand in the source: ways to run what a stranger wrote, and contracts that differ at replay."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import esper

SOURCE = Path(next(iter(esper.__path__)))

BANNED_MODULES = {
    "pickle", "cPickle", "_pickle", "pickletools", "dill", "cloudpickle", "marshal", "shelve", "joblib", "yaml",
    "runpy",
    # Pickle over a socket:
    "multiprocessing.managers", "multiprocessing.connection", "torch.distributed.rpc",
    # Files that are programs: archives with pickles, pickled metadata, machine code.
    "torch.package", "torch.distributed.checkpoint", "torch.hub", "torch.utils.cpp_extension",
}  # fmt: skip
BANNED_CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "torch.load", "torch.save", "torch.serialization.load", "torch.serialization.save", "torch.jit.load",
    "torch.hub.load",
    "torch.export.load", "torch.export.pt2_archive.load_pt2", "torch.compiler.load_cache_artifacts",
    "torch.package.PackageImporter", "torch.distributed.checkpoint.load",
    "torch.distributed.checkpoint.FileSystemReader",
    "torch._inductor.aoti_load_package", "torch.ops.load_library", "torch.classes.load_library",
    "numpy.load", "numpy.fromregex", "numpy.memmap", "yaml.load", "multiprocessing.Manager", "ctypes.CDLL",
    "ctypes.PyDLL",
    "ctypes.cdll.LoadLibrary", "code.InteractiveInterpreter",
}  # fmt: skip
ARCHIVES = ("extractall", "extract")
"""Methods that write what an archive names, unless `filter="data"` holds them back."""
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


def banned(module: str) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in BANNED_MODULES)


def meanings(tree: ast.AST) -> dict[str, str]:
    """What a name stands for by the imports: `t` for torch after `import torch as t`."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.asname: alias.name for alias in node.names if alias.asname is not None}
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def sinks(tree: ast.AST) -> Iterator[str]:
    known = meanings(tree)
    archives = any(name.split(".")[0] == "tarfile" for name in (*known.values(), *imported(tree)))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if banned(alias.name))
        elif isinstance(node, ast.ImportFrom):
            yield from (
                f"from {node.module} import {alias.name}"
                for alias in node.names
                if banned(f"{node.module}.{alias.name}") or f"{node.module}.{alias.name}" in BANNED_CALLS
            )
        elif isinstance(node, ast.Call):
            first, dot, rest = dotted(node.func).partition(".")
            name = f"{known.get(first, first)}{dot}{rest}"
            if name in BANNED_CALLS:
                yield f"{name}()"
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            shell = given.get("shell")
            if shell is not None and not (isinstance(shell, ast.Constant) and not shell.value):
                yield f"{name}(shell=...)"
            allowed = given.get("allow_pickle")
            if allowed is not None and not (isinstance(allowed, ast.Constant) and allowed.value is False):
                yield f"{name}(allow_pickle=...)"
            filtered = given.get("filter")
            safe = isinstance(filtered, ast.Constant) and filtered.value == "data"
            if archives and name.rpartition(".")[2] in ARCHIVES and not safe:
                yield f"{name}() without filter='data'"


def imported(tree: ast.AST) -> set[str]:
    return {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}


@pytest.mark.fault("I12")
def test_nothing_unpickles_evaluates_or_asks_a_shell() -> None:
    assert [f"{name}: {sink}" for name, tree in trees() for sink in sinks(tree)] == []


@pytest.mark.parametrize(
    "code",
    ["import pickle", "from pickle import loads", "import torch\ntorch.load('x')", "eval('1')", "exec('1')",
     "import yaml", "import subprocess\nsubprocess.run('ls', shell=True)", "import os\nos.system('ls')",
     "import torch as t\nt.load('x', weights_only=True)", "from torch import load",
     "from torch.serialization import load",
     "import torch\ntorch.jit.load('x')", "from torch.jit import load as read", "import torch\ntorch.export.load('x')",
     "import torch.package", "from torch import package", "from torch.package import PackageImporter",
     "import torch.distributed.checkpoint as dcp", "from torch.distributed import checkpoint", "from torch import hub",
     "import torch\ntorch.compiler.load_cache_artifacts(b'')", "import torch\ntorch.ops.load_library('x.so')",
     "import torch\ntorch._inductor.aoti_load_package('x')", "import numpy as np\nnp.load('x')",
     "import numpy\nnumpy.load('x', allow_pickle=True)", "from numpy import load",
     "import anything\nanything(allow_pickle=True)",
     "import dill", "import cloudpickle", "from joblib import load", "import shelve", "import marshal", "import runpy",
     "from multiprocessing.managers import BaseManager", "from multiprocessing import managers",
     "import multiprocessing\nmultiprocessing.Manager()", "from multiprocessing.connection import Listener",
     "import tarfile\ntarfile.open('x').extractall('y')",
     "import tarfile\ntarfile.open('x').extractall('y', filter='fully_trusted')",
     "from tarfile import TarFile\nTarFile('x').extract('a')", "import ctypes\nctypes.CDLL('x.so')"],
)  # fmt: skip
def test_the_search_finds_what_it_is_for(code: str) -> None:
    assert list(sinks(ast.parse(code)))


@pytest.mark.parametrize(
    "code",
    ["import tarfile\ntarfile.open('x').extractall('y', filter='data')", "import re\nre.compile('x').extract",
     "import numpy as np\nnp.frombuffer(b'')", "import safetensors.torch\nsafetensors.torch.load(b'')",
     "import subprocess\nsubprocess.run(['ls'], shell=False)", "from multiprocessing import get_context",
     "import json\njson.load(file)", "from safetensors.torch import load_file"],
)  # fmt: skip
def test_the_search_leaves_alone_what_runs_nothing(code: str) -> None:
    assert not list(sinks(ast.parse(code)))


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
