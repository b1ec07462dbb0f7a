"""Many cycles of growing and removing leave nothing that can be counted (resident memory: benchmarks.engine.memory)."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch import nn
from torch import optim

import esper


def counts(model: nn.Module, optimizer: optim.Optimizer) -> dict[str, int]:
    gc.collect()
    alive = gc.get_objects()
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "entries": sum(len(group["params"]) for group in optimizer.param_groups),
        "states": len(optimizer.state),
        "groups": len(optimizer.param_groups),
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
        "modules": sum(issubclass(type(item), nn.Module) for item in alive),
        "tensors": sum(issubclass(type(item), Tensor) for item in alive),
        "files": len(list(Path("/proc/self/fd").iterdir())),
    }


def _cull(blueprint: str) -> Callable[[Any, Any], None]:
    def cycle(model: Any, train: Callable[[], optim.Optimizer]) -> None:
        esper.graft(model, "fc1", blueprint, optimizer=train())
        esper.cull(model, "fc1", optimizer=train())

    return cycle


def _roll_back(model: Any, train: Callable[[], optim.Optimizer]) -> None:
    optimizer = train()
    snapshot = esper.snapshot(model, optimizer)
    esper.graft(model, "fc1", "widen", optimizer=optimizer)
    train()
    esper.fossilize(model, optimizer=optimizer)
    esper.rollback(snapshot)


CYCLES: dict[str, Callable[[Any, Any], None]] = {
    "cull": _cull("bottleneck"),
    "cull widen": _cull("widen"),
    "rollback": _roll_back,
}


@pytest.mark.parametrize("named", CYCLES)
def test_fifty_cycles_leave_nothing(zoo: Any, named: str) -> None:
    model, x = zoo.make("mlp")
    esper.wrap(model, example_inputs=x)
    optimizer = optim.AdamW(model.parameters(), lr=0.001)

    def train() -> optim.Optimizer:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        return optimizer

    def cycle() -> None:
        CYCLES[named](model, train)

    for _ in range(3):
        cycle()
    before = counts(model, optimizer)
    for _ in range(50):
        cycle()
    assert counts(model, optimizer) == before
