"""Every operation of the IR: what it infers, stores and counts is what its module does."""

import pytest
import torch
from hypothesis import given
from hypothesis import reject
from hypothesis import settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from esper.errors import BlueprintError
from esper.runtime.tezzeret.ir import INPUT
from esper.runtime.tezzeret.ir import MAX_DEPTH
from esper.runtime.tezzeret.ir import KernelGraph
from esper.runtime.tezzeret.ir import KernelNode
from esper.runtime.tezzeret.ir import TypedGraph
from esper.runtime.tezzeret.ir import check_graph
from esper.runtime.tezzeret.module import MODULES
from esper.runtime.tezzeret.module import GraphModule
from esper.runtime.tezzeret.operations.table import OPERATIONS


def one(op: str, shape: tuple[int, ...], *, inputs: tuple[str, ...] = (INPUT,), **attributes) -> KernelGraph:
    node = KernelNode(id="it", op=op, inputs=inputs, attributes=attributes)
    return KernelGraph(inputs={INPUT: shape}, nodes=(node,), outputs=("it",))


def filled(typed: TypedGraph, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in typed.tensors().items()}
    buffers = {
        name: torch.full(kept.shape, kept.value, dtype=torch.int64 if kept.counts else torch.float32)
        for name, kept in typed.buffers().items()
    }
    return tensors | buffers


def x_for(typed: TypedGraph, rows: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    if typed.reads_ids:
        count = typed.nodes[0].attributes.num_embeddings
        return torch.randint(0, count, (rows, *typed.input_shape), generator=generator)
    return torch.randn((rows, *typed.input_shape), generator=generator)


def agrees(graph: KernelGraph) -> torch.Tensor:
    """The module's shape, state and floating point operations are those of the IR; gives its output."""
    typed = check_graph(graph)
    module = GraphModule(graph, filled(typed), torch.float32)
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == typed.tensors()
    assert {name: tuple(b.shape) for name, b in module.named_buffers()} == {
        name: kept.shape for name, kept in typed.buffers().items()
    }
    x = x_for(typed)
    with FlopCounterMode(display=False) as counter:
        output = module(x)
    assert tuple(output.shape) == (3, *typed.output_shape)
    assert counter.get_total_flops() == 3 * typed.flops_per_sample
    return output.detach()


def test_every_operation_has_a_module():
    assert MODULES.keys() == OPERATIONS.keys()


small = st.integers(1, 5)
axes_of = st.integers(1, 2)


@st.composite
def convolutions(draw):
    axes = draw(axes_of)
    groups = draw(st.integers(1, 3))
    same = draw(st.integers(0, 5)) == 0

    def several(low: int, high: int) -> list[int]:
        return [draw(st.integers(low, high)) for _ in range(axes)]

    return one(
        f"conv{axes}d",
        (groups * draw(small), *[draw(st.integers(5, 8)) for _ in range(axes)]),
        out_channels=groups * draw(small),
        kernel_size=several(1, 3),
        stride=[1] * axes if same else several(1, 3),
        padding="same" if same else several(0, 2),
        dilation=several(1, 2),
        groups=groups,
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
        bias=draw(st.booleans()),
    )


@st.composite
def pools(draw):
    window, shape = [draw(st.integers(1, 4)) for _ in "ab"], [draw(st.integers(4, 9)) for _ in "ab"]
    given = {
        "kernel_size": window,
        "stride": [draw(st.integers(1, 4)) for _ in "ab"],
        "padding": [draw(st.integers(0, size // 2)) for size in window],
        "ceil_mode": draw(st.booleans()),
    }
    if draw(st.booleans()):
        return one("avg_pool2d", (draw(small), *shape), **given, count_include_pad=draw(st.booleans()))
    dilation = [draw(st.integers(1, 2)) if size == 1 else 1 for size in window]
    return one("max_pool2d", (draw(small), *shape), **given, dilation=dilation)


@st.composite
def others(draw):
    channels = draw(st.integers(2, 6))
    leading = [draw(small) for _ in range(draw(st.integers(0, 3)))]
    first = draw(st.booleans())
    shape = (channels, *leading) if first else (*leading, channels)
    axis = "first" if first else "last"
    places = (channels, *leading, 2)
    return draw(
        st.sampled_from(
            [
                one("linear", (*leading, channels), out_features=draw(small), bias=draw(st.booleans())),
                one("embedding", tuple(leading), num_embeddings=7, embedding_dim=channels),
                one("embedding", tuple(leading), num_embeddings=7, embedding_dim=channels, padding_idx=3),
                one(
                    "self_attention",
                    (draw(small), channels),
                    heads=draw(small),
                    head_dim=draw(small),
                    causal=draw(st.booleans()),
                ),
                one("activation", shape, name=draw(st.sampled_from(["relu", "gelu", "silu", "tanh", "sigmoid"]))),
                one("affine", shape, channel_axis=axis, bias=draw(st.booleans())),
                one("gate", shape, channel_axis=axis),
                one("layer_norm", shape, channel_axis=axis, affine=draw(st.booleans())),
                one("group_norm", places, groups=draw(st.sampled_from([1, channels]))),
                one("batch_norm", (channels, *leading), affine=draw(st.booleans())),
                one("batch_norm", (channels, *leading), track_running_stats=False, momentum=None),
                one("mean", places, axes=[0, len(places) - 1]),
                one("add", shape, inputs=(INPUT, INPUT)),
                one("subtract", shape, inputs=(INPUT, INPUT)),
                one("multiply", shape, inputs=(INPUT, INPUT)),
            ]
        )
    )


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@settings(max_examples=150, deadline=None)
@given(convolutions() | pools() | others())
def test_shape_tensors_and_cost_are_those_of_the_module(graph):
    try:
        check_graph(graph)
    except BlueprintError as error:
        assert error.code == "ESP-414"
        reject()
    agrees(graph)


def test_a_pool_with_a_window_over_the_end_is_torch_s():
    for padding in ([0, 0], [1, 1]):
        for size in range(4, 10):
            graph = one(
                "max_pool2d", (1, size, size), kernel_size=[3, 3], stride=[2, 2], padding=padding, ceil_mode=True
            )
            agrees(graph)


def test_self_attention_is_torch_s_own_without_its_projection():
    graph = one("self_attention", (5, 6), heads=2, head_dim=3, causal=False)
    typed = check_graph(graph)
    tensors = filled(typed)
    reference = nn.MultiheadAttention(6, 2, bias=False, batch_first=True)
    with torch.no_grad():
        reference.in_proj_weight.copy_(tensors["it.weight"])
        reference.out_proj.weight.copy_(torch.eye(6))
    x = x_for(typed)
    expected, _ = reference(x, x, x, need_weights=False)
    assert torch.allclose(GraphModule(graph, tensors, torch.float32)(x), expected, atol=1e-6)


def test_causal_attention_does_not_see_what_comes_after():
    graph = one("self_attention", (5, 6), heads=2, head_dim=3, causal=True)
    typed = check_graph(graph)
    module = GraphModule(graph, filled(typed), torch.float32)
    x = x_for(typed)
    later = x.clone()
    later[:, 3:] += 1.0
    assert torch.allclose(module(x)[:, :3], module(later)[:, :3])
    assert not torch.allclose(module(x)[:, 3:], module(later)[:, 3:])


def test_channel_wise_operations_work_on_the_channels_that_they_are_told():
    x = torch.randn(2, 3, 4)
    for axis, size in (("first", 3), ("last", 4)):
        weight, bias = torch.randn(size), torch.randn(size)
        shown = (size, 1) if axis == "first" else (size,)
        affine = GraphModule(
            one("affine", (3, 4), channel_axis=axis, bias=True), {"it.weight": weight, "it.bias": bias}, torch.float32
        )
        assert torch.equal(affine(x), x * weight.reshape(shown) + bias.reshape(shown))
        gate = GraphModule(one("gate", (3, 4), channel_axis=axis), {"it.weight": weight}, torch.float32)
        assert torch.equal(gate(x), x * weight.tanh().reshape(shown))
        norm = GraphModule(one("layer_norm", (3, 4), channel_axis=axis, affine=False), {}, torch.float32)
        assert torch.allclose(norm(x).mean(dim=1 if axis == "first" else 2), torch.zeros(()), atol=1e-6)


def test_a_scale_keeps_half_precision_under_autocast():
    graph = one("affine", (4,), channel_axis="last", bias=True)
    module = GraphModule(graph, filled(check_graph(graph)), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(torch.randn(2, 4, dtype=torch.bfloat16)).dtype is torch.bfloat16


def test_a_batch_norm_keeps_its_statistics():
    graph = one("batch_norm", (3, 4), momentum=0.5)
    module = GraphModule(graph, filled(check_graph(graph)), torch.float32)
    x = torch.randn(8, 3, 4)
    module(x)
    buffers = dict(module.named_buffers())
    assert int(buffers["it.num_batches_tracked"]) == 1
    assert torch.allclose(buffers["it.running_mean"], 0.5 * x.mean(dim=(0, 2)), atol=1e-6)
    reference = nn.BatchNorm1d(3, momentum=0.5)
    reference.load_state_dict({name.removeprefix("it."): tensor for name, tensor in module.state_dict().items()})
    assert torch.equal(module.eval()(x), reference.eval()(x))


def test_the_row_of_padding_stays_zero():
    graph = one("embedding", (), num_embeddings=5, embedding_dim=2, padding_idx=1)
    module = GraphModule(graph, filled(check_graph(graph)), torch.float32)
    module(torch.tensor([1, 2])).sum().backward()
    (weight,) = module.parameters()
    assert not weight.grad[1].any()
    assert weight.grad[2].all()
    assert functional.embedding(torch.tensor([2]), weight).shape == (1, 2)


REFUSED = {
    "one value to normalise": (one("layer_norm", (4, 1)), "two channels or more"),
    "one value in a group": (one("group_norm", (4,), groups=4), "two values or more in a group"),
    "groups of a norm": (one("group_norm", (4, 3), groups=3), "groups 3 must divide"),
    "a norm of five dimensions": (one("batch_norm", (2, 2, 2, 2, 2)), "1 to 4 dimensions"),
    "a mean over what is not there": (one("mean", (2, 3), axes=[2]), "are not different dimensions"),
    "a mean over one axis twice": (one("mean", (2, 3), axes=[1, 1]), "are not different dimensions"),
    "a pool wider than the image": (
        one("max_pool2d", (1, 2, 2), kernel_size=[3, 3], stride=[1, 1]),
        "wider than the padded input",
    ),
    "too much padding of a pool": (
        one("avg_pool2d", (1, 4, 4), kernel_size=[2, 2], stride=[1, 1], padding=[2, 2]),
        "more than half",
    ),
    "attention over an image": (
        one("self_attention", (2, 3, 4), heads=1, head_dim=1, causal=True),
        "(places, channels)",
    ),
    "a row that is not there": (one("embedding", (), num_embeddings=3, embedding_dim=2, padding_idx=3), "is no row"),
    "no channels to scale": (one("affine", (), channel_axis="last", bias=False), "at least one dimension"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_computed_is_refused(name):
    graph, part = REFUSED[name]
    with pytest.raises(BlueprintError) as caught:
        check_graph(graph)
    assert caught.value.code == "ESP-414"
    assert part in caught.value.message


def node(node_id: str, op: str, *inputs: str, **attributes) -> KernelNode:
    return KernelNode(id=node_id, op=op, inputs=inputs, attributes=attributes)


def test_shapes_that_do_not_go_together_are_refused():
    nodes = (node("a", "linear", INPUT, out_features=3, bias=False), node("b", "add", "a", INPUT))
    with pytest.raises(BlueprintError, match="do not go together"):
        check_graph(KernelGraph(inputs={INPUT: (4,)}, nodes=nodes, outputs=("b",)))
    nodes = (node("a", "mean", INPUT, axes=[0]), node("b", "multiply", "a", INPUT))
    assert check_graph(KernelGraph(inputs={INPUT: (3, 4)}, nodes=nodes, outputs=("b",))).output_shape == (3, 4)


def test_ids_are_read_by_embeddings_only():
    table = node("a", "embedding", INPUT, num_embeddings=3, embedding_dim=2)
    for nodes, part in (
        ((table, node("b", "activation", INPUT, name="relu")), "'b': activation reads numbers"),
        ((node("b", "activation", INPUT, name="relu"), table.model_copy(update={"inputs": ("b",)})), "'a': embedding"),
    ):
        with pytest.raises(BlueprintError) as caught:
            check_graph(KernelGraph(inputs={INPUT: (2,)}, nodes=nodes, outputs=(nodes[-1].id,)))
        assert caught.value.code == "ESP-414"
        assert part in caught.value.message


def test_a_graph_over_a_budget_is_refused_by_its_dearest_node():
    nodes = (
        node("a", "linear", INPUT, out_features=3, bias=False),
        node("b", "linear", "a", out_features=8, bias=True),
    )
    graph = KernelGraph(inputs={INPUT: (4,)}, nodes=nodes, outputs=("b",))
    typed = check_graph(graph)
    assert check_graph(graph, max_parameters=typed.parameter_count, max_flops=typed.flops_per_sample) == typed
    with pytest.raises(BlueprintError, match="node 'b': the graph takes 72 floating point") as caught:
        check_graph(graph, max_flops=typed.flops_per_sample - 1)
    assert caught.value.code == "ESP-416"


def test_a_graph_that_is_too_deep_is_refused():
    nodes = [node("n0", "activation", INPUT, name="relu")]
    for index in range(1, MAX_DEPTH):
        nodes.append(node(f"n{index}", "activation", f"n{index - 1}", name="relu"))
    deepest = KernelGraph(inputs={INPUT: (4,)}, nodes=tuple(nodes), outputs=(nodes[-1].id,))
    check_graph(deepest)
    nodes.append(node("last", "activation", nodes[-1].id, name="relu"))
    with pytest.raises(BlueprintError, match=f"{MAX_DEPTH + 1} nodes deep") as caught:
        check_graph(KernelGraph(inputs={INPUT: (4,)}, nodes=tuple(nodes), outputs=("last",)))
    assert caught.value.code == "ESP-415"
