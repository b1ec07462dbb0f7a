"""What a session needs of the world outside: bytes, heads and facts. Everything here blocks; Urza stands behind it."""

from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pydantic import JsonValue

from esper.contracts.assets import ArtifactRef
from esper.contracts.base import Digest
from esper.contracts.operational import EpochReport
from esper.contracts.operational import Fact
from esper.contracts.operational import HeadRef
from esper.contracts.orders import Lease


class SessionStore(Protocol):
    """The world as one lease sees it. `commit_head` and `insert_fact` raise `LeaseLost` once it is another process's.

    Called from several threads at once: the training thread, the writer, and whoever installs.
    """

    @property
    def lease(self) -> Lease: ...

    def put(self, data: bytes) -> ArtifactRef:
        """Store bytes under their digest; storing them twice is storing them once."""
        ...

    def get(self, ref: ArtifactRef) -> bytes:
        """The bytes, verified. Raises `IntegrityError` or `ObjectsUnavailable`."""
        ...

    def commit_head(
        self, head: HeadRef, manifest: ArtifactRef, parent: Digest | None, report: EpochReport | None
    ) -> HeadRef:
        """Move the run's head from `parent` to `head`, together with the report of the epoch that ends there."""
        ...

    def record_report(self, report: EpochReport) -> None:
        """Record the report of an epoch that ended without a head of its own."""
        ...

    def insert_fact(self, fact: Fact) -> Fact:
        """The fact that now rules: this one with its `seq`, or the one recorded before."""
        ...

    def open_marker(self, adaptation_id: str, kernel: Digest) -> None:
        """The kernel is about to be executed for the first time: should the process end now, it is counted."""
        ...

    def close_marker(self, adaptation_id: str) -> None:
        """The kernel was executed, and the process lives."""
        ...

    def rewind(self, damaged: HeadRef, to: HeadRef, objects: Sequence[ArtifactRef], reason: str) -> None:
        """Go back, on record, from a damaged head to an older one; its damaged `objects` are quarantined."""
        ...

    def record_drift(self, step: int, fields: Mapping[str, tuple[JsonValue, JsonValue]]) -> None:
        """Note that the run goes on at `step` with what is not as it was: by name, what was and what is."""
        ...


class Ledger(Protocol):
    """What a new owner of a run is told, read under its lease in one transaction (`urza.ledger.RunLedger`)."""

    @property
    def head(self) -> HeadRef | None: ...

    @property
    def manifest(self) -> ArtifactRef | None: ...

    @property
    def facts(self) -> Sequence[Fact]: ...

    @property
    def reports(self) -> Sequence[EpochReport]: ...

    @property
    def frontier(self) -> int: ...

    @property
    def older(self) -> Sequence[tuple[HeadRef, ArtifactRef]]:
        """The heads before `head` on its line of parents, newest first, each with its manifest."""
        ...

    @property
    def crashes(self) -> Mapping[str, int]:
        """By adaptation, how often a process ended during the first execution of its kernel."""
        ...

    @property
    def quarantined(self) -> Collection[Digest]:
        """The kernels that are never executed again."""
        ...

    @property
    def rewound_from(self) -> Sequence[Digest]:
        """The damaged heads in whose place `head` is used."""
        ...


@dataclass(frozen=True)
class Progress:
    """What a heartbeat carries. `loss` is the last one read (at most twice a second), `seeds` counts seeds by state."""

    step: int
    epoch: int
    loss: float | None
    samples_per_s: float
    seeds: dict[str, int]
    phase: str


Beat = Callable[[Progress], None]
"""Called while the step counter advances or a bounded wait is under way; raises to cancel at a step boundary."""
