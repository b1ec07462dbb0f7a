"""How work says that it lives, and learns that it should end."""

import threading
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
from temporalio.exceptions import ApplicationError
from temporalio.exceptions import CancelledError
from temporalio.service import RPCError
from temporalio.service import RPCStatusCode
from temporalio.testing import ActivityEnvironment

from esper.activities import heartbeats
from esper.activities.heartbeats import Draining
from esper.activities.heartbeats import beat
from esper.activities.heartbeats import draining_to_failure
from esper.activities.heartbeats import pulse


def listening(hear: Callable[..., None]) -> ActivityEnvironment:
    environment = ActivityEnvironment()
    environment.on_heartbeat = hear
    return environment


def test_a_beat_carries_what_is_going_on() -> None:
    heard: list[object] = []
    listening(heard.append).run(beat, {"step": 3})
    assert heard == [{"step": 3}]


def test_a_beat_ends_work_that_was_cancelled() -> None:
    environment = ActivityEnvironment()

    def work() -> None:
        beat(1)
        environment.cancel()
        beat(2)

    with pytest.raises(CancelledError):
        environment.run(work)


def test_a_beat_drains_a_worker_that_shuts_down_before_anything_else() -> None:
    environment = ActivityEnvironment()

    def work() -> None:
        environment.worker_shutdown()
        beat(1)

    with pytest.raises(Draining):
        environment.run(work)


@pytest.mark.fault("C7")
@pytest.mark.parametrize(
    "fault",
    [
        TimeoutError(),
        RuntimeError("Event loop is closed"),
        RPCError("namespace rate limit exceeded", RPCStatusCode.RESOURCE_EXHAUSTED, b""),
    ],
)
def test_a_heartbeat_that_does_not_arrive_costs_no_training(fault: Exception) -> None:
    def hear(*details: object) -> None:
        raise fault

    steps = []

    def work() -> None:
        with pulse("working"):
            for step in range(3):
                beat(step)
                steps.append(step)

    listening(hear).run(work)
    assert steps == [0, 1, 2]


def test_draining_has_the_type_that_costs_no_penalty() -> None:
    with pytest.raises(ApplicationError) as failed, draining_to_failure():
        raise Draining
    assert (failed.value.type, failed.value.non_retryable) == ("WorkerDraining", True)
    with pytest.raises(KeyError), draining_to_failure():
        raise KeyError


def test_a_pulse_beats_beside_the_work_and_ends_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeats, "HEARTBEAT", timedelta(seconds=0.04))
    heard: list[object] = []
    enough = threading.Event()

    def hear(details: object) -> None:
        heard.append(details)
        if len(heard) >= 3:
            enough.set()

    def work() -> None:
        with pytest.raises(KeyError), pulse("loading"):
            assert enough.wait(10)
            raise KeyError

    listening(hear).run(work)
    assert set(heard) == {"loading"}
    after = len(heard)
    time.sleep(0.05)
    assert len(heard) == after
    assert not [thread for thread in threading.enumerate() if thread.name == "pulse"]
