"""What every layer of the tests shares: a clean environment, and one real Temporal dev server a session."""

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from temporalio.client import Client

from esper.runtime.temporal.server import SEARCH_ATTRIBUTES
from esper.runtime.temporal.server import obtain_server


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting of the machine reaches a test, and nothing a test does reaches the user's home."""
    for name in list(os.environ):
        if name.startswith(("TEMPORAL_", "AWS_")) or (name.startswith("ESPER_") and name != "ESPER_TEMPORAL_CLI"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("ESPER_HOME", str(tmp_path / "esper-home"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return here


def _answers(address: str) -> bool:
    try:
        asyncio.run(Client.connect(address))
    except RuntimeError:  # what a server says that listens and is not healthy yet, too
        return False
    return True


@pytest.fixture(scope="session")
def temporal_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real dev server in memory, with Esper's search attributes, for the whole session."""
    program = obtain_server(os.environ, print)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(program.path), "server", "start-dev", "--ip", "127.0.0.1", "--port", str(port), "--headless"]
    command += ["--log-level", "error"]
    for name, kind in SEARCH_ATTRIBUTES.items():
        command += ["--search-attribute", f"{name}={kind}"]
    log = tmp_path_factory.mktemp("temporal") / "server.log"
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as server:
        try:
            address = f"127.0.0.1:{port}"
            deadline = time.monotonic() + 120
            while not _answers(address):
                assert server.poll() is None, f"the dev server ended: {log.read_text()}"
                assert time.monotonic() < deadline, "the dev server does not answer"
                time.sleep(0.1)
            yield address
        finally:
            server.terminate()
            server.wait(10)


_EXIT_STATUS = 0


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Keeps the status for `pytest_unconfigure`."""
    global _EXIT_STATUS
    _EXIT_STATUS = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """A process that used a Temporal client may crash or hang in ordinary finalisation: end it here."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(_EXIT_STATUS)
