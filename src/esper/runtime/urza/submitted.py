"""The submitted blueprints of a database, for code that cannot wait for an event loop."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from esper.contracts.assets import Blueprint
from esper.runtime.urza import migration
from esper.runtime.urza.library import Library


def submitted_blueprints(url: str, *, default_file: Path) -> tuple[Blueprint, ...]:
    """All of them, of each name the newest version first; none where the database was never made.

    Read on an event loop of its own, so that it may be called on any thread. Raises `DatabaseUnavailable`.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="blueprints") as thread:
        found = thread.submit(asyncio.run, _read(url, default_file)).result()
    return tuple(sorted(found, key=lambda blueprint: (blueprint.name, -blueprint.version)))


async def _read(url: str, default_file: Path) -> tuple[Blueprint, ...]:
    if (await migration.check(url, default_file=default_file)).state == "empty":
        return ()
    async with await Library.open(url, default_file=default_file) as library:
        return await library.blueprints()
