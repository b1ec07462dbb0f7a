"""A blueprint that somebody else wrote: as the documentation shows it, from an installed distribution, in the forge."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from site_world import site

from esper.contracts.assets import Hyperparameters
from esper.contracts.assets import SiteContract
from esper.runtime.tezzeret.blueprints.documents import parse_document
from esper.runtime.tezzeret.blueprints.registering import TABLE
from esper.runtime.tezzeret.blueprints.registry import PACKAGED
from esper.runtime.tezzeret.blueprints.registry import list_blueprints
from esper.runtime.tezzeret.blueprints.registry import register_blueprint
from esper.runtime.tezzeret.build import build_kernel
from esper.runtime.tezzeret.forge_child import build_in_child
from esper.runtime.tezzeret.forge_child import certify_in_child
from esper.runtime.tezzeret.initialisers import list_initialisers
from esper.runtime.tezzeret.ir import KernelGraph
from esper.runtime.tezzeret.ir import KernelNode
from esper.runtime.tezzeret.operations.table import OPERATIONS

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "blueprints.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", DOCUMENT, re.S)

MODULE = """
from esper.runtime.tezzeret.blueprints.registry import register_blueprint
from esper.runtime.tezzeret.ir import KernelGraph
from esper.runtime.tezzeret.ir import KernelNode

@register_blueprint("mine", description="Mine", formula="y += A x", host_kinds=("linear",), defaults={})
def mine(site, hyperparameters):
    attributes = {"out_features": site.output_shape[-1], "bias": False}
    node = KernelNode(id="up", op="linear", inputs=("x",), attributes=attributes)
    return KernelGraph(inputs={"x": site.input_shape}, nodes=(node,), outputs=("up",))
"""


@pytest.fixture
def users_own() -> Iterator[str]:
    @register_blueprint(
        "users_own", description="", formula="", host_kinds=("linear",), defaults={"rank": 2}, version=7
    )
    def made(site: SiteContract, hyperparameters: Hyperparameters) -> KernelGraph:
        def linear(name: str, source: str, size: int) -> KernelNode:
            return KernelNode(id=name, op="linear", inputs=(source,), attributes={"out_features": size, "bias": False})

        nodes = (linear("in", "x", hyperparameters["rank"]), linear("out", "in", site.output_shape[-1]))
        return KernelGraph(inputs={"x": site.input_shape}, nodes=nodes, outputs=("out",))

    yield "users_own"
    del TABLE["users_own"]


def in_a_process(code: str, *search_path: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(path) for path in search_path)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)


def installed(folder: Path, module: str) -> None:
    """What an installed distribution looks like that names a module of blueprints."""
    (folder / "my_blueprints.py").write_text(module)
    described = folder / "my_blueprints-1.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: my-blueprints\nVersion: 1.0\n")
    (described / "entry_points.txt").write_text("[esper.blueprints]\nmine = my_blueprints\n")


def test_the_example_of_the_documentation_grows_a_model():
    assert len(EXAMPLES) == 1
    checked = """
import torch
assert torch.equal(before, net(x)), "the graft changed the function"
assert {n for n, _ in net.named_parameters() if "kasmina" in n}
optimizer.zero_grad()
net(x).sum().backward()
optimizer.step()
assert not torch.equal(before, net(x))
print("GROWN")
"""
    done = in_a_process(EXAMPLES[0] + checked)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("GROWN\n")


def test_a_child_of_the_forge_builds_what_only_its_caller_knows(users_own, fork_server, draw_samples):
    contract = site("linear", (6,), (4,))
    samples = draw_samples(contract)
    limits = {"timeout_s": 120.0, "memory_mb": 4096}
    files = build_in_child(
        users_own, contract, {"rank": 3}, seed=5, samples=samples, max_parameters=1000, server=fork_server, **limits
    )
    assert files == build_kernel(users_own, contract, {"rank": 3}, seed=5, samples=samples, max_parameters=1000)
    certificate = certify_in_child(files, samples=samples, optimizer=None, compile=False, server=fork_server, **limits)
    assert certificate.passed


def test_an_installed_distribution_registers_its_blueprints(tmp_path):
    installed(tmp_path, MODULE)
    code = "from esper.runtime.tezzeret.blueprints.registry import *\n"
    listed = in_a_process(f"{code}print(*[b.name for b in list_blueprints()])", tmp_path)
    assert "mine" in listed.stdout.split(), listed.stderr
    assert "mine" not in in_a_process(f"{code}print(*[b.name for b in list_blueprints()])").stdout.split()


def test_an_installed_distribution_that_is_broken_is_named(tmp_path):
    installed(tmp_path, "import nowhere_to_be_found\n")
    code = "from esper.runtime.tezzeret.blueprints.registry import *\nlist_blueprints()"
    failed = in_a_process(code, tmp_path)
    assert "entry point 'mine' of 'esper.blueprints' (my_blueprints) cannot be loaded" in failed.stderr
    assert "nowhere_to_be_found" in failed.stderr


def test_documentation_and_registry_say_the_same():
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", DOCUMENT, re.M))
    packaged = {entry.blueprint.name: entry for entry in TABLE.values() if entry.function.__module__ in _packaged()}
    assert {blueprint.name for blueprint in list_blueprints()} == packaged.keys()
    for name, entry in packaged.items():
        assert f"`{entry.blueprint.formula}`" in rows[name], name
        for kind in entry.blueprint.host_kinds:
            assert ("all" if kind == "*" else f"`{kind}`") in rows[name], (name, kind)
        assert ("output" if entry.reads == "output" else "input") in rows[name], name
        assert re.search(r"arXiv \d{4}\.\d{5}|control", rows[name]), name
    assert set(list_initialisers()) <= rows.keys()
    assert [op for op in OPERATIONS if f"`{op}`" not in DOCUMENT] == []


def _packaged() -> set[str]:
    return {module.__name__ for module in PACKAGED}


def test_the_document_of_the_documentation_is_a_blueprint():
    (text,) = re.findall(r"```json\n(.*?)```", DOCUMENT, re.S)
    blueprint = parse_document(text.encode())
    assert (blueprint.name, blueprint.reads) == ("gated_branch", "input")
