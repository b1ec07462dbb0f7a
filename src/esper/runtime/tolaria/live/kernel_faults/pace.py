"""How long a step takes with the kernel on probation, against how long it took before: a timing, so never replayed.

What follows from it is a fact, and that is.
"""

import math
from collections import deque

WINDOW = 32
"""Steps of one look."""

FEWEST = 8
"""Without so many steps before the graft there is nothing to compare with."""

WINDOWS = 3
"""So many looks in a row must find the kernel slow."""

FACTOR = 10.0

FLOOR_SECONDS = 0.065
"""A step that takes no longer is not slow: on a busy machine steps of a millisecond vary more than tenfold."""


class Pace:
    """The newest steps without a kernel on probation, and those with the present one."""

    def __init__(self) -> None:
        self._usual: deque[float] = deque(maxlen=WINDOW)
        self._graft: str | None = None
        self._window: list[float] = []
        self._slow = 0

    def without(self, seconds: float) -> None:
        """A step while nothing was on probation."""
        self._usual.append(seconds)

    def beside(self, adaptation_id: str, seconds: float) -> str | None:
        """A step with the kernel of an adaptation. Why it is too slow, once that is sure."""
        if adaptation_id != self._graft:
            # The first step warms caches up: it counts for nothing.
            self._graft, self._window, self._slow = adaptation_id, [], 0
            return None
        self._window.append(seconds)
        if len(self._window) < WINDOW or len(self._usual) < FEWEST:
            return None
        before, now = percentile_95(self._usual), percentile_95(self._window)
        self._window = []
        self._slow = self._slow + 1 if now > max(FLOOR_SECONDS, FACTOR * before) else 0
        if self._slow < WINDOWS:
            return None
        return f"breaker: a step takes {now * 1000:.0f} ms with its kernel, {before * 1000:.1f} ms without (p95)"


def percentile_95(seconds: deque[float] | list[float]) -> float:
    """The value that 95 % of them do not exceed (nearest rank)."""
    return sorted(seconds)[math.ceil(0.95 * len(seconds)) - 1]
