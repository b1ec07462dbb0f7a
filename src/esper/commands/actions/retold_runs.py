"""One run of a lost database put together again: what its histories tell, completed from the objects of its store."""

from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace

from esper.contracts.assets import ArtifactRef
from esper.contracts.assets import Kernel
from esper.contracts.enums import DecisionKind
from esper.contracts.enums import KernelState
from esper.contracts.operational import Fact
from esper.contracts.operational import KernelDelivery
from esper.contracts.orders import RunRecord
from esper.errors import IntegrityError
from esper.runtime.tamiyo.by_hand import wait_at_branch
from esper.runtime.temporal.retelling import LEASE_MARGIN
from esper.runtime.temporal.retelling import ToldRun
from esper.runtime.temporal.retelling import facts_of
from esper.runtime.temporal.retold_heads import FoundManifest
from esper.runtime.temporal.retold_heads import RetoldLine
from esper.runtime.temporal.retold_heads import retold_line
from esper.runtime.tezzeret.manifest import KernelManifest
from esper.runtime.tolaria.branching import ParentRecords
from esper.runtime.tolaria.branching import branch_off
from esper.runtime.tolaria.checkpoint import CheckpointManifest
from esper.runtime.tolaria.checkpoint import drift_between
from esper.runtime.tolaria.checkpoint import read_manifest
from esper.runtime.tolaria.retraining import is_whole
from esper.runtime.urza.branches import Branch
from esper.runtime.urza.decisions import StoredHistory
from esper.runtime.urza.ledger import Drift
from esper.runtime.urza.ledger import line_of
from esper.runtime.urza.objects import ObjectStore
from esper.runtime.urza.objects import reference
from esper.runtime.urza.retold import RetoldRun


@dataclass(frozen=True)
class Retelling:
    """A run told again, and in words what of it could not be."""

    run: RetoldRun
    missing: tuple[str, ...]


class Remains:
    """What an object store has left of runs: manifests are read once, and only when they are asked for."""

    def __init__(self, store: ObjectStore) -> None:
        self.store = store
        self.references: dict[str, ArtifactRef] = {each.ref.digest: each.ref for each in store.objects()}
        self._manifests: dict[str, CheckpointManifest | None] = {}

    def manifest(self, digest: str) -> CheckpointManifest | None:
        """The checkpoint of that digest; `None` when it is gone, damaged or no checkpoint."""
        if digest not in self._manifests:
            try:
                found = read_manifest(self.references[digest], self.store.get)
            except (KeyError, IntegrityError):
                found = None
            self._manifests[digest] = found
        return self._manifests[digest]

    def find(self, digest: str) -> FoundManifest | None:
        found = self.manifest(digest)
        return None if found is None else FoundManifest(self.references[digest], found.step, found.epoch)


def put_together(
    told: ToldRun, remains: Remains, parent: RetoldRun | None, histories: Sequence[StoredHistory]
) -> Retelling:
    """All records of a run that was recorded once. `parent` is what it branched off, if it did and that is known.

    Its lease lies above every one that was ever given, so that a trainer of the lost time is fenced off.
    """
    record = told.record
    if record is None:
        raise ValueError(f"run {told.run_id} was never recorded")
    branch, missing = _past(record, remains, parent)
    line = retold_line(told.loads, told.heads, remains.find)
    present = (remains.manifest(item.head.digest) for item in line_of(line.heads, line.head))
    newest = next((document for document in present if document is not None), None)
    # Every checkpoint holds all that was executed before it.
    executed = newest.state.executed if newest is not None else branch.facts if branch is not None else ()
    facts = facts_of(told, executed)
    begun = 0
    if record.lineage is not None and line.heads:
        begun = line.heads[0].head.step
        # Entered with the branch, before anybody claimed it.
        line = replace(line, heads=(replace(line.heads[0], lease_gen=0), *line.heads[1:]))
    kernels, unknown = _kernels(told, facts, begun, remains)
    reports = {report.epoch: report for report in (() if branch is None else branch.reports)} | told.reports
    decisions = told.decisions | {decision.epoch: decision for decision in (() if branch is None else branch.decisions)}
    drifts = tuple(_drifts(told, line, remains))
    run = RetoldRun(
        record=record.model_copy(update={"lease_gen": told.lease_gen + LEASE_MARGIN}),
        head=line.head,
        heads=line.heads,
        rewinds=line.rewinds,
        drifts=drifts,
        facts=facts,
        reports=tuple(reports[epoch] for epoch in sorted(reports)),
        decisions=tuple(decisions[epoch] for epoch in sorted(decisions)),
        adaptations=(*(() if branch is None else branch.adaptations), *told.adaptations),
        judgements=(*(() if branch is None else branch.judgements), *told.judgements),
        kernels=kernels,
        histories=tuple(histories),
    )
    missing += [*_untold(told, run, line, remains), *unknown]
    return Retelling(run, tuple(missing))


def _past(record: RunRecord, remains: Remains, parent: RetoldRun | None) -> tuple[Branch | None, list[str]]:
    """What a branch began with: it is made of its parent's records again, and must be the same to the bit."""
    lineage = record.lineage
    if lineage is None:
        return None, []
    lost = [f"what it has from {lineage.parent}: that run, or the checkpoint that it branched off at, is gone"]
    head = None if parent is None else next((e for e in parent.heads if e.head.digest == lineage.head), None)
    if parent is None or head is None or remains.manifest(lineage.head) is None:
        return None, lost
    waits = lineage.decision is DecisionKind.WAIT
    adaptations = {adaptation.adaptation_id: adaptation for adaptation in parent.adaptations}
    records = ParentRecords(
        lineage.parent, head.head, head.manifest, parent.reports, parent.decisions, tuple(adaptations.values())
    )
    branch = branch_off(
        records,
        lineage.epoch,
        record.run_id,
        record.config,
        decision=wait_at_branch(lineage.parent, lineage.epoch) if waits else None,
        get=remains.store.get,
        # Its checkpoint was stored when the branch was made: nothing is written here.
        put=reference,
    )
    return branch, []


def _kernels(
    told: ToldRun, facts: Sequence[Fact], begun: int, remains: Remains
) -> tuple[tuple[tuple[str | None, Kernel], ...], list[str]]:
    """Those whose publication was told; of others that were delivered, what the store has of them. What was grafted
    before the step at which a branch has `begun` was published for its parent."""
    kernels: list[tuple[str | None, Kernel]] = [*told.kernels.items()]
    lost = []
    for fact in facts:
        delivery = fact.delivery
        if delivery is None or fact.adaptation_id in told.kernels:
            continue
        kernel = _stored_kernel(delivery, remains)
        if kernel is None:
            lost.append(f"the kernel of {fact.adaptation_id}: its manifest is gone")
        else:
            kernels.append((None if fact.apply_step < begun else fact.adaptation_id, kernel))
    return tuple(kernels), lost


def _stored_kernel(delivery: KernelDelivery, remains: Remains) -> Kernel | None:
    try:
        manifest = KernelManifest.model_validate_json(remains.store.get(delivery.manifest))
    except (IntegrityError, ValueError):
        return None
    return Kernel(
        digest=delivery.kernel,
        blueprint=manifest.blueprint,
        hyperparameters=manifest.hyperparameters,
        site=manifest.site,
        manifest=delivery.manifest,
        weights=delivery.weights,
        certificate=delivery.certificate,
        parameter_count=manifest.parameter_count,
        state=KernelState.CERTIFIED,
    )


def _drifts(told: ToldRun, line: RetoldLine, remains: Remains) -> Iterator[Drift]:
    """Where a run went on with another recipe or on another machine: its checkpoints before and after say with what."""
    for load in told.loads:
        before = remains.manifest(load.loaded.head.digest)
        following = (item for item in line.heads if item.lease_gen >= load.lease_gen)
        after = next((item for item in following if item.head.parent == load.loaded.head.digest), None)
        found = None if after is None else remains.manifest(after.head.digest)
        if before is not None and found is not None and (fields := drift_between(before, found)):
            yield Drift(load.loaded.head.step, fields)


def _untold(told: ToldRun, run: RetoldRun, line: RetoldLine, remains: Remains) -> Iterator[str]:
    """In words, what the lost database had and nothing tells any more."""
    record = run.record
    if not told.complete:
        yield "what came before its oldest history"
    epochs = [report.epoch for report in run.reports]
    gaps = sorted(set(range(1, max(epochs, default=0))) - set(epochs))
    if gaps:
        yield f"the reports of epochs {_ranges(gaps)}"
    present = run.present
    if present is not None and not is_whole(present.manifest, remains.store.get):
        yield f"the last checkpoint, at step {present.head.step}: its objects are gone or damaged"
    unknown = [digest for digest in line.untold if remains.manifest(digest) is None]
    if unknown:
        yield f"the steps of {len(unknown)} checkpoints between epoch ends, which are gone"
    diverged = record.divergences - len(run.drifts)
    if diverged > 0:
        yield f"{diverged} divergences: records that came second"


def _ranges(numbers: Iterable[int]) -> str:
    """`1-3, 7`."""
    groups: list[list[int]] = []
    for number in numbers:
        if groups and number == groups[-1][-1] + 1:
            groups[-1].append(number)
        else:
            groups.append([number])
    return ", ".join(f"{group[0]}-{group[-1]}" if len(group) > 1 else f"{group[0]}" for group in groups)
