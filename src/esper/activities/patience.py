"""How a trainer waits for a store that is away: the one place where a call to Urza is made again.

| limit | value | why |
|---|---|---|
| `FIRST_WAIT_S` | 0.25 s, doubled each time | most outages are a dropped connection |
| `LONGEST_WAIT_S` | 10 s | a store that comes back is noticed within that |
| `FRESH_LIMIT_S` | 10 s | a run without a head: a wrong address or password is said at once, not after minutes |
| `LIMIT_S` | 900 s | a run with a head trains on, until its next commit must wait for the one that is in flight |
| `DRAINING_LIMIT_S` | 8 s | the process was told to end: what is not committed by then is trained again |
| `CALL_LIMIT_S` | 45 s | one call to a database that does not answer; SQLite itself waits 30 s for its lock |

Only what may heal by itself (`UnavailableError`) is tried again, and every call to Urza is safe twice: where the answer
was lost, the next try finds what the first one did. Beyond the limit the error ends the session, and its run goes on
from its last head under a new lease.
"""

import contextvars
import logging
import time
from collections.abc import Callable
from typing import TypeVar

from temporalio import activity

from esper.activities.heartbeats import pulse
from esper.errors import UnavailableError

FIRST_WAIT_S = 0.25
LONGEST_WAIT_S = 10.0
FRESH_LIMIT_S = 10.0
LIMIT_S = 900.0
DRAINING_LIMIT_S = 8.0
CALL_LIMIT_S = 45.0

_LOOK_S = 0.25

log = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")


class Patience:
    """Tries again and again, from any thread. `limit_s` may be changed at any time; `draining` says whether the
    process was told to end."""

    def __init__(self, limit_s: float = LIMIT_S, draining: Callable[[], bool] = lambda: False) -> None:
        self.limit_s = limit_s
        self._draining = draining
        self._drained: float | None = None

    def insist(self, what: str, call: Callable[[], ResultT]) -> ResultT:
        """The result of `call`, made again while the store is away. Raises its last `UnavailableError` when the limit
        has passed, and anything else at once. On the thread of an activity there are heartbeats meanwhile."""
        if activity.in_activity():
            with pulse(what):
                return self._insist(what, call)
        return self._insist(what, call)

    def _insist(self, what: str, call: Callable[[], ResultT]) -> ResultT:
        began, wait_s, tries = time.monotonic(), FIRST_WAIT_S, 0
        while True:
            try:
                result = call()
            except UnavailableError as error:
                tries += 1
                log.warning("%s (try %d): %s", what, tries, error)
                if not self._wait(wait_s, began):
                    raise
                wait_s = min(2 * wait_s, LONGEST_WAIT_S)
                continue
            if tries:
                log.info("%s: done after %.1f s", what, time.monotonic() - began)
            return result

    def _wait(self, wait_s: float, began: float) -> bool:
        """Wait before the next try; false when there is to be none."""
        until = time.monotonic() + wait_s
        while True:
            now = time.monotonic()
            if now - began >= self.limit_s:
                return False
            if self._draining():
                self._drained = now if self._drained is None else self._drained
                if now - self._drained >= DRAINING_LIMIT_S:
                    return False
            if now >= until:
                return True
            time.sleep(min(_LOOK_S, until - now))


def draining_here() -> Callable[[], bool]:
    """A way to ask, from any thread, whether the worker of the present activity shuts down; never outside of one."""
    if not activity.in_activity():
        return lambda: False
    context = contextvars.copy_context()
    # A context can be entered by one thread at a time, its copies by as many as there are.
    return lambda: context.copy().run(activity.is_worker_shutdown)
