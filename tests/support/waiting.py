"""Waiting for what other threads and processes do."""

import time
from collections.abc import Callable
from typing import TypeVar

FoundT = TypeVar("FoundT")


def until(true: Callable[[], FoundT], what: str, seconds: float = 240, pause: float = 0.02) -> FoundT:
    """Wait until something is true, looking every `pause` seconds; gives what it is."""
    deadline = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(pause)
    return found
