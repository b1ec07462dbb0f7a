"""Everything that is kept of one run, read once: the plain data that `invariants` judges."""

from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from typing import Protocol

import safetensors.torch

from esper.contracts.assets import ArtifactRef
from esper.contracts.assets import Kernel
from esper.contracts.enums import DecisionKind
from esper.contracts.operational import Adaptation
from esper.contracts.operational import AdaptationDecision
from esper.contracts.operational import EpochReport
from esper.contracts.operational import Fact
from esper.contracts.operational import JudgeReport
from esper.contracts.orders import RunRecord
from esper.errors import EsperError
from esper.runtime.kasmina.digest import tensors_digest
from esper.runtime.tolaria.checkpoint import CheckpointManifest
from esper.runtime.tolaria.checkpoint import read_manifest
from esper.runtime.urza.ledger import CommittedHead
from esper.runtime.urza.ledger import Rewind
from esper.runtime.urza.library import Library

WEIGHTS = "model.safetensors"
KEPT_HEADS = 2


class Objects(Protocol):
    """What the check needs of an object store."""

    def get(self, ref: ArtifactRef) -> bytes: ...

    def exists(self, ref: ArtifactRef) -> bool: ...


@dataclass(frozen=True)
class RunRecords:
    """`manifests`, `unreadable` and `documents` are empty where the objects were not looked at.

    `unreadable`: digests that must be there, and why they cannot be read. `documents`: stored bytes by a name for
    people (histories, manifests, output files). `final_digest`: of the weights in the present head.
    """

    run: RunRecord
    heads: tuple[CommittedHead, ...]
    rewinds: tuple[Rewind, ...] = ()
    facts: tuple[Fact, ...] = ()
    reports: tuple[EpochReport, ...] = ()
    decisions: tuple[AdaptationDecision, ...] = ()
    adaptations: tuple[Adaptation, ...] = ()
    judgements: tuple[JudgeReport, ...] = ()
    kernels: Mapping[str, Kernel] = field(default_factory=dict)
    manifests: Mapping[str, CheckpointManifest] = field(default_factory=dict)
    unreadable: Mapping[str, str] = field(default_factory=dict)
    documents: Mapping[str, bytes] = field(default_factory=dict)
    final_digest: str | None = None

    def line(self) -> tuple[CommittedHead, ...]:
        """The present head and its ancestors, oldest first."""
        by_digest = {item.head.digest: item for item in self.heads}
        found: list[CommittedHead] = []
        current = self.run.head.digest if self.run.head is not None else None
        while current in by_digest and by_digest[current] not in found:
            found.append(by_digest[current])
            current = by_digest[current].head.parent
        return tuple(reversed(found))

    def manifests_of_line(self) -> tuple[tuple[CommittedHead, CheckpointManifest], ...]:
        """Those heads of the line whose manifest is still there, oldest first."""
        return tuple((item, self.manifests[d]) for item in self.line() if (d := item.head.digest) in self.manifests)

    def began(self) -> int:
        """The step at which the run's own training began: 0, or that of the head a branch began from."""
        return self.heads[0].head.step if self.run.lineage is not None and self.heads else 0


async def read_records(library: Library, objects: Objects | None, run_id: str) -> RunRecords:
    """All of one run, in an order in which a run that goes on meanwhile cannot look broken: what names before what is
    named. Without `objects` only the rows are read."""
    run = await library.run(run_id)
    adaptations = await library.adaptations(run_id)
    judgements = await library.judgements(run_id)
    decisions = await library.decisions(run_id)
    reports = await library.reports(run_id)
    heads = await library.heads(run_id)
    facts = await library.facts(run_id)
    records = RunRecords(
        run=run,
        heads=heads,
        rewinds=await library.rewinds(run_id),
        facts=facts,
        reports=reports,
        decisions=decisions,
        adaptations=adaptations,
        judgements=judgements,
    )
    if objects is None:
        return records
    kernels = {kernel.digest: kernel for kernel in await library.kernels(10_000)}
    histories = {f"history of {h.workflow_id}": h.events for h in await library.histories(run_id)}
    return _with_objects(records, objects, kernels, histories)


def _with_objects(
    records: RunRecords, objects: Objects, kernels: Mapping[str, Kernel], histories: Mapping[str, ArtifactRef]
) -> RunRecords:
    reader = _Reader(objects)
    needed = {item.head.digest for item in _needed(records)}
    # A damaged head from which the run fell back is on record, and so is the loss of its bytes.
    lost = {rewind.from_head for rewind in records.rewinds}
    manifests: dict[str, CheckpointManifest] = {}
    for item in records.heads:
        digest = item.head.digest
        if digest in needed or objects.exists(item.manifest):
            document = reader.manifest(item.manifest, f"head {digest[:19]}", excused=digest in lost)
            if document is not None:
                manifests[digest] = document
                if digest in needed:
                    for part in ("model", "optimizer", "random"):
                        reader.read(getattr(document, part), f"{part} of head {digest[:19]}", excused=digest in lost)
    for fact in records.facts:
        if fact.delivery is not None:
            for part in ("manifest", "weights", "certificate"):
                reader.read(getattr(fact.delivery, part), f"kernel {part} of {fact.adaptation_id}")
    finished = records.run.finished
    for name, ref in (finished.files if finished is not None else {}).items():
        reader.read(ref, f"output {name}")
    for name, ref in histories.items():
        reader.read(ref, name)
    used = {fact.delivery.kernel for fact in records.facts if fact.delivery is not None}
    return RunRecords(
        **{name: getattr(records, name) for name in _ROWS},
        kernels={digest: kernels[digest] for digest in used if digest in kernels},
        manifests=manifests,
        unreadable=reader.unreadable,
        documents=reader.documents,
        final_digest=_final_digest(records, manifests, reader),
    )


_ROWS = ("run", "heads", "rewinds", "facts", "reports", "decisions", "adaptations", "judgements")


class _Reader:
    """Reads what is named and notes what cannot be read."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self.unreadable: dict[str, str] = {}
        self.documents: dict[str, bytes] = {}

    def read(self, ref: ArtifactRef, name: str, *, excused: bool = False) -> bytes | None:
        try:
            data = self._objects.get(ref)
        except EsperError as error:
            if not excused:
                self.unreadable[name] = error.message
            return None
        self.documents[name] = data
        return data

    def manifest(self, ref: ArtifactRef, name: str, *, excused: bool) -> CheckpointManifest | None:
        data = self.read(ref, name, excused=excused)
        if data is None:
            return None
        try:
            return read_manifest(ref, lambda _: data)
        except EsperError as error:
            self.unreadable[name] = error.message
            return None


def _needed(records: RunRecords) -> Iterator[CommittedHead]:
    """The heads that retention promises to keep."""
    yield from records.line()[-KEPT_HEADS:]
    ordered = {decision.epoch for decision in records.decisions if decision.kind is not DecisionKind.WAIT}
    kept = {report.head.digest for report in records.reports if report.epoch in ordered}
    if records.run.lineage is not None:
        kept |= {item.head.digest for item in records.heads[:1]}
    yield from (item for item in records.heads if item.head.digest in kept)


def _final_digest(records: RunRecords, manifests: Mapping[str, CheckpointManifest], reader: _Reader) -> str | None:
    """`weights_digest` of the model in the present head: a checkpoint also has buffers that no state dict has."""
    head, finished = records.run.head, records.run.finished
    document = manifests.get(head.digest) if head is not None else None
    exported = reader.documents.get(f"output {WEIGHTS}")
    if document is None or finished is None or exported is None:
        return None
    model = reader.read(document.model, "model of the final head")
    if model is None:
        return None
    names = safetensors.torch.load(exported).keys()
    return tensors_digest({name: tensor for name, tensor in safetensors.torch.load(model).items() if name in names})


def secrets_of(environment: Mapping[str, str], names: Iterable[str]) -> tuple[str, ...]:
    """The values of the named variables that are long enough to be a secret."""
    return tuple(environment[name] for name in names if len(environment.get(name, "")) >= 8)
