"""Which layers are a pair between which units can be added: by lineage, and by tracing where that can see it."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch import nn
from torch.nn import functional

import esper
from esper.contracts.operational import SiteNode
from esper.runtime.kasmina.growing.pairs import traced_pairs
from esper.runtime.kasmina.lineage import layer_graph
from esper.runtime.kasmina.wrapping.morphable import model_state


class Pairs(nn.Module):
    """Between `a` and `b` whatever the test puts there."""

    def __init__(
        self, between: Any, a: nn.Module | None = None, b: nn.Module | None = None, **parts: nn.Module
    ) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4) if a is None else a
        self.b = nn.Linear(4, 2) if b is None else b
        for name, part in parts.items():
            self.add_module(name, part)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.between(self, h)


def first_node(model: nn.Module, x: Tensor, targets: Any = "auto") -> tuple[SiteNode, dict[str, str]]:
    esper.wrap(model, targets)
    graph = layer_graph(model, lambda: model(x))
    return next(n for n in graph.nodes if n.contract.site == "a"), model_state(model).pair_refusals


LINEAR: list[tuple[Any, str | None]] = [
    (lambda m, h: m.b(functional.relu(h)), "relu"),
    (lambda m, h: m.b(functional.gelu(h)), "gelu"),
    (lambda m, h: m.b(h.tanh()), "tanh"),
    (lambda m, h: m.b(functional.silu(h)), "silu"),
    (lambda m, h: m.b(torch.sigmoid(h)), "sigmoid"),
    (lambda m, h: m.b(functional.relu_(h)), "relu"),
    (lambda m, h: m.b(functional.dropout(functional.relu(h), 0.5, training=True)), "relu"),
    (lambda m, h: m.b(functional.gelu(h, approximate="tanh")), None),
    (lambda m, h: m.b(h), None),
    (lambda m, h: m.b(functional.relu(torch.tanh(h))), None),
    (lambda m, h: m.b(functional.leaky_relu(h)), None),
    (lambda m, h: m.b(functional.relu(h) * 2), None),
    (lambda m, h: m.b(functional.softmax(h, dim=1)), None),
    (lambda m, h: m.b(functional.relu(functional.layer_norm(h, (4,)))), None),
    (lambda m, h: m.b(functional.relu(h)) + h.sum(), None),
    (lambda m, h: m.b(functional.relu(h)) + functional.relu(h).sum(), None),
    (lambda m, h: (m.b(functional.relu(h)), h), None),
    (lambda m, h: {"out": m.b(a := functional.relu(h)), "hidden": [a]}, None),
    (lambda m, h: m.b(functional.relu(h)) + m.b(functional.tanh(h)), None),
    (lambda m, h: m.b(functional.relu(h)) + m.b(functional.relu(m.a(h))), None),
]
UNSEEN: list[Any] = [
    lambda m, h: m.b(functional.relu(h)) + h.detach().sum(),
    lambda m, h: m.b(functional.relu(h)) * h.sum().item(),
    lambda m, h: m.b(functional.relu(h)) if h.sum() > -1e9 else h,
    lambda m, h: m.b(functional.relu(h)) + h.argmax(),
    lambda m, h: m.b(functional.relu(h)) + h.data.mean(),
    lambda m, h: m.b(functional.relu(h)) + torch.from_numpy(h.detach().numpy()).sum(),
    lambda m, h: m.b(functional.relu(h)) + (h > 0).sum(),
    lambda m, h: m.b(functional.relu(h)) + len(h.tolist()),
]
"""Readers of the hidden units that no gradient flows through: the graph of autograd does not show them."""


@pytest.mark.parametrize(("between", "activation"), LINEAR, ids=range(len(LINEAR)))
def test_a_pair_is_what_one_activation_alone_joins(between: Any, activation: str | None) -> None:
    node, refusals = first_node(Pairs(between), torch.randn(5, 4))
    assert node.widen_output == (None if activation is None else "b")
    assert node.contract.attributes.get("pair_activation") == activation
    assert ("a" in refusals) == (activation is None)
    if activation is not None:
        assert node.contract.attributes["pair_between"] == [{"op": "activation", "name": activation}]


def test_control_flow_is_seen_by_lineage_and_not_by_tracing() -> None:
    def between(m: Any, h: Tensor) -> Tensor:
        return m.b(functional.relu(h)) if h.shape[0] > 1 and h.dim() == 2 else h

    assert first_node(Pairs(between), torch.randn(5, 4))[0].widen_output == "b"
    blind = esper.wrap(Pairs(between))
    assert traced_pairs(blind).pairs == {}
    blind(torch.randn(5, 4))
    with pytest.raises(esper.GrowthError, match="wrap it with example_inputs="):
        esper.graft(blind, "a", "widen")


@pytest.mark.parametrize("between", UNSEEN, ids=range(len(UNSEEN)))
def test_units_that_something_reads_outside_of_autograd_are_no_pair(between: Any) -> None:
    node, refusals = first_node(Pairs(between), torch.randn(5, 4))
    assert node.widen_output is None
    assert "read in more than one place" in refusals["a"]


def test_tracing_agrees_where_it_can_see() -> None:
    for between, activation in LINEAR:
        model = esper.wrap(Pairs(between))
        pairs = traced_pairs(model).pairs
        expected = {} if activation is None else {"a": ("b", activation)}
        assert {first: (pair.second, pair.activation) for first, pair in pairs.items()} == expected
    for between in UNSEEN:
        assert traced_pairs(esper.wrap(Pairs(between))).pairs == {}
    modules = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4), nn.GELU("tanh"), nn.Linear(4, 2))
    found = traced_pairs(esper.wrap(modules))
    assert [(first, pair.second) for first, pair in found.pairs.items()] == [("0", "2")]
    assert "tanh approximation" in found.refusals["2"]


def conv(inputs: int = 4, outputs: int = 4, **settings: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **settings)


BATCH_NORM = {"op": "batch_norm", "eps": 1e-5, "momentum": 0.1, "affine": True, "track_running_stats": True}
RELU = {"op": "activation", "name": "relu"}
MAX_POOL = {
    "op": "max_pool2d",
    "kernel_size": [2, 2],
    "stride": [2, 2],
    "padding": [0, 0],
    "dilation": [1, 1],
    "ceil_mode": False,
}
AVG_POOL = {
    "op": "avg_pool2d",
    "kernel_size": [3, 3],
    "stride": [1, 1],
    "padding": [1, 1],
    "ceil_mode": True,
    "count_include_pad": False,
}
CONVOLUTIONS: list[tuple[Any, list[dict[str, Any]], list[str]]] = [
    (lambda m, h: m.b(functional.relu(h)), [RELU], []),
    (lambda m, h: m.b(functional.relu(m.norm(h))), [BATCH_NORM, RELU], ["norm"]),
    (lambda m, h: m.b(m.norm(h).relu_()), [BATCH_NORM, RELU], ["norm"]),
    (lambda m, h: m.b(m.norm(functional.relu(h))), [RELU, BATCH_NORM], ["norm"]),
    (
        lambda m, h: m.b(functional.max_pool2d(functional.relu(m.norm(h)), 2)),
        [BATCH_NORM, RELU, MAX_POOL],
        ["norm"],
    ),
    (lambda m, h: m.b(torch.relu(functional.max_pool2d(h, 2, stride=[2]))), [MAX_POOL, RELU], []),
    (
        lambda m, h: m.b(functional.avg_pool2d(torch.relu(h), 3, 1, 1, True, count_include_pad=False)),
        [RELU, AVG_POOL],
        [],
    ),
    (lambda m, h: m.b(functional.dropout2d(functional.relu(m.norm(h)), 0.5)), [BATCH_NORM, RELU], ["norm"]),
]


@pytest.mark.parametrize(("between", "parts", "norms"), CONVOLUTIONS, ids=range(len(CONVOLUTIONS)))
@pytest.mark.parametrize("targets", ["auto", [nn.Conv2d]], ids=["norms are sites", "norms are none"])
def test_what_stands_between_two_convolutions_is_told_in_order(
    between: Any, parts: list[dict[str, Any]], norms: list[str], targets: Any
) -> None:
    x = torch.randn(2, 4, 8, 8)
    make = lambda: Pairs(between, conv(), conv(4, 3), norm=nn.BatchNorm2d(4))  # noqa: E731
    node, _ = first_node(make(), x, targets)
    assert node.widen_output == "b"
    assert node.contract.attributes["pair_between"] == parts
    assert node.contract.attributes["pair_norms"] == norms
    model = esper.wrap(make(), targets)
    model(x)
    traced = traced_pairs(model).pairs["a"]
    assert [dict(part) for part in traced.between] == parts
    assert list(traced.norms) == norms


@pytest.mark.parametrize(
    ("between", "parts", "told"),
    [
        (lambda m, h: m.b(torch.relu(m.norm(h))), {"norm": nn.GroupNorm(2, 4)}, "a GroupNorm, which couples"),
        (lambda m, h: m.b(torch.relu(m.norm(h))), {"norm": nn.LayerNorm(8)}, "a LayerNorm, which couples"),
        (lambda m, h: m.b(torch.relu(m.norm(h))), {"norm": nn.InstanceNorm2d(4)}, "'instance_norm'"),
        (lambda m, h: m.b(m.norm(h)), {"norm": nn.BatchNorm2d(4)}, "no activation"),
        (lambda m, h: m.b(torch.relu(h)), {"b": conv(groups=2)}, "groups"),
        (lambda m, h: m.b(torch.relu(h)), {"a": conv(groups=4)}, "groups"),
        (lambda m, h: m.b(torch.relu(h).flatten(1)), {"b": nn.Linear(256, 2)}, "is no Conv2d"),
    ],
)
def test_what_couples_the_units_is_refused_by_name(between: Any, parts: dict[str, Any], told: str) -> None:
    model = Pairs(between, parts.pop("a", conv()), parts.pop("b", conv()), **parts)
    node, refusals = first_node(model, torch.randn(2, 4, 8, 8))
    assert node.widen_output is None
    assert told in refusals["a"]


def test_one_dimensional_pairs() -> None:
    model = Pairs(lambda m, h: m.b(torch.relu(m.norm(h))), norm=nn.BatchNorm1d(4))
    assert first_node(model, torch.randn(5, 4))[0].contract.attributes["pair_between"] == [BATCH_NORM, RELU]
    node, refusals = first_node(
        Pairs(lambda m, h: m.b(torch.relu(m.norm(h))), norm=nn.BatchNorm1d(3)), torch.randn(5, 3, 4)
    )
    assert node.widen_output is None
    assert "another axis" in refusals["a"]
    pair = Pairs(
        lambda m, h: m.b(torch.relu(m.norm(h))), nn.Conv1d(4, 4, 3), nn.Conv1d(4, 2, 3), norm=nn.BatchNorm1d(4)
    )
    assert first_node(pair, torch.randn(5, 4, 9))[0].widen_output == "b"
    pooled = Pairs(
        lambda m, h: m.b(functional.max_pool2d(torch.relu(h), (1, 2))), nn.Conv1d(4, 4, 3), nn.Conv1d(4, 2, 3)
    )
    assert "pools over the units" in first_node(pooled, torch.randn(5, 4, 9))[1]["a"]


def test_a_batch_norm_that_is_used_twice_is_no_part_of_a_pair() -> None:
    def twice(m: Any, h: Tensor) -> Tensor:
        return m.b(torch.relu(m.norm(h))) + m.norm(torch.ones(5, 4)).sum()

    node, refusals = first_node(Pairs(twice, norm=nn.BatchNorm1d(4)), torch.randn(5, 4))
    assert node.widen_output is None
    assert "'norm'" in refusals["a"]


def test_units_that_cross_the_border_of_a_block_site_are_no_pair() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1 = nn.Linear(4, 4)
            self.fc2 = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.fc2(torch.relu(self.fc1(torch.relu(x))))

    model = Pairs(lambda m, h: m.b(torch.relu(m.block(h))), block=Block())
    esper.wrap(model, [nn.Linear, "block"])
    graph = layer_graph(model, lambda: model(torch.randn(3, 4)))
    widened = {n.contract.site: n.widen_output for n in graph.nodes}
    assert widened == {"a": None, "b": None, "block": None, "block.fc1": "block.fc2", "block.fc2": None}
    traced = traced_pairs(model)
    assert {first: pair.second for first, pair in traced.pairs.items()} == {"block.fc1": "block.fc2"}


def test_a_refused_pair_says_why_at_the_graft(zoo: Any) -> None:
    model = Pairs(lambda m, h: m.b(torch.relu(m.norm(h))), norm=nn.LayerNorm(4))
    esper.wrap(model, example_inputs=torch.randn(5, 4))
    with pytest.raises(esper.GrowthError, match="LayerNorm, which couples") as caught:
        esper.graft(model, "a", "widen")
    assert caught.value.code == "ESP-434"


def test_weights_that_are_read_elsewhere_are_no_part_of_a_pair() -> None:
    def elsewhere(m: Any, h: Tensor) -> Tensor:
        return m.b(torch.relu(h)) + m.b.weight.norm()

    node, refusals = first_node(Pairs(elsewhere), torch.randn(5, 4))
    assert node.widen_output is None
    assert "read outside of its own forward" in refusals["a"]
    assert traced_pairs(esper.wrap(Pairs(elsewhere))).pairs == {}


def test_weights_that_the_loss_reads_are_still_their_own() -> None:
    model = esper.wrap(Pairs(lambda m, h: m.b(torch.relu(h))))
    x = torch.randn(5, 4)
    graph = layer_graph(model, lambda: model(x).sum() + sum(p.square().sum() for p in model.parameters()))
    assert graph.nodes[0].widen_output == "b"
