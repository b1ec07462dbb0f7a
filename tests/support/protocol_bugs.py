"""Five bugs that the protocol exists to exclude, each put back into the real code by itself."""

from typing import Any

from memory_urza import Store
from protocol_machine import Protocol
from sqlalchemy import func
from sqlalchemy import select
from sqlalchemy import update

from esper.contracts.assets import ArtifactRef
from esper.contracts.enums import FactKind
from esper.contracts.operational import EpochReport
from esper.contracts.operational import Fact
from esper.contracts.operational import HeadRef
from esper.contracts.operational import ScheduledAdaptation
from esper.contracts.orders import Lease
from esper.errors import LeaseLost
from esper.runtime.tolaria.live.facts import FactBook
from esper.runtime.urza.rows import hold
from esper.runtime.urza.rows import insert_new
from esper.runtime.urza.tables import facts as fact_table
from esper.runtime.urza.tables import heads as head_table
from esper.runtime.urza.tables import runs as run_table


class OwnNumberStore(Store):
    """No fence: a process asks for the lease that is the run's now, and writes under that."""

    def _current(self) -> Lease:
        lease = self.urza.lease(self.lease.run_id)
        assert lease is not None
        return lease

    def commit_head(
        self, head: HeadRef, manifest: ArtifactRef, parent: str | None, report: EpochReport | None
    ) -> HeadRef:
        return self.commit_under(self._current(), head, manifest, parent, report)

    def insert_fact(self, fact: Fact) -> Fact:
        return self.insert_under(self._current(), fact)


class CheckThenWriteStore(Store):
    """The condition of the commit is checked before the files are written, and the head is moved after that."""

    def check_before_files(self, parent: str | None) -> None:
        self.urza.transact(lambda connection: self._check(connection, parent))

    async def _check(self, connection: Any, parent: str | None) -> None:
        row = await hold(connection, self.lease)
        if row.head != parent:
            raise LeaseLost("ESP-503", "somebody else moved the head")

    def commit_head(
        self, head: HeadRef, manifest: ArtifactRef, parent: str | None, report: EpochReport | None
    ) -> HeadRef:
        self.writing(lambda connection: self._move(connection, head, manifest))
        return head

    async def _move(self, connection: Any, head: HeadRef, manifest: ArtifactRef) -> None:
        mine = run_table.c.run_id == self.lease.run_id
        number = select(func.coalesce(func.max(head_table.c.number), 0) + 1).where(
            head_table.c.run_id == self.lease.run_id
        )
        values = {
            "run_id": self.lease.run_id,
            "digest": head.digest,
            "number": number.scalar_subquery(),
            "parent": head.parent,
            "step": head.step,
            "epoch": head.epoch,
            "manifest_bytes": manifest.size_bytes,
            "lease_gen": self.lease.lease_gen,
        }
        await connection.execute(update(run_table).where(mine).values(head=head.digest))
        await insert_new(connection, head_table, values)


class ForgetfulBook(FactBook):
    """No dedup, the trainer's half: a delivery is never one that came before."""

    def delivery(self, adaptation_id: str) -> Fact | None:
        return None

    def expected(self) -> tuple[ScheduledAdaptation, ...]:
        return tuple(item for key, item in self._expected.items() if super(ForgetfulBook, self).delivery(key) is None)


class ForgetfulStore(Store):
    """No dedup, the ledger's half: every insert is a new fact."""

    def insert_fact(self, fact: Fact) -> Fact:
        inserted: Fact = self.writing(lambda connection: self._insert(connection, fact))
        return inserted

    async def _insert(self, connection: Any, fact: Fact) -> Fact:
        await hold(connection, self.lease)
        last = select(func.coalesce(func.max(fact_table.c.seq), 0)).where(fact_table.c.run_id == fact.run_id)
        numbered = fact.model_copy(update={"seq": (await connection.execute(last)).scalar_one() + 1})
        values = {
            "run_id": fact.run_id,
            "seq": numbered.seq,
            "adaptation_id": fact.adaptation_id,
            "kind": fact.kind,
            "decides": f"{fact.kind.value}-{numbered.seq}",
            "apply_step": fact.apply_step,
            "fact": numbered,
        }
        await connection.execute(fact_table.insert().values(**values))
        return numbered


class EarlyStore(Store):
    """Early acknowledgement, the trainer's half: a delivery is answered at once, its fact waits for the next commit."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.waiting: list[Fact] = []

    def insert_fact(self, fact: Fact) -> Fact:
        if fact.kind is not FactKind.GRAFT:
            recorded: Fact = super().insert_fact(fact)
            return recorded
        self.waiting.append(fact)
        return fact.model_copy(update={"seq": 1000 + len(self.waiting)})

    def commit_head(
        self, head: HeadRef, manifest: ArtifactRef, parent: str | None, report: EpochReport | None
    ) -> HeadRef:
        while self.waiting:
            super().insert_fact(self.waiting.pop(0))
        return super().commit_head(head, manifest, parent, report)


class NoFence(Protocol):
    store_kind = OwnNumberStore


class CheckThenWrite(Protocol):
    store_kind = CheckThenWriteStore


class NoDedup(Protocol):
    store_kind = ForgetfulStore
    book_kind = ForgetfulBook


class NoGeneration(Protocol):
    checks_generation = False


class EarlyAcknowledgement(Protocol):
    store_kind = EarlyStore
    acknowledges_early = True
