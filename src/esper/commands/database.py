"""`db`: bring Urza's database to this Esper's revision, or say where it stands."""

from typing import Annotated

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
    """Say at which revision the database is, and whether its file is whole. Exit 3 when either is not as it should."""
    import asyncio

    from esper.commands.actions import connections
    from esper.runtime.urza import migration

    status = asyncio.run(migration.check(connections.database_url(url)))
    migration.require(status)
    asyncio.run(migration.require_whole(connections.database_url(url)))
    if as_json:
        output.write_json(_form(status.database, status.current, status.head, status.state))
    else:
        output.write(f"{status.database}: at revision {status.current}, as it should be")
    return 0


@database.command("rebuild")
def rebuild(
    url: options.DatabaseOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be restored.")] = False,
    stored_only: Annotated[
        bool, typer.Option("--stored-only", help="Do not ask the Temporal server, which may be lost too.")
    ] = False,
    as_json: options.JsonFlag = False,
) -> int:
    """Restore the runs of a database that is lost, from the histories of their workflows and from their objects.

    For a new or empty database: one that has runs is refused, so move it away before. The local stack must be down, and
    so must workers elsewhere. Ended runs are as before; one that was under way goes on from the last checkpoint that
    was told of, by itself once workers run, or by `resume` or `recover`. Exit 4 when a run could not be read.
    """
    from esper.commands.actions import rebuilding

    return rebuilding.rebuild_database(url, dry_run=dry_run, stored_only=stored_only, as_json=as_json)


def _form(database: str, current: str | None, head: str, state: str) -> dict[str, str | None]:
    return {"database": database, "current": current, "head": head, "state": state}
