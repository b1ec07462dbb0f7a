"""Designs that look right and are not: each is refused by its certificate, by the check that is named for it."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch import nn

from esper.contracts.assets import ArtifactRef
from esper.contracts.assets import Certificate
from esper.contracts.assets import SiteContract
from esper.contracts.config import OptimizerConfig
from esper.errors import IntegrityError
from esper.runtime.tezzeret.artifact import KernelFiles
from esper.runtime.tezzeret.artifact import digest_of
from esper.runtime.tezzeret.artifact import manifest_bytes
from esper.runtime.tezzeret.artifact import verified_tensors
from esper.runtime.tezzeret.artifact import weights_bytes
from esper.runtime.tezzeret.build import build_kernel
from esper.runtime.tezzeret.build import files_of
from esper.runtime.tezzeret.build import load_kernel
from esper.runtime.tezzeret.certify import certify
from esper.runtime.tezzeret.certify import certify_module
from esper.runtime.tezzeret.ir import parse_graph
from esper.runtime.tezzeret.samples import SiteSamples

Change = Callable[[dict[str, Tensor]], None]
OPTIMIZERS = [
    OptimizerConfig(name="adamw", lr=1e-3),
    OptimizerConfig(name="adamw", lr=0.012, weight_decay=0.01, clip=1.0),
    OptimizerConfig(name="sgd", lr=0.1, momentum=0.9),
]


@pytest.fixture
def image_site() -> SiteContract:
    return SiteContract(
        site="conv",
        output_site="conv",
        kind="conv2d",
        input_shape=(8, 6, 6),
        output_shape=(8, 6, 6),
        dtype="float32",
        attributes={
            "kernel_size": [3, 3],
            "stride": [1, 1],
            "padding": [1, 1],
            "dilation": [1, 1],
            "groups": 1,
            "channel_axis": "first",
        },
    )


@pytest.fixture
def output_site(image_site: SiteContract) -> SiteContract:
    return image_site.model_copy(update={"reads": "output"})


def node(node_id: str, op: str, *inputs: str, **attributes: object) -> dict[str, object]:
    return {"id": node_id, "op": op, "inputs": list(inputs), "attributes": attributes}


def conv(name: str, source: str, channels: int, *, size: int = 3, bias: bool = False) -> dict[str, object]:
    given = {"kernel_size": [size] * 2, "stride": [1, 1], "padding": [size // 2] * 2, "dilation": [1, 1], "groups": 1}
    return node(name, "conv2d", source, **given, out_channels=channels, padding_mode="zeros", bias=bias)


def linear(name: str, source: str, features: int, *, bias: bool = False) -> dict[str, object]:
    return node(name, "linear", source, out_features=features, bias=bias)


def kernel(site: SiteContract, *nodes: dict[str, object], change: Change | None = None) -> KernelFiles:
    """A kernel of this graph, its numbers changed by hand."""
    graph = parse_graph(
        {"inputs": {"x": list(site.input_shape)}, "nodes": list(nodes), "outputs": [str(nodes[-1]["id"])]}
    )
    files = files_of(graph, site, seed=0, samples=None, blueprint="bottleneck", hyperparameters={})
    return files if change is None else changed(files, change)


def changed(files: KernelFiles, change: Change) -> KernelFiles:
    manifest, tensors = verified_tensors(files, files.digest)
    change(tensors)
    weights = weights_bytes(tensors)
    named = manifest.model_copy(update={"weights": ArtifactRef(digest=digest_of(weights), size_bytes=len(weights))})
    return KernelFiles(manifest_bytes(named), weights)


def named_checks(certificate: Certificate) -> set[str]:
    assert certificate.passed == (not certificate.failures)
    return {failure.partition(":")[0] for failure in certificate.failures}


def scaled(factors: dict[str, float], ones: str | None = None) -> Change:
    """Tensors times a factor, one filled with ones."""

    def change(tensors: dict[str, Tensor]) -> None:
        for name, factor in factors.items():
            tensors[name].mul_(factor)
        if ones is not None:
            tensors[ones].fill_(1.0)

    return change


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda settings: f"{settings.name}-{settings.lr}")
def test_conv_small_is_dead_for_ever_and_refused(image_site, optimizer):
    """x + relu(GN(conv0 x)) of an earlier system: relu'(0) = 0, so it pays its rent and learns nothing."""
    files = kernel(
        image_site,
        conv("mix", "x", 8),
        node("norm", "group_norm", "mix", groups=2),
        node("act", "activation", "norm", name="relu"),
        change=scaled({"mix.weight": 0.0, "norm.bias": 0.0}, ones="norm.weight"),
    )
    certificate = certify(files, samples=None, optimizer=optimizer)
    assert named_checks(certificate) == {"gradient"}
    assert certificate.failures == ("gradient: none within two steps for mix.weight, norm.weight, norm.bias",)
    assert certificate.birth_difference == 0.0
    assert certificate.parameters_with_gradient == 0


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda settings: f"{settings.name}-{settings.lr}")
def test_a_zero_inside_a_normalisation_is_refused(image_site, optimizer):
    """x + GN(conv0(...)) of an earlier system: GN divides by sqrt(epsilon), one step is a perturbation of full size."""
    files = kernel(
        image_site,
        conv("first", "x", 8),
        node("act", "activation", "first", name="relu"),
        conv("last", "act", 8),
        node("norm", "group_norm", "last", groups=2, affine=False),
        change=scaled({"last.weight": 0.0}),
    )
    certificate = certify(files, samples=None, optimizer=optimizer)
    assert certificate.birth_difference == 0.0
    assert "drift" in named_checks(certificate)


@pytest.mark.parametrize("norm", ["layer_norm", "group_norm", "batch_norm"])
def test_a_zero_inside_any_normalisation_is_refused_with_its_weights(image_site, norm):
    attributes: dict[str, object] = {"groups": 2} if norm == "group_norm" else {}
    files = kernel(
        image_site,
        conv("mix", "x", 8),
        node("norm", norm, "mix", **attributes),
        change=scaled({"mix.weight": 0.0}, ones="norm.weight"),
    )
    certificate = certify(files, samples=None)
    assert certificate.birth_difference == 0.0
    assert "drift" in named_checks(certificate)


def test_the_zero_behind_the_normalisation_passes(image_site):
    """x + conv0(relu(GN(conv x))): the same parts in the right order."""
    files = kernel(
        image_site,
        conv("first", "x", 8),
        node("norm", "group_norm", "first", groups=2),
        node("act", "activation", "norm", name="relu"),
        conv("last", "act", 8),
    )
    for optimizer in OPTIMIZERS:
        certificate = certify(files, samples=None, optimizer=optimizer)
        assert certificate.passed, certificate.failures
        assert certificate.birth_bound == 0.0


def test_an_open_squeeze_and_excite_gate_is_not_the_identity_and_refused(output_site):
    """sigma(3) = 0.953 of an earlier system: a shrink of 4.7 %."""

    def open_gate(tensors: dict[str, Tensor]) -> None:
        tensors["wide.weight"].zero_()
        tensors["wide.bias"].fill_(3.0)

    files = kernel(
        output_site,
        node("pool", "mean", "x", axes=[1, 2]),
        conv("narrow", "pool", 4, size=1, bias=True),
        node("act", "activation", "narrow", name="relu"),
        conv("wide", "act", 8, size=1, bias=True),
        node("gate", "activation", "wide", name="sigmoid"),
        node("scaled", "multiply", "x", "gate"),
        node("delta", "subtract", "scaled", "x"),
        change=open_gate,
    )
    certificate = certify(files, samples=None)
    assert {"birth", "backward", "state"} <= named_checks(certificate)
    assert certificate.neighbour_state_kept is False
    shrink = 1.0 - 1.0 / (1.0 + math.exp(-3.0))
    assert certificate.backward_difference == pytest.approx(shrink, rel=1e-3)


def test_a_gate_that_is_exactly_shut_passes(output_site):
    files = kernel(
        output_site,
        node("pool", "mean", "x", axes=[1, 2]),
        conv("narrow", "pool", 4, size=1, bias=True),
        node("act", "activation", "narrow", name="gelu"),
        conv("wide", "act", 8, size=1, bias=True),
        node("gate", "activation", "wide", name="tanh"),
        node("delta", "multiply", "x", "gate"),
    )
    certificate = certify(files, samples=None)
    assert certificate.passed, certificate.failures
    assert certificate.backward_difference == 0.0
    assert certificate.neighbour_state_kept is True


def test_a_kernel_that_leaves_the_forward_alone_and_not_the_gradient_is_refused(output_site):
    """relu(x) - relu(x) by two ways: zero for every input, but torch is asked for the gradient of each way."""

    class Biased(nn.Module):
        """Zero forward; backward adds its gradient."""

        def forward(self, x: Tensor) -> Tensor:
            return x - x.detach()

    files = kernel(output_site, conv("last", "x", 8))
    module = load_kernel(files, files.digest)
    module.last.register_forward_hook(lambda layer, args, output: output + Biased()(args[0]))
    certificate = certify_module(module, samples=None)
    assert certificate.birth_difference == 0.0
    assert {"backward", "state"} <= named_checks(certificate)


@pytest.mark.fault("A8")
def test_weights_that_are_not_finite_are_no_kernel(linear_site):
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["down.weight"][0, 0] = math.nan

    files = build_kernel("bottleneck", linear_site, {}, seed=0, samples=None, max_parameters=10**6)
    with pytest.raises(IntegrityError, match=r"down\.weight.*NaN") as refusal:
        certify(changed(files, spoil), samples=None)
    assert refusal.value.code == "ESP-405"


@pytest.mark.fault("A8")
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_kernel_in_memory_with_weights_that_are_not_finite_is_refused(linear_site, value):
    files = build_kernel("bottleneck", linear_site, {}, seed=0, samples=None, max_parameters=10**6)
    module = load_kernel(files, files.digest)
    with torch.no_grad():
        module.down.weight[0, 0] = value
    certificate = certify_module(module, samples=None)
    assert {"birth", "finite"} <= named_checks(certificate)
    assert any("down.weight" in failure for failure in certificate.failures if failure.startswith("finite"))
    assert math.isfinite(certificate.birth_difference)


def test_units_that_never_fire_never_learn_and_are_refused(linear_site):
    def drown(tensors: dict[str, Tensor]) -> None:
        tensors["down.bias"].fill_(-1e3)

    files = build_kernel("bottleneck", linear_site, {}, seed=0, samples=None, max_parameters=10**6)
    certificate = certify(changed(files, drown), samples=None)
    assert named_checks(certificate) == {"gradient"}
    assert certificate.failures == ("gradient: none within two steps for down.weight, down.bias, up.weight",)


@pytest.mark.fault("A11")
@pytest.mark.parametrize("wrong", ["output", "input"])
def test_a_kernel_of_another_shape_is_refused(linear_site, wrong):
    files = build_kernel("bottleneck", linear_site, {}, seed=0, samples=None, max_parameters=10**6)
    module = load_kernel(files, files.digest)
    update = {"output_shape": (9,)} if wrong == "output" else {"input_shape": (13,)}
    module.manifest = module.manifest.model_copy(update={"site": linear_site.model_copy(update=update)})
    certificate = certify_module(module, samples=None)
    assert named_checks(certificate) == {"shape"}


def test_a_kernel_that_overflows_in_half_precision_is_refused(linear_site):
    """Features of 1e5 stand in float32 and bfloat16 and not in float16."""
    files = kernel(
        linear_site,
        linear("down", "x", 16, bias=True),
        node("act", "activation", "down", name="relu"),
        linear("squeeze", "act", 16, bias=False),
        node("bound", "activation", "squeeze", name="tanh"),
        linear("up", "bound", 7),
        change=scaled({"down.weight": 1e6, "squeeze.weight": 1e-6}),
    )
    certificate = certify(files, samples=None)
    assert certificate.autocast["bfloat16"] == "finite"
    if certificate.autocast["float16"] != "unavailable":
        assert certificate.autocast["float16"] == "not finite"
        assert "autocast" in named_checks(certificate)


def test_an_input_that_half_precision_cannot_hold_is_not_held_against_the_kernel(linear_site, draw_samples):
    samples = draw_samples(linear_site)
    large = SiteSamples(samples.x * 1e6, samples.g)
    files = build_kernel("lowrank", linear_site, {}, seed=0, samples=large, max_parameters=10**6)
    certificate = certify(files, samples=large)
    assert certificate.autocast["float16"] == "unavailable"
    assert "autocast" not in named_checks(certificate)


def test_a_normalisation_in_the_way_of_an_identity_has_a_stated_bound(output_site):
    """LN(x) - x behind a normalised output: not zero, but within the norm's epsilon and rounding."""
    site = output_site.model_copy(
        update={"kind": "layer_norm", "input_shape": (16,), "output_shape": (16,), "attributes": {}}
    )
    files = kernel(
        site,
        node("norm", "layer_norm", "x"),
        node("delta", "subtract", "norm", "x"),
        change=scaled({"norm.bias": 0.0}, ones="norm.weight"),
    )
    unlike = certify(files, samples=None)
    assert 0.0 < unlike.birth_bound < 1e-3
    assert "birth" in named_checks(unlike)
    generator = torch.Generator().manual_seed(0)
    x = nn.functional.layer_norm(torch.randn((64, 16), generator=generator), (16,))
    alike = certify(files, samples=SiteSamples(x, torch.randn((64, 16), generator=generator)))
    assert 0.0 < alike.birth_difference <= alike.birth_bound
    assert "birth" not in named_checks(alike)
