"""Urza's real ledger and leases on SQLite in memory, called without waiting, and what one trainer sees of them."""

from collections.abc import Callable
from collections.abc import Coroutine
from typing import Any

from sqlalchemy import Connection
from sqlalchemy import CursorResult
from sqlalchemy import Executable
from sqlalchemy import create_engine
from sqlalchemy import func
from sqlalchemy import select
from sqlalchemy.pool import StaticPool

from esper.contracts.assets import ArtifactRef
from esper.contracts.config import EsperConfig
from esper.contracts.config import RunConfig
from esper.contracts.config import TaskConfig
from esper.contracts.operational import EpochReport
from esper.contracts.operational import Fact
from esper.contracts.operational import HeadRef
from esper.contracts.orders import Lease
from esper.contracts.orders import RecordRun
from esper.errors import DatabaseUnavailable
from esper.runtime.urza import ledger
from esper.runtime.urza import markers
from esper.runtime.urza import runs
from esper.runtime.urza.objects import reference
from esper.runtime.urza.tables import facts as fact_table
from esper.runtime.urza.tables import metadata
from esper.runtime.urza.tables import runs as run_table


class DirectConnection:
    """What Urza's functions ask of an `AsyncConnection`, answered by a synchronous one: no thread, no waiting."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.dialect = connection.dialect

    async def execute(self, statement: Executable, *arguments: Any) -> CursorResult[Any]:
        return self._connection.execute(statement, *arguments)


Work = Callable[[Any], Coroutine[Any, Any, Any]]
"""One of Urza's functions, but for its connection."""


class MemoryUrza:
    """Urza's ledger and leases on SQLite in memory: one database for all examples, one run for each."""

    def __init__(self) -> None:
        self._engine = create_engine("sqlite://", poolclass=StaticPool)
        self.runs = 0
        metadata.create_all(self._engine)

    def transact(self, work: Work) -> Any:
        """One transaction, undone by any exception."""
        with self._engine.begin() as connection:
            running = work(DirectConnection(connection))
            try:
                running.send(None)
            except StopIteration as done:
                return done.value
            raise AssertionError("Urza waited for something")

    def record_run(self, run_id: str) -> None:
        config = EsperConfig(run=RunConfig(name="x"), task=TaskConfig(name="digits"))
        request = RecordRun(run_id=run_id, config=config)
        self.transact(lambda connection: runs.record_run(connection, request, "2030-01-01T00:00:00Z"))

    def claim(self, run_id: str) -> Lease:
        lease: Lease = self.transact(lambda connection: runs.claim(connection, run_id, "queue"))
        return lease

    def lease(self, run_id: str) -> Lease | None:
        lease: Lease | None = self.transact(lambda connection: runs.lease(connection, run_id))
        return lease

    def heads(self, run_id: str) -> tuple[ledger.CommittedHead, ...]:
        found: tuple[ledger.CommittedHead, ...] = self.transact(lambda connection: ledger.heads(connection, run_id))
        return found

    def facts(self, run_id: str) -> tuple[Fact, ...]:
        found: tuple[Fact, ...] = self.transact(lambda connection: ledger.facts(connection, run_id))
        return found

    def position(self, run_id: str) -> tuple[str | None, int]:
        """Head and number of facts of a run."""
        position: tuple[str | None, int] = self.transact(lambda connection: _position(connection, run_id))
        return position

    def close(self) -> None:
        self._engine.dispose()


async def _position(connection: Any, run_id: str) -> tuple[str | None, int]:
    head = (await connection.execute(select(run_table.c.head).where(run_table.c.run_id == run_id))).scalar_one()
    count = select(func.count()).select_from(fact_table).where(fact_table.c.run_id == run_id)
    return head, (await connection.execute(count)).scalar_one()


class Store:
    """What a trainer sees of Urza (a `SessionStore`); notes who wrote, and may lose the answer to a write."""

    def __init__(self, urza: MemoryUrza, objects: dict[str, bytes], lease: Lease, writes: list[int]) -> None:
        self.urza = urza
        self.objects = objects
        self.lease = lease
        self.writes = writes
        self.lose_answer = False
        self.meanwhile: Callable[[], None] | None = None

    def put(self, data: bytes) -> ArtifactRef:
        ref = reference(data)
        self.objects[ref.digest] = data
        return ref

    def get(self, ref: ArtifactRef) -> bytes:
        return self.objects[ref.digest]

    def commit_head(
        self, head: HeadRef, manifest: ArtifactRef, parent: str | None, report: EpochReport | None
    ) -> HeadRef:
        return self.commit_under(self.lease, head, manifest, parent, report)

    def insert_fact(self, fact: Fact) -> Fact:
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            meanwhile()
        return self.insert_under(self.lease, fact)

    def open_marker(self, adaptation_id: str, kernel: str) -> None:
        self.urza.transact(lambda connection: markers.open_marker(connection, self.lease, adaptation_id, kernel))

    def close_marker(self, adaptation_id: str) -> None:
        self.urza.transact(lambda connection: markers.close_marker(connection, self.lease, adaptation_id))

    def commit_under(
        self, lease: Lease, head: HeadRef, manifest: ArtifactRef, parent: str | None, report: EpochReport | None
    ) -> HeadRef:
        committed: HeadRef = self.writing(
            lambda connection: ledger.commit_head(
                connection, lease, head=head, manifest=manifest, parent=parent, report=report
            )
        )
        return committed

    def insert_under(self, lease: Lease, fact: Fact) -> Fact:
        recorded: Fact = self.writing(lambda connection: ledger.insert_fact(connection, lease, fact))
        return recorded

    def check_before_files(self, parent: str | None) -> None:
        """Called before the files of a commit are written; what is checked here may no longer hold at the end."""

    def writing(self, work: Work) -> Any:
        """Do it; note the owner's lease if it changed anything."""
        before = self.urza.position(self.lease.run_id)
        answer = self.urza.transact(work)
        if self.urza.position(self.lease.run_id) != before:
            self.writes.append(self.lease.lease_gen)
        lost, self.lose_answer = self.lose_answer, False
        if lost:
            raise DatabaseUnavailable("ESP-333", "the connection broke before the answer came")
        return answer
