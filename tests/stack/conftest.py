"""Homes with a local stack of real processes: the real supervisor and dev server, stub workers."""

import os
import sys
from collections.abc import Callable
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Protocol

import pytest
from waiting import until

from esper.runtime.home import make_home
from esper.runtime.stack import down
from esper.runtime.stack import up
from esper.runtime.stack_state import StackInfo
from esper.runtime.temporal.server import ServerProgram
from esper.runtime.temporal.server import find_server

STUB = (sys.executable, str(Path(__file__).parent / "stub_worker.py"))

WaitFor = Callable[[Callable[[], object], str], object]


class Start(Protocol):
    def __call__(self, home: Path) -> StackInfo: ...


@pytest.fixture(scope="session")
def server_program() -> ServerProgram:
    found = find_server(os.environ)
    if not isinstance(found, ServerProgram):
        pytest.fail(f"the stack tests need a Temporal server on this machine: {found}")
    return found


@pytest.fixture(scope="session")
def start(server_program: ServerProgram) -> Start:
    def starting(home: Path) -> StackInfo:
        environment = {**os.environ, "ESPER_TEMPORAL_CLI": str(server_program.path)}
        return up(home, lambda line: None, environment=environment, worker_command=STUB, timeout_s=120)

    return starting


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    home = make_home({"ESPER_HOME": str(tmp_path / "home")})
    yield home
    down(home)


@pytest.fixture(scope="module")
def shared_home(tmp_path_factory: pytest.TempPathFactory, start: Start) -> Iterator[Path]:
    """A home whose stack is up, for tests that leave it as they found it."""
    home = make_home({"ESPER_HOME": str(tmp_path_factory.mktemp("stack") / "home")})
    start(home)
    yield home
    down(home)


@pytest.fixture(scope="session")
def wait_for() -> WaitFor:
    return partial(until, seconds=60, pause=0.05)
