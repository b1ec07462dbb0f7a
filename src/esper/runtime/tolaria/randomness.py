"""The global random generators of a process (Python, NumPy, torch): seeding, capture, restoration.

A run draws from them on its training thread only, in one order, so a copy of their states taken between
two steps is all that a resumed run needs.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy
import torch


@dataclass(frozen=True)
class RandomState:
    """The states of all global generators. `tensors` are uint8 or int64 and never alias the live states.

    `python_gauss` and `numpy_gauss` are the spare normal deviates that those two generators keep.
    """

    tensors: dict[str, torch.Tensor]
    python_version: int
    python_gauss: float | None
    numpy_position: int
    numpy_has_gauss: int
    numpy_gauss: float


def seed_everything(seed: int) -> None:
    """Seed the global generators in the documented order: `random`, `numpy.random`, `torch` (all its devices)."""
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def capture_random_state() -> RandomState:
    """A private copy of every global generator's state."""
    version, internal, gauss = random.getstate()
    legacy: Any = numpy.random.get_state(legacy=True)
    _, keys, position, has_gauss, cached = legacy
    tensors = {
        "python": torch.tensor(internal, dtype=torch.int64),
        "numpy": torch.from_numpy(keys.astype(numpy.int64)),
        "torch": torch.get_rng_state().clone(),
    }
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        for index, state in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"cuda.{index}"] = state.clone()
    return RandomState(tensors, version, gauss, int(position), int(has_gauss), float(cached))


def restore_random_state(state: RandomState) -> None:
    """Set every global generator to a captured state."""
    internal = tuple(int(value) for value in state.tensors["python"].tolist())
    random.setstate((state.python_version, internal, state.python_gauss))
    keys = state.tensors["numpy"].numpy().astype(numpy.uint32)
    numpy.random.set_state(("MT19937", keys, state.numpy_position, state.numpy_has_gauss, state.numpy_gauss))
    torch.set_rng_state(state.tensors["torch"].clone())
    if torch.cuda.is_available():
        for name, tensor in state.tensors.items():
            kind, _, index = name.partition(".")
            if kind == "cuda" and int(index) < torch.cuda.device_count():
                torch.cuda.set_rng_state(tensor.clone(), int(index))


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Whatever is drawn inside leaves no trace in the global generators."""
    state = capture_random_state()
    try:
        yield
    finally:
        restore_random_state(state)
