"""Work that a workflow has going beside its main coroutine, and what it means when it fails."""

import asyncio
from collections.abc import Callable
from collections.abc import Coroutine

from temporalio import workflow
from temporalio.exceptions import ActivityError
from temporalio.exceptions import ApplicationError
from temporalio.exceptions import TimeoutError as TemporalTimeoutError

_DRAINED = frozenset({"WorkerDraining", "LeaseLost"})


class TrainerLost(Exception):
    """The process that holds the run's model is gone, or no longer ours.

    `silent` is true when it is known to be dead: then nothing that runs there will ever answer.
    """

    def __init__(self, reason: str, *, silent: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.silent = silent


def trainer_loss(failure: BaseException) -> TrainerLost | None:
    """`failure` as the loss of a trainer; `None` when it is something else (an error of the task itself)."""
    if isinstance(failure, TrainerLost):
        return failure
    if not isinstance(failure, ActivityError):
        return None
    cause = failure.cause
    if isinstance(cause, TemporalTimeoutError):
        kind = cause.type.name.lower() if cause.type is not None else "unknown"
        return TrainerLost(f"{failure.activity_type}: {kind} time-out")
    if isinstance(cause, ApplicationError) and cause.type in _DRAINED:
        return TrainerLost(f"{failure.activity_type}: {cause.type}")
    return None


class TaskRing:
    """Named tasks. The first failure is kept; `wake` is called whenever one ends."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self.failure: BaseException | None = None

    def start(self, key: str, work: Coroutine[object, object, None]) -> None:
        """Begin `work` under a name that is not in use."""
        self._tasks[key] = asyncio.create_task(self._run(key, work), name=key)

    def __contains__(self, key: str) -> bool:
        return key in self._tasks

    def __len__(self) -> int:
        return len(self._tasks)

    async def cancel(self) -> None:
        """Cancel everything and wait until it has ended; its failures no longer matter."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await workflow.wait(tasks)
        self.forget()

    def forget(self) -> None:
        """Let go of everything at once: nobody is there to answer a cancellation."""
        self._tasks = {}
        self.failure = None

    async def _run(self, key: str, work: Coroutine[object, object, None]) -> None:
        this = asyncio.current_task()
        try:
            await work
        except BaseException as failure:
            if self._tasks.get(key) is this and self.failure is None:
                self.failure = failure
        finally:
            if self._tasks.get(key) is this:
                del self._tasks[key]
            self._wake()
