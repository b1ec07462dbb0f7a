"""From a database URL to an engine that loses no update, and from a driver's error to one of ours.

The SQLite settings are the only ones of those tried under which four processes lost nothing: we begin
every transaction ourselves, and a writing one takes the write lock at once (`BEGIN IMMEDIATE`).
"""

import re
import sqlite3
from collections.abc import AsyncIterator
from collections.abc import Iterator
from contextlib import asynccontextmanager
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL
from sqlalchemy import Connection
from sqlalchemy import event
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.exc import DataError
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import IntegrityError
from sqlalchemy.exc import NotSupportedError
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.ext.asyncio import create_async_engine

from esper.errors import DatabaseUnavailable

BUSY_TIMEOUT_MS = 30_000
CONNECT_TIMEOUT_S = 5

KEEPALIVE = {"keepalives_idle": "5", "keepalives_interval": "5", "keepalives_count": "3", "tcp_user_timeout": "20000"}
"""A PostgreSQL server that is gone without a word is noticed within 20 s, also while an answer is awaited."""

DRIVERS = {
    "sqlite": "sqlite+aiosqlite",
    "sqlite+aiosqlite": "sqlite+aiosqlite",
    "postgresql": "postgresql+psycopg",
    "postgresql+psycopg": "postgresql+psycopg",
}

NETWORK_FILE_SYSTEMS = frozenset(
    {"afs", "ceph", "cifs", "fuse.ceph", "fuse.glusterfs", "fuse.sshfs", "glusterfs", "lustre", "nfs", "nfs4", "smb3"}
)

_URL_HINT = "Write `default`, `sqlite+aiosqlite:////folder/urza.db` or `postgresql+psycopg://user@host/database`"
_PASSWORD = re.compile(r"://[^/]*@|(?<=password=)[^&]*", re.IGNORECASE)


def wal_is_safe(version: tuple[int, int, int]) -> bool:
    """Whether this SQLite has the repair of the WAL-reset bug: 3.51.3, or 3.50.7 and 3.44.6 on their branches."""
    return version >= (3, 51, 3) or (3, 50, 7) <= version < (3, 51, 0) or (3, 44, 6) <= version < (3, 45, 0)


def resolve_database(database: str, home: Path) -> str:
    """The URL that `urza.database` names: ``default`` is ``urza.db`` in `home` (``ESPER_HOME``).

    Raises `DatabaseUnavailable` (ESP-331) when it names no database that Esper can use.
    """
    return str(parse_url(database, home / "urza.db").render_as_string(hide_password=False))


def parse_url(database: str, default_file: Path) -> URL:
    """Checked and with its driver named. Raises `DatabaseUnavailable` (ESP-331), the password masked."""
    if database == "default":
        return URL.create("sqlite+aiosqlite", database=str(default_file.absolute()))
    try:
        url = make_url(database)
    except (ArgumentError, ValueError) as error:
        raise _bad_url(_masked(database), "it is not a database URL") from error
    if url.drivername not in DRIVERS:
        raise _bad_url(describe(url), f"{url.drivername!r} is not one of {', '.join(sorted(DRIVERS))}")
    url = url.set(drivername=DRIVERS[url.drivername])
    if url.get_backend_name() == "sqlite":
        if not url.database or url.database.startswith((":memory:", "file:")):
            raise _bad_url(describe(url), "the library must outlive this process, so it needs a file")
        url = url.set(database=str(Path(url.database).expanduser().absolute()))
    elif not url.database:
        raise _bad_url(describe(url), "it names no database")
    return url


def has_password(url: URL) -> bool:
    """Whether the URL itself holds a password, wherever in it."""
    return url.password is not None or "password" in url.query


def describe(url: URL) -> str:
    """The URL as people may see it: without its password."""
    return _masked(url.render_as_string(hide_password=True))


def _masked(url: str) -> str:
    return _PASSWORD.sub(lambda match: "://***@" if match.group().startswith("://") else "***", url)


def _bad_url(shown: str, why: str) -> DatabaseUnavailable:
    return DatabaseUnavailable("ESP-331", f"urza.database {shown!r}: {why}", hint=_URL_HINT)


def sqlite_file(url: URL) -> Path | None:
    """The file of a SQLite database; `None` for a server."""
    return Path(url.database) if url.get_backend_name() == "sqlite" and url.database else None


def make_engine(url: URL) -> AsyncEngine:
    """One engine a process and event loop, made after any fork; contacts nothing yet.

    Raises `DatabaseUnavailable`: ESP-332 without a driver, ESP-333 for SQLite on a network file system.
    """
    file = sqlite_file(url)
    try:
        if file is None:
            query = {"connect_timeout": str(CONNECT_TIMEOUT_S), **KEEPALIVE, **url.query}
            return create_async_engine(url.set(query=query), pool_pre_ping=True, isolation_level="READ COMMITTED")
        _refuse_network_file_system(file, url)
        engine = create_async_engine(url)
    except ModuleNotFoundError as error:
        raise DatabaseUnavailable(
            "ESP-332",
            f"urza.database {describe(url)!r}: the driver {error.name!r} is not installed",
            hint="Install it: pip install 'esper-morphogenetic[postgres]'",
        ) from error
    _sqlite_events(engine, file)
    return engine


def _sqlite_events(engine: AsyncEngine, file: Path) -> None:
    @event.listens_for(engine.sync_engine, "connect")
    def _configure(dbapi_connection: Any, record: Any) -> None:
        dbapi_connection.isolation_level = None
        cursor = dbapi_connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
        cursor.execute("PRAGMA foreign_keys = ON")
        if wal_is_safe(sqlite3.sqlite_version_info):
            cursor.execute("PRAGMA journal_mode = WAL")
        # FULL also under WAL: a head that was acknowledged must survive a power failure.
        cursor.execute("PRAGMA synchronous = FULL")
        cursor.close()
        record.info["file"] = _identity(file)

    @event.listens_for(engine.sync_engine, "begin")
    def _begin(connection: Connection) -> None:
        # SQLite would go on with a file that nobody can find any more, and what it commits there is lost.
        if connection.info.get("file") != _identity(file):
            raise FileNotFoundError(f"{file} was moved, deleted or replaced while it was open")
        read_only = connection.get_execution_options().get("esper_read_only")
        connection.exec_driver_sql("BEGIN DEFERRED" if read_only else "BEGIN IMMEDIATE")


def _identity(file: Path) -> tuple[int, int] | None:
    """What tells a file from another one of its name; `None` while there is none."""
    try:
        found = file.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


@asynccontextmanager
async def writing(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """One short writing transaction: committed at the end, undone by any exception."""
    with explained(engine.url):
        async with engine.begin() as connection:
            yield connection


@asynccontextmanager
async def reading(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """One reading transaction, which on SQLite never waits for the write lock."""
    with explained(engine.url):
        async with engine.execution_options(esper_read_only=True).begin() as connection:
            yield connection


@contextmanager
def explained(url: URL) -> Iterator[None]:
    """What the database could not do becomes `DatabaseUnavailable` (ESP-333); our own mistakes stay as they are."""
    try:
        yield
    except (IntegrityError, ProgrammingError, DataError, NotSupportedError):
        raise
    except DBAPIError as error:
        reason = str(error.orig).strip().partition("\n")[0] or type(error.orig).__name__
        raise _unavailable(url, reason) from error
    except (PoolTimeout, OSError) as error:
        raise _unavailable(url, str(error) or type(error).__name__) from error


def _unavailable(url: URL, reason: str) -> DatabaseUnavailable:
    if "locked" in reason:
        hint = "Another process holds it too long: find and end it, or use PostgreSQL"
    elif sqlite_file(url) is not None:
        hint = "Check the file, its folder's rights and the free space"
    else:
        hint = "Check that the server runs and that host, port, user and password are right"
    return DatabaseUnavailable("ESP-333", f"database {describe(url)}: {_masked(reason)}", hint=hint)


def _refuse_network_file_system(file: Path, url: URL) -> None:
    mounts = Path("/proc/self/mountinfo")
    kind = file_system_type(file, mounts.read_text(errors="replace")) if mounts.is_file() else None
    if kind in NETWORK_FILE_SYSTEMS:
        raise DatabaseUnavailable(
            "ESP-333",
            f"database {describe(url)}: {file.parent} is on a network file system ({kind}), where SQLite loses data",
            hint="Set ESPER_HOME to a local disk, or `urza.database` to a PostgreSQL URL",
        )


def file_system_type(file: Path, mountinfo: str) -> str | None:
    """The type of the file system that `file` is on, by the text of Linux's ``/proc/self/mountinfo``."""
    best: tuple[int, str] | None = None
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fields = before.split(" ")
        if len(fields) < 5 or not after:
            continue
        point = Path(re.sub(r"\\([0-7]{3})", lambda match: chr(int(match.group(1), 8)), fields[4]))
        # The later of two mounts on one point hides the earlier.
        if file.absolute().is_relative_to(point) and (best is None or len(point.parts) >= best[0]):
            best = (len(point.parts), after.split(" ")[0])
    return best[1] if best else None
