from typing import Any

import pytest
import torch
from torch import Tensor
from torch import nn
from torch.nn import functional

import esper
from esper.contracts.operational import LayerGraph
from esper.runtime.kasmina.growing.pairs import traced_pairs
from esper.runtime.kasmina.lineage import layer_graph


def edges(graph: LayerGraph) -> set[tuple[str, str]]:
    return {(edge.source, edge.target) for edge in graph.edges}


def graph_of(model: nn.Module, *inputs: Any) -> LayerGraph:
    esper.wrap(model)
    return layer_graph(model, lambda: model(*inputs))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
        self.c = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.c(x + self.b(torch.relu(x)))


class OutOfOrder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(6, 2)
        self.right = nn.Linear(4, 3)
        self.left = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([self.left(x), self.right(x)], dim=1))


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.relu(self.cell(x))
        return self.head(x)


class HalfFrozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 4)
        self.middle = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = torch.relu(self.middle(torch.relu(self.encoder(x))))
        return self.head(x)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).tanh()
        return self.b(x) if x.sum() > -1e9 else x


def test_edges_of_an_mlp_carry_sizes_and_depths(zoo: Any) -> None:
    model, x = zoo.make("mlp")
    graph = graph_of(model, x)
    assert [(e.source, e.target, e.elements) for e in graph.edges] == [("fc1", "fc2", 5), ("fc2", "fc3", 5)]
    assert [node.depth for node in graph.nodes] == [0, 1, 2]
    assert [node.parameter_count for node in graph.nodes] == [35, 30, 18]
    assert [node.flops_per_sample for node in graph.nodes] == [60, 50, 30]
    assert [node.widen_output for node in graph.nodes] == ["fc2", "fc3", None]
    first = graph.nodes[0].contract
    assert (first.kind, first.input_shape, first.output_shape, first.dtype) == ("linear", (6,), (5,), "float32")
    assert first.attributes["pair_activation"] == "relu"
    assert len(graph.nodes[0].seeds) == 4


def test_edges_of_a_cnn_go_through_norm_and_dropout(zoo: Any) -> None:
    model, x = zoo.make("cnn")
    graph = graph_of(model, x)
    assert edges(graph) == {("conv1", "conv2"), ("conv2", "head")}
    contract = graph.nodes[1].contract
    assert (contract.input_shape, contract.output_shape) == ((4, 8, 8), (4, 4, 4))
    assert contract.attributes["stride"] == [2, 2]
    assert graph.nodes[1].flops_per_sample == 2 * 4 * 9 * 4 * 4 * 4
    assert all(node.widen_output is None for node in graph.nodes)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (Residual, {("a", "b"), ("a", "c"), ("b", "c")}),
        (OutOfOrder, {("left", "last"), ("right", "last")}),
        (Loop, {("cell", "cell"), ("cell", "head")}),
        (HalfFrozen, {("encoder", "middle"), ("middle", "head")}),
        (Branching, {("a", "b")}),
    ],
)
def test_edges_follow_the_data(make: type[nn.Module], expected: set[tuple[str, str]]) -> None:
    assert edges(graph_of(make(), torch.randn(5, 4))) == expected


def test_frozen_models_have_lineage_too() -> None:
    model = Residual().requires_grad_(False)
    assert edges(graph_of(model, torch.randn(5, 4))) == {("a", "b"), ("a", "c"), ("b", "c")}
    assert not any(p.requires_grad for p in model.parameters())


def test_flops_of_a_shared_layer_are_summed() -> None:
    graph = graph_of(Loop(), torch.randn(5, 4))
    assert graph.nodes[0].flops_per_sample == 3 * 2 * 16


class Pairs(nn.Module):
    """Between `a` and `b` whatever the test puts there."""

    def __init__(self, between: Any) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 2)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.between(self, h)


@pytest.mark.parametrize(
    ("between", "activation"),
    [
        (lambda m, h: m.b(functional.relu(h)), "relu"),
        (lambda m, h: m.b(functional.gelu(h)), "gelu"),
        (lambda m, h: m.b(h.tanh()), "tanh"),
        (lambda m, h: m.b(functional.silu(h)), "silu"),
        (lambda m, h: m.b(torch.sigmoid(h)), "sigmoid"),
        (lambda m, h: m.b(functional.relu_(h)), "relu"),
        (lambda m, h: m.b(functional.gelu(h, approximate="tanh")), None),
        (lambda m, h: m.b(h), None),
        (lambda m, h: m.b(functional.leaky_relu(h)), None),
        (lambda m, h: m.b(functional.relu(h) * 2), None),
        (lambda m, h: m.b(functional.softmax(h, dim=1)), None),
        (lambda m, h: m.b(functional.relu(h)) + h.sum(), None),
        (lambda m, h: m.b(functional.relu(h)) + functional.relu(h).sum(), None),
        (lambda m, h: (m.b(functional.relu(h)), h), None),
        (lambda m, h: {"out": m.b(a := functional.relu(h)), "hidden": [a]}, None),
        (lambda m, h: m.b(functional.relu(h)) + m.b(functional.tanh(h)), None),
    ],
    ids=range(16),
)
def test_a_pair_is_what_one_activation_alone_joins(between: Any, activation: str | None) -> None:
    model = Pairs(between)
    graph = graph_of(model, torch.randn(5, 4))
    node = graph.nodes[0]
    assert node.widen_output == (None if activation is None else "b")
    assert node.contract.attributes.get("pair_activation") == activation


def test_tracing_agrees_where_it_can_see(zoo: Any) -> None:
    def traced(between: Any) -> Any:
        return traced_pairs(esper.wrap(Pairs(between)))

    assert traced(lambda m, h: m.b(functional.relu(h))) == {"a": ("b", "relu")}
    assert traced(lambda m, h: m.b(functional.gelu(h, approximate="tanh"))) == {}
    assert traced(lambda m, h: m.b(h.tanh())) == {"a": ("b", "tanh")}
    assert traced(lambda m, h: m.b(functional.relu(h)) + h.sum()) == {}
    assert traced(lambda m, h: m.b(functional.relu(h)) + m.b(functional.relu(m.a(h)))) == {}
    assert traced(lambda m, h: m.b(h) if h.sum() > 0 else h) is None
    modules = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4), nn.GELU("tanh"), nn.Linear(4, 2))
    assert traced_pairs(esper.wrap(modules)) == {"0": ("2", "gelu")}


def test_tied_or_parametrized_layers_are_no_pair(zoo: Any) -> None:
    for name in ("tied", "normed"):
        model, x = zoo.make(name)
        assert all(node.widen_output is None for node in graph_of(model, x).nodes)


def test_looking_leaves_the_model_and_the_generators_alone(zoo: Any) -> None:
    model, x = zoo.make("cnn")
    esper.wrap(model)
    model(x).sum().backward()
    before = esper.weights_digest(model), [p.grad.clone() for p in model.parameters()], torch.get_rng_state()
    layer_graph(model, lambda: model(x).sum())
    assert esper.weights_digest(model) == before[0]
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before[1], strict=True))
    assert torch.equal(torch.get_rng_state(), before[2])


def test_a_grown_model_has_the_lineage_of_its_hosts(zoo: Any) -> None:
    model, x = zoo.make("mlp")
    before = graph_of(model, x)
    for blueprint in ("bottleneck", "widen"):
        esper.graft(model, "fc1", blueprint)
    after = layer_graph(model, lambda: model(x))
    assert after.edges == before.edges
    assert [n.contract for n in after.nodes] == [n.contract for n in before.nodes]
    assert [seed.blueprint for seed in after.nodes[0].seeds] == ["bottleneck", "widen", None, None]
