from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from torch import nn
from torch.utils.checkpoint import checkpoint

import esper
from esper.contracts.operational import LayerGraph
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
    assert edges(graph) == {("conv1", "norm"), ("norm", "conv2"), ("conv2", "head")}
    contract = graph.nodes[2].contract
    assert (contract.input_shape, contract.output_shape) == ((4, 8, 8), (4, 4, 4))
    assert contract.attributes["stride"] == [2, 2]
    assert graph.nodes[2].flops_per_sample == 2 * 4 * 9 * 4 * 4 * 4


class DictInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(4, 4)
        self.right = nn.Linear(4, 4)
        self.out = nn.Linear(4, 2)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"out": self.out(torch.relu(self.left(batch["a"])) + self.right(batch["b"]))}


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        def middle(h: Tensor) -> Tensor:
            return torch.relu(self.b(torch.relu(self.a(h))))

        return self.last(checkpoint(middle, torch.relu(self.first(x)), use_reentrant=False))


class SkippingCnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.down = nn.Conv2d(4, 6, 1, stride=2)
        self.main = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.conv(x)
        x = self.main(x) + self.down(x)
        return self.head(x.mean((2, 3)))


class Numpy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        scale = float(numpy.abs(h.detach().numpy()).max())
        return self.b(torch.relu(h) / scale)


class Text(nn.Module):
    """Embeddings, norms and attention as in a language model: ids come from no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, 4)
        self.places = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.memory = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7)

    def forward(self, x: Tensor) -> Tensor:
        ids = (x > 0).long()
        h = self.tokens(ids) + self.places(torch.arange(4)[None])
        m = self.memory(h)
        return self.head(h + self.attention(self.norm(h), key=m, value=m)[0])


def test_a_cnn_with_skips_has_the_edges_of_its_data() -> None:
    graph = graph_of(SkippingCnn(), torch.randn(2, 2, 8, 8))
    assert edges(graph) == {
        ("stem", "norm"),
        ("norm", "conv"),
        ("norm", "main"),
        ("conv", "main"),
        ("norm", "down"),
        ("conv", "down"),
        ("main", "head"),
        ("down", "head"),
    }
    assert {(e.source, e.target): e.elements for e in graph.edges}["conv", "main"] == 4 * 8 * 8
    assert [n.contract.site for n in graph.nodes if n.widen_output is not None] == []


def test_dict_inputs_and_outputs_have_lineage() -> None:
    batch = {"a": torch.randn(3, 4), "b": torch.randn(3, 4)}
    assert edges(graph_of(DictInput(), batch)) == {("left", "out"), ("right", "out")}


def test_every_tensor_that_a_module_reads_is_an_edge() -> None:
    graph = graph_of(Text(), torch.randn(3, 4))
    assert edges(graph) == {
        ("tokens", "norm"),
        ("places", "norm"),
        ("tokens", "memory"),
        ("places", "memory"),
        ("norm", "attention"),
        ("memory", "attention"),
        ("tokens", "head"),
        ("places", "head"),
        ("attention", "head"),
    }
    assert {n.contract.site: n.depth for n in graph.nodes}["attention"] == 2


@pytest.mark.parametrize("frozen", [False, True])
def test_a_transformer_encoder_in_evaluation_has_all_its_edges(frozen: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(nn.Linear(4, 8), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)).eval()
    model.requires_grad_(not frozen)
    graph = graph_of(model, torch.randn(2, 5, 4))

    def inside(index: int, before: set[str]) -> set[tuple[str, str]]:
        names = ("self_attn", "norm1", "linear1", "linear2", "norm2")
        attention, norm1, linear1, linear2, norm2 = (f"1.layers.{index}.{name}" for name in names)
        entering = {(source, target) for source in before for target in (attention, norm1)}
        return entering | {
            (attention, norm1),
            (norm1, linear1),
            (linear1, linear2),
            (norm1, norm2),
            (linear2, norm2),
        }

    assert edges(graph) == inside(0, {"0"}) | inside(1, {"1.layers.0.norm2"})
    pairs = {n.contract.site: n.widen_output for n in graph.nodes if n.widen_output is not None}
    assert pairs == {f"1.layers.{index}.linear1": f"1.layers.{index}.linear2" for index in (0, 1)}


def test_blocks_stand_beside_the_layers_inside_of_them() -> None:
    """The edges between single layers are those without the blocks; a block has edges on its own level alone."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Residual()
            self.fc = nn.Linear(2, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.fc(torch.relu(self.inner(x)))

    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), Outer(), Outer(), nn.Linear(4, 2))

    x = torch.randn(3, 4)
    plain = graph_of(net(), x)
    model = esper.wrap(net(), [nn.Linear, "1", "2"])
    graph = layer_graph(model, lambda: model(x))
    found = edges(graph)
    layers = {(s, t) for s, t in found if not {s, t} & {"1", "2"}}
    assert layers == edges(plain)
    assert found - layers == {("0", "1"), ("1", "2"), ("2", "3")}
    depths = {n.contract.site: n.depth for n in graph.nodes}
    assert depths["1"] == depths["1.inner.a"] == 1
    assert {n.contract.site: n.depth for n in plain.nodes}.items() <= depths.items()
    block = next(n for n in graph.nodes if n.contract.site == "1")
    assert block.parameter_count == sum(p.numel() for p in model[1].parameters())
    esper.graft(model, "1.fc", "bottleneck")
    again = layer_graph(model, lambda: model(x))
    assert next(n for n in again.nodes if n.contract.site == "1").parameter_count == block.parameter_count


def test_a_call_past_the_module_is_seen_too() -> None:
    class Direct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.b = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b.forward(self.a.forward(x))

    assert edges(graph_of(Direct(), torch.randn(2, 4))) == {("a", "b")}


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (Checkpointed, {("first", "a"), ("a", "b"), ("b", "last")}),
        (Numpy, {("a", "b")}),
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
