"""A blueprint as data: submitted, listed, and grown by its name; whatever breaks a rule is refused and not stored."""

import asyncio
import copy
import json
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import esper
from esper.contracts.config import EsperConfig
from esper.errors import GrowthError
from esper.runtime.tezzeret.blueprints import sources
from esper.runtime.tezzeret.blueprints.documents import parse_document
from esper.runtime.tezzeret.blueprints.registering import TABLE
from esper.runtime.tezzeret.ir import MAX_JSON_BYTES
from esper.runtime.urza import migration
from esper.runtime.urza.submitted import submitted_blueprints

Cli = Callable[..., Any]

DOCUMENT: dict[str, Any] = {
    "name": "gated_branch",
    "description": "A gated branch beside a layer.",
    "formula": "y += B (silu(A x) * (C x))",
    "host_kinds": ["linear", "block"],
    "defaults": {"units": 16},
    "graph": {
        "nodes": [
            {"id": "gate", "op": "linear", "inputs": ["x"], "attributes": {"out_features": "$units", "bias": False}},
            {"id": "act", "op": "activation", "inputs": ["gate"], "attributes": {"name": "silu"}},
            {"id": "value", "op": "linear", "inputs": ["x"], "attributes": {"out_features": "$units", "bias": False}},
            {"id": "product", "op": "multiply", "inputs": ["act", "value"]},
            {"id": "up", "op": "linear", "inputs": ["product"], "attributes": {"out_features": "$out", "bias": False}},
        ],
        "outputs": ["up"],
    },
}


@pytest.fixture(autouse=True)
def nothing_is_remembered() -> Iterator[None]:
    before, asked = dict(TABLE), list(sources.SOURCES)
    yield
    TABLE.clear()
    TABLE.update(before)
    sources.SOURCES[:] = asked


@pytest.fixture
def database(home: Path) -> Path:
    home.mkdir()
    asyncio.run(migration.upgrade("default", default_file=home / "urza.db"))
    return home / "urza.db"


@pytest.fixture
def document(folder: Path) -> Path:
    file = folder / "gated.json"
    file.write_text(json.dumps(DOCUMENT))
    return file


def changed(**changes: Any) -> bytes:
    return json.dumps(copy.deepcopy(DOCUMENT) | changes).encode()


def with_nodes(*nodes: dict[str, Any], outputs: list[str] | None = None) -> bytes:
    return changed(graph={"nodes": list(nodes), "outputs": outputs or [nodes[-1]["id"]]})


def node(name: str, *inputs: str, op: str = "linear", **attributes: Any) -> dict[str, Any]:
    defaults = {"out_features": "$out", "bias": False} if op == "linear" else {}
    return {"id": name, "op": op, "inputs": list(inputs or ["x"]), "attributes": defaults | attributes}


def test_it_is_listed_shown_and_grown_by_name(cli: Cli, database: Path, document: Path) -> None:
    submitted = cli("blueprints", "submit", "gated.json")
    assert (submitted.code, submitted.out, submitted.err) == (0, "gated_branch version 1\n", "")
    assert "gated_branch" not in TABLE
    assert cli("blueprints", "show", "gated_branch", "--json").json["formula"] == DOCUMENT["formula"]
    assert "gated_branch" in [entry["name"] for entry in cli("blueprints", "list", "--json").json]
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(4, 6)
    before = net(x)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    esper.wrap(net, example_inputs=(x,))
    made = esper.graft(net, "0", "gated_branch", optimizer=optimizer, units=4)
    assert made.parameters == 6 * 4 * 2 + 4 * 8
    assert torch.equal(net(x), before)
    assert made.certificate is not None and made.certificate.passed
    with pytest.raises(GrowthError, match="the blueprint is for linear, block"):
        esper.graft(esper.wrap(nn.Sequential(nn.LayerNorm(6)), example_inputs=(x,)), "0", "gated_branch")


def test_a_configuration_and_a_person_may_name_it(cli: Cli, database: Path, document: Path) -> None:
    assert cli("config", "show", "--quick-start", "digits", "--set", "tamiyo.blueprints=[gated_branch]").code == 2
    assert cli("blueprints", "submit", "gated.json", "--json").json["graph"]["outputs"] == ["up"]
    shown = cli("config", "show", "--quick-start", "digits", "--set", "tamiyo.blueprints=[gated_branch]", "--json")
    assert EsperConfig.model_validate_json(shown.out).tamiyo.blueprints == ("gated_branch",)
    # The name is known; it is the run that is not.
    assert cli("adapt", "nothing", "--site", "a", "--blueprint", "gated_branch", "--json").error["code"] != "ESP-421"


def test_submitting_twice_is_submitting_once_and_other_content_needs_another_version(
    cli: Cli, database: Path, document: Path
) -> None:
    for _ in range(2):
        assert cli("blueprints", "submit", "gated.json").code == 0
    document.write_bytes(changed(description="other"))
    refused = cli("blueprints", "submit", "gated.json", "--json")
    assert (refused.code, refused.error["code"]) == (5, "ESP-504")
    document.write_bytes(changed(description="other", version=2))
    assert cli("blueprints", "submit", "gated.json").code == 0
    newest = submitted_blueprints("default", default_file=database)
    assert [(each.name, each.version) for each in newest] == [("gated_branch", 2), ("gated_branch", 1)]


@pytest.mark.parametrize(
    ("data", "code", "said"),
    [
        (b"[1]", "ESP-420", "object"),
        (b'{"name": "a"} x', "ESP-420", ""),
        (b"\xff\xfe{}", "ESP-420", ""),
        (b'{"name": "\\ud800"}', "ESP-420", ""),
        (b'{"name": 1, "name": 2}', "ESP-420", "name"),
        (b'{"a": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", "ESP-420", ""),
        (b'{"a": "' + b"x" * MAX_JSON_BYTES + b'"}', "ESP-420", ""),
        (changed(surplus=1), "ESP-419", "surplus"),
        (changed(name="../x"), "ESP-419", "name"),
        (changed(name="bottleneck"), "ESP-421", "is known already"),
        (changed(host_kinds=[]), "ESP-419", "host_kinds"),
        (changed(host_kinds=["linaer"]), "ESP-423", "unknown kind of site 'linaer'"),
        (changed(defaults={"units": [1]}), "ESP-419", "defaults.units"),
        (with_nodes(node("up", op="exec")), "ESP-410", "node 'up': unknown operation 'exec'"),
        (with_nodes(node("a", "b"), node("b", "a")), "ESP-411", ""),
        (with_nodes(node("up", "nowhere")), "ESP-412", "'nowhere'"),
        (with_nodes(node("a"), node("b"), outputs=["a", "b"]), "ESP-413", "2 outputs"),
        (with_nodes(node("up", out_features=3)), "ESP-414", "node 'up'"),
        (changed(graph={"nodes": [], "outputs": ["up"]}), "ESP-415", "0 nodes"),
        (with_nodes(*[node(f"n{index}") for index in range(100_000)])[: MAX_JSON_BYTES * 100], "ESP-420", ""),
        (with_nodes(*[node(f"n{index}") for index in range(17)]), "ESP-415", "17 nodes"),
        (with_nodes(node("up", out_features="$unit")), "ESP-417", "'$unit' names nothing"),
        (with_nodes(node("up", out_features=-1)), "ESP-417", "node 'up'"),
        (with_nodes(node("a"), node("a")), "ESP-418", "'a'"),
    ],
)
def test_what_breaks_a_rule_is_refused_by_its_own_code_and_not_stored(
    cli: Cli, database: Path, document: Path, data: bytes, code: str, said: str
) -> None:
    document.write_bytes(data)
    refused = cli("blueprints", "submit", "gated.json", "--json")
    assert (refused.code, refused.error["code"]) == (2, code)
    assert said in refused.error["message"]
    assert submitted_blueprints("default", default_file=database) == ()


def test_a_file_that_is_not_there_and_a_home_that_was_never_used(cli: Cli, home: Path, document: Path) -> None:
    missing = cli("blueprints", "submit", "nothing.json", "--json")
    assert (missing.code, missing.error["code"]) == (2, "ESP-201")
    unused = cli("blueprints", "submit", "gated.json", "--json")
    assert (unused.code, unused.error["code"]) == (3, "ESP-334")
    assert "db upgrade" in unused.error["hint"]
    assert not home.exists()


def test_a_template_that_reads_the_output(cli: Cli) -> None:
    scale = node("gate", op="gate", channel_axis="last")
    read = parse_document(
        changed(
            reads="output",
            host_kinds=["linear", "layer_norm", "attention", "block"],
            defaults={},
            graph={"nodes": [scale], "outputs": ["gate"]},
        )
    )
    assert read.reads == "output"
