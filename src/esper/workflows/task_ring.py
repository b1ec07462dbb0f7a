"""Work that a workflow has going beside its main coroutine, and what it means when it fails."""

import asyncio
from collections.abc import Callable
from collections.abc import Coroutine

from temporalio import workflow
from temporalio.exceptions import ActivityError
from temporalio.exceptions import ApplicationError
from temporalio.exceptions import TimeoutError as TemporalTimeoutError
from temporalio.exceptions import is_cancelled_exception

from esper.errors import DataUnavailable
from esper.errors import UnavailableError
from esper.errors import by_name


class TrainerLost(Exception):
    """The run must be loaded anew: the process that holds its model is gone, no longer ours, or cannot go on.

    `silent`: known to be dead, so that nothing that runs there will ever answer. `drained`: it went in order,
    which costs no penalty. `may_live`: it only fell silent, and is the first to be asked again.
    `unavailable`: a service that it needs is away for a while.
    """

    def __init__(
        self,
        reason: str,
        *,
        silent: bool = False,
        drained: bool = False,
        may_live: bool = False,
        unavailable: bool = False,
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.silent = silent
        self.drained = drained
        self.may_live = may_live
        self.unavailable = unavailable


def trainer_loss(failure: BaseException) -> TrainerLost | None:
    """`failure` as the loss of a trainer; `None` when it is something else (an error of the task itself)."""
    if isinstance(failure, TrainerLost):
        return failure
    if not isinstance(failure, ActivityError):
        return None
    cause, what = failure.cause, failure.activity_type
    if isinstance(cause, TemporalTimeoutError):
        kind = cause.type.name.lower() if cause.type is not None else "unknown"
        return TrainerLost(f"{what}: {kind} time-out", may_live=True)
    if is_cancelled_exception(failure):
        # Nobody asks for a cancellation and then looks at what came of it: the trainer itself gave up.
        return TrainerLost(f"{what}: cancelled")
    if isinstance(cause, ApplicationError) and cause.type is not None:
        if cause.type in ("WorkerDraining", "LeaseLost"):
            return TrainerLost(f"{what}: {cause.type}", drained=cause.type == "WorkerDraining")
        error = by_name(cause.type)
        if error is not None and issubclass(error, UnavailableError) and error is not DataUnavailable:
            return TrainerLost(f"{what}: {cause.message}", may_live=True, unavailable=True)
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

    async def cancel(self, patience: float) -> bool:
        """Cancel everything and wait until it has ended, at most `patience` seconds; its failures no longer
        matter. False when something has not ended: whoever does it is stuck."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        stuck = (await workflow.wait(tasks, timeout=patience))[1] if tasks else []
        self.forget()
        return not stuck

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
