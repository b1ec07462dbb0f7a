"""How times are taken here: arms alternated in a new random order every round, no garbage collection meanwhile.

Only ratios within one round are compared, and medians of them reported: what else the machine does in a minute hits
all arms alike. A second copy of the baseline among the arms shows what such a ratio is worth (its noise floor).
"""

import gc
import math
import random
import statistics
import time
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Some numbers by three: a median between the ends of the middle half, or of its confidence interval."""

    low: float
    median: float
    high: float
    count: int

    def show(self, digits: int) -> str:
        return f"{self.median:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def spread(values: Sequence[float]) -> Spread:
    """Quartiles of at least one number."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0], 1)
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(low, median, high, len(values))


def median_interval(values: Sequence[float]) -> Spread:
    """The median and its 95 % confidence interval by order statistics (of few values: all of them).

    This is what a goal is held against; `spread` shows how much single values differ.
    """
    ordered = sorted(values)
    count = len(ordered)
    outside = max(0, math.floor(count / 2 - 0.98 * math.sqrt(count)))
    return Spread(ordered[outside], statistics.median(ordered), ordered[count - 1 - outside], count)


VERDICTS = "Goals: `met` by the median; `open`: the median is above, and its interval reaches the goal; else `missed`."
"""What `verdict` says, for the foot of a table."""


def verdict(found: Spread, goal: float) -> str:
    """Whether a median is at most `goal`; `open` when it is above and its interval reaches down to the goal."""
    if found.median <= goal:
        return "met"
    return "open" if found.low <= goal else "missed"


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Collect once, then not until the end of the block."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def alternate(
    arms: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    clock: Callable[[], float] = time.thread_time,
    order_seed: int = 0,
) -> dict[str, list[float]]:
    """Seconds of each arm in each round, after one round that is not counted.

    The default clock counts the CPU time of this thread, so that other processes do not count; an arm must then do
    its work in this thread.
    """
    order = random.Random(order_seed)
    names = list(arms)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with without_garbage_collection():
        for number in range(-1, rounds):
            order.shuffle(names)
            for name in names:
                began = clock()
                arms[name]()
                took = clock() - began
                if number >= 0:
                    seconds[name].append(took)
            gc.collect(0)
    return seconds


def ratios(seconds: Mapping[str, Sequence[float]], arm: str, baseline: str) -> list[float]:
    """Of two arms, round by round."""
    return [a / b for a, b in zip(seconds[arm], seconds[baseline], strict=True)]


def ratio(seconds: Mapping[str, Sequence[float]], arm: str, baseline: str) -> Spread:
    """The ratio of two arms, round by round."""
    return spread(ratios(seconds, arm, baseline))
