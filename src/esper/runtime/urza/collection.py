"""Garbage collection of objects: mark from the records, sweep what nothing names and nobody wrote lately.

Safe beside running trainers. An object is written before the record that names it, so the young ones are left alone
(`grace_s`); writing an object that is there already makes it young again. Candidates are listed first and the records
are read after that; then each candidate's age is looked at once more at the moment it goes: it goes if nobody has put
it since the grace period before the records were read.
"""

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass

from esper.errors import IntegrityError
from esper.runtime.failpoints import hit
from esper.runtime.urza.library import Library
from esper.runtime.urza.objects import ObjectStore
from esper.runtime.urza.objects import StoredObject
from esper.runtime.urza.retention import Needed
from esper.runtime.urza.retention import references_in

DEFAULT_GRACE_S = 24 * 3600.0
"""Longer than the longest upload and the longest pause of a trainer between an upload and its commit."""


@dataclass(frozen=True)
class Swept:
    """What a collection did, or would do: counts and bytes. `young` were left alone although nothing names them."""

    kept: int
    kept_bytes: int
    removed: int
    removed_bytes: int
    young: int
    unreadable: tuple[str, ...]
    """Present heads that are missing, and kept checkpoint manifests that are damaged: nothing is removed while there
    is one."""


async def collect(
    library: Library,
    store: ObjectStore,
    *,
    grace_s: float,
    dry_run: bool,
    clock: Callable[[], float] = time.monotonic,
) -> Swept:
    """Mark and sweep. Raises `ObjectsUnavailable`, `DatabaseUnavailable`.

    With a manifest that cannot be read it is not known what must stay, so then nothing is removed. What an earlier
    collection was killed over is first put back under its name.
    """
    if not dry_run:
        await asyncio.to_thread(store.put_back)
    listed = await asyncio.to_thread(lambda: list(store.objects()))
    marked_at = clock()
    needed = await library.needed()
    marked, unreadable = await asyncio.to_thread(_follow, needed, store)
    kept = [each for each in listed if each.ref.digest in marked]
    garbage = [each for each in listed if each.ref.digest not in marked]
    old = [each for each in garbage if each.age_s >= grace_s]
    removed: list[StoredObject] = [] if unreadable else old
    if removed and not dry_run:

        def is_removed(each: StoredObject) -> bool:
            # However long all this takes: what was put since then may be named by a record that was not read.
            hit("collect.before_delete")
            return store.delete_older(each.ref, grace_s + max(0.0, clock() - marked_at))

        removed = await asyncio.to_thread(lambda: [each for each in old if is_removed(each)])
    if not dry_run:
        await asyncio.to_thread(store.delete_unfinished, grace_s)
    return Swept(
        kept=len(kept),
        kept_bytes=sum(each.ref.size_bytes for each in kept),
        removed=len(removed),
        removed_bytes=sum(each.ref.size_bytes for each in removed),
        young=len(garbage) - len(old),
        unreadable=unreadable,
    )


def _follow(needed: Needed, store: ObjectStore) -> tuple[set[str], tuple[str, ...]]:
    """Everything that is named, also by the manifests of kept checkpoints and by those that these name."""
    marked, unreadable = set(needed.digests), []
    waiting, seen = list(needed.kept), set(needed.kept)
    while waiting:
        digest = waiting.pop()
        try:
            named = set(references_in(json.loads(store.get(needed.manifests[digest]))))
        except IntegrityError:
            if digest in needed.present or store.exists(needed.manifests[digest]):
                unreadable.append(digest)
            continue
        marked |= named
        older = (named & needed.manifests.keys()) - seen
        waiting += older
        seen |= older
    return marked, tuple(sorted(unreadable))
