"""A run trained once more from its records alone: every recorded fact at its step, every recorded head compared.

No workflow, no strategist and no forge take part: the facts say what happened to the model, the kernels are the
stored ones, and the session is the one that trained the run. Nothing is written to the run's records.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from threading import Lock

from pydantic import JsonValue

from esper.contracts.assets import ArtifactRef
from esper.contracts.base import Digest
from esper.contracts.config import EsperConfig
from esper.contracts.enums import FactKind
from esper.contracts.operational import EpochReport
from esper.contracts.operational import Fact
from esper.contracts.operational import HeadRef
from esper.contracts.orders import EpochRequest
from esper.contracts.orders import Lease
from esper.errors import IntegrityError
from esper.errors import NotFoundError
from esper.runtime.scratch import scratch_folder
from esper.runtime.tolaria.checkpoint import CheckpointManifest
from esper.runtime.tolaria.checkpoint import Get
from esper.runtime.tolaria.checkpoint import read_manifest
from esper.runtime.tolaria.live.live_run import VERDICTS
from esper.runtime.tolaria.session import Session
from esper.runtime.tolaria.store import Progress
from esper.runtime.urza.objects import FolderStore


@dataclass(frozen=True)
class RecordedRun:
    """What Urza knows of a run. `heads` are those that were ever committed, each with its manifest."""

    run_id: str
    config: EsperConfig
    facts: Sequence[Fact]
    heads: Sequence[tuple[HeadRef, ArtifactRef]]
    get: Get
    start: tuple[HeadRef, ArtifactRef] | None = None
    """The head that training begins from: that of a branch, or where a drift was accepted. Else it begins at step 0."""
    drifted: bool = False
    """A drift was accepted: the start may have been made with another recipe than `config`."""


@dataclass(frozen=True)
class ComparedHead:
    """One recorded head and what the reproduction has at its step.

    `same`: at that step the reproduction had the same model, optimizer and random state, to the bit. `obstacle` says
    why there was nothing to compare (the bytes of an old head may have been collected).
    """

    step: int
    epoch: int
    head: Digest
    same: bool
    obstacle: str | None = None


@dataclass(frozen=True)
class Reproduction:
    """The outcome: `divergences` are facts that the reproduction would have decided otherwise."""

    run_id: str
    heads: tuple[ComparedHead, ...]
    digest: Digest
    divergences: tuple[str, ...]

    @property
    def different(self) -> tuple[ComparedHead, ...]:
        """Recorded heads that could be compared and are not the same."""
        return tuple(head for head in self.heads if not head.same and head.obstacle is None)

    @property
    def clean(self) -> bool:
        """Nothing diverged, and every head that could be compared is the same."""
        return not self.divergences and not self.different


class Shelf:
    """A `SessionStore` that reads the run's objects, writes to a folder of its own and knows the recorded facts."""

    def __init__(self, recorded: RecordedRun, folder: Path) -> None:
        self.lease = Lease(run_id=recorded.run_id, lease_gen=1, task_queue="reproduction")
        self.committed: list[tuple[int, CheckpointManifest]] = []
        self.heads: list[tuple[HeadRef, ArtifactRef]] = []
        self.reports: dict[int, EpochReport] = {}
        self.divergences: list[str] = []
        self._recorded = recorded
        self._own = FolderStore(folder)
        self._lock = Lock()

    def put(self, data: bytes) -> ArtifactRef:
        return self._own.put(data)

    def get(self, ref: ArtifactRef) -> bytes:
        return self._own.get(ref) if self._own.exists(ref) else self._recorded.get(ref)

    def commit_head(
        self, head: HeadRef, manifest: ArtifactRef, parent: Digest | None, report: EpochReport | None
    ) -> HeadRef:
        document = read_manifest(manifest, self.get)
        with self._lock:
            self.committed.append((head.step, document))
            self.heads.append((head, manifest))
            if report is not None:
                self.reports[report.epoch] = report
        return head

    def rewind(self, damaged: HeadRef, to: HeadRef, objects: Sequence[ArtifactRef], reason: str) -> None:
        raise AssertionError("a reproduction knows one head at most, and none before it")

    def record_drift(self, step: int, fields: Mapping[str, tuple[JsonValue, JsonValue]]) -> None:
        """Another machine than the one that made the start of a branch: the comparison of heads will tell."""

    def record_report(self, report: EpochReport) -> None:
        self.reports[report.epoch] = report

    def open_marker(self, adaptation_id: str, kernel: Digest) -> None:
        """What ended a process is in the records, and is not executed."""

    def close_marker(self, adaptation_id: str) -> None:
        """As `open_marker`."""

    def insert_fact(self, fact: Fact) -> Fact:
        """A fact that the records lack is a divergence; it rules here, so that training can go on to show more."""
        same = (known for known in self._recorded.facts if known.adaptation_id == fact.adaptation_id)
        found = next((known for known in same if known.name == fact.name), None)
        if found is not None:
            return found
        with self._lock:
            self.divergences.append(
                f"{fact.kind} of {fact.adaptation_id} at step {fact.apply_step} is not in the records: {fact.reason}"
            )
            last = max((known.seq for known in self._recorded.facts), default=0)
            return fact.model_copy(update={"seq": last + len(self.divergences)})


@dataclass(frozen=True)
class Fresh:
    """A ledger with every fact, and no head but that of a branch."""

    facts: Sequence[Fact]
    head: HeadRef | None
    manifest: ArtifactRef | None
    reports: Sequence[EpochReport] = ()
    older: Sequence[tuple[HeadRef, ArtifactRef]] = ()
    rewound_from: Sequence[Digest] = ()
    crashes: Mapping[str, int] = field(default_factory=dict)
    quarantined: frozenset[Digest] = frozenset()

    @property
    def frontier(self) -> int:
        return max((fact.apply_step for fact in self.facts), default=0)


def reproduce(recorded: RecordedRun, tick: Callable[[Progress], None]) -> Reproduction:
    """Train from the beginning to the last recorded head. `tick` is called with progress and may raise to give up.

    Raises what a session raises: `TargetError`, `DatasetError` (task or data are not what they were),
    `IntegrityError` (a kernel is gone or damaged), `RunFailed` (training raised).
    """
    steps = frozenset(head.step for head, _ in recorded.heads)
    ended = max(steps, default=0)
    facts = [fact for fact in recorded.facts if fact.apply_step <= ended]
    with scratch_folder("reproduce") as folder:
        shelf = Shelf(recorded, folder)
        head, manifest = recorded.start or (None, None)
        ledger = Fresh(facts, head, manifest)
        drifted = recorded.drifted
        session = Session.load(recorded.config, ledger, shelf, commit_at=steps, timed=False, accept_drift=drifted)
        try:
            loaded = session.describe()
            train_again(session, shelf.lease, facts, -(-ended // loaded.steps_per_epoch), tick)
            digest = session.digest()
        finally:
            session.close()
        return Reproduction(
            run_id=recorded.run_id,
            heads=tuple(_compare(recorded.get, shelf.committed, *each) for each in _beyond(recorded)),
            digest=digest,
            divergences=tuple(shelf.divergences),
        )


def train_again(
    session: Session, lease: Lease, facts: Sequence[Fact], last: int, tick: Callable[[Progress], None]
) -> None:
    """From where the session stands through epoch `last`, with every verdict that `facts` hold."""
    begun = session.describe()
    # A cull at the step of its own graft was no verdict, and was executed on the way.
    due = {fact.adaptation_id: fact.judge_step for fact in facts if fact.kind is FactKind.GRAFT}
    for epoch in range(begun.epoch + 1, last + 1):
        session.train_epoch(EpochRequest(lease=lease, epoch=epoch), tick)
        for fact in facts:
            step = epoch * begun.steps_per_epoch
            if fact.kind in VERDICTS.values() and fact.apply_step == step == due.get(fact.adaptation_id, step):
                session.judge(fact.adaptation_id, tick)


def _beyond(recorded: RecordedRun) -> list[tuple[HeadRef, ArtifactRef]]:
    """The heads that training led to: all but the one it began from."""
    return [each for each in recorded.heads if recorded.start is None or each[0] != recorded.start[0]]


def _compare(
    get: Get, committed: Sequence[tuple[int, CheckpointManifest]], head: HeadRef, manifest: ArtifactRef
) -> ComparedHead:
    def compared(same: bool, obstacle: str | None = None) -> ComparedHead:
        return ComparedHead(step=head.step, epoch=head.epoch, head=head.digest, same=same, obstacle=obstacle)

    try:
        recorded = read_manifest(manifest, get)
    except (IntegrityError, NotFoundError) as error:
        return compared(False, error.message)
    here = [document for step, document in committed if step == head.step]
    if not here:
        return compared(False, "the reproduction did not stop at this step")
    return compared(any(document.files == recorded.files for document in here))
