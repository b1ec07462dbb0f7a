"""What a kernel costs: floating point operations, memory, time."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from esper.runtime.tezzeret.certifying.steps import backward

TIMED_ROWS = 32
TIMED_CALLS = 15
FEWEST_CALLS = 3
TIMED_SECONDS = 0.05
"""After so long no further call is timed: a large site is timed by few."""
COUNTED_ROWS = 2
"""Counts are taken on two rows: one is too few for a batch norm that trains."""


def flops_per_sample(module: nn.Module, x: Tensor) -> int:
    """Forward floating point operations of one sample as `torch.utils.flop_counter` counts them."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(x[:COUNTED_ROWS])
    return int(counter.get_total_flops()) // COUNTED_ROWS


def held_bytes(module: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def peak_bytes_per_sample(module: nn.Module, x: Tensor, g: Tensor) -> int:
    """The most bytes that live at one time between the operations of a forward and backward, for one more sample.

    Counted and not measured, so that it repeats: every tensor that an operation makes, from when it is made until
    the last reference to it goes. The same operations run on two numbers of rows; what does not grow with them (the
    gradients of the parameters) falls out, as does the scratch memory inside one operation. Gradients are left on
    the parameters.
    """
    few, more = (_live_bytes(module, x[:rows], g[:rows]) for rows in (COUNTED_ROWS, 2 * COUNTED_ROWS))
    return max(0, *(b - a for a, b in zip(few, more, strict=False))) // COUNTED_ROWS


def median_us(module: nn.Module, x: Tensor) -> float:
    """Wall time of one forward without gradients on up to `TIMED_ROWS` rows, in microseconds."""
    timed = x[:TIMED_ROWS]
    with torch.no_grad():
        module(timed)
        times: list[float] = []
        while len(times) < TIMED_CALLS and (len(times) < FEWEST_CALLS or sum(times) < TIMED_SECONDS):
            start = time.perf_counter()
            module(timed)
            times.append(time.perf_counter() - start)
    return 1e6 * sorted(times)[len(times) // 2]


def _live_bytes(module: nn.Module, x: Tensor, g: Tensor) -> list[int]:
    """What lives after each operation of a forward and backward."""
    module.zero_grad(set_to_none=True)
    with _LiveBytes() as live:
        backward(module, x, g)
    after: list[int] = live.after
    return after


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages that operations inside of it make, as long as they live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.after: list[int] = []
        self._live: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {_key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        self._live = {key: (ref, size) for key, (ref, size) in self._live.items() if not ref.expired()}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and (key := _key(leaf)) not in given and key not in self._live:
                storage = leaf.untyped_storage()
                self._live[key] = (_weakly(storage), storage.nbytes())
        self.after.append(sum(size for _, size in self._live.values()))
        return result


_weakly: Callable[[torch.UntypedStorage], Any] = StorageWeakRef


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
