"""First weights: what each initialiser promises, and whom it refuses."""

import pytest
import torch
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from site_world import contract_of
from site_world import convolution
from site_world import site

from esper.contracts.assets import SiteContract
from esper.errors import BlueprintError
from esper.runtime.tezzeret.build import HostWeights
from esper.runtime.tezzeret.build import KernelModule
from esper.runtime.tezzeret.build import SiteSamples
from esper.runtime.tezzeret.build import build_kernel
from esper.runtime.tezzeret.build import load_kernel
from esper.runtime.tezzeret.initialisers import NOISE
from esper.runtime.tezzeret.initialisers import list_initialisers
from esper.runtime.tezzeret.initialisers import register_initialiser
from esper.runtime.tezzeret.samples import pack_samples
from esper.runtime.tezzeret.samples import samples_for
from esper.runtime.tezzeret.samples import seeded_samples
from esper.runtime.tezzeret.samples import unpack_samples

LINEAR = site("linear", (12,), (7,))


def drawn(contract: SiteContract, rows: int = 64) -> SiteSamples:
    return seeded_samples(contract, torch.float32, rows, torch.Generator().manual_seed(3))


def born(blueprint: str, contract: SiteContract, initialiser: str, hyperparameters=None, **given_) -> KernelModule:
    files = build_kernel(
        blueprint,
        contract,
        hyperparameters or {},
        seed=1,
        samples=given_.pop("samples", None),
        max_parameters=10**6,
        initialiser=initialiser,
        **given_,
    )
    return load_kernel(files, files.digest)


def refused(*arguments, **given_) -> BlueprintError:
    with pytest.raises(BlueprintError) as caught:
        born(*arguments, **given_)
    assert caught.value.code == "ESP-428"
    return caught.value


def pair(width: int = 5) -> SiteContract:
    return site("linear", (12,), (4,), width=width, pair_activation="gelu").model_copy(update={"output_site": "b"})


def test_the_registry_knows_five_and_names_near_ones():
    assert list_initialisers() == ("residual", "gradmax", "kaiming", "net2net", "random")
    assert refused("bottleneck", LINEAR, "residul").hint == "did you mean 'residual'?"
    assert refused("bottleneck", LINEAR, "zzz").hint == f"known are {', '.join(list_initialisers())}"
    with pytest.raises(BlueprintError, match="registered already"):
        register_initialiser("kaiming")(lambda birth: None)


def test_residual_is_the_default_and_says_when_it_could_not():
    samples = drawn(LINEAR)
    assert born("bottleneck", LINEAR, "residual", samples=samples).manifest.initialisation == "residual"
    assert born("bottleneck", LINEAR, "residual").manifest.initialisation == "kaiming"
    files = [
        build_kernel("bottleneck", LINEAR, {}, seed=1, samples=samples, max_parameters=10**6, **more)
        for more in ({}, {"initialiser": "residual"})
    ]
    assert files[0] == files[1]


@pytest.mark.parametrize("initialiser", ["kaiming", "residual"])
def test_norms_begin_neutral_and_the_last_operation_at_zero(initialiser):
    contract = site("conv2d", (4, 6, 6), (8, 6, 6), kernel_size=[3, 3], padding=[1, 1])
    kernel = born("conv_bottleneck", contract, initialiser, samples=drawn(contract))
    assert kernel.manifest.preserves
    for norm in ("norm1", "norm2"):
        assert torch.equal(kernel.get_parameter(f"{norm}.weight"), torch.ones(8))
        assert not kernel.get_parameter(f"{norm}.bias").any()
    assert not kernel.get_parameter("up.weight").any()
    assert kernel.get_parameter("reduce.weight").any()
    assert kernel.get_parameter("window.weight").any()


def test_alignment_looks_through_what_has_no_parameters():
    """Behind the norm of a depth block the rows are spread as they are behind nothing."""
    contract = contract_of("depth_block", site("linear", (12,), (7,)))
    kernel = born("depth_block", contract, "residual", {"units": 6}, samples=drawn(contract))
    assert kernel.manifest.initialisation == "residual"
    spread = kernel.get_submodule("down")(kernel.get_submodule("norm")(drawn(contract).x)).std(dim=0)
    assert torch.allclose(spread, torch.full((6,), 2.0**0.5), rtol=0.05)


def test_alignment_leaves_alone_what_it_does_not_understand():
    for blueprint, kind in (("se_gate", LINEAR), ("norm_gate", LINEAR), ("attention", site("attention", (5, 8)))):
        contract = contract_of(blueprint, kind)
        kernel = born(blueprint, contract, "residual", samples=drawn(contract))
        assert kernel.manifest.initialisation == "kaiming"


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 2).flatmap(convolution), st.integers(1, 6))
def test_convolutions_are_aligned_in_one_dimension_as_in_two(contract, rank):
    samples = drawn(contract, rows=16)
    try:
        kernel = born("bottleneck", contract, "residual", {"rank": rank}, samples=samples)
    except BlueprintError as error:
        assert error.code == "ESP-414"
        return
    assert not kernel(samples.x).detach().any()
    if kernel.manifest.initialisation == "residual":
        spread = kernel.get_submodule("down")(samples.x).transpose(0, 1).flatten(1).std(dim=1)
        assert bool((spread > 0.3).all())


def test_a_table_is_drawn_as_wide_as_one_row_is_long():
    contract = site("embedding", (), (6,), num_embeddings=400, embedding_dim=6)
    weight = born("lowrank", contract, "kaiming", {"rank": 8}).get_parameter("down.weight").detach()
    assert 0.9 < float(weight.std()) < 1.1


@pytest.mark.parametrize("blueprint", ["bottleneck", "depth_block", "lowrank"])
def test_gradmax_is_zero_with_everything_in_the_outgoing_weights(blueprint):
    contract = contract_of(blueprint, LINEAR)
    samples = drawn(contract)
    given_ = {"rank": 3} if blueprint != "depth_block" else {"units": 3}
    chosen = given_ | ({} if blueprint == "lowrank" else {"activation": "gelu"})
    kernel = born(blueprint, contract, "gradmax", chosen, samples=samples)
    assert kernel.manifest.initialisation == "gradmax"
    assert kernel.manifest.preserves
    assert not kernel(samples.x).detach().any()
    up = kernel.get_parameter("up.weight").detach()
    gram = up.T @ up
    assert torch.allclose(gram, torch.eye(3) * gram[0, 0], atol=1e-5)
    # What the paper derives: no other orthonormal columns make a larger gradient of the incoming weights.
    kernel(samples.x).backward(samples.g)
    best = kernel.get_parameter("down.weight").grad.norm()
    with torch.no_grad():
        other = torch.linalg.qr(torch.randn(7, 3, generator=torch.Generator().manual_seed(0)))[0]
        kernel.get_parameter("up.weight").copy_(other * gram[0, 0].sqrt())
    kernel.zero_grad()
    kernel(samples.x).backward(samples.g)
    assert float(best) >= float(kernel.get_parameter("down.weight").grad.norm())


def test_gradmax_of_a_convolution_and_beyond_the_rank_of_the_gradient():
    contract = site("conv2d", (2, 6, 6), (3, 6, 6), kernel_size=[3, 3], padding=[1, 1])
    kernel = born("bottleneck", contract, "gradmax", {"rank": 5, "activation": "tanh"}, samples=drawn(contract))
    assert not kernel.get_parameter("down.weight").any()
    assert bool(kernel.get_parameter("up.weight").detach().flatten(1).norm(dim=0).gt(0).all())


def test_gradmax_refuses_what_could_never_learn_or_would_not_be_zero():
    samples = drawn(LINEAR)
    assert "needs samples" in refused("bottleneck", LINEAR, "gradmax", {"activation": "gelu"}).message
    for activation in ("relu", "sigmoid"):
        error = refused("bottleneck", LINEAR, "gradmax", {"activation": activation}, samples=samples)
        assert error.hint == "give an activation of gelu, silu, tanh"
    gate = contract_of("norm_gate", LINEAR)
    assert "up(act(down(x)))" in refused("norm_gate", gate, "gradmax", samples=drawn(gate)).message


def test_net2net_copies_rows_and_splits_what_goes_out():
    weight, bias, outgoing = torch.randn(5, 12), torch.randn(5), torch.randn(4, 5)
    host = HostWeights(weight, bias, outgoing)
    kernel = born("widen", pair(), "net2net", {"units": 8}, host=host)
    assert kernel.manifest.initialisation == "net2net"
    assert not kernel.manifest.preserves
    down, up = kernel.get_parameter("down.weight").detach(), kernel.get_parameter("up.weight").detach()
    chosen = [int((bias - value).abs().argmin()) for value in kernel.get_parameter("down.bias").detach()]
    assert sorted(chosen[:5]) == list(range(5))
    assert torch.allclose(down, weight[chosen], atol=6 * NOISE * float(weight.square().mean().sqrt()))
    assert not torch.equal(down, weight[chosen])
    assert torch.allclose(up, outgoing[:, chosen] / 2)


def test_net2net_beside_one_layer_preserves_the_function():
    kernel = born("bottleneck", LINEAR, "net2net", {"rank": 4}, host=HostWeights(torch.randn(7, 12)))
    assert kernel.manifest.preserves
    assert not kernel(torch.randn(3, 12)).detach().any()


def test_net2net_needs_the_host_s_weights_in_its_own_shape():
    gate = contract_of("norm_gate", LINEAR)
    assert "up(...(down(x)))" in refused("norm_gate", gate, "net2net", host=HostWeights(torch.randn(7, 12))).message
    assert "needs the host's weights" in refused("widen", pair(), "net2net").message
    error = refused("widen", pair(), "net2net", host=HostWeights(torch.randn(5, 11)))
    assert "has no rows for node 'down'" in error.message
    error = refused("widen", pair(), "net2net", host=HostWeights(torch.randn(5, 12), None, torch.randn(4, 6)))
    assert "does not go with node 'up'" in error.message


@pytest.mark.parametrize("blueprint", ["bottleneck", "scale_shift", "norm_gate", "se_gate"])
def test_random_weights_say_that_they_change_the_function(blueprint):
    contract = contract_of(blueprint, LINEAR)
    kernel = born(blueprint, contract, "random")
    assert not kernel.manifest.preserves
    assert kernel.manifest.initialisation == "random"
    assert kernel(torch.randn(3, *contract.input_shape)).detach().any()


def test_random_weights_of_nothing_change_nothing():
    assert born("noop", contract_of("noop", LINEAR), "random").manifest.preserves


@pytest.mark.parametrize("initialiser", ["residual", "kaiming", "gradmax", "net2net", "random"])
def test_equal_input_gives_equal_bytes_and_draws_nothing_from_the_world(initialiser):
    given_ = {"samples": drawn(LINEAR), "host": HostWeights(torch.randn(7, 12, generator=torch.Generator()))}
    before = torch.random.get_rng_state()
    one, two = (born("bottleneck", LINEAR, initialiser, {"activation": "tanh"}, **given_) for _ in range(2))
    assert one.digest == two.digest
    assert torch.equal(before, torch.random.get_rng_state())


def test_ids_are_samples_of_an_embedding():
    contract = site("embedding", (3,), (3, 6), num_embeddings=11, embedding_dim=6)
    samples = drawn(contract)
    assert samples.x.dtype is torch.int64
    kernel = born("lowrank", contract, "residual", samples=samples)
    assert kernel(samples.x).shape == (64, 3, 6)
    for broken in (samples.x + 11, samples.x - 11, samples.x.float()):
        with pytest.raises(BlueprintError, match="whole numbers from 0 to 10") as caught:
            born("lowrank", contract, "residual", samples=SiteSamples(broken, samples.g))
        assert caught.value.code == "ESP-417"
    nameless = contract.model_copy(update={"attributes": {}})
    with pytest.raises(BlueprintError, match="'num_embeddings'"):
        seeded_samples(nameless, torch.float32, 2, torch.Generator())


def test_the_output_travels_with_the_samples_where_it_is_read():
    x, g, y = torch.randn(4, 12), torch.randn(4, 7), torch.randn(4, 7)
    packed = unpack_samples(pack_samples({"a": SiteSamples(x, g, y), "b": SiteSamples(x, g)}))
    assert torch.equal(packed["a"].y, y)
    assert packed["b"].y is None
    reads = contract_of("scale_shift", LINEAR)
    assert torch.equal(samples_for(reads, packed).x, y)
    assert torch.equal(samples_for(LINEAR, packed).x, x)
    assert samples_for(reads.model_copy(update={"site": "b", "output_site": "b"}), packed) is None
