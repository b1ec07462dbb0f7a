"""`db`: bring Urza's database to this Esper's revision, or say where it stands."""

import typer

from esper.commands import options
from esper.commands import output

database = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Migrations of the Urza database.")


@database.command("upgrade")
def upgrade(url: options.DatabaseOption = None, as_json: options.JsonFlag = False) -> int:
    """Migrate the database to the revision of this Esper. Safe twice."""
    import asyncio

    from esper.commands.actions import connections
    from esper.runtime.urza import migration

    status = asyncio.run(migration.upgrade(connections.database_url(url)))
    if as_json:
        output.write_json(_form(status.database, status.current, status.head, status.state))
    else:
        output.write(f"{status.database}: at revision {status.current}")
    return 0


@database.command("check")
def check(url: options.DatabaseOption = None, as_json: options.JsonFlag = False) -> int:
    """Say at which revision the database is. Exit 3 when it is not this Esper's."""
    import asyncio

    from esper.commands.actions import connections
    from esper.errors import DatabaseUnavailable
    from esper.runtime.urza import migration

    status = asyncio.run(migration.check(connections.database_url(url)))
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
    if as_json:
        output.write_json(_form(status.database, status.current, status.head, status.state))
    else:
        output.write(f"{status.database}: at revision {status.current}, as it should be")
    return 0


def _form(database: str, current: str | None, head: str, state: str) -> dict[str, str | None]:
    return {"database": database, "current": current, "head": head, "state": state}
