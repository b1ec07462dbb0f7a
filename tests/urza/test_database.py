import asyncio
import sqlite3
import sys
import threading
import time
from pathlib import Path

import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import inspect
from sqlalchemy import text

import esper.runtime.urza
from esper.contracts.enums import FactKind
from esper.errors import DatabaseUnavailable
from esper.runtime.urza import engine
from esper.runtime.urza import migration
from esper.runtime.urza.engine import file_system_type
from esper.runtime.urza.engine import make_engine
from esper.runtime.urza.engine import parse_url
from esper.runtime.urza.engine import reading
from esper.runtime.urza.engine import resolve_database
from esper.runtime.urza.engine import wal_is_safe
from esper.runtime.urza.engine import writing
from esper.runtime.urza.library import Library
from esper.runtime.urza.tables import metadata

NOW = "2026-11-23T12:00:00Z"


async def table_names(url: str) -> set[str]:
    made = make_engine(parse_url(url, Path("unused")))
    try:
        async with reading(made) as connection:
            return set(await connection.run_sync(lambda sync: inspect(sync).get_table_names()))
    finally:
        await made.dispose()


def test_upgrade_downgrade_upgrade(empty_url):
    async def main():
        assert (await migration.check(empty_url)).state == "empty"
        up = await migration.upgrade(empty_url)
        assert (up.state, up.current, up.head) == ("current", migration.REVISION, migration.REVISION)
        assert await migration.upgrade(empty_url) == up
        ours = {table.name for table in metadata.sorted_tables}
        assert ours <= await table_names(empty_url)
        assert (await migration.downgrade(empty_url)).state == "empty"
        assert await table_names(empty_url) == {"alembic_version"}
        assert await migration.upgrade(empty_url) == up
        assert await migration.check(empty_url) == up

    asyncio.run(main())


async def shape(url: str) -> dict[str, list[str]]:
    """What the database itself watches over, of each table that others refer to or that was changed since 0001."""
    made = make_engine(parse_url(url, Path("unused")))

    def read(sync) -> dict[str, list[str]]:
        found = inspect(sync)
        looks = found.get_check_constraints, found.get_foreign_keys, found.get_indexes, found.get_columns
        return {
            f"{table} {look.__name__}": sorted(str(item["name"]) for item in look(table))
            for table in ("runs", "facts", "heads")
            for look in looks
        }

    try:
        async with reading(made) as connection:
            return await connection.run_sync(read)
    finally:
        await made.dispose()


@pytest.mark.fault("E6")
@pytest.mark.parametrize("revision", ["0002", "0001"])
def test_a_database_with_runs_goes_back_and_on_again_and_keeps_them(empty_url, make, revision):
    async def main():
        await migration.upgrade(empty_url)
        before = await shape(empty_url)
        async with await Library.open(empty_url, default_file=Path("unused")) as library:
            await library.record_run(make.run(), NOW)
            lease = await library.claim("r1", "queue")
            head = make.head("one", step=10, epoch=1)
            await library.commit_head(
                lease, head=head, manifest=make.manifest("one"), parent=None, report=make.report(head)
            )
            graft = await library.insert_fact(lease, make.fact())
            await library.insert_fact(lease, make.fact(kind=FactKind.STRIKE, step=101))
            run = await library.run("r1")
        assert (await migration.downgrade(empty_url, revision=revision)).current == revision
        with pytest.raises(DatabaseUnavailable, match=f"at revision {revision}.*needs revision {migration.REVISION}"):
            await Library.open(empty_url, default_file=Path("unused"))
        assert (await migration.upgrade(empty_url)).state == "current"
        assert await shape(empty_url) == before
        async with await Library.open(empty_url, default_file=Path("unused")) as library:
            assert await library.run("r1") == run
            assert [item.head for item in await library.heads("r1")] == [head]
            assert len(await library.reports("r1")) == 1
            # What the older Esper could not have read is gone.
            assert await library.facts("r1") == (graft,)

    asyncio.run(main())


@pytest.mark.fault("E6")
def test_a_file_whose_rows_refer_to_nothing_is_not_migrated(sqlite_file):
    with sqlite3.connect(sqlite_file) as connection:
        connection.execute("PRAGMA foreign_keys = OFF")
        connection.execute("INSERT INTO reports (run_id, epoch, step, report) VALUES ('nobody', 1, 1, '{}')")
    connection.close()
    with pytest.raises(DatabaseUnavailable, match="a row of reports refers to a row of runs") as refused:
        asyncio.run(migration.downgrade("default", default_file=sqlite_file, revision="0001"))
    assert refused.value.code == "ESP-333"
    assert asyncio.run(migration.check("default", default_file=sqlite_file)).state == "current"


def test_tables_and_migrations_agree(empty_url):
    async def main():
        await migration.upgrade(empty_url)
        await migration.drift(empty_url)

    asyncio.run(main())


def test_drift_would_be_seen(empty_url):
    async def main():
        await migration.upgrade(empty_url)
        made = make_engine(parse_url(empty_url, Path("unused")))
        async with writing(made) as connection:
            await connection.execute(text("ALTER TABLE runs DROP COLUMN device"))
        await made.dispose()
        with pytest.raises(Exception, match="device"):
            await migration.drift(empty_url)

    asyncio.run(main())


@pytest.mark.fault("E6")
def test_two_upgrades_at_once_are_one_after_the_other(empty_url):
    async def main():
        done = await asyncio.gather(*(migration.upgrade(empty_url) for _ in range(3)))
        assert {status.state for status in done} == {"current"}

    asyncio.run(main())


def test_the_revision_is_that_of_the_newest_migration():
    config = Config()
    (package,) = esper.runtime.urza.__path__
    config.set_main_option("script_location", str(Path(package) / "migrations"))
    assert ScriptDirectory.from_config(config).get_heads() == [migration.REVISION]


@pytest.mark.fault("E6")
def test_workers_refuse_a_database_without_tables_and_make_nothing(tmp_path):
    file = tmp_path / "urza.db"
    with pytest.raises(DatabaseUnavailable, match="esper-cli db upgrade") as refused:
        asyncio.run(Library.open("default", default_file=file))
    assert refused.value.code == "ESP-334"
    assert asyncio.run(migration.check("default", default_file=file)).state == "empty"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault("E6")
@pytest.mark.parametrize(("revision", "words"), [("0000", "esper-cli db upgrade"), ("9999", "newer than this Esper")])
def test_workers_refuse_another_revision(database_url, revision, words):
    async def main(number: str) -> None:
        made = make_engine(parse_url(database_url, Path("unused")))
        async with writing(made) as connection:
            await connection.execute(text("UPDATE alembic_version SET version_num = :number"), {"number": number})
        await made.dispose()

    asyncio.run(main(revision))
    try:
        with pytest.raises(DatabaseUnavailable, match=words) as refused:
            asyncio.run(Library.open(database_url, default_file=Path("unused")))
        assert refused.value.code == "ESP-334"
        assert revision in str(refused.value) and migration.REVISION in str(refused.value)
    finally:
        asyncio.run(main(migration.REVISION))


def test_default_is_a_file_in_the_home(tmp_path):
    assert resolve_database("default", tmp_path) == f"sqlite+aiosqlite:///{tmp_path}/urza.db"
    assert resolve_database("sqlite:////data/x.db", tmp_path) == "sqlite+aiosqlite:////data/x.db"
    with_password = resolve_database("postgresql://u:geheim@db/urza", tmp_path)
    assert with_password == "postgresql+psycopg://u:geheim@db/urza"


@pytest.mark.parametrize(
    "url",
    [
        "nonsense",
        "",
        "mysql://u:geheim@h/d",
        "postgresql+asyncpg://u:geheim@h/d",
        "postgresql://u:geheim@h",
        "postgresql://u:geheim@h:port/d",
        "sqlite://",
        "sqlite+aiosqlite:///:memory:",
    ],
)
def test_other_urls_are_refused_without_showing_a_password(url, tmp_path):
    with pytest.raises(DatabaseUnavailable, match=r"urza\.database") as refused:
        resolve_database(url, tmp_path)
    assert refused.value.code == "ESP-331"
    assert "geheim" not in str(refused.value)


@pytest.mark.parametrize(
    "url", ["postgresql://u:geheim@127.0.0.1:1/urza", "postgresql://u@127.0.0.1:1/urza?password=geheim"]
)
def test_a_server_that_is_not_there_is_named_without_the_password(url):
    with pytest.raises(DatabaseUnavailable, match=r"127\.0\.0\.1:1/urza") as refused:
        asyncio.run(Library.open(url, default_file=Path("unused")))
    assert refused.value.code == "ESP-333"
    assert "geheim" not in str(refused.value)


def test_a_missing_driver_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(DatabaseUnavailable, match=r"esper-morphogenetic\[postgres\]") as refused:
        asyncio.run(Library.open("postgresql://u:geheim@127.0.0.1:1/urza", default_file=Path("unused")))
    assert refused.value.code == "ESP-332"
    assert "geheim" not in str(refused.value)


def test_a_file_that_is_no_database_is_refused(tmp_path):
    file = tmp_path / "urza.db"
    file.write_bytes(b"not a database" * 1000)
    with pytest.raises(DatabaseUnavailable, match=r"urza\.db") as refused:
        asyncio.run(Library.open("default", default_file=file))
    assert refused.value.code == "ESP-333"


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DatabaseUnavailable) as refused:
        asyncio.run(migration.upgrade("default", default_file=tmp_path / "file" / "urza.db"))
    assert refused.value.code == "ESP-333"


@pytest.mark.fault("E1")
def test_a_database_that_stays_locked_is_an_error_and_stays_whole(sqlite_file, locked, make, monkeypatch):
    monkeypatch.setattr(engine, "BUSY_TIMEOUT_MS", 100)

    async def main():
        async with await Library.open("default", default_file=sqlite_file) as library:
            with pytest.raises(DatabaseUnavailable, match="locked") as refused:
                await library.record_run(make.run(), NOW)
            assert refused.value.code == "ESP-333"
            # Reading waits for nobody.
            assert await library.runs() == ()
            locked.execute("ROLLBACK")
            assert (await library.record_run(make.run(), NOW)).run_id == "r1"

    asyncio.run(main())


@pytest.mark.fault("E1")
def test_a_lock_that_is_given_back_is_waited_for(sqlite_file, locked, make):
    def give_back() -> None:
        time.sleep(0.3)
        locked.execute("ROLLBACK")

    async def main():
        async with await Library.open("default", default_file=sqlite_file) as library:
            return await library.record_run(make.run(), NOW)

    thread = threading.Thread(target=give_back)
    thread.start()
    assert asyncio.run(main()).run_id == "r1"
    thread.join()


@pytest.mark.fault("E2")
def test_a_full_disk_is_an_error_and_the_database_stays_whole(sqlite_file, make):
    async def main():
        made = make_engine(parse_url("default", sqlite_file))
        library = Library(made)
        async with made.connect() as connection:
            pages = (await connection.execute(text("PRAGMA page_count"))).scalar_one()
        big = make.run().model_copy(
            update={
                "config": make.config().model_copy(
                    update={"task": make.config().task.model_copy(update={"arguments": {"words": "x" * 100_000}})}
                )
            }
        )
        async with made.connect() as connection:
            await connection.execute(text(f"PRAGMA max_page_count = {pages}"))
        with pytest.raises(DatabaseUnavailable, match="full"):
            await library.record_run(big, NOW)
        await library.close()

    asyncio.run(main())
    with sqlite3.connect(sqlite_file) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert connection.execute("SELECT count(*) FROM runs").fetchone() == (0,)
    connection.close()


@pytest.mark.fault("E3")
def test_every_connection_keeps_the_promises(sqlite_file):
    async def main():
        made = make_engine(parse_url("default", sqlite_file))
        async with reading(made) as connection:
            values = {
                name: (await connection.execute(text(f"PRAGMA {name}"))).scalar_one()
                for name in ("foreign_keys", "busy_timeout", "synchronous", "journal_mode")
            }
        await made.dispose()
        return values

    journal = "wal" if wal_is_safe(sqlite3.sqlite_version_info) else "delete"
    assert asyncio.run(main()) == {
        "foreign_keys": 1,
        "busy_timeout": engine.BUSY_TIMEOUT_MS,
        "synchronous": 2,
        "journal_mode": journal,
    }


def test_wal_is_used_only_where_it_is_repaired():
    safe = [(3, 44, 6), (3, 44, 9), (3, 50, 7), (3, 51, 3), (3, 52, 0)]
    broken = [(3, 40, 1), (3, 44, 5), (3, 45, 0), (3, 50, 6), (3, 51, 2)]
    assert [wal_is_safe(version) for version in safe + broken] == [True] * len(safe) + [False] * len(broken)


MOUNTS = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:40 / /mnt/team rw - nfs4 server:/export rw
31 22 0:41 / /mnt/my\\040disk rw - ext4 /dev/sdb1 rw
32 30 0:42 / /mnt/team/local rw - xfs /dev/sdc1 rw
33 22 0:43 / /over rw - nfs server:/x rw
34 22 0:44 / /over rw - tmpfs none rw
torn line
"""


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("/home/a/urza.db", "ext4"),
        ("/mnt/team/urza.db", "nfs4"),
        ("/mnt/team/local/urza.db", "xfs"),
        ("/mnt/teamwork/urza.db", "ext4"),
        ("/mnt/my disk/urza.db", "ext4"),
        ("/over/urza.db", "tmpfs"),
    ],
)
def test_the_file_system_is_that_of_the_nearest_mount(file, kind):
    assert file_system_type(Path(file), MOUNTS) == kind


def test_sqlite_on_a_network_file_system_is_refused(sqlite_file, monkeypatch):
    monkeypatch.setattr(engine, "file_system_type", lambda *_: "nfs4")
    with pytest.raises(DatabaseUnavailable, match="nfs4") as refused:
        asyncio.run(Library.open("default", default_file=sqlite_file))
    assert refused.value.code == "ESP-333"
    assert "PostgreSQL" in str(refused.value)


@pytest.mark.fault("E4")
@pytest.mark.postgres
def test_a_lost_connection_is_an_error_and_the_next_call_works(migrated_postgres, make):
    url = migrated_postgres.url("migrated")

    async def main():
        async with await Library.open(url, default_file=Path("unused")) as library:
            await library.record_run(make.run("lost"), NOW)
            with pytest.raises(DatabaseUnavailable, match="terminating"):
                async with writing(library._engine) as connection:
                    await connection.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))
            assert (await library.record_run(make.run("lost"), NOW)).run_id == "lost"

    asyncio.run(main())
