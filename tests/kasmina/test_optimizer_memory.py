"""Many cycles of growing and removing leave nothing that can be counted (resident memory: benchmarks.engine.memory)."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch import nn
from torch import optim

import esper


class Census:
    """Counts what came alive since it was made: other tests' garbage may die at any time."""

    def __init__(self) -> None:
        gc.collect()
        self._foreign = {id(item): weakref.ref(item) for item in self._alive(Tensor, nn.Module)}

    def __call__(self, model: nn.Module, optimizer: optim.Optimizer) -> dict[str, int]:
        gc.collect()
        return {
            "parameters": sum(p.numel() for p in model.parameters()),
            "entries": sum(len(group["params"]) for group in optimizer.param_groups),
            "states": len(optimizer.state),
            "groups": len(optimizer.param_groups),
            "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
            "modules": sum(self._own(item) for item in self._alive(nn.Module)),
            "tensors": sum(self._own(item) for item in self._alive(Tensor)),
            "files": len(list(Path("/proc/self/fd").iterdir())),
        }

    @staticmethod
    def _alive(*kinds: type) -> list[Any]:
        return [item for item in gc.get_objects() if issubclass(type(item), kinds)]

    def _own(self, item: object) -> bool:
        known = self._foreign.get(id(item))
        return known is None or known() is not item


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


@pytest.mark.fault("G2")
@pytest.mark.parametrize("named", CYCLES)
def test_fifty_cycles_leave_nothing(zoo: Any, named: str) -> None:
    census = Census()
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
    before = census(model, optimizer)
    for _ in range(50):
        cycle()
    assert census(model, optimizer) == before
