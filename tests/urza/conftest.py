"""A PostgreSQL server, an S3 server, fresh databases on both kinds, and makers of records."""

import asyncio
import os
import pwd
import shutil
import signal
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Awaitable
from collections.abc import Callable
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import psycopg
import pytest
from moto.server import ThreadedMotoServer

from esper.contracts.assets import ArtifactRef
from esper.contracts.assets import Kernel
from esper.contracts.assets import SiteContract
from esper.contracts.config import EsperConfig
from esper.contracts.config import RunConfig
from esper.contracts.config import TaskConfig
from esper.contracts.enums import AdaptationState
from esper.contracts.enums import DecisionKind
from esper.contracts.enums import FactKind
from esper.contracts.enums import KernelState
from esper.contracts.operational import Adaptation
from esper.contracts.operational import AdaptationDecision
from esper.contracts.operational import EpochReport
from esper.contracts.operational import Fact
from esper.contracts.operational import HeadRef
from esper.contracts.operational import LayerGraph
from esper.contracts.operational import Metrics
from esper.contracts.orders import RecordRun
from esper.runtime.urza import migration
from esper.runtime.urza.library import Library
from esper.runtime.urza.objects import reference
from esper.runtime.urza.tables import metadata


@dataclass(frozen=True)
class PostgresServer:
    """A server of our own, reached through a socket in its temporary folder."""

    folder: Path

    def url(self, database: str) -> str:
        return f"postgresql+psycopg://postgres@/{database}?host={self.folder}"

    def execute(self, statement: str, *, database: str = "postgres") -> None:
        with psycopg.connect(f"host={self.folder} user=postgres dbname={database}", autocommit=True) as connection:
            connection.execute(statement.encode())


def _postgres_program(name: str) -> str | None:
    installed = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return shutil.which(name) or (str(installed[-1]) if installed else None)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    initdb, postgres = _postgres_program("initdb"), _postgres_program("postgres")
    if initdb is None or postgres is None:
        pytest.skip("the PostgreSQL programs initdb and postgres are not installed")
    # PostgreSQL refuses to run as root.
    owner = "postgres" if os.geteuid() == 0 else None
    if owner is not None and owner not in {entry.pw_name for entry in pwd.getpwall()}:
        pytest.skip("PostgreSQL does not run as root, and there is no user 'postgres'")
    folder = Path(tempfile.mkdtemp(prefix="esper-pg-", dir="/tmp"))
    process = None
    try:
        if owner is not None:
            shutil.chown(folder, owner)
        data = folder / "data"
        setup = [initdb, "-D", str(data), "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"]
        subprocess.run(setup, user=owner, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        serve = [postgres, "-D", str(data), "-k", str(folder), "-c", "listen_addresses=", "-F"]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(serve, user=owner, cwd=folder, stdout=log, stderr=log)
        server = PostgresServer(folder)
        _wait_until_ready(server, process)
        yield server
    finally:
        if process is not None:
            # At once: nothing of it is kept.
            process.send_signal(signal.SIGQUIT)
            process.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_until_ready(server: PostgresServer, process: "subprocess.Popen[bytes]") -> None:
    for _ in range(600):
        if process.poll() is not None:
            break
        try:
            server.execute("SELECT 1")
            return
        except psycopg.OperationalError:
            time.sleep(0.05)
    raise RuntimeError((server.folder / "log").read_text())


@pytest.fixture(scope="session")
def migrated_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("urza") / "template.db"
    asyncio.run(migration.upgrade("default", default_file=file))
    return file


@pytest.fixture(scope="session")
def migrated_postgres(postgres_server: PostgresServer) -> PostgresServer:
    postgres_server.execute("CREATE DATABASE migrated")
    asyncio.run(migration.upgrade(postgres_server.url("migrated")))
    return postgres_server


_databases = iter(range(1_000_000))

BOTH = ["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)]


@pytest.fixture(params=BOTH)
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database without tables, of both kinds."""
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path / 'empty.db'}"
    server: PostgresServer = request.getfixturevalue("postgres_server")
    name = f"empty_{next(_databases)}"
    server.execute(f"CREATE DATABASE {name}")
    return server.url(name)


@pytest.fixture(params=BOTH)
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A migrated database without rows, of both kinds."""
    if request.param == "sqlite":
        file = tmp_path / "urza.db"
        shutil.copyfile(request.getfixturevalue("migrated_sqlite"), file)
        return f"sqlite+aiosqlite:///{file}"
    server: PostgresServer = request.getfixturevalue("migrated_postgres")
    names = ", ".join(table.name for table in metadata.sorted_tables)
    # Far faster than a database a test, and rolls the counters back too.
    server.execute(f"TRUNCATE {names} RESTART IDENTITY CASCADE", database="migrated")
    return server.url("migrated")


@pytest.fixture
def sqlite_file(migrated_sqlite: Path, tmp_path: Path) -> Path:
    """A migrated SQLite file without rows."""
    return Path(shutil.copyfile(migrated_sqlite, tmp_path / "urza.db"))


Scenario = Callable[[Library], Awaitable[Any]]


@pytest.fixture
def play(database_url: str, tmp_path: Path) -> Callable[[Scenario], Any]:
    """Run a scenario with a library that is open on `database_url`."""

    def run(scenario: Scenario) -> Any:
        async def main() -> Any:
            async with await Library.open(database_url, default_file=tmp_path / "unused.db") as library:
                return await scenario(library)

        return asyncio.run(main())

    return run


class Make:
    """Records with everything that a test does not care about filled in."""

    def config(self, *, seed: int = 0) -> EsperConfig:
        return EsperConfig(run=RunConfig(name="digits", seed=seed), task=TaskConfig(name="digits"))

    def run(self, run_id: str = "r1", *, seed: int = 0) -> RecordRun:
        return RecordRun(run_id=run_id, config=self.config(seed=seed))

    def manifest(self, content: str) -> ArtifactRef:
        return reference(content.encode())

    def head(self, content: str, *, parent: HeadRef | None = None, step: int = 0, epoch: int = 0) -> HeadRef:
        above = parent.digest if parent else None
        return HeadRef(digest=self.manifest(content).digest, parent=above, step=step, epoch=epoch)

    def report(self, head: HeadRef, *, epoch: int = 1, loss: float = 0.5, busy_seconds: float = 1.0) -> EpochReport:
        return EpochReport(
            run_id="r1",
            epoch=epoch,
            step=head.step,
            head=head,
            metrics=Metrics(train_loss=loss, val_loss=loss, extra={"accuracy": 1e22, "bias": -0.0}),
            learning_rate=0.01,
            samples=640,
            parameters=870,
            training_flops=1e9,
            probe_flops=0.0,
            busy_seconds=busy_seconds,
            stall_seconds=0.0,
            graph=LayerGraph(nodes=(), edges=()),
            health=(),
        )

    def fact(self, number: int = 1, kind: FactKind = FactKind.GRAFT, *, step: int = 100) -> Fact:
        return Fact(run_id="r1", adaptation_id=f"r1/a{number}", kind=kind, apply_step=step, seq=0, site="fc1", seed=0)

    def decision(self, epoch: int = 1, *, reason: str = "flat") -> AdaptationDecision:
        return AdaptationDecision(
            run_id="r1",
            epoch=epoch,
            policy="heuristic",
            kind=DecisionKind.WAIT,
            code="learning",
            reason=reason,
            hyperparameters={"rank": 32, "scale": 1e22, "activation": "relu", "bias": True},
        )

    def adaptation(self, state: AdaptationState, *, number: int = 1, **known: Any) -> Adaptation:
        return Adaptation(
            adaptation_id=f"r1/a{number}",
            number=number,
            epoch=1,
            site="fc1",
            seed=0,
            seed_generation=0,
            blueprint="bottleneck",
            state=state,
            reason="planted",
            **known,
        )

    def kernel(self, content: str = "kernel", *, state: KernelState = KernelState.CERTIFIED) -> Kernel:
        manifest = self.manifest(content)
        site = SiteContract(
            site="fc1",
            output_site="fc1",
            kind="linear",
            input_shape=(8,),
            output_shape=(4,),
            dtype="float32",
        )
        return Kernel(
            digest=manifest.digest,
            blueprint="bottleneck",
            hyperparameters={"rank": 2},
            site=site,
            manifest=manifest,
            weights=self.manifest(content + " weights"),
            parameter_count=24,
            state=state,
        )


@pytest.fixture
def make() -> Make:
    return Make()


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """A real HTTP server that speaks S3."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_client(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client of our own, for setting up buckets and for damaging what lies in them."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "visible")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "geheim")
    monkeypatch.setenv("ESPER_S3_ENDPOINT_URL", s3_endpoint)
    client = boto3.client("s3", endpoint_url=s3_endpoint, region_name="us-east-1")
    yield client
    client.close()


@pytest.fixture
def locked(sqlite_file: Path) -> Iterator[sqlite3.Connection]:
    """Another connection that holds the write lock of `sqlite_file` until it rolls back or the test ends."""
    connection = sqlite3.connect(sqlite_file, isolation_level=None, check_same_thread=False)
    connection.execute("BEGIN IMMEDIATE")
    yield connection
    connection.close()
