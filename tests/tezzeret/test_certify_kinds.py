"""The certificate on every kind of site, with every blueprint that fits, and with whatever optimizer trains it."""

import copy
import json

import pytest
import torch
from site_world import contract_of
from torch import nn

from esper.contracts.assets import Certificate
from esper.contracts.assets import SiteContract
from esper.contracts.config import OptimizerConfig
from esper.runtime.tezzeret import parity
from esper.runtime.tezzeret.blueprints.registry import list_blueprints
from esper.runtime.tezzeret.build import build_kernel
from esper.runtime.tezzeret.build import files_of
from esper.runtime.tezzeret.build import load_kernel
from esper.runtime.tezzeret.certify import certify
from esper.runtime.tezzeret.certify import certify_module
from esper.runtime.tezzeret.certifying.reference import reference_for
from esper.runtime.tezzeret.certifying.steps import configured
from esper.runtime.tezzeret.ir import parse_graph
from esper.runtime.tezzeret.samples import seeded_samples
from esper.runtime.tolaria.recipe import build_optimizer


def window(axes: int) -> dict[str, object]:
    """A convolution with a window of three that keeps the places."""
    return {
        "kernel_size": [3] * axes,
        "stride": [1] * axes,
        "padding": [1] * axes,
        "dilation": [1] * axes,
        "groups": 1,
        "padding_mode": "zeros",
    }


def site(kind: str, given: tuple[int, ...], gives: tuple[int, ...], axis: str = "last", **attributes) -> SiteContract:
    return SiteContract(
        site="host",
        output_site="host",
        kind=kind,
        input_shape=given,
        output_shape=gives,
        dtype="float32",
        attributes={**attributes, "channel_axis": axis},
    )


SITES = {
    "linear": site("linear", (12,), (7,)),
    "linear of a sequence": site("linear", (5, 12), (5, 7)),
    "conv1d": site("conv1d", (3, 10), (6, 10), "first", **window(1)),
    "conv2d": site("conv2d", (3, 8, 8), (8, 8, 8), "first", **window(2)),
    "embedding": site("embedding", (5,), (5, 8), num_embeddings=11, embedding_dim=8, padding_idx=0),
    "embedding of one id": site("embedding", (), (8,), num_embeddings=11, embedding_dim=8, padding_idx=None),
    "layer_norm": site("layer_norm", (5, 8), (5, 8), normalized_shape=[8]),
    "group_norm": site("group_norm", (8, 6, 6), (8, 6, 6), "first", num_groups=2),
    "batch_norm": site("batch_norm", (8, 6, 6), (8, 6, 6), "first", num_features=8),
    "batch_norm of a volume": site("batch_norm", (8, 4, 4, 4), (8, 4, 4, 4), "first", num_features=8),
    "flat batch_norm": site("batch_norm", (8,), (8,), "first", num_features=8),
    "attention": site("attention", (5, 8), (5, 8), embed_dim=8, num_heads=2, batch_first=True),
    "block": site("block", (5, 8), (5, 8)),
    "image block": site("block", (8, 6, 6), (8, 6, 6), "first"),
}


FITTING = [
    (name, blueprint.name, fitted)
    for name, contract in SITES.items()
    for blueprint in list_blueprints()
    if (fitted := contract_of(blueprint.name, contract)) is not None
]
CONFIGURED = [
    OptimizerConfig(name="adamw", lr=0.012, weight_decay=0.01, clip=1.0),
    OptimizerConfig(name="sgd", lr=0.1, momentum=0.9),
]
WITHOUT_TIMINGS = {"forward_us": 0.0, "host_forward_us": 0.0}


def certificate_of(blueprint: str, contract: SiteContract, optimizer=None, **hyperparameters) -> Certificate:
    files = build_kernel(blueprint, contract, hyperparameters, seed=0, samples=None, max_parameters=10**6)
    return certify(files, samples=None, optimizer=optimizer)


@pytest.mark.parametrize(
    ("where", "blueprint", "contract"), FITTING, ids=lambda value: value if isinstance(value, str) else ""
)
@pytest.mark.parametrize("optimizer", CONFIGURED, ids=["adamw", "sgd"])
def test_every_blueprint_passes_on_every_kind_of_site(where, blueprint, contract, optimizer):
    certificate = certificate_of(blueprint, contract, optimizer)
    assert certificate.passed, certificate.failures
    assert certificate.birth_difference == 0.0
    assert certificate.birth_bound == 0.0
    assert certificate.backward_difference == 0.0
    assert certificate.neighbour_state_kept is True
    assert certificate.parameters_with_gradient == certificate.parameters_total
    assert certificate.autocast["bfloat16"] == "finite"
    assert certificate.autocast["float16"] in ("finite", "unavailable")
    assert certificate.peak_bytes_per_sample > 0
    assert certificate.optimizer == optimizer.name
    assert certificate.reference is not None
    if blueprint != "noop":
        assert certificate.first_step_drift > 0.0
        assert certificate.first_step_change > 0.0
        assert certificate.parameter_bytes >= 4 * certificate.parameter_count
        assert certificate.optimizer_bytes >= certificate.parameter_bytes - 64


def test_all_kinds_are_met():
    assert {blueprint for _, blueprint, _ in FITTING} == {b.name for b in list_blueprints()} - {"widen"}
    assert {contract.kind for _, _, contract in FITTING} == {contract.kind for contract in SITES.values()}


def test_a_kernel_without_parameters_costs_nothing_and_passes():
    (contract,) = (c for where, blueprint, c in FITTING if (where, blueprint) == ("block", "noop"))
    certificate = certificate_of("noop", contract)
    assert certificate.passed
    assert (certificate.parameters_total, certificate.parameter_count, certificate.optimizer_bytes) == (0, 0, 0)
    assert certificate.first_step_drift == 0.0


@pytest.mark.parametrize("where", SITES)
def test_the_reference_reads_and_gives_what_a_kernel_does(where):
    for name, _, contract in FITTING:
        if name == where:
            drawn = seeded_samples(contract, torch.float32, 4, torch.Generator().manual_seed(0))
            reference = reference_for(contract)
            assert reference(drawn.x).shape == drawn.g.shape
            reference.redraw(torch.Generator().manual_seed(0))
            assert 0.1 < float(reference(drawn.x).detach().std()) < 10.0


def test_the_reference_of_a_pair_with_pooling_between_averages_the_places():
    contract = site(
        "conv2d", (3, 8, 8), (5, 4, 4), "first", kernel_size=[3, 3], stride=[1, 1], padding=[1, 1], dilation=[1, 1]
    )
    assert reference_for(contract).name == "channel mix"
    assert reference_for(contract)(torch.ones((2, 3, 8, 8))).shape == (2, 5, 4, 4)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_other_precisions_pass(dtype):
    for where, blueprint, contract in FITTING:
        if where == "conv2d":
            certificate = certificate_of(blueprint, contract.model_copy(update={"dtype": dtype}))
            assert certificate.passed, (blueprint, certificate.failures)


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, amsgrad=True, foreach=True),
    "AdamW": lambda p: torch.optim.AdamW(p, fused=True),
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "RMSprop": lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True),
    "Adagrad": torch.optim.Adagrad,
    "Adadelta": torch.optim.Adadelta,
    "Adafactor": torch.optim.Adafactor,
    "Adamax": torch.optim.Adamax,
    "ASGD": torch.optim.ASGD,
    "Rprop": torch.optim.Rprop,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_user_s_own_optimizer_measures_and_is_left_alone(name):
    weight = nn.Parameter(torch.ones((3, 3)))
    optimizer = OPTIMIZERS[name]([weight])
    weight.sum().backward()
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    held = [weight.detach().clone(), weight.grad.clone()]
    certificate = certificate_of("bottleneck", SITES["linear"], optimizer)
    assert certificate.passed, certificate.failures
    assert certificate.optimizer == name
    assert torch.equal(weight, held[0])
    assert torch.equal(weight.grad, held[1])
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for key, value in before["state"][0].items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(after["state"][0][key]))


def test_muon_measures_matrices_and_its_partner_the_rest():
    matrix, vector = nn.Parameter(torch.ones((3, 3))), nn.Parameter(torch.ones(3))
    both = [torch.optim.Muon([matrix], lr=1e-3), torch.optim.SGD([vector], lr=0.1)]
    certificate = certificate_of("bottleneck", SITES["linear"], both)
    assert certificate.passed, certificate.failures
    assert certificate.optimizer == "Muon + SGD"
    assert certificate_of("bottleneck", SITES["linear"], both[0]).passed


class Odd(torch.optim.Optimizer):
    """A user's optimizer with a constructor of another form."""

    def __init__(self, model: nn.Module, strength: float) -> None:
        super().__init__(model.parameters(), {"lr": strength})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=group["lr"])


def test_an_optimizer_with_a_constructor_of_its_own_is_made_as_a_copy_would_be():
    certificate = certificate_of("bottleneck", SITES["linear"], Odd(nn.Linear(2, 2), 0.05))
    assert certificate.passed, certificate.failures
    assert certificate.optimizer == "Odd"


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, torch.optim.SparseAdam])
def test_an_optimizer_that_cannot_train_a_kernel_is_named_and_stood_in_for(kind):
    certificate = certificate_of("bottleneck", SITES["linear"], kind([nn.Parameter(torch.ones((2, 2)))]))
    assert certificate.passed
    assert certificate.optimizer == f"adamw in place of {kind.__name__}"


def test_an_optimizer_at_the_foot_of_its_warm_up_is_stood_in_for():
    """At a learning rate of zero nothing moves, and nothing would be shown."""
    certificate = certificate_of("bottleneck", SITES["linear"], torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.0))
    assert certificate.passed
    assert certificate.optimizer == "adamw in place of SGD"


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_a_configured_optimizer_is_the_one_that_the_run_trains_with(name):
    config = OptimizerConfig(name=name, lr=0.02, weight_decay=0.3, momentum=0.7 if name == "sgd" else 0.0)
    parameters = [nn.Parameter(torch.ones(2))]
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    given = {"lr": 0.02, "weight_decay": 0.3} | ({"momentum": 0.7} if name == "sgd" else {})
    expected = kind(parameters, **given)
    for made in (configured(config, parameters), build_optimizer(config, iter(parameters))):
        assert type(made) is kind
        assert made.state_dict() == expected.state_dict()


def test_running_statistics_and_the_kernel_itself_stay_as_they_were():
    graph = parse_graph(
        {
            "inputs": {"x": [8, 6, 6]},
            "nodes": [
                {"id": "norm", "op": "batch_norm", "inputs": ["x"], "attributes": {}},
                {
                    "id": "scale",
                    "op": "affine",
                    "inputs": ["norm"],
                    "attributes": {"channel_axis": "first", "bias": True},
                },
            ],
            "outputs": ["scale"],
        }
    )
    contract = SITES["batch_norm"]
    files = files_of(graph, contract, seed=0, samples=None, blueprint="scale_shift", hyperparameters={})
    kernel = load_kernel(files, files.digest)
    kernel.eval()
    before = {name: tensor.clone() for name, tensor in kernel.state_dict().items()}
    assert {"norm.running_mean", "norm.num_batches_tracked"} <= before.keys()
    certificate = certify_module(kernel, samples=None)
    assert certificate.passed, certificate.failures
    assert not kernel.training
    assert all(parameter.grad is None for parameter in kernel.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in kernel.state_dict().items())
    assert certificate.parameter_bytes == sum(tensor.nbytes for tensor in before.values())


def test_a_host_with_running_statistics_is_called_and_left_alone():
    host = nn.Sequential(nn.Linear(12, 7), nn.BatchNorm1d(7))
    before = copy.deepcopy(host.state_dict())
    certificate = certify(
        build_kernel("bottleneck", SITES["linear"], {}, seed=0, samples=None, max_parameters=10**6),
        samples=None,
        host=host,
    )
    assert certificate.reference == "host"
    assert certificate.relative_latency > 0.0
    assert all(torch.equal(before[name], tensor) for name, tensor in host.state_dict().items())


def test_memory_is_counted_and_so_repeats():
    """up(relu(down(x))) of rank 32 on 12 -> 7, forward and backward: hidden, gradients of it, output."""
    one, two = (certificate_of("bottleneck", SITES["linear"]) for _ in range(2))
    assert one.model_copy(update=WITHOUT_TIMINGS) == two.model_copy(update=WITHOUT_TIMINGS)
    assert one.peak_bytes_per_sample >= 4 * 32
    wider = certificate_of("bottleneck", SITES["linear"], rank=64)
    assert wider.peak_bytes_per_sample == pytest.approx(2 * one.peak_bytes_per_sample, rel=0.3)
    assert one.parameter_bytes == 4 * one.parameter_count
    assert one.optimizer_bytes == 2 * one.parameter_bytes + 4 * one.parameters_total


def test_old_certificates_are_still_read():
    fresh = certificate_of("lowrank", SITES["linear"]).model_dump(mode="json")
    added = {
        "birth_bound", "backward_difference", "neighbour_state_kept", "first_step_change", "autocast",
        "parameter_bytes", "optimizer_bytes", "peak_bytes_per_sample", "optimizer", "reference",
    }  # fmt: skip
    assert added <= fresh.keys()
    old = Certificate.model_validate_json(json.dumps({k: v for k, v in fresh.items() if k not in added}))
    assert old.birth_bound == 0.0
    assert old.optimizer is None


def test_ids_and_running_statistics_are_compared_too(monkeypatch):
    """With the compiler left out: what is compiled is the module itself."""
    monkeypatch.setattr(torch, "compile", lambda module, **settings: module)
    monkeypatch.setattr(parity, "c_compiler", lambda: "a compiler")
    for where, blueprint, contract in FITTING:
        if where in ("embedding", "batch_norm"):
            files = build_kernel(blueprint, contract, {}, seed=0, samples=None, max_parameters=10**6)
            certificate = certify(files, samples=None, compile=True)
            assert (certificate.compiled, certificate.compiled_difference) == ("parity", 0.0)


def test_a_compiler_that_computes_something_else_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda module, **settings: lambda x: module(x) * 1.01 + 1e-3)
    monkeypatch.setattr(parity, "c_compiler", lambda: "a compiler")
    files = build_kernel("bottleneck", SITES["linear"], {}, seed=0, samples=None, max_parameters=10**6)
    certificate = certify(files, samples=None, compile=True)
    assert not certificate.passed
    assert [failure.partition(":")[0] for failure in certificate.failures] == ["parity"]
