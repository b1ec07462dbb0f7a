"""The newest checkpoint of a run that can be read: the head, or the one before it where the head is damaged.

Only one step back is gone by itself. Two damaged checkpoints in a row are no accident of one file: a person looks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from esper.contracts.assets import ArtifactRef
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
    """The head, or else the newest whole one of the step before. `None` for a run without a head. Writes nothing.

    Raises `IntegrityError`: ESP-402 when both are damaged, ESP-408 for a checkpoint of a newer Esper, which is whole.
    """
    if ledger.head is None or ledger.manifest is None:
        return None
    newest = ledger.head
    damaged: list[ArtifactRef] = []
    reasons: list[str] = []
    for head, manifest in _candidates((newest, ledger.manifest), ledger.older):
        try:
            restored = _read(manifest, store)
        except IntegrityError as error:
            if error.code != DAMAGED:
                raise
            damaged += _damaged_objects(manifest, store)
            reasons.append(f"at step {head.step}: {error.message}")
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


def _candidates(
    newest: tuple[HeadRef, ArtifactRef], older: Sequence[tuple[HeadRef, ArtifactRef]]
) -> list[tuple[HeadRef, ArtifactRef]]:
    """The heads of the newest two steps: those of one step may share their files."""
    steps = sorted({head.step for head, _ in (newest, *older)}, reverse=True)[:2]
    return [each for each in (newest, *older) if each[0].step in steps]


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
    parts = (document.model, document.frozen, document.optimizer, document.random)
    return [ref for ref in parts if ref is not None and not _is_whole(ref, store)]


def _is_whole(ref: ArtifactRef, store: SessionStore) -> bool:
    try:
        store.get(ref)
    except IntegrityError:
        return False
    return True
