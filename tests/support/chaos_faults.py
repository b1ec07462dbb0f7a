"""What a soak does to a real stack: processes killed or stopped, objects out of reach, the database locked."""

import os
import signal
import sqlite3
import threading
import time
from collections.abc import Callable
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random

from local_stack import LocalStack

STOPPED_S = 35.0
"""More than three heartbeat time-outs: the stopped process is taken for dead, and comes back as a zombie."""

AWAY_S = (1.0, 6.0)


@dataclass(frozen=True)
class Injected:
    """One fault: when it had been done (wall time), and to what."""

    when: float
    kind: str
    what: str


class Chaos:
    """Faults at one run on one stack. `close` ends what still lasts."""

    def __init__(self, stack: LocalStack, run_id: str, random: Random) -> None:
        self._stack = stack
        self._run_id = run_id
        self._random = random
        self._deck: list[str] = []
        self._lasting: list[threading.Thread] = []
        self._end = threading.Event()

    @property
    def kinds(self) -> Mapping[str, Callable[[], str]]:
        return {
            "trainer killed": self._kill_trainer,
            "trainer stopped, then continued": self._stop_trainer,
            "forge and strategist killed": lambda: self._kill_worker("forge"),
            "orchestrator killed": lambda: self._kill_worker("orchestrator"),
            "server killed": self._kill_server,
            "objects out of reach": self._hide_objects,
            "database locked": self._lock_database,
        }

    def pause(self, mean: float) -> float:
        """Seconds until the next fault."""
        return self._random.expovariate(1 / mean)

    def inject(self) -> Injected:
        """One fault of a random kind; each comes once before one comes again."""
        if not self._deck:
            self._deck = list(self.kinds)
            self._random.shuffle(self._deck)
        kind = self._deck.pop()
        what = self.kinds[kind]()
        return Injected(time.time(), kind, what)

    def close(self) -> None:
        """Everything is in reach again, and nobody is stopped any more."""
        self._end.set()
        for thread in self._lasting:
            thread.join()

    def _kill_trainer(self) -> str:
        return self._kill(self._stack.claimed_trainer(self._run_id))

    def _kill_worker(self, role: str) -> str:
        found = [worker["pid"] for worker in self._stack.stack()["workers"] if role in worker["roles"]]
        return self._kill(int(found[0]) if found else None)

    def _kill_server(self) -> str:
        return self._kill(self._stack.stack()["temporal"]["pid"])

    def _kill(self, pid: int | None) -> str:
        if pid is None:
            return "nobody was there"
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        return f"process {pid}"

    def _stop_trainer(self) -> str:
        pid = self._stack.claimed_trainer(self._run_id)
        if pid is None:
            return "nobody was there"
        os.kill(pid, signal.SIGSTOP)

        def later() -> None:
            self._end.wait(STOPPED_S)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

        self._last(later)
        return f"process {pid} for {STOPPED_S:g} s"

    def _hide_objects(self) -> str:
        folder = self._stack.home / "objects" / "sha256"
        aside = folder.with_name("hidden")
        if aside.exists() or not folder.is_dir():
            return "there is nothing to hide"
        seconds = self._random.uniform(*AWAY_S)
        folder.rename(aside)
        # A file in its place: nobody can make the folder anew, and reading says that the store is away.
        folder.write_text("")

        def later() -> None:
            self._end.wait(seconds)
            folder.unlink()
            aside.rename(folder)

        self._last(later)
        return f"for {seconds:.1f} s"

    def _lock_database(self) -> str:
        seconds = self._random.uniform(*AWAY_S)
        locked = threading.Event()

        def later() -> None:
            with suppress(sqlite3.OperationalError):
                _hold(self._stack.home / "urza.db", seconds, locked, self._end)
            locked.set()

        self._last(later)
        locked.wait(60)
        return f"for {seconds:.1f} s"

    def _last(self, later: Callable[[], None]) -> None:
        thread = threading.Thread(target=later, daemon=True)
        thread.start()
        self._lasting.append(thread)


def _hold(file: Path, seconds: float, locked: threading.Event, end: threading.Event) -> None:
    connection = sqlite3.connect(file, timeout=30, isolation_level=None)
    try:
        connection.execute("BEGIN IMMEDIATE")
        locked.set()
        end.wait(seconds)
        connection.execute("ROLLBACK")
    finally:
        connection.close()
