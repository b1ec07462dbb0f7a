"""The heads of a run in their order, put together again from what trainers told and what the store still has.

A head that was committed between two epoch ends (a graft, a pause, a process that was told to end) may have been told
by nobody: its successor names it as its parent, and its own manifest, where the store still has it, says the rest.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace

from esper.contracts.assets import ArtifactRef
from esper.contracts.operational import HeadRef
from esper.runtime.temporal.retelling import ToldHead
from esper.runtime.temporal.retelling import ToldLoad
from esper.runtime.urza.ledger import CommittedHead
from esper.runtime.urza.ledger import Rewind


@dataclass(frozen=True)
class FoundManifest:
    """What the store has under the digest of a head."""

    manifest: ArtifactRef
    step: int
    epoch: int


Find = Callable[[str], FoundManifest | None]
"""The checkpoint manifest of that digest; `None` when it is gone or no checkpoint."""


@dataclass(frozen=True)
class RetoldLine:
    """`heads` in the order of their commits, the digest of the present one, and the falls to older ones."""

    heads: tuple[CommittedHead, ...]
    head: str | None
    rewinds: tuple[Rewind, ...]
    untold: tuple[str, ...]
    """Digests of the heads that nobody told of: known by their successors."""


def retold_line(loads: Sequence[ToldLoad], told: Sequence[ToldHead], find: Find) -> RetoldLine:
    """Under each lease first what was loaded, then what was committed, by step. Nothing of it is read from the store
    but through `find`; a manifest that is gone has 0 bytes."""
    line = _Line(find)
    for lease_gen in sorted({load.lease_gen for load in loads} | {each.lease_gen for each in told}):
        for load in loads:
            if load.lease_gen == lease_gen:
                line.load(load)
        under = [each for each in told if each.lease_gen == lease_gen]
        for each in sorted(under, key=lambda each: each.head.step):
            line.commit(each.head, lease_gen)
    return RetoldLine(tuple(line.heads.values()), line.current, tuple(line.rewinds), tuple(line.untold))


class _Line:
    def __init__(self, find: Find) -> None:
        self._find = find
        self.heads: dict[str, CommittedHead] = {}
        self.current: str | None = None
        self.rewinds: list[Rewind] = []
        self.untold: list[str] = []

    def load(self, load: ToldLoad) -> None:
        """Where a run stood when it was taken over: an older head than the last one is a fall back to it."""
        head = load.loaded.head
        if head.digest in self.heads:
            reasons = [warning for warning in load.loaded.warnings if "was damaged" in warning]
            self._fall(head.digest, load.lease_gen, reasons[-1] if reasons else "the run went on from an older head")
        else:
            self.commit(head, load.lease_gen)

    def commit(self, head: HeadRef, lease_gen: int) -> None:
        known = self.heads.get(head.digest)
        if known is not None:
            # Told again, which changes nothing; or reached again after a fall, and its line is the one that led here.
            if known.head.parent != head.parent and head.parent in self.heads and self._is_ahead(head.parent):
                self.heads[head.digest] = replace(known, head=head)
            if self._is_ahead(head.digest):
                self.current = head.digest
            return
        if head.parent is not None and head.parent not in self.heads:
            self._insert_untold(head.parent, head)
        if head.parent is not None and not self._is_ahead(head.parent):
            self._fall(head.parent, lease_gen, "the run went on from an older head")
        self._insert(head, lease_gen)

    def _insert(self, head: HeadRef, lease_gen: int) -> None:
        found = self._find(head.digest)
        manifest = found.manifest if found is not None else ArtifactRef(digest=head.digest, size_bytes=0)
        self.heads[head.digest] = CommittedHead(head, manifest, lease_gen)
        self.current = head.digest

    def _insert_untold(self, digest: str, successor: HeadRef) -> None:
        """A head between the present one and its successor. One whose manifest is gone stands where that one does."""
        found = self._find(digest)
        before = self.heads[self.current] if self.current is not None else None
        step = successor.step if found is None else found.step
        while before is not None and before.head.step > step:
            before = self.heads.get(before.head.parent or "")
        epoch = found.epoch if found is not None else before.head.epoch if before is not None else successor.epoch
        parent = before.head.digest if before is not None else None
        lease_gen = max((item.lease_gen for item in self.heads.values()), default=0)
        if parent != self.current and parent is not None:
            self._fall(parent, lease_gen, "the run went on from an older head")
        self.untold.append(digest)
        self._insert(HeadRef(digest=digest, parent=parent, step=step, epoch=epoch), lease_gen)

    def _is_ahead(self, digest: str | None) -> bool:
        """Whether the line of that head comes through the present one."""
        return self.current in (None, digest) or self.current in self._line(digest)

    def _line(self, digest: str | None) -> Iterator[str]:
        """The head and its ancestors, newest first."""
        seen: set[str] = set()
        while digest is not None and digest in self.heads and digest not in seen:
            seen.add(digest)
            yield digest
            digest = self.heads[digest].head.parent

    def _fall(self, to: str, lease_gen: int, reason: str) -> None:
        if self.current is not None and self.current != to and to in self._line(self.current):
            self.rewinds.append(Rewind(self.current, to, lease_gen, reason))
        self.current = to
