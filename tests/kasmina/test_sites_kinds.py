"""Every kind of host: dormant it is what it was, to the bit; what grows there is exact at birth, learns, and goes."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from host_zoo import HOSTS
from host_zoo import made
from host_zoo import stirred
from torch import Tensor
from torch import nn

import esper
from esper.runtime.kasmina.layer import state_of

BLUEPRINTS = ("bottleneck", "lowrank", "depth_block", "norm_gate", "se_gate", "scale_shift", "attention")


def trained(model: nn.Module, x: Tensor, steps: int = 2) -> tuple[list[Tensor], list[Tensor | None]]:
    """Losses and last gradients of a few steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    torch.manual_seed(5)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses, [p.grad for p in model.parameters()]


def wrapped(name: str) -> tuple[nn.Module, Tensor]:
    model, x = made(name)
    return esper.wrap(model, ["host"], example_inputs=x), x


def blueprint_for(name: str) -> str:
    """One that reads the host's input where there is one, else one that reads its output."""
    if name == "batch_norm3d":
        return "scale_shift"
    return "lowrank" if HOSTS[name].form == "embedding" else "bottleneck"


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("proven", [True, False])
def test_dormant_host_trains_to_the_same_bits(name: str, proven: bool) -> None:
    plain, x = made(name)
    ours, _ = made(name)
    random_state = torch.get_rng_state()
    esper.wrap(ours, ["host"], example_inputs=x if proven else None)
    assert torch.equal(torch.get_rng_state(), random_state)
    left, right = trained(plain, x), trained(ours, x)
    assert torch.equal(torch.stack(left[0]), torch.stack(right[0]))
    for a, b in zip(left[1], right[1], strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    assert esper.weights_digest(plain) == esper.weights_digest(ours)
    plain.eval(), ours.eval()
    with torch.no_grad():
        assert torch.equal(plain(x), ours(x))
    assert state_of(ours.host).idle


@pytest.mark.parametrize("name", HOSTS)
def test_contract_says_what_the_host_is(name: str) -> None:
    host = HOSTS[name]
    model, _ = wrapped(name)
    contract = state_of(model.host).contract(model.host)
    assert contract is not None
    assert esper.status(model).sites[0].kind == host.kind
    assert contract.kind == host.form
    assert (contract.input_shape, contract.output_shape) == host.shapes
    assert contract.attributes["channel_axis"] == host.axis
    assert contract.dtype == "float32"


@pytest.mark.parametrize(
    ("name", "reads"), [(n, r) for n in HOSTS for r in ("input", "output") if (n, r) != ("batch_norm3d", "input")]
)
def test_grown_host_is_exact_at_birth_learns_and_gives_the_host_back(name: str, reads: str) -> None:
    model, x = wrapped(name)
    blueprint = blueprint_for(name) if reads == "input" else "scale_shift"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.eval()
    before = model(x).detach()
    made_graft = esper.graft(model, "host", blueprint, optimizer=optimizer)
    assert torch.equal(model(x), before)
    grown = dict(model.get_submodule("host.kasmina.0").named_parameters())
    assert made_graft.parameter_names == tuple(f"host.kasmina.0.{n}" for n in grown)
    moved: set[str] = set()
    for _ in range(2):
        optimizer.zero_grad()
        (model(x) - 1.0).square().mean().backward()
        moved |= {n for n, p in grown.items() if p.grad is not None and bool(p.grad.any())}
        optimizer.step()
    assert moved == set(grown)
    with esper.dormant(model):
        host_only = model(x).detach()
    assert not torch.equal(model(x), host_only)
    esper.cull(model, "host", optimizer=optimizer)
    assert torch.equal(model(x), host_only)
    assert not any("kasmina" in name for name in model.state_dict())


@pytest.mark.parametrize("name", HOSTS)
def test_every_blueprint_is_exact_at_birth_or_refused_by_name(name: str) -> None:
    model, x = wrapped(name)
    model.eval()
    before = model(x)
    accepted = []
    for blueprint in BLUEPRINTS:
        try:
            esper.graft(model, "host", blueprint)
        except esper.GrowthError as error:
            assert error.code == "ESP-434"
            assert "'host'" in error.message
            continue
        accepted.append(blueprint)
        assert torch.equal(model(x), before)
        stirred(model)
        assert not torch.equal(model(x), before)
        esper.cull(model, "host")
        assert torch.equal(model(x), before)
    everywhere = {"scale_shift", "norm_gate"}
    assert (everywhere if name == "batch_norm3d" else everywhere | {"se_gate", "depth_block"}) <= set(accepted)


@pytest.mark.parametrize("name", HOSTS)
def test_copies_and_pickles_of_a_grown_host_compute_the_same(name: str) -> None:
    model, x = wrapped(name)
    esper.graft(model, "host", blueprint_for(name))
    stirred(model)
    model.eval()
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), expected)
        assert esper.status(twin) == esper.status(model)
        esper.cull(twin, "host")
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("name", ["linear", "embedding", "batch_norm2d", "attention", "convolutional_block"])
def test_saved_and_loaded_host_computes_the_same(name: str, tmp_path: Path) -> None:
    model, x = wrapped(name)
    esper.graft(model, "host", "norm_gate")
    stirred(model)
    model.eval()
    esper.save(model, tmp_path / "grown")
    base, _ = made(name, seed=9)
    back = esper.load(tmp_path / "grown", base).eval()
    assert torch.equal(back(x), model(x))
