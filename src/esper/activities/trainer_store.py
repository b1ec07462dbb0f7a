"""The trainer's way into Urza: synchronous calls from its threads, carried out on the process's event loop.

A store that is away is waited for here and nowhere else: see `patience` for how long.
"""

import asyncio
from collections.abc import Callable
from collections.abc import Coroutine
from collections.abc import Mapping
from collections.abc import Sequence
from functools import partial
from typing import Any
from typing import TypeVar

from pydantic import JsonValue

from esper.activities.patience import CALL_LIMIT_S
from esper.activities.patience import Patience
from esper.contracts.assets import ArtifactRef
from esper.contracts.operational import EpochReport
from esper.contracts.operational import Fact
from esper.contracts.operational import HeadRef
from esper.contracts.orders import Lease
from esper.errors import DatabaseUnavailable
from esper.runtime.urza.ledger import CommittedHead
from esper.runtime.urza.library import Library
from esper.runtime.urza.objects import ObjectStore

ResultT = TypeVar("ResultT")


class UrzaStore:
    """What a live session asks of the world, under one lease: every write raises `LeaseLost` once it is stale."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        library: Library,
        objects: ObjectStore,
        lease: Lease,
        patience: Patience | None = None,
    ) -> None:
        self._loop = loop
        self._library = library
        self._objects = objects
        self._patience = patience or Patience()
        self.lease = lease

    def put(self, data: bytes) -> ArtifactRef:
        return self._patience.insist("storing a file", lambda: self._objects.put(data))

    def get(self, ref: ArtifactRef) -> bytes:
        return self._patience.insist("reading a file", lambda: self._objects.get(ref))

    def commit_head(
        self, head: HeadRef, manifest: ArtifactRef, parent: str | None, report: EpochReport | None
    ) -> HeadRef:
        return self._ask(
            f"committing step {head.step}",
            lambda: self._library.commit_head(self.lease, head=head, manifest=manifest, parent=parent, report=report),
        )

    def record_report(self, report: EpochReport) -> None:
        self._ask(f"recording epoch {report.epoch}", lambda: self._library.record_report(self.lease, report))

    def insert_fact(self, fact: Fact) -> Fact:
        return self._ask(f"recording a {fact.kind} fact", lambda: self._library.insert_fact(self.lease, fact))

    def open_marker(self, adaptation_id: str, kernel: str) -> None:
        self._ask("marking a kernel", lambda: self._library.open_marker(self.lease, adaptation_id, kernel))

    def close_marker(self, adaptation_id: str) -> None:
        self._ask("unmarking a kernel", lambda: self._library.close_marker(self.lease, adaptation_id))

    def rewind(self, damaged: HeadRef, to: HeadRef, objects: Sequence[ArtifactRef], reason: str) -> None:
        # Recorded first: a process that dies in between leaves a damaged object, which the next put heals.
        self._ask(
            "going back to an older head",
            lambda: self._library.rewind(self.lease, damaged=damaged.digest, to=to.digest, reason=reason),
        )
        for ref in objects:
            self._patience.insist("quarantining a file", partial(self._objects.set_aside, ref))

    def record_drift(self, step: int, fields: Mapping[str, tuple[JsonValue, JsonValue]]) -> None:
        self._ask("recording what differs", lambda: self._library.record_drift(self.lease, step, fields))

    def head_at(self, step: int) -> CommittedHead | None:
        return self._ask("looking up a head", lambda: self._library.head_at(self.lease.run_id, step))

    def reports(self) -> tuple[EpochReport, ...]:
        return self._ask("reading the reports", lambda: self._library.reports(self.lease.run_id))

    def _ask(self, what: str, call: Callable[[], Coroutine[Any, Any, ResultT]]) -> ResultT:
        return self._patience.insist(what, lambda: self._answer(call()))

    def _answer(self, call: Coroutine[Any, Any, ResultT]) -> ResultT:
        asked = asyncio.run_coroutine_threadsafe(call, self._loop)
        try:
            return asked.result(CALL_LIMIT_S)
        except TimeoutError as error:
            if asked.cancel():
                raise DatabaseUnavailable(
                    "ESP-333",
                    f"database {self._library.describe()}: no answer in {CALL_LIMIT_S:g} s",
                    hint="Check that the server runs and that its network does",
                ) from error
            return asked.result()
