"""What the tests of stores that go away share: waits in a hurry, training that outlasts the time away, bad lines."""

import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait
from typing import TypeVar

import pytest
from tcp_proxy import TcpProxy
from tcp_proxy import Weather
from tolaria_world import Driver
from waiting import until

from esper.activities import patience

EPOCH = 7
"""Steps of an epoch of `make_config()`."""

BAD_LINES = ("slow", "sliced", "reset", "half open")

ResultT = TypeVar("ResultT")


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_WAIT_S", 0.05)
    monkeypatch.setattr(patience, "LONGEST_WAIT_S", 0.2)


def step_of(driver: Driver) -> int:
    return driver.session.describe().step


def nothing() -> None:
    """Nothing more to say."""


def outlast(
    driver: Driver,
    begin: Callable[[], object],
    end: Callable[[], object],
    meanwhile: Callable[[], object] = nothing,
) -> None:
    """Two epochs are ordered while nothing can be committed. Training comes to the end of the second and waits there,
    as the commit of the first is still in flight; once it can be made, both are."""
    driver.train(1)
    begin()
    with ThreadPoolExecutor(2) as orders:
        try:
            both = [orders.submit(driver.train, epoch) for epoch in (2, 3)]
            until(lambda: step_of(driver) == 3 * EPOCH, "the end of the third epoch")
            time.sleep(0.5)
            assert step_of(driver) == 3 * EPOCH
            assert not any(order.done() for order in both)
            meanwhile()
        finally:
            end()
        assert [order.result(60)[0].epoch for order in both] == [2, 3]


def survive(line: str, proxy: TcpProxy, work: Callable[[], ResultT], *, slow: Weather, sliced: Weather) -> ResultT:
    """What `work` gives though the line is bad for a second, one of `BAD_LINES`: it may end in it only where something
    still comes through."""
    if line == "slow":
        proxy.up = proxy.down = slow
    elif line == "sliced":
        proxy.up = proxy.down = sliced
    elif line == "reset":
        proxy.refuse = True
        proxy.reset()
    else:
        proxy.blackhole()
    with ThreadPoolExecutor(1) as pool:
        done: Future[ResultT] = pool.submit(work)
        wait([done], timeout=1.0)
        assert line in ("slow", "sliced") or not done.done()
        proxy.heal()
        return done.result(60)
