"""`gc`: mark and sweep over the objects of the database that the environment names."""

from esper.commands.actions import connections
from esper.errors import IntegrityError
from esper.runtime.urza import collection


async def collect(grace_s: float, *, dry_run: bool) -> collection.Swept:
    """What was removed, or would be. Nothing at all where there is no database yet: then nothing is known.

    Raises `IntegrityError` (ESP-407) when a checkpoint that must stay cannot be read: it is not known what it needs.
    """
    async with connections.library() as library:
        if library is None:
            return collection.Swept(kept=0, kept_bytes=0, removed=0, removed_bytes=0, young=0, unreadable=())
        swept = await collection.collect(library, connections.store(), grace_s=grace_s, dry_run=dry_run)
    if swept.unreadable:
        raise IntegrityError(
            "ESP-407",
            f"the checkpoint {swept.unreadable[0]} must be kept and cannot be read; nothing was removed",
            hint="Restore it from a copy, or check that `urza.objects` names the store that the runs wrote to",
        )
    return swept
