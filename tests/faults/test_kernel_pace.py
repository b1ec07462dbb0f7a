"""When a kernel is found slow: a pure function of step times."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies

from esper.runtime.tolaria.live.kernel_faults.pace import FACTOR
from esper.runtime.tolaria.live.kernel_faults.pace import FLOOR_SECONDS
from esper.runtime.tolaria.live.kernel_faults.pace import WINDOW
from esper.runtime.tolaria.live.kernel_faults.pace import WINDOWS
from esper.runtime.tolaria.live.kernel_faults.pace import Pace
from esper.runtime.tolaria.live.kernel_faults.pace import percentile_95

pytestmark = pytest.mark.fault("A10")

FIRST = 1
"""The first step with a kernel counts for nothing."""


def found_slow(before: list[float], beside: list[float]) -> int | None:
    """The step, from 1, at which it is found."""
    pace = Pace()
    for seconds in before:
        pace.without(seconds)
    for step, seconds in enumerate(beside, start=1):
        if pace.beside("run/a1", seconds) is not None:
            return step
    return None


def test_kernel_ten_times_slower_is_found_within_three_windows() -> None:
    assert found_slow([0.02] * 40, [0.21] * 200) == FIRST + WINDOWS * WINDOW


def test_nothing_is_found_without_steps_to_compare_with() -> None:
    assert found_slow([0.02] * 3, [9.0] * 500) is None


def test_one_step_that_stood_still_is_not_a_slow_kernel() -> None:
    assert found_slow([0.02] * 40, ([0.02] * (WINDOW - 1) + [60.0]) * 20) is None


def test_slow_windows_must_come_in_a_row() -> None:
    slow, quick = [1.0] * WINDOW, [0.02] * WINDOW
    assert found_slow([0.02] * 40, [0.0, *(slow + slow + quick) * 5]) is None


def test_steps_of_another_graft_do_not_count() -> None:
    pace = Pace()
    for _ in range(WINDOW):
        pace.without(0.02)
    for number in range(10):
        assert all(pace.beside(f"run/a{number}", 1.0) is None for _ in range(WINDOWS * WINDOW))


@given(
    strategies.floats(1e-5, 1.0), strategies.lists(strategies.floats(0.0, 1.0), min_size=1, max_size=WINDOWS * WINDOW)
)
def test_no_kernel_within_the_limits_is_ever_found_slow(usual: float, beside: list[float]) -> None:
    limit = max(FLOOR_SECONDS, FACTOR * usual)
    assert found_slow([usual] * WINDOW, [seconds * limit for seconds in beside] * 10) is None


@given(strategies.lists(strategies.floats(0, 1e3), min_size=1, max_size=200))
def test_95_of_100_are_not_above_the_percentile(seconds: list[float]) -> None:
    value = percentile_95(seconds)
    assert value in seconds
    assert sum(each <= value for each in seconds) >= 0.95 * len(seconds) - 1e-9
    assert sum(each < value for each in seconds) < math.ceil(0.95 * len(seconds))
