"""Every timeout, retry policy and concurrency limit of Esper's Temporal work, in one table.

`schedule_to_start` is never retried by the server: on a pinned queue it is how a dead process is noticed
when nothing runs there. Training activities have one attempt: a second one would wait on the same dead
queue, so the retry is the workflow's, with a new lease.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from temporalio.common import RetryPolicy
from temporalio.workflow import ActivityCancellationType

from esper.contracts.config import EsperConfig

HEARTBEAT = timedelta(seconds=10)
"""The longest silence of live work. Ten seconds, so that a server that was away for a moment does not
cost a lease twice (heartbeat and sticky queue). Work that beats between two steps may be silent for longer, where
its run says so: `longest_silence`."""

STUCK = 3
"""After so many times the longest silence a trainer ends itself. By then its run has been taken over, so that nothing
is lost by it; and a process that was only stopped for a moment has had the time to go on. Work that was cancelled has
as long to end before its process counts as stuck."""

HEARTBEAT_THROTTLE = timedelta(seconds=2)
"""How often heartbeats really travel; also the latency with which a cancellation reaches an activity."""

GRACEFUL_SHUTDOWN = timedelta(seconds=20)
"""What an activity gets to finish its step and commit after SIGTERM."""

OLD_QUEUE_PATIENCE = timedelta(seconds=3)
"""How long the former trainer of a run is asked first after a time-out, before another one is claimed."""

RECLAIM_PATIENCE = timedelta(seconds=5)
"""How long it may take to answer once it has been asked: one short write to Urza."""

LOST_TRAINER_LIMIT = 8
"""Lease losses in a row without one finished epoch between them after which a run is failed."""

STOP_PATIENCE = timedelta(seconds=30)
"""How long a run that is to stop, and has lost its trainer, waits for another one to export its model."""

INSTALL_ATTEMPTS = 3
"""Tries to fetch and record a kernel while the store is away; after that its adaptation is given up."""

DECISION_LIMIT = timedelta(minutes=10)
"""For one decision, whatever holds it up. After that the run waits, and says so."""

DECISION_ATTEMPTS = 5
"""Tries to start a decision while one of the same name, of an earlier life of the run, still ends."""

FORGE_MARGIN = timedelta(seconds=30)
"""What a forge needs beside the limited work itself: starting its child, moving bytes."""

DRAIN_LIMIT = GRACEFUL_SHUTDOWN + timedelta(seconds=5)
"""After so long a process that was told to end, and has not, ends at once."""

TRAINER_SLOTS = 12
"""Activities beside each other in a trainer: two epochs, deliveries, a judge, a checkpoint, a claim."""

_ONCE = RetryPolicy(maximum_attempts=1)
_PATIENT = RetryPolicy(
    initial_interval=timedelta(milliseconds=200),
    backoff_coefficient=2.0,
    maximum_interval=timedelta(seconds=10),
)
_BOUNDED = RetryPolicy(
    initial_interval=timedelta(milliseconds=200),
    backoff_coefficient=2.0,
    maximum_interval=timedelta(seconds=5),
    maximum_attempts=4,
)


@dataclass(frozen=True)
class ActivityOptions:
    """How one activity is run. `None` leaves a limit away."""

    start_to_close: timedelta
    retry: RetryPolicy
    heartbeat: timedelta | None = None
    schedule_to_start: timedelta | None = None
    schedule_to_close: timedelta | None = None
    cancellation: ActivityCancellationType = ActivityCancellationType.TRY_CANCEL

    def keywords(self) -> dict[str, Any]:
        """For `workflow.execute_activity(..., **options.keywords())`."""
        return {
            "start_to_close_timeout": self.start_to_close,
            "retry_policy": self.retry,
            "heartbeat_timeout": self.heartbeat,
            "schedule_to_start_timeout": self.schedule_to_start,
            "schedule_to_close_timeout": self.schedule_to_close,
            "cancellation_type": self.cancellation,
        }


def _pinned(start_to_close: timedelta, *, heartbeat: timedelta | None = HEARTBEAT) -> ActivityOptions:
    return ActivityOptions(
        start_to_close=start_to_close,
        retry=_ONCE,
        heartbeat=heartbeat,
        schedule_to_start=timedelta(seconds=20),
        # Two writers on one model are worse than a slow cancellation.
        cancellation=ActivityCancellationType.WAIT_CANCELLATION_COMPLETED,
    )


_RECORD = ActivityOptions(start_to_close=timedelta(seconds=20), retry=_PATIENT)
"""Short work that is safe to do twice, and that a run cannot do without: a dead orchestrator delays it no longer."""

OPTIONS: dict[str, ActivityOptions] = {
    "claim_trainer": ActivityOptions(start_to_close=timedelta(seconds=20), retry=_PATIENT),
    # A process that is stopped, or whose GIL is held, may still be handed the question: it gets no longer to answer.
    "reclaim_trainer": ActivityOptions(
        start_to_close=RECLAIM_PATIENCE, retry=_ONCE, schedule_to_start=OLD_QUEUE_PATIENCE
    ),
    "load_run": _pinned(timedelta(hours=6)),
    "train_epoch": _pinned(timedelta(days=7)),
    "install_kernel": _pinned(timedelta(minutes=30)),
    "abandon_kernel": _pinned(timedelta(minutes=5)),
    "judge_seed": _pinned(timedelta(days=7)),
    "remove_seed": _pinned(timedelta(minutes=5)),
    "checkpoint": _pinned(timedelta(hours=1)),
    "release_trainer": _pinned(timedelta(hours=6)),
    "score_sites": ActivityOptions(
        start_to_close=timedelta(seconds=30), retry=_BOUNDED, schedule_to_close=timedelta(minutes=5)
    ),
    # The workflow bounds both by the run's own `tezzeret.timeout_s`.
    "build_kernel": ActivityOptions(start_to_close=timedelta(hours=1), retry=_BOUNDED, heartbeat=HEARTBEAT),
    "certify_kernel": ActivityOptions(start_to_close=timedelta(hours=1), retry=_BOUNDED, heartbeat=HEARTBEAT),
    "publish_kernel": _RECORD,
    "record_run": _RECORD,
    "record_decision": _RECORD,
    "record_adaptation": _RECORD,
    "record_outcome": _RECORD,
}


def longest_silence(config: EsperConfig) -> timedelta:
    """Of work that beats at step boundaries."""
    return timedelta(seconds=config.training.step_timeout_s)
