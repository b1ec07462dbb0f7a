"""How an activity in a thread says that it lives, and how it learns that it should stop."""

import contextvars
import logging
import threading
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from temporalio import activity
from temporalio.exceptions import ApplicationError
from temporalio.exceptions import CancelledError
from temporalio.service import RPCError

from esper.runtime.temporal.options import HEARTBEAT
from esper.runtime.watchdog import Watchdog


class Draining(Exception):
    """The worker shuts down: finish the step, commit, let another process go on."""


log = logging.getLogger(__name__)

_alive: ContextVar[Callable[[], None]] = ContextVar("esper_alive", default=lambda: None)
"""Tells the watchdog of the present work that it lives."""


@contextmanager
def watched(watchdog: Watchdog) -> Iterator[None]:
    """Every heartbeat inside, also one from beside the work, shows the watchdog that it lives."""
    with watchdog.watching() as alive:
        token = _alive.set(alive)
        try:
            yield
        finally:
            _alive.reset(token)


def beat(details: object) -> None:
    """Heartbeat with what is going on; raises when the activity should end at the next step boundary.

    Raises `CancelledError` when the workflow cancelled it, `Draining` when the worker shuts down.
    """
    _send(details)
    if activity.is_worker_shutdown():
        raise Draining
    if activity.is_cancelled():
        raise CancelledError("the workflow cancelled this activity")


def _send(details: object) -> None:
    """One heartbeat that does not reach the event loop (blocked, or gone with its worker) or that the server has no
    capacity for is worth no training: if none arrives, the server notices."""
    _alive.get()()
    try:
        activity.heartbeat(details)
    except (TimeoutError, RuntimeError, RPCError) as error:
        log.warning("a heartbeat was not sent: %s", error or type(error).__name__)


@contextmanager
def draining_to_failure() -> Iterator[None]:
    """A drained activity fails with the type that costs its run no penalty."""
    try:
        yield
    except Draining:
        raise ApplicationError("the trainer shuts down", type="WorkerDraining", non_retryable=True) from None


@contextmanager
def pulse(details: str) -> Iterator[None]:
    """Heartbeats from beside an opaque, bounded piece of work (loading a data set, exporting a model)."""
    ended = threading.Event()
    context = contextvars.copy_context()

    def beats() -> None:
        while not ended.wait(HEARTBEAT.total_seconds() / 4):
            _send(details)

    thread = threading.Thread(target=context.run, args=(beats,), name="pulse", daemon=True)
    _send(details)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
