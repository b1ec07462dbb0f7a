"""The database locks, fills up, breaks off, is restarted or replaced in the middle of a run: nothing that was
acknowledged is lost, nothing is written twice, and what cannot be trusted is refused."""

import asyncio
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from outlasting import BAD_LINES
from outlasting import EPOCH
from outlasting import hurried as hurried
from outlasting import outlast
from outlasting import survive
from postgres_server import TcpPostgres
from postgres_server import tcp_postgres
from sqlalchemy import event
from tcp_proxy import TcpProxy
from tcp_proxy import Weather
from tolaria_world import Driver
from tolaria_world import World
from tolaria_world import make_config
from tolaria_world import undisturbed_digest
from typer.testing import CliRunner

from esper.activities import trainer_store as trainer_store_module
from esper.activities.trainer_store import UrzaStore
from esper.cli import app
from esper.commands.actions import checks
from esper.contracts.enums import FactKind
from esper.contracts.operational import Fact
from esper.contracts.operational import HeadRef
from esper.contracts.orders import Lease
from esper.contracts.orders import RecordRun
from esper.errors import DatabaseUnavailable
from esper.runtime.urza import engine as engine_module
from esper.runtime.urza import migration
from esper.runtime.urza.library import Library

Drive = Callable[..., Driver]


@pytest.fixture(autouse=True)
def short_lock_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "BUSY_TIMEOUT_MS", 200)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    return undisturbed_digest(tmp_path_factory.mktemp("undisturbed"), make_config(), 3)


@pytest.mark.fault("C5", "E1", "I1", "I10", "I11")
def test_training_goes_a_bounded_way_while_the_database_is_locked(drive: Drive, world: World, undisturbed: str) -> None:
    driver = drive(make_config())
    other = sqlite3.connect(world.folder / "urza.db", isolation_level=None, check_same_thread=False)
    outlast(driver, lambda: other.execute("BEGIN IMMEDIATE"), lambda: other.execute("ROLLBACK"))
    other.close()
    assert driver.digest() == undisturbed
    heads = world.call(world.library.heads("run"))
    assert [item.head.step for item in heads] == [0, EPOCH, 2 * EPOCH, 3 * EPOCH]
    assert [item.head.parent for item in heads[1:]] == [item.head.digest for item in heads[:-1]]


@pytest.mark.fault("E2")
def test_a_file_that_was_replaced_or_deleted_is_not_written_to(world: World, tmp_path: Path) -> None:
    file = world.folder / "urza.db"
    record = RecordRun(run_id="r1", config=make_config())
    world.call(world.library.record_run(record, "2030-01-01T00:00:00Z"))
    shutil.copyfile(file, tmp_path / "copy.db")
    original = tmp_path / "original.db"
    for change in ("replaced", "deleted"):
        file.rename(original)
        if change == "replaced":
            shutil.copyfile(tmp_path / "copy.db", file)
        with pytest.raises(DatabaseUnavailable, match="replaced while it was open") as refused:
            world.call(world.library.claim("r1", "queue"))
        assert refused.value.code == "ESP-333"
        file.unlink(missing_ok=True)
        original.rename(file)
    assert world.call(world.library.claim("r1", "queue")).lease_gen == 1


@pytest.mark.fault("E2")
def test_a_read_only_file_is_refused_by_name(world: World) -> None:
    """By a file system that is read-only for this connection: root may write where no user may."""
    made = engine_module.make_engine(engine_module.parse_url("default", world.folder / "urza.db"))

    @event.listens_for(made.sync_engine, "connect")
    def _read_only(connection: Any, _record: Any) -> None:
        connection.execute("PRAGMA query_only = ON")

    async def main() -> None:
        with pytest.raises(DatabaseUnavailable, match=r"urza\.db.*readonly"):
            await Library(made).record_run(RecordRun(run_id="r1", config=make_config()), "2030-01-01T00:00:00Z")
        await made.dispose()

    asyncio.run(main())


@pytest.mark.fault("E2", "I7")
def test_a_corrupt_page_is_found_by_db_check_and_by_who_reads_it(world: World, tmp_path: Path) -> None:
    driver = Driver(world, world.open(make_config()))
    driver.train(1)
    damaged = tmp_path / "damaged.db"
    shutil.copyfile(world.folder / "urza.db", damaged)
    with sqlite3.connect(damaged) as connection:
        size = connection.execute("PRAGMA page_size").fetchone()[0]
        page = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'reports'").fetchone()[0]
    connection.close()
    url = f"sqlite+aiosqlite:///{damaged}"
    whole = CliRunner().invoke(app, ["db", "check", "--database", url])
    assert whole.exit_code == 0, whole.output
    with damaged.open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\xff" * size)
    with pytest.raises(DatabaseUnavailable, match=r"damaged\.db") as found:
        asyncio.run(migration.require_whole(url))
    assert found.value.code == "ESP-333"
    assert found.value.exit_code == 3

    async def read() -> None:
        async with await Library.open(url, default_file=damaged) as library:
            await library.reports("run")

    with pytest.raises(DatabaseUnavailable, match="malformed"):
        asyncio.run(read())
    damaged.unlink()


@pytest.mark.fault("E6")
def test_a_migration_that_dies_on_its_way_is_finished_by_the_next(tmp_path: Path) -> None:
    """Killed with -9 when all its tables are made and nothing is committed."""
    file = tmp_path / "urza.db"
    code = f"""
import asyncio, os, signal
from pathlib import Path
from alembic import command
from esper.runtime.urza import migration
upgrade = command.upgrade
def die(*arguments):
    upgrade(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
command.upgrade = die
asyncio.run(migration.upgrade("default", default_file=Path({str(file)!r})))
"""
    died = subprocess.run([sys.executable, "-c", code], check=False, timeout=250)
    assert died.returncode == -signal.SIGKILL
    assert asyncio.run(migration.check("default", default_file=file)).state == "empty"
    assert asyncio.run(migration.upgrade("default", default_file=file)).state == "current"
    asyncio.run(migration.require_whole("default", default_file=file))


@pytest.mark.fault("E7")
def test_doctor_says_that_sqlite_does_not_belong_on_a_network_file_system(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("ESPER_HOME", str(world.folder))
        patch.setattr(engine_module, "file_system_type", lambda *_: "nfs4")
        check = asyncio.run(checks._guarded("database", checks._database))
    assert check.state == "fail"
    assert "network file system (nfs4)" in check.message
    assert check.hint is not None
    assert "PostgreSQL" in check.hint


class DatabaseWorld(World):
    """A session's world with its records in a database of any kind."""

    def __init__(self, folder: Path, url: str) -> None:
        super().__init__(folder)
        self.call(self.library.close())
        self.library = self.call(Library.open(url, default_file=folder / "unused.db"))


@pytest.fixture(scope="module")
def server() -> Iterator[TcpPostgres]:
    with tcp_postgres() as running:
        asyncio.run(migration.upgrade(running.url()))
        yield running


@pytest.fixture
def proxy(server: TcpPostgres) -> Iterator[TcpProxy]:
    with TcpProxy(server.address) as between:
        yield between


@pytest.fixture
def far(server: TcpPostgres, proxy: TcpProxy, tmp_path: Path) -> Iterator[DatabaseWorld]:
    made = DatabaseWorld(tmp_path, server.url(address=proxy.address))
    yield made
    made.close()


def opened(far: DatabaseWorld, run_id: str) -> tuple[UrzaStore, HeadRef]:
    """A run with its first head, under a lease."""
    far.call(far.library.record_run(RecordRun(run_id=run_id, config=make_config()), "2030-01-01T00:00:00Z"))
    lease: Lease = far.call(far.library.claim(run_id, "queue"))
    store = UrzaStore(far._loop, far.library, far.objects, lease)
    manifest = far.objects.put(run_id.encode())
    first = HeadRef(digest=manifest.digest, parent=None, step=0, epoch=0)
    store.commit_head(first, manifest, None, None)
    return store, first


def following(store: UrzaStore, above: HeadRef) -> HeadRef:
    manifest = store.put(f"after {above.digest}".encode())
    head = HeadRef(digest=manifest.digest, parent=above.digest, step=above.step + 1, epoch=0)
    return store.commit_head(head, manifest, above.digest, None)


@pytest.mark.postgres
@pytest.mark.fault("C5", "I1", "I10", "I11")
def test_training_goes_a_bounded_way_while_the_database_is_cut_off(
    far: DatabaseWorld, proxy: TcpProxy, undisturbed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing arrives and nothing is refused: connections look alive."""
    monkeypatch.setattr(trainer_store_module, "CALL_LIMIT_S", 2.0)
    driver = Driver(far, far.open(make_config()))
    outlast(driver, proxy.blackhole, proxy.heal)
    assert driver.digest() == undisturbed
    assert [item.head.step for item in far.call(far.library.heads("run"))] == [0, EPOCH, 2 * EPOCH, 3 * EPOCH]


@pytest.mark.postgres
@pytest.mark.fault("E4", "I1", "I2")
@pytest.mark.parametrize("times", [1, 3])
def test_a_commit_whose_answer_never_came_is_made_once(
    far: DatabaseWorld, proxy: TcpProxy, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server has done it, and the connection breaks before it can say so: nobody knows, until it is read again."""
    store, first = opened(far, f"commit{times}")
    left = [times]

    @event.listens_for(far.library._engine.sync_engine, "commit")
    def _break(connection: Any) -> None:
        if left[0] > 0:
            left[0] -= 1
            proxy.blackhole(up=False, down=True)
            threading.Timer(0.5, lambda: (proxy.reset(), proxy.heal())).start()

    head = following(store, first)
    assert left == [0]
    run_id = store.lease.run_id
    assert [item.head for item in far.call(far.library.heads(run_id))] == [first, head]
    left[0] = times
    fact = Fact(run_id=run_id, adaptation_id=f"{run_id}/a1", kind=FactKind.MISSED, apply_step=3, seq=0)
    recorded = store.insert_fact(fact)
    assert left == [0]
    assert far.call(far.library.facts(run_id)) == (recorded,)


@pytest.mark.postgres
@pytest.mark.fault("E4", "I1")
@pytest.mark.parametrize("number", [signal.SIGQUIT, signal.SIGINT])
def test_a_server_that_is_restarted_is_waited_for(server: TcpPostgres, far: DatabaseWorld, number: int) -> None:
    store, first = opened(far, f"restart{number}")
    second = following(store, first)
    server.stop(number)
    with ThreadPoolExecutor(1) as pool:
        commit = pool.submit(following, store, second)
        time.sleep(0.5)
        assert not commit.done()
        server.start()
        third = commit.result(60)
    heads = far.call(far.library.heads(store.lease.run_id))
    assert [item.head for item in heads] == [first, second, third]


@pytest.mark.postgres
@pytest.mark.fault("C6", "I1")
@pytest.mark.parametrize("weather", BAD_LINES)
def test_a_bad_line_to_the_server_loses_nothing(
    far: DatabaseWorld, proxy: TcpProxy, weather: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_store_module, "CALL_LIMIT_S", 2.0 if weather == "half open" else 45.0)
    store, head = opened(far, weather.replace(" ", "-"))
    slow, sliced = Weather(delay_s=0.05), Weather(delay_s=0.001, slice_bytes=10)
    after = survive(weather, proxy, lambda: following(store, head), slow=slow, sliced=sliced)
    assert [item.head for item in far.call(far.library.heads(store.lease.run_id))] == [head, after]
