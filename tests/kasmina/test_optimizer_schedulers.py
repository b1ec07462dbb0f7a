"""Every learning-rate scheduler of torch goes on over a graft as if nothing had happened."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler
from torch.optim import swa_utils

import esper

S = lr_scheduler


def _chained(o: Any) -> Any:
    return S.ChainedScheduler([S.ConstantLR(o, 0.5, 4), S.ExponentialLR(o, 0.9)])


def _sequential(o: Any) -> Any:
    return S.SequentialLR(o, [S.LinearLR(o, 0.1, 1.0, 3), S.CosineAnnealingLR(o, 9)], [3])


SCHEDULERS: dict[type, Callable[[Any], Any]] = {
    S.LambdaLR: lambda o: S.LambdaLR(o, [lambda n: 1 / (n + 1), lambda n: 0.9**n]),
    S.MultiplicativeLR: lambda o: S.MultiplicativeLR(o, [lambda n: 0.95, lambda n: 0.9]),
    S.StepLR: lambda o: S.StepLR(o, 2, 0.5),
    S.MultiStepLR: lambda o: S.MultiStepLR(o, [2, 5, 7], 0.5),
    S.ConstantLR: lambda o: S.ConstantLR(o, 0.3, 6),
    S.LinearLR: lambda o: S.LinearLR(o, 0.1, 1.0, 8),
    S.ExponentialLR: lambda o: S.ExponentialLR(o, 0.9),
    S.SequentialLR: _sequential,
    S.PolynomialLR: lambda o: S.PolynomialLR(o, 12, 2.0),
    S.CosineAnnealingLR: lambda o: S.CosineAnnealingLR(o, 12),
    S.ChainedScheduler: _chained,
    S.ReduceLROnPlateau: lambda o: S.ReduceLROnPlateau(o, patience=1, min_lr=[1e-4, 1e-5]),
    S.CyclicLR: lambda o: S.CyclicLR(o, [0.01, 0.02], [0.1, 0.2], step_size_up=3),
    S.CosineAnnealingWarmRestarts: lambda o: S.CosineAnnealingWarmRestarts(o, 5),
    S.OneCycleLR: lambda o: S.OneCycleLR(o, [0.1, 0.2], total_steps=20),
    swa_utils.SWALR: lambda o: swa_utils.SWALR(o, [0.01, 0.02], anneal_epochs=6),
}


def test_every_scheduler_of_torch_is_covered() -> None:
    found = {
        kind
        for module in (lr_scheduler, swa_utils)
        for name, kind in vars(module).items()
        if inspect.isclass(kind) and issubclass(kind, S.LRScheduler) and not name.startswith("_")
    }
    assert found - {S.LRScheduler} == set(SCHEDULERS)


def rates(zoo: Any, make: Callable[[Any], Any], *, named: bool, grow: bool) -> list[list[float]]:
    model, x = zoo.make("mlp")
    esper.wrap(model, example_inputs=x)
    named_groups: Any = [
        {"params": [(n, p) for n, p in model.named_parameters() if p.dim() > 1], "lr": 0.05},
        {"params": [(n, p) for n, p in model.named_parameters() if p.dim() == 1], "lr": 0.1},
    ]
    plain_groups = [{**group, "params": [p for _, p in group["params"]]} for group in named_groups]
    optimizer = torch.optim.SGD(named_groups if named else plain_groups, lr=0.05, momentum=0.9)
    scheduler = make(optimizer)
    seen = []
    for number in range(12):
        if grow and number in (0, 3, 6):
            esper.graft(model, "fc1", ("widen", "bottleneck")[number % 2], optimizer=optimizer)
        if grow and number == 8:
            esper.cull(model, "fc1", optimizer=optimizer, seed=1)
            esper.fossilize(model, "fc1", optimizer=optimizer)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        # A metric that never gets better makes the plateau scheduler act too.
        scheduler.step(1.0) if isinstance(scheduler, S.ReduceLROnPlateau) else scheduler.step()
        seen.append([group["lr"] for group in optimizer.param_groups])
        assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {
            id(p) for p in model.parameters()
        }
    return seen


@pytest.mark.parametrize("named", [False, True], ids=["parameters", "named_parameters"])
@pytest.mark.parametrize("kind", SCHEDULERS, ids=lambda kind: kind.__name__)
def test_scheduler_gives_the_same_rates_with_and_without_growth(zoo: Any, kind: type, named: bool) -> None:
    grown = rates(zoo, SCHEDULERS[kind], named=named, grow=True)
    assert grown == rates(zoo, SCHEDULERS[kind], named=named, grow=False)
    assert all(len(rate) == 2 for rate in grown)
    assert len({rate[0] for rate in grown}) > 1


def test_fused_sgd_with_dampening_is_refused_beside_a_scheduler(zoo: Any) -> None:
    model, x = zoo.make("mlp")
    esper.wrap(model, example_inputs=x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, dampening=0.5, fused=True)
    scheduler = S.StepLR(optimizer, 1)
    model(x).sum().backward()
    optimizer.step()
    scheduler.step()
    with pytest.raises(esper.GrowthError, match="fused SGD with dampening") as caught:
        esper.graft(model, "fc1", "bottleneck", optimizer=optimizer)
    assert "fused=False" in str(caught.value.hint)
    assert len(optimizer.param_groups) == 1
