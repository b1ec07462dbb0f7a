"""The local stack: `up` makes sure that it runs, `down` that nothing of it does.

Both are idempotent, and those of one home wait for each other. What runs is a supervisor, apart from any
terminal, and its children; homes know nothing of each other.
"""

import asyncio
import contextlib
import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path

from esper.errors import RunConflict
from esper.errors import TemporalUnavailable
from esper.errors import UnavailableError
from esper.runtime.children import last_words
from esper.runtime.home import logs_folder
from esper.runtime.home import stack_file
from esper.runtime.home import temporal_database
from esper.runtime.home import urza_database_url
from esper.runtime.home import workers_folder
from esper.runtime.processes import Identity
from esper.runtime.processes import identify
from esper.runtime.processes import is_ours
from esper.runtime.processes import stop
from esper.runtime.processes import wait_gone
from esper.runtime.stack_state import StackInfo
from esper.runtime.stack_state import read_stack
from esper.runtime.stack_state import write_stack
from esper.runtime.temporal.client import ServerAddress
from esper.runtime.temporal.client import connect_to
from esper.runtime.temporal.server import USUAL_PORT
from esper.runtime.temporal.server import USUAL_UI_PORT
from esper.runtime.temporal.server import free_port
from esper.runtime.temporal.server import obtain_server
from esper.runtime.temporal.server_process import SERVER_GRACE_S
from esper.runtime.temporal.server_process import local_address
from esper.runtime.temporal.server_process import start_server
from esper.runtime.urza.migration import upgrade

START_SECONDS = 240.0
"""For the whole stack to become ready; building the server from source is not counted."""
STOP_SECONDS = 45.0
"""For the supervisor to end its children in order: longer than their graces together."""
KILL_GRACE_S = 5.0
SERVER_SECONDS = 60.0
"""For the Temporal server alone to answer."""
_POLL_SECONDS = 0.1
_SUPERVISOR = "esper.runtime.supervisor"
_DETACH = "import os, sys; os.fork() or (os.setsid(), os.execv(sys.argv[1], sys.argv[1:]))"
"""Nobody's child: the supervisor must outlive us, and be reaped whether we live on or not."""

Progress = Callable[[str], None]


def up(
    home: Path,
    progress: Progress,
    *,
    environment: Mapping[str, str] | None = None,
    worker_command: Sequence[str] | None = None,
    timeout_s: float = START_SECONDS,
) -> StackInfo:
    """Make sure that the stack of this home runs and is ready; returns what runs.

    Args:
        home: as `make_home` returns it.
        progress: called with a line of text whenever there is something to tell.
        environment: what the processes get; normally `os.environ`.
        worker_command: what is run with role names appended, instead of this interpreter's `-m esper.worker`.
        timeout_s: how long the processes may take to become ready.

    Raises:
        TemporalUnavailable: ESP-306 no server program.
        UnavailableError: ESP-306 a process of the stack does not start; a stack that this call started is down then.
        DatabaseUnavailable: Urza's database cannot be opened or is newer than this code.
    """
    environment = os.environ if environment is None else environment
    command = list(worker_command) if worker_command is not None else [sys.executable, "-m", "esper.worker"]
    with _alone(home, progress):
        ours = _living_supervisor(home) is None
        if ours:
            _stop_leftovers(home)
            program = obtain_server(environment, progress)
            progress(f"starting the local stack in {home}")
            asyncio.run(upgrade(urza_database_url(home)))
            _start_supervisor(home, program.path, program.server_version, command, environment)
        try:
            return _wait_ready(home, progress, timeout_s)
        except UnavailableError:
            # One that ran before may serve runs all the same, and tries again by itself.
            if ours:
                _stop(home)
            raise


def down(home: Path, progress: Progress = lambda line: None) -> tuple[str, ...]:
    """Stop what `stack.json` names and is still ours, workers first; nothing of the stack runs afterwards.

    Returns what was stopped, such as `trainer 4711`; nothing when nothing ran.
    """
    if not home.exists():
        return ()
    with _alone(home, progress):
        return _stop(home, progress)


@contextlib.contextmanager
def server_alone(
    home: Path, progress: Progress, *, environment: Mapping[str, str] | None = None
) -> Iterator[ServerAddress | None]:
    """The Temporal server of this home without any worker, while the block lasts: for reading what it knows.

    `None` where the home has no database of that server. Starting and stopping the stack wait meanwhile; a server that
    a killed command left behind is ended by the next `up` or `down`. Not in an event loop.

    Raises:
        RunConflict: ESP-504 while the stack runs.
        TemporalUnavailable: ESP-306 no server program, ESP-301 it does not answer.
    """
    environment = os.environ if environment is None else environment
    with _alone(home, progress):
        if _living_supervisor(home) is not None:
            raise RunConflict(
                "ESP-504",
                f"the local stack in {home} is up, and its workers have the lost database open",
                hint="`esper-cli down` ends it; then do this again",
            )
        _stop_leftovers(home)
        program = obtain_server(environment, progress)
        if not temporal_database(home, program.server_version).exists():
            yield None
            return
        progress("starting the Temporal server alone")
        port = free_port(USUAL_PORT)
        ui_port = free_port(USUAL_UI_PORT, frozenset({port}))
        child = start_server(
            program.path, program.server_version, home, port=port, ui_port=ui_port, environment=environment
        )
        where = local_address(port)
        try:
            if child is not None:
                ourselves = identify(os.getpid())
                assert ourselves is not None
                ui = f"http://127.0.0.1:{ui_port}"
                write_stack(home, StackInfo(where.address, ui, program.server_version, child.identity, ourselves))
            asyncio.run(_until_answering(where, time.monotonic() + SERVER_SECONDS))
            yield where
        finally:
            if child is not None:
                stop([child.identity], SERVER_GRACE_S)
                child.process.wait()
            stack_file(home).unlink(missing_ok=True)


async def _until_answering(where: ServerAddress, deadline: float) -> None:
    while True:
        try:
            await connect_to(where)
            return
        except TemporalUnavailable:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(_POLL_SECONDS)


def running_stack(home: Path) -> StackInfo | None:
    """What runs now; `None` unless the supervisor lives. Nothing is started or written."""
    info = read_stack(home)
    return info if info is not None and is_ours(info.supervisor, _SUPERVISOR) else None


def _start_supervisor(
    home: Path, program: Path, server_version: str, worker_command: list[str], environment: Mapping[str, str]
) -> None:
    command = [sys.executable, "-m", _SUPERVISOR, "--home", str(home), "--program", str(program)]
    command += ["--server-version", server_version, "--worker-command", json.dumps(worker_command)]
    with (logs_folder(home) / "supervisor.out").open("ab") as output:
        subprocess.run(
            [sys.executable, "-I", "-c", _DETACH, *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**environment, "ESPER_HOME": str(home)},
            cwd=home,
            check=True,
        )


def _wait_ready(home: Path, progress: Progress, timeout_s: float) -> StackInfo:
    deadline = time.monotonic() + timeout_s
    # The supervisor needs a moment before it can be seen at all.
    seen_by = time.monotonic() + min(timeout_s, 30.0)
    told = ""
    while True:
        supervisor = _living_supervisor(home)
        info = read_stack(home) if supervisor is not None else None
        if info is not None and info.failures:
            raise _not_started("; ".join(info.failures), home)
        if info is not None and info.ready:
            return info
        now = time.monotonic()
        if supervisor is None and now > seen_by:
            raise _not_started(f"the supervisor ended: {last_words(logs_folder(home) / 'supervisor.out')}", home)
        if now > deadline:
            raise _not_started(f"not ready after {timeout_s:.0f} s ({told or 'no word from the supervisor'})", home)
        news = _news(info)
        if news != told:
            told = news
            progress(news)
        time.sleep(_POLL_SECONDS)


def _news(info: StackInfo | None) -> str:
    if info is None or info.server is None:
        return "starting the Temporal server"
    if not info.workers:
        return f"waiting for the Temporal server at {info.address}"
    return f"waiting for the workers to be warm (Web UI: {info.ui})"


def _stop(home: Path, progress: Progress = lambda line: None) -> tuple[str, ...]:
    info = read_stack(home)
    supervisor = _living_supervisor(home)
    stopped = _names(info)
    if supervisor is not None:
        progress("stopping the local stack")
        with contextlib.suppress(ProcessLookupError):
            os.kill(supervisor.pid, 15)
        if wait_gone([supervisor], STOP_SECONDS):
            stop([supervisor], KILL_GRACE_S)
        if info is None or info.supervisor.pid != supervisor.pid:
            stopped = (*stopped, f"supervisor {supervisor.pid}")
    # The supervisor may have been killed, or have started something after `info` was read.
    _stop_leftovers(home, info)
    return stopped


def _stop_leftovers(home: Path, *more: StackInfo | None) -> None:
    for info in (read_stack(home), *more):
        if info is None:
            continue
        workers = [worker.process for worker in info.workers if is_ours(worker.process, worker.roles[0])]
        stop(workers, KILL_GRACE_S)
        if info.server is not None and is_ours(info.server, "start-dev"):
            stop([info.server], KILL_GRACE_S)
    stack_file(home).unlink(missing_ok=True)
    for path in workers_folder(home).glob("*.json"):
        path.unlink(missing_ok=True)


def _names(info: StackInfo | None) -> tuple[str, ...]:
    if info is None:
        return ()
    found = [("+".join(worker.roles), worker.process, worker.roles[0]) for worker in info.workers]
    if info.server is not None:
        found.append(("temporal", info.server, "start-dev"))
    found.append(("supervisor", info.supervisor, _SUPERVISOR))
    return tuple(f"{name} {process.pid}" for name, process, word in found if is_ours(process, word))


def _living_supervisor(home: Path) -> Identity | None:
    """The one that `stack.json` names; else the one that holds the lock and has not written it yet."""
    info = running_stack(home)
    if info is not None:
        return info.supervisor
    try:
        identity = identify(int((home / "supervisor.lock").read_text()))
    except (OSError, ValueError):
        return None
    # The lock file keeps the number of the last one for ever, so the home on the command line decides.
    return identity if identity is not None and is_ours(identity, f"{_SUPERVISOR} --home {home} ") else None


def _not_started(why: str, home: Path) -> UnavailableError:
    return UnavailableError("ESP-306", f"the local stack does not start: {why}", hint=f"See {logs_folder(home)}")


@contextlib.contextmanager
def _alone(home: Path, progress: Progress) -> Iterator[None]:
    with (home / "stack.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("another command is starting or stopping this stack; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
