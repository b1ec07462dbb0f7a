"""`gc`: removes objects that no record needs any more."""

from dataclasses import asdict
from typing import Annotated

import typer

from esper.commands import options
from esper.commands import output


def collect_garbage(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    grace_hours: Annotated[
        float, typer.Option("--grace-hours", min=0.0, help="Leave alone what was written in the last hours.")
    ] = 24.0,
    as_json: options.JsonFlag = False,
) -> int:
    """Remove objects that no record of this database needs: mostly checkpoints between those that are kept.

    Of each run stay the last two checkpoints, those before every decision that was not to wait, and both sides of
    every fork; `fork` trains others again. It may run beside trainers. A store that several databases share must not
    be collected: each knows only its own objects.
    """
    import asyncio

    from esper.commands.actions import collecting

    swept = asyncio.run(collecting.collect(grace_hours * 3600.0, dry_run=dry_run))
    if as_json:
        output.write_json({"schema": 1, "dry_run": dry_run, **asdict(swept)})
        return 0
    verb = "would remove" if dry_run else "removed"
    output.write(f"{verb} {swept.removed} objects, {swept.removed_bytes} bytes")
    output.write(f"kept {swept.kept} objects, {swept.kept_bytes} bytes; {swept.young} more are too young to go")
    return 0
