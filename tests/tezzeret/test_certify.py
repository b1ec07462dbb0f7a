import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from esper.contracts.assets import ArtifactRef
from esper.contracts.assets import SiteContract
from esper.contracts.config import OptimizerConfig
from esper.errors import BlueprintError
from esper.errors import IntegrityError
from esper.runtime.tezzeret import certify as certify_module
from esper.runtime.tezzeret import parity
from esper.runtime.tezzeret.artifact import KernelFiles
from esper.runtime.tezzeret.artifact import digest_of
from esper.runtime.tezzeret.artifact import manifest_bytes
from esper.runtime.tezzeret.artifact import verified_tensors
from esper.runtime.tezzeret.artifact import weights_bytes
from esper.runtime.tezzeret.build import SiteSamples
from esper.runtime.tezzeret.build import build_kernel
from esper.runtime.tezzeret.build import files_of
from esper.runtime.tezzeret.certify import certify
from esper.runtime.tezzeret.ir import parse_graph

OPTIMIZERS = [
    OptimizerConfig(name="adamw", lr=0.012, weight_decay=0.01, clip=1.0),
    OptimizerConfig(name="adam", lr=1e-3),
    OptimizerConfig(name="sgd", lr=0.1, momentum=0.9),
]


def built(name: str, site: SiteContract, samples: SiteSamples | None = None, **hyperparameters) -> KernelFiles:
    return build_kernel(name, site, hyperparameters, seed=0, samples=samples, max_parameters=10**6)


def with_tensors(files: KernelFiles, change) -> KernelFiles:
    """The same kernel with other numbers in it."""
    manifest, tensors = verified_tensors(files, files.digest)
    change(tensors)
    weights = weights_bytes(tensors)
    named = manifest.model_copy(update={"weights": ArtifactRef(digest=digest_of(weights), size_bytes=len(weights))})
    return KernelFiles(manifest_bytes(named), weights)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda settings: settings.name)
@pytest.mark.parametrize("shipped", [True, False])
def test_every_blueprint_passes_on_every_host(optimizer, shipped, linear_site, conv2d_site, pair_site, draw_samples):
    cases = [
        ("bottleneck", linear_site),
        ("lowrank", linear_site),
        ("bottleneck", conv2d_site),
        ("lowrank", conv2d_site),
    ]
    for name, site in [*cases, ("widen", pair_site)]:
        samples = draw_samples(site) if shipped else None
        files = built(name, site, samples)
        certificate = certify(files, samples=samples, optimizer=optimizer)
        assert certificate.passed, certificate.failures
        assert certificate.kernel == files.digest
        assert certificate.birth_difference == 0.0
        assert certificate.first_step_drift > 0.0
        assert certificate.parameters_with_gradient == certificate.parameters_total
        assert certificate.parameter_count == json.loads(files.manifest)["parameter_count"]
        assert certificate.flops_per_sample > 0
        assert certificate.host_flops_per_sample > 0
        assert certificate.forward_us > 0
        assert certificate.compiled == "off"


def test_the_host_s_own_cost_is_counted(linear_site):
    files = built("bottleneck", linear_site, rank=4)
    assert certify(files, samples=None).host_flops_per_sample == 2 * 12 * 7
    assert certify(files, samples=None).flops_per_sample == 2 * 4 * (12 + 7)
    host = nn.Sequential(nn.Linear(12, 30), nn.Linear(30, 7))
    with_host = certify(files, samples=None, host=host)
    assert with_host.host_flops_per_sample == 2 * 30 * (12 + 7)
    assert with_host.passed


def test_a_zero_before_a_relu_is_refused_by_name(linear_site):
    """esper-lite's `conv_small`, x + relu(conv0 x): relu'(0) = 0, so nothing ever learns and the rent is paid."""
    dead = parse_graph(
        {
            "inputs": {"x": [12]},
            "nodes": [
                {"id": "mix", "op": "linear", "inputs": ["x"], "attributes": {"out_features": 7, "bias": True}},
                {"id": "act", "op": "activation", "inputs": ["mix"], "attributes": {"name": "relu"}},
            ],
            "outputs": ["act"],
        }
    )
    files = files_of(dead, linear_site, seed=0, samples=None, blueprint="bottleneck", hyperparameters={})
    certificate = certify(files, samples=None)
    assert not certificate.passed
    assert certificate.failures == ("gradient: none within two steps for mix.weight, mix.bias",)
    assert certificate.parameters_with_gradient == 0
    assert certificate.birth_difference == 0.0


def test_two_zero_operations_are_refused_by_name(linear_site):
    def empty(tensors):
        tensors["down.weight"].zero_()
        tensors["down.bias"].zero_()

    certificate = certify(with_tensors(built("bottleneck", linear_site), empty), samples=None)
    assert certificate.failures == ("gradient: none within two steps for down.weight, down.bias, up.weight",)


def test_a_kernel_that_is_not_zero_at_birth_is_refused_by_name(linear_site):
    def disturb(tensors):
        tensors["up.weight"][0, 0] = 1e-6

    certificate = certify(with_tensors(built("bottleneck", linear_site), disturb), samples=None)
    assert not certificate.passed
    assert certificate.failures[0].startswith("birth: ")
    assert certificate.birth_difference > 0.0


def test_a_kernel_that_overflows_is_refused_by_name(linear_site):
    def inflate(tensors):
        tensors["down.weight"].fill_(3e38)

    certificate = certify(with_tensors(built("bottleneck", linear_site), inflate), samples=None)
    assert not certificate.passed
    names = {failure.partition(":")[0] for failure in certificate.failures}
    assert {"birth", "finite"} <= names


def test_a_kernel_whose_first_step_jumps_is_refused_by_name(linear_site):
    """As a zero inside a normalisation does: features far larger than the host's input."""

    def inflate(tensors):
        tensors["down.weight"].mul_(1e3)

    certificate = certify(with_tensors(built("bottleneck", linear_site), inflate), samples=None)
    assert [failure.partition(":")[0] for failure in certificate.failures] == ["drift"]


def test_a_gradient_of_zero_everywhere_proves_nothing_and_is_replaced(linear_site, draw_samples):
    samples = draw_samples(linear_site)
    certificate = certify(built("bottleneck", linear_site), samples=replace(samples, g=samples.g * 0))
    assert certificate.passed
    assert certificate.parameters_with_gradient == 3


def test_a_certificate_repeats_but_for_its_timings(linear_site, draw_samples):
    samples = draw_samples(linear_site)
    files = built("bottleneck", linear_site, samples)
    timings = {"forward_us": 0.0, "host_forward_us": 0.0}
    one, two = (certify(files, samples=samples).model_copy(update=timings) for _ in range(2))
    assert one == two


def test_certifying_draws_no_global_random_number_and_asks_for_no_grad_mode(linear_site):
    before = torch.random.get_rng_state()
    with torch.no_grad():
        assert certify(built("bottleneck", linear_site), samples=None).passed
    assert torch.equal(before, torch.random.get_rng_state())


def test_damaged_files_and_foreign_samples_are_errors_not_certificates(linear_site, draw_samples):
    files = built("bottleneck", linear_site)
    with pytest.raises(IntegrityError):
        certify(replace(files, weights=files.weights[:-1]), samples=None)
    samples = draw_samples(linear_site)
    with pytest.raises(BlueprintError):
        certify(files, samples=replace(samples, x=samples.x[:, :3]))


def test_costs_are_compared_with_the_ir(linear_site):
    kernel = certify_module.load_kernel(files := built("bottleneck", linear_site), files.digest)
    assert certify_module.cost_failures(kernel, 2 * 32 * (12 + 7)) == []
    kernel.register_parameter("stray", nn.Parameter(torch.zeros(2)))
    assert [f.partition(":")[0] for f in certify_module.cost_failures(kernel, 1)] == ["cost", "cost"]


def test_without_a_compiler_parity_is_unavailable(linear_site, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    certificate = certify(built("bottleneck", linear_site), samples=None, compile=True)
    assert certificate.passed
    assert certificate.compiled == "unavailable"
    assert certificate.compiled_difference is None


@pytest.mark.skipif(parity.c_compiler() is None, reason="no C++ compiler")
def test_compiled_and_eager_agree(linear_site, draw_samples):
    samples = draw_samples(linear_site)
    certificate = certify(built("bottleneck", linear_site, samples), samples=samples, compile=True)
    assert certificate.passed
    assert certificate.compiled == "parity"
    assert certificate.compiled_difference < 1e-4
