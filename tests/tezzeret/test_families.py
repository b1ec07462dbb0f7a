"""The packaged blueprints at every kind of site: born at zero, all of it learns, and it costs what it says."""

import pytest
import torch
from hypothesis import given
from hypothesis import reject
from hypothesis import settings
from hypothesis import strategies as st
from site_world import CASES
from site_world import SITES
from site_world import any_site
from site_world import contract_of
from site_world import convolution
from site_world import node_of
from site_world import site
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from esper.contracts.assets import SiteContract
from esper.contracts.operational import LayerGraph
from esper.errors import BlueprintError
from esper.runtime.tezzeret.blueprints.registry import cost
from esper.runtime.tezzeret.blueprints.registry import fitted_contract
from esper.runtime.tezzeret.blueprints.registry import kernel_graph
from esper.runtime.tezzeret.blueprints.registry import list_blueprints
from esper.runtime.tezzeret.blueprints.registry import resolve_hyperparameters
from esper.runtime.tezzeret.blueprints.registry import site_contract_for
from esper.runtime.tezzeret.build import KernelModule
from esper.runtime.tezzeret.build import SiteSamples
from esper.runtime.tezzeret.build import build_kernel
from esper.runtime.tezzeret.build import load_kernel
from esper.runtime.tezzeret.samples import seeded_samples

BUDGET = 10_000_000
ROWS = 24


def born(name: str, contract: SiteContract, hyperparameters=None, *, seed: int = 0) -> tuple[KernelModule, SiteSamples]:
    dtype = getattr(torch, contract.dtype)
    samples = seeded_samples(contract, dtype, ROWS, torch.Generator().manual_seed(seed))
    files = build_kernel(name, contract, hyperparameters or {}, seed=seed, samples=samples, max_parameters=BUDGET)
    return load_kernel(files, files.digest), samples


def is_sound(name: str, contract: SiteContract, hyperparameters=None, *, seed: int = 0) -> KernelModule:
    """What every newborn must be."""
    kernel, samples = born(name, contract, hyperparameters, seed=seed)
    delta = kernel(samples.x)
    assert delta.shape == samples.g.shape
    assert delta.dtype == samples.g.dtype
    assert not delta.detach().any()

    with FlopCounterMode(display=False) as counter:
        kernel(samples.x[:2])
    numbers = sum(parameter.numel() for parameter in kernel.parameters())
    assert cost(name, contract, hyperparameters or {}) == (numbers, counter.get_total_flops() // 2)

    if numbers:
        learned = set()
        optimizer = torch.optim.AdamW(kernel.parameters(), lr=1e-2)
        for _ in range(2):
            optimizer.zero_grad()
            kernel(samples.x).backward(samples.g)
            learned |= {n for n, p in kernel.named_parameters() if p.grad is not None and p.grad.any()}
            optimizer.step()
        assert learned == {n for n, _ in kernel.named_parameters()}
    return kernel


@pytest.mark.parametrize(
    ("name", "contract"), [pytest.param(*case, id=f"{case[0]}-{case[1].kind}-{i}") for i, case in enumerate(CASES)]
)
def test_a_newborn_is_zero_learns_everywhere_and_costs_what_it_says(name, contract):
    is_sound(name, contract)


def test_every_blueprint_fits_somewhere_and_every_kind_takes_several():
    single = {blueprint.name for blueprint in list_blueprints()} - {"widen"}
    assert {name for name, _ in CASES} >= single & {name for name, _ in CASES}
    assert {name for name, _ in CASES} == single
    for kind in {contract.kind for contract in SITES}:
        assert len({name for name, contract in CASES if contract.kind == kind}) >= 5


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@settings(max_examples=60, deadline=None)
@given(
    any_site(),
    st.sampled_from([blueprint.name for blueprint in list_blueprints() if blueprint.name != "widen"]),
    st.integers(0, 2**31 - 1),
)
def test_any_site_gets_a_sound_kernel_or_a_reason(contract, name, seed):
    found = contract_of(name, contract)
    if found is None:
        reject()
    kernel, samples = born(name, found, seed=seed)
    delta = kernel(samples.x)
    assert delta.shape == samples.g.shape
    assert not delta.detach().any()
    with FlopCounterMode(display=False) as counter:
        kernel(samples.x[:2])
    assert cost(name, found, {}) == (
        sum(parameter.numel() for parameter in kernel.parameters()),
        counter.get_total_flops() // 2,
    )


def test_a_site_without_channels_or_with_too_many_axes_is_refused_with_its_reason():
    for name, contract, part in (
        ("depth_block", site("block", (2, 3, 4, 5), channel_axis="first"), "more than two dimensions of places"),
        ("scale_shift", site("block", (), channel_axis="last"), "no channels"),
        ("attention", site("block", (2, 3, 4), channel_axis="last"), "not one (places, channels)"),
        ("depthwise", site("block", (3, 4), channel_axis="last"), "not both (channels, height, width)"),
        ("depthwise", site("linear", (3,)), "the blueprint is for conv2d, block"),
        ("norm_gate", site("linear", (3,), (1,)), "two channels or more"),
    ):
        node = node_of(contract)
        found = fitted_contract(name, node, LayerGraph(nodes=(node,), edges=()))
        assert isinstance(found, str)
        assert part in found


def test_a_kernel_that_reads_the_output_gets_its_shape():
    found = contract_of("scale_shift", site("linear", (6,), (5,)))
    assert (found.reads, found.input_shape, found.output_shape) == ("output", (5,), (5,))
    assert contract_of("bottleneck", site("linear", (6,), (5,))).reads == "input"


def test_defaults_follow_the_site():
    def defaults(name: str, contract: SiteContract) -> dict[str, object]:
        return resolve_hyperparameters(name, contract_of(name, contract), {})

    assert defaults("depth_block", site("linear", (6,), (5,))) == {"units": 5, "activation": "gelu"}
    assert defaults("conv_bottleneck", site("block", (64, 4, 4), channel_axis="first"))["rank"] == 16
    assert defaults("se_gate", site("linear", (6,), (256,)))["rank"] == 16
    assert defaults("attention", site("attention", (7, 48), num_heads=4)) == {
        "heads": 1,
        "head_dim": 12,
        "causal": True,
    }
    assert defaults("attention", site("block", (7, 256), channel_axis="last", causal=False)) == {
        "heads": 1,
        "head_dim": 64,
        "causal": False,
    }
    assert defaults("noop", site("linear", (6,), (5,))) == {}


@pytest.mark.parametrize("name", ["depth_block", "norm_gate", "se_gate", "scale_shift", "bottleneck", "attention"])
@pytest.mark.parametrize(
    "contract",
    [site("block", (6, 8), channel_axis="last"), site("conv1d", (8, 6), kernel_size=[1])],
    ids=["block", "conv1d"],
)
def test_no_kernel_of_a_sequence_sees_what_comes_after(name, contract):
    """In a language model it would read what it must predict."""
    found = contract_of(name, contract)
    if found is None:
        assert (name, contract.kind) == ("attention", "conv1d")
        return
    files = build_kernel(name, found, {}, seed=0, samples=None, max_parameters=BUDGET, initialiser="random")
    kernel = load_kernel(files, files.digest)
    places = -1 if contract.kind == "conv1d" else -2
    x = torch.randn(2, *found.input_shape)
    later = x.clone()
    later.narrow(places, 4, 2).add_(1.0)
    before, after = (kernel(value).detach().narrow(places, 0, 4) for value in (x, later))
    assert before.any()
    assert torch.allclose(before, after)


def test_the_padding_row_of_an_embedding_stays_what_it_is():
    contract = site("embedding", (), (6,), num_embeddings=11, embedding_dim=6, padding_idx=3)
    files = build_kernel("lowrank", contract, {}, seed=0, samples=None, max_parameters=BUDGET, initialiser="random")
    delta = load_kernel(files, files.digest)(torch.arange(11)).detach()
    assert not delta[3].any()
    assert delta[4].any()


def test_a_noop_changes_nothing_and_has_nothing():
    kernel = is_sound("noop", contract_of("noop", site("linear", (6,), (5,))))
    x = torch.randn(4, 5, requires_grad=True)
    kernel(x).sum().backward()
    assert not x.grad.any()
    assert kernel.manifest.parameter_count == 0
    assert kernel.manifest.tensors == ()


def pair_of(first: SiteContract, second: SiteContract, between: list[dict[str, object]] | None) -> SiteContract | str:
    attributes = dict(first.attributes) | ({} if between is None else {"pair_between": between})
    activation = next((part["name"] for part in between or [] if part["op"] == "activation"), "relu")
    head = node_of(first.model_copy(update={"attributes": attributes | {"pair_activation": activation}}), "b")
    tail = node_of(second.model_copy(update={"site": "b", "output_site": "b"}))
    return fitted_contract("widen", head, LayerGraph(nodes=(head, tail), edges=()))


NORM = {"op": "batch_norm", "eps": 1e-5, "momentum": 0.1, "affine": True, "track_running_stats": True}
RELU = {"op": "activation", "name": "relu"}
POOL = {"op": "max_pool2d", "kernel_size": [2, 2], "stride": [2, 2], "padding": [0, 0], "ceil_mode": False}


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(1, 2), st.booleans(), st.booleans(), st.integers(0, 2**31 - 1))
def test_convolutions_are_widened_across_norm_activation_and_pool(data, axes, normed, pooled, seed):
    first = data.draw(convolution(axes).filter(lambda c: c.attributes["groups"] == 1))
    between = [*([NORM] if normed else []), RELU]
    places = first.output_shape[1:]
    if pooled and axes == 2:
        if min(places) < 2:
            reject()
        between.append(POOL)
        places = tuple(size // 2 for size in places)
    geometry = {"kernel_size": [data.draw(st.integers(1, min(places)))] * axes, "stride": [data.draw(sizes_of)] * axes}
    host = (nn.Conv1d if axes == 1 else nn.Conv2d)(first.output_shape[0], 3, device="meta", **geometry)
    produced = tuple(host(torch.empty((1, first.output_shape[0], *places), device="meta")).shape[1:])
    second = site(f"conv{axes}d", (first.output_shape[0], *places), produced, **geometry)
    contract = pair_of(first, second, between)
    assert isinstance(contract, SiteContract)
    assert contract.attributes["width"] == first.output_shape[0]
    kernel, samples = born("widen", contract, {"units": 4}, seed=seed)
    assert not kernel(samples.x).detach().any()
    chain = kernel.chain()
    assert [op for _, op, _ in chain] == [f"conv{axes}d", *[part["op"] for part in between], f"conv{axes}d"]
    assert (kernel.updown() is not None) == (between == [RELU])
    assert tuple(chain[0][2].weight.shape[:2]) == (4, first.input_shape[0])


sizes_of = st.integers(1, 2)


def test_a_widened_pair_learns_everywhere_and_keeps_its_own_statistics():
    first = site("conv2d", (3, 8, 8), (5, 8, 8), kernel_size=[3, 3], padding=[1, 1])
    second = site("conv2d", (5, 4, 4), (7, 4, 4), kernel_size=[3, 3], padding=[1, 1])
    kernel = is_sound("widen", pair_of(first, second, [NORM, RELU, POOL]))
    assert [node_id for node_id, _, _ in kernel.chain()] == ["down", "norm", "act", "pool", "up"]
    assert int(kernel.get_buffer("norm.num_batches_tracked")) > 0
    assert kernel.get_parameter("down.weight").shape == (10, 3, 3, 3)
    assert kernel.updown() is None


def test_a_linear_pair_is_widened_as_before():
    contract = pair_of(site("linear", (6,), (5,)), site("linear", (5,), (4,)), [{"op": "activation", "name": "tanh"}])
    kernel = is_sound("widen", contract)
    assert [node_id for node_id, _, _ in kernel.chain()] == ["down", "act", "up"]
    assert kernel.updown()[1] == "tanh"
    old_style = pair_of(site("linear", (6,), (5,)), site("linear", (5,), (4,)), None)
    assert kernel_graph("widen", old_style, {"activation": "tanh"}) == kernel.manifest.graph


def test_a_pair_that_cannot_be_widened_says_why():
    first = site("conv2d", (4, 8, 8), (4, 8, 8), kernel_size=[3, 3], padding=[1, 1])
    grouped = site("conv2d", (4, 8, 8), (4, 8, 8), kernel_size=[3, 3], padding=[1, 1], groups=2)
    linear = site("linear", (4,), (4,))
    for case, part in (
        (pair_of(first, first, [{"op": "layer_norm"}, RELU]), "layer_norm stands between"),
        (pair_of(first, first, [RELU, RELU]), "2 activations"),
        (pair_of(first, first, [NORM]), "0 activations"),
        (pair_of(grouped, first, [RELU]), "the first layer has groups"),
        (pair_of(first, grouped, [RELU]), "the second layer has groups"),
        (pair_of(first, linear, [RELU]), "the second layer linear"),
    ):
        assert isinstance(case, str)
        assert part in case
    alone = node_of(first)
    assert site_contract_for("widen", alone, LayerGraph(nodes=(alone,), edges=())) is None


def test_a_chain_is_seen_and_a_graph_that_is_none_is_not():
    kernel, _ = born("depth_block", contract_of("depth_block", site("linear", (6,), (5,))))
    assert [op for _, op, _ in kernel.chain()] == ["layer_norm", "linear", "activation", "linear"]
    assert kernel.chain()[1][2] is kernel.get_submodule("down")
    gate, _ = born("norm_gate", contract_of("norm_gate", site("linear", (6,), (5,))))
    assert gate.chain() is None
    assert gate.updown() is None


def test_too_many_floating_point_operations_are_refused_before_anything_is_allocated():
    contract = site("linear", (2**20,), (2**20,))
    with pytest.raises(BlueprintError) as caught:
        build_kernel("lowrank", contract, {}, seed=0, samples=None, max_parameters=10**9, max_flops=10**6)
    assert caught.value.code == "ESP-416"
    assert "floating point operations" in caught.value.message
