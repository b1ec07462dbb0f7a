"""Committing heads on a thread of its own, one at a time and in order, while training goes on."""

from collections.abc import Callable
from collections.abc import Mapping
from concurrent.futures import Future
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from esper.contracts.assets import ArtifactRef
from esper.contracts.operational import EpochReport
from esper.contracts.operational import HeadRef
from esper.runtime.failpoints import hit
from esper.runtime.tezzeret.samples import SiteSamples
from esper.runtime.tezzeret.samples import pack_samples
from esper.runtime.tolaria.checkpoint import Snapshot
from esper.runtime.tolaria.checkpoint import write
from esper.runtime.tolaria.store import SessionStore

ReportMaker = Callable[[HeadRef, ArtifactRef | None], EpochReport]
"""Makes the report once its head, and the artifact with the site samples, are known. Called on the writer's thread."""

SampleMaker = Callable[[], Mapping[str, SiteSamples]]
"""Brings the site samples from the device to the CPU. Called on the writer's thread."""


@dataclass(frozen=True)
class Committed:
    """A head that stands, where its manifest lies, and the report that was committed with it."""

    head: HeadRef
    manifest: ArtifactRef
    report: EpochReport | None = None


class HeadWriter:
    """Never has two commits in flight: `idle` tells when the next may be submitted."""

    def __init__(self, store: SessionStore, last: Committed | None) -> None:
        self._store = store
        self._last = last
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="esper-writer")
        # Storing is waiting for a disk or a network: the files of one head wait together.
        self._files = ThreadPoolExecutor(max_workers=4, thread_name_prefix="esper-files")
        self._running: Future[Committed] | None = None

    @property
    def last(self) -> Committed | None:
        """The newest head that stands."""
        return self._last

    def submit(
        self,
        taken: Snapshot,
        report: ReportMaker | None = None,
        samples: SampleMaker | None = None,
    ) -> Future[Committed]:
        """Write and commit a snapshot. The caller has waited for the commit before."""
        return self._start(partial(self._commit, taken, report, samples))

    def submit_report(self, report: ReportMaker) -> Future[Committed]:
        """Record a report without a head of its own: it names the newest one that stands."""
        return self._start(partial(self._report, report))

    def close(self) -> None:
        """Wait for the commit in flight, and end the threads."""
        self._thread.shutdown(wait=True)
        self._files.shutdown(wait=True)

    def _start(self, work: Callable[[], Committed]) -> Future[Committed]:
        if self._running is not None and not self._running.done():
            raise RuntimeError("a commit is still in flight")
        self._running = self._thread.submit(work)
        return self._running

    def _report(self, report: ReportMaker) -> Committed:
        if self._last is None:
            raise RuntimeError("a run has a head before it has a report")
        made = report(self._last.head, None)
        self._store.record_report(made)
        return Committed(self._last.head, self._last.manifest, made)

    def _commit(self, taken: Snapshot, report: ReportMaker | None, samples: SampleMaker | None) -> Committed:
        taken_samples = samples() if samples is not None else {}
        storing = self._files.submit(self._store.put, pack_samples(taken_samples)) if taken_samples else None
        manifest = write(taken, self._store.put, self._files.map)
        artifact = None if storing is None else storing.result()
        parent = None if self._last is None else self._last.head.digest
        if report is None and self._last is not None and manifest.digest == parent:
            return self._last
        head = HeadRef(digest=manifest.digest, parent=parent, step=taken.step, epoch=taken.epoch)
        made = None if report is None else report(head, artifact)
        hit("commit.before_head")
        committed = Committed(self._store.commit_head(head, manifest, parent, made), manifest, made)
        hit("commit.after_head")
        self._last = committed
        return committed
