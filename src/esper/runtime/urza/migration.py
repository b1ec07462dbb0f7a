"""The revision of a database: check it, or bring it to that of this Esper.

Workers check and refuse with a sentence; only `esper-cli db upgrade` and the local stack's `up` migrate.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any
from typing import Literal

from sqlalchemy import Connection
from sqlalchemy import event
from sqlalchemy import inspect
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.ext.asyncio import AsyncEngine

from esper.errors import DatabaseUnavailable
from esper.runtime.urza.engine import describe
from esper.runtime.urza.engine import explained
from esper.runtime.urza.engine import make_engine
from esper.runtime.urza.engine import parse_url
from esper.runtime.urza.engine import reading
from esper.runtime.urza.engine import sqlite_file
from esper.runtime.urza.engine import writing

REVISION = "0003"
"""The revision that `tables` describes: the newest one in ``migrations/versions``."""

_MIGRATION_LOCK = 0x65737065
"""Key of PostgreSQL's advisory lock: two upgrades at once are one after the other."""


@dataclass(frozen=True)
class RevisionStatus:
    """Where a database stands: `current` is its revision (`None`: no tables yet), `head` that of this Esper."""

    database: str
    current: str | None
    head: str

    @property
    def state(self) -> Literal["current", "empty", "older", "newer"]:
        if self.current == self.head:
            return "current"
        if self.current is None:
            return "empty"
        return "older" if self.current < self.head else "newer"


async def check(url: str, *, default_file: Path = Path("urza.db")) -> RevisionStatus:
    """The revision of the database at `url`; creates and changes nothing. Raises `DatabaseUnavailable`."""
    parsed = parse_url(url, default_file)
    file = sqlite_file(parsed)
    if file is not None and not file.is_file():
        return RevisionStatus(describe(parsed), None, REVISION)
    engine = make_engine(parsed)
    try:
        return await _status(engine)
    finally:
        await engine.dispose()


async def require_whole(url: str, *, default_file: Path = Path("urza.db")) -> None:
    """Read a whole SQLite file: `DatabaseUnavailable` (ESP-333) with what SQLite's own check finds wrong in it. A
    server checks its files itself."""
    parsed = parse_url(url, default_file)
    file = sqlite_file(parsed)
    if file is None or not file.is_file():
        return
    engine = make_engine(parsed)
    try:
        async with reading(engine) as connection:
            found = [str(line) for line in (await connection.execute(text("PRAGMA integrity_check"))).scalars()]
    finally:
        await engine.dispose()
    if found != ["ok"]:
        raise DatabaseUnavailable(
            "ESP-333",
            f"database {describe(parsed)} is damaged: {found[0].splitlines()[-1]}",
            hint="Restore it from a copy, then `esper-cli recover RUN`; without one, `esper-cli db rebuild`",
        )


async def require_current(engine: AsyncEngine) -> None:
    """Nothing if the database is at this Esper's revision; else `DatabaseUnavailable` (ESP-334) saying what to do."""
    file = sqlite_file(engine.url)
    if file is not None and not file.is_file():
        status = RevisionStatus(describe(engine.url), None, REVISION)
    else:
        status = await _status(engine)
    require(status)


def require(status: RevisionStatus) -> None:
    """Raise `DatabaseUnavailable` (ESP-334), saying what to do, unless this is the revision of this Esper."""
    if status.state == "newer":
        raise DatabaseUnavailable(
            "ESP-334",
            f"database {status.database} is at revision {status.current}, newer than this Esper's {status.head}",
            hint="Install the Esper that made it, or a later one",
        )
    if status.state != "current":
        found = "has no tables yet" if status.current is None else f"is at revision {status.current}"
        raise DatabaseUnavailable(
            "ESP-334",
            f"database {status.database} {found}; this Esper needs revision {status.head}",
            hint="Run `esper-cli db upgrade`; --database URL names another than the default",
        )


async def upgrade(url: str, *, default_file: Path = Path("urza.db"), revision: str = "head") -> RevisionStatus:
    """Bring the database at `url` to this Esper's revision, in one transaction; a SQLite file is made if needed.

    Safe twice and from several processes at once. Raises `DatabaseUnavailable` (ESP-331..334).
    """
    return await _migrate(url, default_file, lambda command, config: command.upgrade(config, revision))


async def downgrade(url: str, *, default_file: Path = Path("urza.db"), revision: str = "base") -> RevisionStatus:
    """Go back to `revision`; what the later tables held is lost. Raises `DatabaseUnavailable`."""
    return await _migrate(url, default_file, lambda command, config: command.downgrade(config, revision))


async def drift(url: str, *, default_file: Path = Path("urza.db")) -> None:
    """Alembic's `check`: raises `alembic.util.AutogenerateDiffsDetected` when tables and migrations disagree."""
    await _migrate(url, default_file, lambda command, config: command.check(config))


async def _migrate(url: str, default_file: Path, action: Callable[[Any, Any], None]) -> RevisionStatus:
    parsed = parse_url(url, default_file)
    file = sqlite_file(parsed)
    if file is not None:
        with explained(parsed):
            file.parent.mkdir(parents=True, exist_ok=True)
    engine = make_engine(parsed)
    if file is not None:
        event.listen(engine.sync_engine, "connect", _leave_references_alone)
    try:
        async with writing(engine) as connection:
            await _alone(connection)
            await connection.run_sync(_with_alembic(action))
            if file is not None:
                await _require_references(connection, describe(parsed))
        return await _status(engine)
    finally:
        await engine.dispose()


def _with_alembic(action: Callable[[Any, Any], None]) -> Callable[[Connection], None]:
    # Only those who migrate pay for importing Alembic (0.4 s).
    from alembic import command
    from alembic.config import Config

    def run(connection: Connection) -> None:
        config = Config()
        config.set_main_option("script_location", str(files("esper.runtime.urza") / "migrations"))
        config.attributes["connection"] = connection
        action(command, config)

    return run


async def _alone(connection: AsyncConnection) -> None:
    if connection.dialect.name == "postgresql":
        await connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})


def _leave_references_alone(dbapi_connection: Any, _record: Any) -> None:
    # SQLite changes a table by making another one in its place: what refers to it must not fall with the first.
    dbapi_connection.execute("PRAGMA foreign_keys = OFF")


async def _require_references(connection: AsyncConnection, database: str) -> None:
    broken = (await connection.execute(text("PRAGMA foreign_key_check"))).first()
    if broken is not None:
        raise DatabaseUnavailable(
            "ESP-333",
            f"database {database}: a row of {broken[0]} refers to a row of {broken[2]} that is not there",
            hint="Nothing was changed. Restore the database from a copy, then `esper-cli recover RUN`",
        )


async def _status(engine: AsyncEngine) -> RevisionStatus:
    async with reading(engine) as connection:
        current = await connection.run_sync(_current_revision)
    return RevisionStatus(describe(engine.url), current, REVISION)


def _current_revision(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    found = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    return None if found is None else str(found)
