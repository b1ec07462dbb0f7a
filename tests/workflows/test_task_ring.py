"""Which failures are the loss of a trainer, and which are the task's own."""

import pytest
from temporalio.exceptions import ActivityError
from temporalio.exceptions import ApplicationError
from temporalio.exceptions import CancelledError
from temporalio.exceptions import RetryState
from temporalio.exceptions import TimeoutError as TemporalTimeoutError
from temporalio.exceptions import TimeoutType

from esper.errors import DatabaseUnavailable
from esper.errors import DataUnavailable
from esper.errors import TargetError
from esper.runtime.temporal.failures import to_failure
from esper.workflows.task_ring import TrainerLost
from esper.workflows.task_ring import trainer_loss


def failed(cause: BaseException) -> ActivityError:
    error = ActivityError(
        "activity failed",
        scheduled_event_id=1,
        started_event_id=2,
        identity="",
        activity_type="train_epoch",
        activity_id="1",
        retry_state=RetryState.MAXIMUM_ATTEMPTS_REACHED,
    )
    error.__cause__ = cause
    return error


def timed_out(kind: TimeoutType) -> TemporalTimeoutError:
    return TemporalTimeoutError("timed out", type=kind, last_heartbeat_details=[])


@pytest.mark.parametrize("kind", list(TimeoutType))
def test_after_a_time_out_the_process_is_asked_again_first(kind: TimeoutType) -> None:
    loss = trainer_loss(failed(timed_out(kind)))
    assert loss is not None
    assert (loss.may_live, loss.drained, loss.silent) == (True, False, False)
    assert kind.name.lower() in loss.reason


def test_a_cancellation_that_nobody_asked_for_is_a_loss() -> None:
    assert trainer_loss(failed(CancelledError("gave up"))) is not None


def test_draining_costs_no_penalty_and_a_lost_lease_does() -> None:
    drained = trainer_loss(failed(ApplicationError("", type="WorkerDraining")))
    fenced = trainer_loss(failed(ApplicationError("", type="LeaseLost")))
    assert drained is not None
    assert fenced is not None
    assert (drained.drained, fenced.drained) == (True, False)


def test_a_service_that_is_away_is_waited_for() -> None:
    loss = trainer_loss(failed(to_failure(DatabaseUnavailable("ESP-331", "away"))))
    assert loss is not None
    assert loss.unavailable


@pytest.mark.parametrize(
    "cause",
    [
        to_failure(TargetError("ESP-310", "no module")),
        to_failure(DataUnavailable("ESP-207", "no folder")),
        ApplicationError("a bug", type="ValueError"),
        ApplicationError("untyped"),
    ],
)
def test_an_error_of_the_task_is_no_loss(cause: ApplicationError) -> None:
    assert trainer_loss(failed(cause)) is None
    assert trainer_loss(cause) is None


def test_a_loss_stays_the_loss_it_is() -> None:
    loss = TrainerLost("killed", silent=True)
    assert trainer_loss(loss) is loss
