"""The newest checkpoint of a run that can be read: the head, or the one before it where the head is damaged.

The checkpoint that the twin of a graft on probation begins at is part of every head that still needs it. Where that one
is damaged, all of them are left, and it with them, for the newest before it.

Only one damage is gone back from by itself. Two damaged checkpoints are no accident of one file: a person looks.
"""

from dataclasses import dataclass

from esper.contracts.assets import ArtifactRef
from esper.contracts.base import Digest
from esper.contracts.operational import Fact
from esper.contracts.operational import HeadRef
from esper.errors import IntegrityError
from esper.runtime.tolaria.checkpoint import Restored
from esper.runtime.tolaria.checkpoint import read_manifest
from esper.runtime.tolaria.checkpoint import restore
from esper.runtime.tolaria.store import Ledger
from esper.runtime.tolaria.store import SessionStore

DAMAGED = "ESP-407"

READINGS = 2
"""A bit may also flip on its way here: what is damaged is read once more before it counts as damaged."""


@dataclass(frozen=True)
class Fall:
    """The head that could not be read, its damaged objects, and why."""

    damaged: HeadRef
    objects: tuple[ArtifactRef, ...]
    reason: str


@dataclass(frozen=True)
class Found:
    """A checkpoint that could be read, and the fall that led to it, if it is not the head."""

    head: HeadRef
    manifest: ArtifactRef
    restored: Restored
    fall: Fall | None


def newest_whole(ledger: Ledger, store: SessionStore) -> Found | None:
    """The head, or else the newest whole one behind what is damaged. `None` for a run without a head. Writes nothing.

    Raises `IntegrityError`: ESP-402 when that one is damaged too, ESP-408 for a checkpoint of a newer Esper, which is
    whole.
    """
    if ledger.head is None or ledger.manifest is None:
        return None
    newest = ledger.head
    line = ((newest, ledger.manifest), *ledger.older)
    step_of = {manifest.digest: head.step for head, manifest in line}
    damaged: dict[ArtifactRef, None] = {}
    reasons: list[str] = []
    places: set[int | Digest] = set()
    for head, manifest in line:
        if len(places | {head.step}) > 2:
            break
        broken = manifest
        try:
            restored = _read(manifest, store)
            held = restored.manifest.state.held
            if held is not None and held.start is not None:
                broken = held.start
                read_start(held.fact, held.start, store)
        except IntegrityError as error:
            if error.code != DAMAGED:
                raise
            damaged |= dict.fromkeys(_damaged_objects(broken, store))
            place = step_of.get(broken.digest, broken.digest)
            if place not in places:
                reasons.append(f"at step {head.step}: {error.message}")
            places.add(place)
            continue
        fall = Fall(newest, tuple(damaged), "; ".join(reasons)) if reasons else None
        return Found(head, manifest, restored, fall)
    run_id = store.lease.run_id
    raise IntegrityError(
        "ESP-402",
        f"run {run_id} has no whole checkpoint to go on from: {'; '.join(reasons)}",
        hint="Nothing was overwritten. Restore the objects from a copy and resume, or "
        f"`esper-cli fork {run_id} --epoch N` trains an earlier epoch again from the records",
        run_id=run_id,
    )


def read_start(graft: Fact, start: ArtifactRef, store: SessionStore) -> Restored:
    """The checkpoint just before a graft, at which its twin begins. Raises as `restore` does, and says whose it is."""
    try:
        return _read(start, store)
    except IntegrityError as error:
        if error.code != DAMAGED:
            raise
        raise IntegrityError(
            DAMAGED,
            f"the twin of {graft.adaptation_id} has nowhere to begin: {error.message}",
            hint=f"`esper-cli resume {graft.run_id}` goes on from the newest checkpoint before it",
            run_id=graft.run_id,
        ) from error


def _read(manifest: ArtifactRef, store: SessionStore) -> Restored:
    for reading in range(1, READINGS + 1):
        try:
            return restore(manifest, store.get)
        except IntegrityError as error:
            if error.code != DAMAGED or reading == READINGS:
                raise
    raise AssertionError("unreachable")


def _damaged_objects(manifest: ArtifactRef, store: SessionStore) -> list[ArtifactRef]:
    """Of a damaged checkpoint the objects that are so, as far as its manifest still names them."""
    try:
        document = read_manifest(manifest, store.get)
    except IntegrityError:
        return [manifest]
    return [ref for ref in document.files if not _is_whole(ref, store)]


def _is_whole(ref: ArtifactRef, store: SessionStore) -> bool:
    try:
        store.get(ref)
    except IntegrityError:
        return False
    return True
