"""Growth of a model that several processes train as replicas (`DistributedDataParallel`).

The wrapper knows the parameters that it was made with, and no others: what is grown inside it trains on each rank by
itself, and the replicas drift apart without an error (measured: a spread of .084 after some steps). So growth there is
refused, but through `grow_replicas`, which makes the change on every rank, compares the ranks, and puts a new wrapper
around the grown model.
"""

import gc
import hashlib
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from typing import TypeVar

import torch
from torch import distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from esper.errors import GrowthError
from esper.runtime.kasmina.keeping.manifest import growth_manifest
from esper.runtime.kasmina.wrapping.morphable import model_state
from esper.runtime.tezzeret.ir import canonical_json

ResultT = TypeVar("ResultT")

_WAY_OUT = "call esper.grow_replicas(ddp, lambda model: esper.graft(model, ...)) on every rank, at the same step"


def grow_replicas(
    ddp: DistributedDataParallel, change: Callable[[nn.Module], ResultT]
) -> tuple[DistributedDataParallel, ResultT]:
    """Change the wrapped model inside `ddp` (graft, cull, fossilize, rollback) on all ranks alike.

    To be called by every rank of its process group, at the same step boundary, with the same `change`, which gets the
    model. Returns a new wrapper with the old one's settings, and what `change` returned; the old wrapper must not be
    used again. Parameters and buffers are those of rank 0 afterwards, as when a wrapper is made.

    Raises what `change` raises (then on that rank the model is as it was, and the other ranks raise too), GrowthError
    ESP-440 when the ranks do not end in the same structure and the same new weights, and for what is no such wrapper.
    """
    if not isinstance(ddp, DistributedDataParallel):
        raise GrowthError(
            "ESP-440",
            f"a {type(ddp).__name__} is no DistributedDataParallel",
            hint="give the wrapper; a model that only one process trains is changed directly, with esper.graft",
        )
    model = ddp.module
    model_state(model)
    failure: Exception | None = None
    results: list[ResultT] = []
    with _permitted(model):
        try:
            results.append(change(model))
        except Exception as error:
            failure = error
    # Every rank takes part in the comparison, also one that failed: the others would wait for it for ever.
    alike = _all_alike(ddp, b"" if failure is not None else _structure(model))
    if failure is not None:
        raise failure
    if not alike:
        raise GrowthError(
            "ESP-440",
            "the ranks did not grow alike: another structure, other new weights, or the change failed on one of them",
            hint="make the same change on every rank; the replicas differ now, so load a checkpoint on all of them",
        )
    return _wrapped_again(ddp, model), results[0]


def refuse_replicated(model: nn.Module, verb: str) -> None:
    """Raises GrowthError ESP-440 when the model is inside a wrapper that would not see the change."""
    if not distributed.is_available() or not distributed.is_initialized() or id(model) in _PERMITTED:
        return
    sharded = next((cls.__name__ for cls in type(model).__mro__ if cls.__name__ == "FSDPModule"), None)
    if sharded is not None:
        raise GrowthError(
            "ESP-440",
            f"this model is sharded (fully_shard): to {verb} in it would let its ranks drift apart without an error",
            hint="grow before fully_shard, or load the grown model and shard it anew",
        )
    if any(isinstance(other, DistributedDataParallel) and _contains(other, model) for other in gc.get_objects()):
        raise GrowthError(
            "ESP-440",
            f"this model is inside DistributedDataParallel: to {verb} in it would let its ranks drift apart without "
            "an error",
            hint=_WAY_OUT,
        )


_PERMITTED: set[int] = set()


@contextmanager
def _permitted(model: nn.Module) -> Iterator[None]:
    _PERMITTED.add(id(model))
    try:
        yield
    finally:
        _PERMITTED.discard(id(model))


def _contains(ddp: DistributedDataParallel, model: nn.Module) -> bool:
    # A wrapper that `grow_replicas` has replaced has let its model go.
    return "module" in ddp._modules and any(module is model for module in ddp.modules())


def _structure(model: nn.Module) -> bytes:
    """What must be equal on all ranks: what is grown where, from which kernels, and the shapes of all parameters."""
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    return canonical_json([growth_manifest(model).model_dump(mode="json"), shapes])


def _all_alike(ddp: DistributedDataParallel, structure: bytes) -> bool:
    digest = hashlib.sha256(structure).digest()
    device = next(ddp.module.parameters()).device
    mine = torch.tensor(list(digest), dtype=torch.uint8, device=device)
    gathered = [torch.empty_like(mine) for _ in range(distributed.get_world_size(ddp.process_group))]
    distributed.all_gather(gathered, mine, group=ddp.process_group)
    return bool(structure) and all(torch.equal(mine, other) for other in gathered)


def _wrapped_again(ddp: DistributedDataParallel, model: nn.Module) -> DistributedDataParallel:
    settings: dict[str, Any] = {
        "device_ids": ddp.device_ids,
        "output_device": ddp.output_device,
        "dim": ddp.dim,
        "process_group": ddp.process_group,
        "bucket_cap_mb": ddp.bucket_bytes_cap / 2**20,
        "find_unused_parameters": ddp.find_unused_parameters,
        "gradient_as_bucket_view": ddp.gradient_as_bucket_view,
        "static_graph": ddp.static_graph,
    }
    if not ddp.broadcast_buffers:
        settings["broadcast_buffers"] = False
    # The reducer's hooks on the old parameters go with it; else both wrappers would add up every gradient.
    del ddp.reducer, ddp.logger
    del ddp._modules["module"]
    return DistributedDataParallel(model, **settings)
