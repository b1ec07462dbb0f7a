"""Which kernels fit which sites: sizes that vary from call to call, and everything that must not."""

from typing import Any

import pytest
import torch
from host_zoo import made
from host_zoo import stirred
from torch import Tensor
from torch import nn

import esper
from esper.runtime.kasmina.growing.fitting import site_contract
from esper.runtime.kasmina.layer import state_of
from esper.runtime.tezzeret.artifact import KernelFiles
from esper.runtime.tezzeret.build import build_kernel


class One(nn.Module):
    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        self.host = host

    def forward(self, x: Tensor) -> Any:
        return self.host(x)


def wrapped(host: nn.Module, *shape: int) -> nn.Module:
    torch.manual_seed(0)
    return esper.wrap(One(host), ["host"], example_inputs=torch.randn(shape))


def kernel_of(model: nn.Module, blueprint: str, **given: Any) -> KernelFiles:
    contract = site_contract(model, "host", blueprint)
    return build_kernel(blueprint, contract, given, seed=3, samples=None, max_parameters=10**6)


@pytest.mark.parametrize(
    ("blueprint", "host", "built", "used"),
    [
        ("bottleneck", lambda: nn.Linear(6, 4), (2, 5, 6), (3, 9, 6)),
        ("scale_shift", lambda: nn.Linear(6, 4), (2, 5, 6), (3, 9, 6)),
        ("depth_block", lambda: nn.LayerNorm(6), (2, 5, 6), (3, 9, 6)),
        ("bottleneck", lambda: nn.Conv2d(3, 4, 3), (2, 3, 8, 8), (2, 3, 9, 11)),
        ("se_gate", lambda: nn.Conv2d(3, 4, 3), (2, 3, 8, 8), (2, 3, 9, 11)),
        ("norm_gate", lambda: nn.BatchNorm1d(3), (4, 3, 8), (4, 3, 5)),
    ],
)
def test_a_kernel_fits_where_the_sizes_that_differ_do_not_matter(
    blueprint: str, host: Any, built: tuple[int, ...], used: tuple[int, ...]
) -> None:
    files = kernel_of(wrapped(host(), *built), blueprint)
    model, x = wrapped(host(), *used), torch.randn(used)
    before = model.eval()(x)
    esper.graft(model, "host", blueprint, kernel=files)
    assert torch.equal(model(x), before)
    stirred(model)
    assert not torch.equal(model(x), before)


@pytest.mark.parametrize(
    ("blueprint", "here", "built", "there", "used", "told"),
    [
        ("bottleneck", lambda: nn.Linear(6, 4), (2, 6), lambda: nn.Linear(5, 4), (2, 5), "input shape"),
        ("bottleneck", lambda: nn.Linear(6, 4), (2, 6), lambda: nn.Linear(6, 5), (2, 6), "output shape"),
        ("scale_shift", lambda: nn.Linear(6, 4), (2, 6), lambda: nn.Linear(6, 5), (2, 6), "input shape"),
        ("bottleneck", lambda: nn.Linear(6, 4), (2, 6), lambda: nn.Linear(6, 4), (2, 5, 6), "input shape"),
        ("bottleneck", lambda: nn.Conv2d(3, 4, 3), (2, 3, 8, 8), lambda: nn.Conv2d(2, 4, 3), (2, 2, 8, 8), "input"),
        (
            "bottleneck",
            lambda: nn.Conv2d(3, 4, 3),
            (2, 3, 8, 8),
            lambda: nn.Conv2d(3, 4, 3, padding=1),
            (2, 3, 8, 8),
            "output shape",
        ),
        ("norm_gate", lambda: nn.LayerNorm(6), (2, 6), lambda: nn.Linear(6, 6), (2, 6), "kind is linear"),
        ("bottleneck", lambda: nn.Linear(6, 4), (2, 6), lambda: nn.Linear(6, 4).double(), (2, 6), "dtype is float64"),
    ],
)
def test_a_kernel_is_refused_where_it_matters(
    blueprint: str, here: Any, built: Any, there: Any, used: Any, told: str
) -> None:
    files = kernel_of(wrapped(here(), *built), blueprint)
    host = there()
    dtype = host.weight.dtype
    model = esper.wrap(One(host), ["host"], example_inputs=torch.randn(used, dtype=dtype))
    before = esper.weights_digest(model)
    with pytest.raises(esper.GrowthError, match=f"does not fit 'host': .*{told}") as caught:
        esper.graft(model, "host", blueprint, kernel=files)
    assert caught.value.code == "ESP-434"
    assert esper.weights_digest(model) == before


def test_a_kernel_for_other_ids_is_refused() -> None:
    ids = torch.randint(10, (3, 4))
    first = esper.wrap(One(nn.Embedding(10, 8)), ["host"], example_inputs=ids)
    other = esper.wrap(One(nn.Embedding(12, 8)), ["host"], example_inputs=ids)
    with pytest.raises(esper.GrowthError, match="number of embeddings is 12, it needs 10"):
        esper.graft(other, "host", "lowrank", kernel=kernel_of(first, "lowrank"))


@pytest.mark.parametrize("blueprint", ["bottleneck", "scale_shift", "se_gate", "depth_block", "attention"])
def test_a_grown_site_takes_sequences_of_every_length_and_batches_of_every_size(blueprint: str) -> None:
    model, x = made("block")
    esper.wrap(model, ["host"], example_inputs=x)
    esper.graft(model, "host", blueprint)
    stirred(model)
    for shape in ((4, 5, 8), (2, 5, 8), (1, 11, 8), (7, 1, 8)):
        batch = torch.randn(shape)
        torch.testing.assert_close(model(batch)[:1], model(batch[:1]))
    assert state_of(model.host).input_shape == (5, 8)


def test_a_trained_kernel_begins_at_alpha_zero_and_an_untrained_one_at_one() -> None:
    model = wrapped(nn.Linear(6, 6), 2, 6)
    for blueprint in ("bottleneck", "scale_shift", "norm_gate"):
        files = kernel_of(model, blueprint)
        assert esper.graft(model, "host", blueprint, kernel=files).alpha == 1.0
        esper.cull(model, "host")
    random_kernel = build_kernel(
        "bottleneck",
        site_contract(model, "host", "bottleneck"),
        {"activation": "tanh"},
        seed=3,
        samples=None,
        max_parameters=10**6,
        initialiser="random",
    )
    x = torch.randn(2, 6)
    before = model(x)
    assert esper.graft(model, "host", "bottleneck", kernel=random_kernel).alpha == 0.0
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("initialiser", ["residual", "kaiming", "net2net"])
def test_first_weights_come_from_the_initialiser_that_was_named(initialiser: str) -> None:
    torch.manual_seed(0)
    model = esper.wrap(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)), example_inputs=torch.ones(2, 6))
    x = torch.randn(4, 6)
    before = model(x)
    esper.graft(model, "0", "bottleneck", initialiser=initialiser)
    assert torch.equal(model(x), before)
    with pytest.raises(esper.GrowthError, match="has its hyperparameters and weights"):
        esper.graft(model, "0", "bottleneck", kernel="sha256:" + "0" * 64, initialiser=initialiser)
    with pytest.raises(esper.BlueprintError) as caught:
        esper.graft(model, "0", "bottleneck", initialiser=initialiser + "x")
    assert caught.value.code == "ESP-428"
    assert len(model[0].kasmina) == 1


def test_seeds_that_read_the_output_see_what_was_added_before_them() -> None:
    torch.manual_seed(0)
    model = wrapped(nn.Linear(6, 6), 4, 6)
    x = torch.randn(4, 6)
    host = model(x)
    for slot, blueprint in enumerate(("scale_shift", "bottleneck", "norm_gate", "bottleneck")):
        esper.graft(model, "host", blueprint)
        stirred(model, slot=slot)
    kernels = model.host.kasmina
    h = host + kernels["1"](x) + kernels["3"](x)
    h = h + kernels["0"](h)
    h = h + kernels["2"](h)
    torch.testing.assert_close(model(x), h)
    esper.graft(wrapped(nn.Linear(6, 6), 4, 6), "host", "noop")


def test_alpha_is_a_valve_for_seeds_that_read_the_output_too() -> None:
    from esper.runtime.kasmina.growth import set_alpha

    model = wrapped(nn.Linear(6, 6), 4, 6)
    x = torch.randn(4, 6)
    host = model(x)
    esper.graft(model, "host", "scale_shift")
    stirred(model)
    whole = model(x) - host
    set_alpha(model, "host", 0, 0.25)
    torch.testing.assert_close(model(x), host + 0.25 * whole)
    set_alpha(model, "host", 0, 0.0)
    assert torch.equal(model(x), host)


def test_a_control_without_weights_is_grown_and_culled() -> None:
    model = wrapped(nn.Linear(6, 6), 4, 6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    x = torch.randn(4, 6)
    before = model(x)
    made_graft = esper.graft(model, "host", "noop", optimizer=optimizer)
    assert made_graft.parameters == 0
    assert made_graft.parameter_names == ()
    assert torch.equal(model(x), before)
    model(x).sum().backward()
    optimizer.step()
    assert len(optimizer.param_groups) == 1
    esper.cull(model, "host", optimizer=optimizer)
    assert len(optimizer.param_groups[0]["params"]) == 2


def test_no_random_number_is_drawn_by_growth() -> None:
    model, x = made("convolutional_block")
    esper.wrap(model, ["host", "host.conv", "host.norm"], example_inputs=x)
    before = torch.get_rng_state()
    for site in ("host", "host.conv", "host.norm"):
        esper.graft(model, site, "bottleneck")
        esper.graft(model, site, "depth_block")
    assert torch.equal(torch.get_rng_state(), before)
