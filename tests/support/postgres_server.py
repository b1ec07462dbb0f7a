"""A PostgreSQL server of a test's own that can be stopped and started again, reached through a socket or TCP."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest


class TcpPostgres:
    """Listens on a port of its own on 127.0.0.1. `stop` and `start` are a restart; what was committed stays."""

    def __init__(self, folder: Path, programs: tuple[str, str], owner: str | None) -> None:
        self._folder = folder
        self._owner = owner
        self._initdb, self._postgres = programs
        self._process: subprocess.Popen[bytes] | None = None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def url(self, database: str = "postgres", address: str | None = None) -> str:
        return f"postgresql+psycopg://postgres@{address or self.address}/{database}"

    def create(self) -> None:
        data = str(self._folder / "data")
        setup = [self._initdb, "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"]
        subprocess.run(setup, user=self._owner, cwd=self._folder, check=True, stdout=subprocess.DEVNULL)

    def start(self) -> None:
        serve = [self._postgres, "-D", str(self._folder / "data"), "-k", str(self._folder), "-p", str(self.port)]
        serve += ["-c", "listen_addresses=127.0.0.1"]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(serve, user=self._owner, cwd=self._folder, stdout=log, stderr=log)
        for _ in range(1200):
            if self._process.poll() is not None:
                break
            try:
                with psycopg.connect(f"host=127.0.0.1 port={self.port} user=postgres", connect_timeout=2):
                    return
            except psycopg.OperationalError:
                time.sleep(0.05)
        raise RuntimeError((self._folder / "log").read_text())

    def stop(self, number: int = signal.SIGQUIT) -> None:
        """SIGQUIT ends it as a power failure would, SIGINT in order; both drop every connection."""
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(timeout=60)
            self._process = None


@contextmanager
def tcp_postgres() -> Iterator[TcpPostgres]:
    """A running server; skips where the programs are not installed."""
    found = [_program(name) for name in ("initdb", "postgres")]
    if found[0] is None or found[1] is None:
        pytest.skip("the PostgreSQL programs initdb and postgres are not installed")
    # PostgreSQL refuses to run as root.
    owner = "postgres" if os.geteuid() == 0 else None
    if owner is not None and owner not in {entry.pw_name for entry in pwd.getpwall()}:
        pytest.skip("PostgreSQL does not run as root, and there is no user 'postgres'")
    folder = Path(tempfile.mkdtemp(prefix="esper-pg-", dir="/tmp"))
    if owner is not None:
        shutil.chown(folder, owner)
    server = TcpPostgres(folder, (found[0], found[1]), owner)
    try:
        server.create()
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


def _program(name: str) -> str | None:
    installed = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return shutil.which(name) or (str(installed[-1]) if installed else None)
