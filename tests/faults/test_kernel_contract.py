"""What a kernel is checked for before it is grafted, and what it cannot do at all, because it is data."""

import threading

import pytest
import torch
from torch import nn

import esper
from esper.errors import BlueprintError
from esper.errors import GrowthError
from esper.runtime.kasmina import growth
from esper.runtime.kasmina.wrapping.morphable import sites_of
from esper.runtime.tezzeret.blueprints.registry import list_blueprints
from esper.runtime.tezzeret.build import KernelModule
from esper.runtime.tezzeret.build import build_kernel
from esper.runtime.tezzeret.build import load_kernel
from esper.runtime.tolaria.randomness import capture_random_state

pytestmark = pytest.mark.fault("A11")


def mlp(width: int = 16, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)).to(dtype)
    return esper.wrap(model, example_inputs=torch.ones(2, width, dtype=dtype))


def convolutions() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
    return esper.wrap(model, example_inputs=torch.ones(2, 3, 6, 6))


def kernel_for(model: nn.Module, blueprint: str) -> KernelModule:
    contract = growth.site_contract(model, "0", blueprint)
    files = build_kernel(blueprint, contract, {}, seed=1, samples=None, max_parameters=10**6)
    return load_kernel(files, files.digest)


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda: kernel_for(mlp(8), "bottleneck"), "shape is"),
        (lambda: kernel_for(mlp(16, torch.float64), "bottleneck"), "dtype is"),
        (lambda: kernel_for(convolutions(), "bottleneck"), "kind is"),
    ],
    ids=["shape", "dtype", "kind"],
)
def test_kernel_that_does_not_fit_is_refused_by_the_check_that_it_fails(given, message: str) -> None:
    model = mlp()
    before = tensors_of(model)
    with pytest.raises(GrowthError, match=message) as refused:
        growth.attach(model, "0", given())
    assert refused.value.code == "ESP-434"
    assert before.keys() == tensors_of(model).keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors_of(model).items())


def test_kernel_whose_output_has_another_shape_than_it_says_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    kernel = kernel_for(model, "bottleneck")
    forward = KernelModule.forward
    monkeypatch.setattr(KernelModule, "forward", lambda self, x: forward(self, x)[:, :3])
    with pytest.raises(GrowthError, match="the kernel gives") as refused:
        growth.attach(model, "0", kernel)
    assert refused.value.code == "ESP-434"


def fitting(model: nn.Module) -> list[str]:
    """The blueprints that can be built for the first layer."""
    names = []
    for blueprint in list_blueprints():
        try:
            growth.site_contract(model, "0", blueprint.name)
            names.append(blueprint.name)
        except (GrowthError, BlueprintError):
            continue
    return names


@pytest.mark.parametrize(("make", "name"), [(make, name) for make in (mlp, convolutions) for name in fitting(make())])
def test_kernel_draws_no_random_numbers_writes_not_into_its_input_keeps_no_graph_starts_no_thread(make, name) -> None:
    model = make()
    kernel = kernel_for(model, name)
    module = sites_of(model)["0"]
    x = torch.randn(4, *((16,) if isinstance(module, nn.Linear) else (3, 6, 6)), requires_grad=True)
    if kernel.manifest.site.reads == "output":
        x = module(x).detach().requires_grad_()
    content, version, threads = x.detach().clone(), x._version, threading.active_count()
    random = capture_random_state()
    for _ in range(2):
        # A graph that outlived its backward would refuse a second one.
        kernel(x).square().sum().backward()
    after = capture_random_state()
    assert all(torch.equal(random.tensors[key], after.tensors[key]) for key in random.tensors)
    assert x._version == version and torch.equal(x, content)
    assert threading.active_count() == threads
