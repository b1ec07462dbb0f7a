"""Garbage collection at any moment beside commits, resumes, rewinds, decisions, branches and readers: row D8, I7.

Real: Urza's ledger, retention and the collection itself. Stood in for: the store (a dict under a clock of its own) and
the trainers (what they put and commit, in the order of the commit protocol). Whatever the collection asks of the store,
others act first.
"""

import asyncio
import json
from collections.abc import Awaitable
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import find
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample
from memory_urza import MemoryUrza
from plain_report import plain_report

from esper.contracts.assets import ArtifactRef
from esper.contracts.config import EsperConfig
from esper.contracts.config import RunConfig
from esper.contracts.config import TaskConfig
from esper.contracts.enums import DecisionKind
from esper.contracts.operational import AdaptationDecision
from esper.contracts.operational import HeadRef
from esper.contracts.orders import Lease
from esper.contracts.orders import Lineage
from esper.errors import IntegrityError
from esper.runtime.urza import branches
from esper.runtime.urza import decisions
from esper.runtime.urza import ledger
from esper.runtime.urza import retention
from esper.runtime.urza.branches import Branch
from esper.runtime.urza.collection import collect
from esper.runtime.urza.objects import StoredObject
from esper.runtime.urza.objects import missing
from esper.runtime.urza.objects import reference

pytestmark = [pytest.mark.fault("D8", "I7"), pytest.mark.slow]

GRACE_S = 100.0
LONGEST_UPLOAD_S = 90.0
CONTENTS = 4
"""So many different tensor files there are: they are put again and again, also when they have been collected."""


class ClockedStore:
    """An `ObjectStore` in memory. `before` is called with the name of whatever a collection is about to ask."""

    def __init__(self) -> None:
        self.now = 0.0
        self.held: dict[str, tuple[bytes, float]] = {}
        self.before: Callable[[str], None] = lambda what: None

    def put(self, data: bytes) -> ArtifactRef:
        ref = reference(data)
        self.held[ref.digest] = (data, self.now)
        return ref

    def get(self, ref: ArtifactRef) -> bytes:
        self.before("get")
        return self.read(ref)

    def read(self, ref: ArtifactRef) -> bytes:
        if ref.digest not in self.held:
            raise missing(ref, "the dict")
        return self.held[ref.digest][0]

    def objects(self) -> Iterator[StoredObject]:
        for digest, (data, put_at) in list(self.held.items()):
            self.before("list")
            yield StoredObject(ArtifactRef(digest=digest, size_bytes=len(data)), self.now - put_at)

    def delete_older(self, ref: ArtifactRef, age_s: float) -> bool:
        self.before("delete")
        if ref.digest not in self.held or self.now - self.held[ref.digest][1] < age_s:
            return False
        del self.held[ref.digest]
        return True

    def exists(self, ref: ArtifactRef) -> bool:
        self.before("look up")
        return ref.digest in self.held

    def put_back(self) -> int:
        """A dict lays nothing aside."""
        return 0

    def delete_unfinished(self, age_s: float) -> None:
        """A dict has nothing that is half written."""


class HastyStore(ClockedStore):
    """What would be wrong: the age is looked at when objects are listed, and not again when they go."""

    def delete_older(self, ref: ArtifactRef, age_s: float) -> bool:
        self.before("delete")
        return self.held.pop(ref.digest, None) is not None


class Scene:
    """Runs with a trainer each, the store, and a collection that others interrupt."""

    def __init__(self, store: ClockedStore, script: Sequence[tuple[str, int]]) -> None:
        self.urza = MemoryUrza()
        self.store = store
        self.script = list(script)
        self.leases: dict[str, Lease] = {}
        self.uploaded: dict[str, tuple[float, HeadRef, ArtifactRef]] = {}
        self.fallen: set[str] = set()
        self.collections = 0
        self.collecting = False
        store.before = lambda what: self.act()
        self._begin("r0")

    async def needed(self) -> retention.Needed:
        self.act()
        found: retention.Needed = self.urza.transact(retention.needed)
        self.act()
        return found

    def play(self) -> None:
        while self.script:
            self.act()
        self.check()

    def act(self) -> None:
        """The next of the script. A collection that is under way goes on meanwhile, and no second one begins."""
        if not self.script:
            return
        name, number = self.script.pop(0)
        run_id = f"r{number % len(self.leases)}"
        getattr(self, f"_{name}")(run_id, number)
        self.check()

    def check(self) -> None:
        """Everything that a trainer which loads the run now may read is there."""
        for run_id in self.leases:
            for head in self._needed_of(run_id):
                self._readable(head)

    def _needed_of(self, run_id: str) -> list[ArtifactRef]:
        taken = self.urza.transact(lambda connection: ledger.take_over(connection, self.leases[run_id]))
        line = [(taken.head, taken.manifest), *taken.older] if taken.head is not None else []
        # Who went back has no second one to go back to, until the next head stands.
        steps = sorted({head.step for head, _ in line}, reverse=True)[: 1 if run_id in self.fallen else 2]
        return [manifest for head, manifest in line if head.step in steps]

    def _readable(self, manifest: ArtifactRef) -> None:
        document = json.loads(self.store.read(manifest))
        self.store.read(ArtifactRef(**document["model"]))
        if document["start"] is not None:
            # The twin of a graft on probation begins at an older checkpoint.
            self._readable(ArtifactRef(**document["start"]))

    def _begin(self, run_id: str) -> None:
        self.urza.record_run(run_id)
        self.leases[run_id] = self.urza.claim(run_id)
        self._upload(run_id, 0)
        self._commit(run_id, 0)

    # --- what may happen ---

    def _wait(self, run_id: str, number: int) -> None:
        """Time goes by, but no upload takes longer than it may."""
        oldest = min((since for since, _, _ in self.uploaded.values()), default=self.store.now)
        self.store.now = min(self.store.now + 20.0 * number, oldest + LONGEST_UPLOAD_S)

    def _upload(self, run_id: str, number: int) -> None:
        heads = self.urza.heads(run_id)
        current = self._current(run_id)
        parent = next((item for item in heads if item.head.digest == current), None)
        step = 0 if parent is None else parent.head.step + 10
        model = self.store.put(f"tensors {number % CONTENTS}".encode())
        start = None
        if parent is not None and number % 3 == 0:
            start = json.loads(self.store.read(parent.manifest))["start"] or parent.manifest.model_dump()
        document = {"run": run_id, "step": step, "model": model.model_dump(), "start": start}
        manifest = self.store.put(json.dumps(document, sort_keys=True).encode())
        head = HeadRef(digest=manifest.digest, parent=current, step=step, epoch=step // 10)
        self.uploaded[run_id] = (self.store.now, head, manifest)

    def _commit(self, run_id: str, number: int) -> None:
        if run_id not in self.uploaded:
            return
        _, head, manifest = self.uploaded.pop(run_id)
        report = None if head.epoch == 0 else plain_report(run_id, head)
        self.fallen.discard(run_id)
        self._do(
            lambda connection: ledger.commit_head(
                connection, self.leases[run_id], head=head, manifest=manifest, parent=head.parent, report=report
            )
        )

    def _decide(self, run_id: str, number: int) -> None:
        reports = self.urza.transact(lambda connection: ledger.reports(connection, run_id, 0))
        if reports:
            kind = DecisionKind.WAIT if number % 2 else DecisionKind.GERMINATE
            decision = AdaptationDecision(
                run_id=run_id, epoch=reports[-1].epoch, policy="p", kind=kind, code="c", reason="r"
            )
            self._do(lambda connection: decisions.record_decision(connection, decision))

    def _resume(self, run_id: str, number: int) -> None:
        """Another trainer takes over: what was uploaded and not committed is nobody's."""
        self.uploaded.pop(run_id, None)
        self.leases[run_id] = self.urza.claim(run_id)

    def _rewind(self, run_id: str, number: int) -> None:
        """The newest head turns out to be damaged: its manifest is set aside, the one before is used."""
        line = [
            item
            for item in ledger.line_of(self.urza.heads(run_id), self._current(run_id))
            if item.head.digest != self._current(run_id)
        ]
        damaged = self._current(run_id)
        if line and damaged is not None and run_id not in self.fallen:
            self.fallen.add(run_id)
            self._resume(run_id, number)
            to = line[0].head.digest
            self._do(
                lambda connection: ledger.rewind(
                    connection, self.leases[run_id], damaged=damaged, to=to, reason="damaged"
                )
            )

    def _branch(self, run_id: str, number: int) -> None:
        """The manifest of the branch is put first, as `fork` does; its head stands in the next moment."""
        if len(self.leases) > 2:
            return
        manifest = self._needed_of(run_id)[0]
        head = next(item.head for item in self.urza.heads(run_id) if item.head.digest == manifest.digest)
        child = f"r{len(self.leases)}"
        document = json.loads(self.store.read(manifest)) | {"run": child}
        stored = self.store.put(json.dumps(document, sort_keys=True).encode())
        config = EsperConfig(run=RunConfig(name="x"), task=TaskConfig(name="digits"))
        branch = Branch(
            run_id=child,
            config=config,
            lineage=Lineage(parent=run_id, epoch=max(1, head.epoch), head=head.digest),
            head=HeadRef(digest=stored.digest, parent=None, step=head.step, epoch=head.epoch),
            manifest=stored,
            facts=(),
            reports=(),
            decisions=(),
            adaptations=(),
            judgements=(),
        )
        self._do(lambda connection: branches.enter_branch(connection, branch, "2030-01-01T00:00:00Z"))
        self.leases[child] = self.urza.claim(child)

    def _collect(self, run_id: str, number: int) -> None:
        if self.collecting:
            return
        self.collecting = True
        try:
            library: Any = self
            store: Any = self.store
            swept = asyncio.run(collect(library, store, grace_s=GRACE_S, dry_run=False, clock=lambda: self.store.now))
        finally:
            self.collecting = False
        assert swept.unreadable == ()
        self.collections += swept.removed > 0

    def _current(self, run_id: str) -> str | None:
        return self.urza.position(run_id)[0]

    def _do(self, work: Callable[[Any], Any]) -> None:
        self.urza.transact(work)


ACTS = ("wait", "upload", "commit", "decide", "resume", "rewind", "branch", "collect")
STEP = st.tuples(st.sampled_from(ACTS), st.integers(0, 5))
EPOCH = st.integers(0, 5).map(lambda number: [("upload", number), ("wait", 4), ("commit", number), ("wait", 5)])
SCRIPTS = st.lists(st.one_of(EPOCH, st.lists(STEP, min_size=1, max_size=4)), min_size=4, max_size=14).map(
    lambda parts: [act for part in parts for act in part]
)


@pytest.fixture(autouse=True)
def on_this_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The collection's own threads would only be in the way of an exact order."""

    async def inline(work: Callable[[], Any], *arguments: Any) -> Any:
        return work(*arguments)

    inlined: Callable[..., Awaitable[Any]] = inline
    monkeypatch.setattr("esper.runtime.urza.collection.asyncio.to_thread", inlined)


def check(script: Sequence[tuple[str, int]]) -> None:
    scene = Scene(ClockedStore(), script)
    try:
        scene.play()
    finally:
        scene.urza.close()


@settings(max_examples=40, deadline=None)
@given(SCRIPTS)
def test_what_a_run_needs_outlives_every_collection(script: list[tuple[str, int]]) -> None:
    check(script)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(SCRIPTS)
def test_what_a_run_needs_outlives_every_collection_in_a_thousand_orders(script: list[tuple[str, int]]) -> None:
    check(script)


def test_something_is_collected() -> None:
    """The test of the test: between the kept ones objects do go."""
    epochs = [[("upload", number), ("commit", number), ("wait", 5)] for number in range(6)]
    scene = Scene(ClockedStore(), [*(act for epoch in epochs for act in epoch), ("wait", 5), ("collect", 0)])
    scene.play()
    assert scene.collections == 1
    scene.urza.close()


def test_a_collection_that_does_not_look_again_is_found_out() -> None:
    def loses(script: list[tuple[str, int]]) -> bool:
        scene = Scene(HastyStore(), script)
        try:
            scene.play()
        except (IntegrityError, AssertionError):
            return True
        finally:
            scene.urza.close()
        return False

    try:
        found = find(SCRIPTS, loses, settings=settings(max_examples=2000, deadline=None))
    except NoSuchExample:
        pytest.fail("no order of 2000 shows it")
    assert ("collect" in {name for name, _ in found}) and any(name == "upload" for name, _ in found)
