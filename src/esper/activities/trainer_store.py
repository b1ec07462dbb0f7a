"""The trainer's way into Urza: synchronous calls from its threads, carried out on the process's event loop."""

import asyncio
from collections.abc import Coroutine
from typing import Any
from typing import TypeVar

from esper.contracts.assets import ArtifactRef
from esper.contracts.operational import EpochReport
from esper.contracts.operational import Fact
from esper.contracts.operational import HeadRef
from esper.contracts.orders import Lease
from esper.runtime.urza.ledger import CommittedHead
from esper.runtime.urza.library import Library
from esper.runtime.urza.objects import ObjectStore

ResultT = TypeVar("ResultT")


class UrzaStore:
    """What a live session asks of the world, under one lease: every write raises `LeaseLost` once it is stale."""

    def __init__(self, loop: asyncio.AbstractEventLoop, library: Library, objects: ObjectStore, lease: Lease) -> None:
        self._loop = loop
        self._library = library
        self._objects = objects
        self.lease = lease

    def put(self, data: bytes) -> ArtifactRef:
        return self._objects.put(data)

    def get(self, ref: ArtifactRef) -> bytes:
        return self._objects.get(ref)

    def commit_head(
        self, head: HeadRef, manifest: ArtifactRef, parent: str | None, report: EpochReport | None
    ) -> HeadRef:
        return self._wait(
            self._library.commit_head(self.lease, head=head, manifest=manifest, parent=parent, report=report)
        )

    def insert_fact(self, fact: Fact) -> Fact:
        return self._wait(self._library.insert_fact(self.lease, fact))

    def head_at(self, step: int) -> CommittedHead | None:
        return self._wait(self._library.head_at(self.lease.run_id, step))

    def reports(self) -> tuple[EpochReport, ...]:
        return self._wait(self._library.reports(self.lease.run_id))

    def _wait(self, call: Coroutine[Any, Any, ResultT]) -> ResultT:
        return asyncio.run_coroutine_threadsafe(call, self._loop).result()
