"""What must hold of the records of every run after anything that happened to it: I1-I12 of the fault matrix.

Each check reads plain `RunRecords` and yields sentences that begin with the name of the invariant. What the records
cannot show is said in the check's own words; I11 in full (the same bits from the records alone) is `reproduce`.
"""

import json
from collections import Counter
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from itertools import pairwise

from content_scan import faults_of_history
from content_scan import runnable
from content_scan import secrets_in
from run_records import Objects
from run_records import RunRecords
from run_records import read_records

from esper.contracts.assets import Seed
from esper.contracts.enums import AdaptationState
from esper.contracts.enums import FactKind
from esper.contracts.enums import Outcome
from esper.contracts.enums import SeedState
from esper.contracts.operational import Fact
from esper.runtime.kasmina.lifecycle import TRANSITIONS
from esper.runtime.tolaria.checkpoint import CheckpointManifest
from esper.runtime.urza.library import Library

TERMINAL = frozenset(
    {
        AdaptationState.FOSSILIZED,
        AdaptationState.CULLED,
        AdaptationState.MISSED,
        AdaptationState.FAILED,
        AdaptationState.VETOED,
        AdaptationState.STALE,
    }
)

_CHANGES = frozenset(FactKind) - {FactKind.MISSED, FactKind.STOP}
"""Facts that change the model. One below a head that lacks it can never be made good."""

_REMOVALS = (FactKind.CULL, FactKind.REMOVE, FactKind.BREAKER, FactKind.QUARANTINE)

_INNOVATION = (*range(402, 407), *range(410, 441))
"""Codes of kernels, blueprints and growth: no run may fail for one of them."""


async def check_run(
    library: Library,
    objects: Objects | None,
    run_id: str,
    histories: Iterable[tuple[str, bytes]] = (),
    *,
    secrets: Iterable[str] = (),
    unchecked: Iterable[str] = (),
) -> list[str]:
    """Every violation, in words. `histories`: Temporal histories as JSON that Urza has not stored, with a name each.

    Without `objects` only the rows are judged. `secrets` were planted and must be nowhere; `unchecked` names
    invariants that a test broke on purpose.
    """
    records = await read_records(library, objects, run_id)
    served = RunRecords(**{**vars(records), "documents": {**records.documents, **dict(histories)}})
    return violations(served, secrets=tuple(secrets), unchecked=frozenset(unchecked))


def violations(
    records: RunRecords, *, secrets: tuple[str, ...] = (), unchecked: frozenset[str] = frozenset()
) -> list[str]:
    """Every violation that the records show, as ``I4: run r: ...``."""
    found = [
        f"{name}: run {records.run.run_id}: {what}"
        for name, check in CHECKS.items()
        if name not in unchecked
        for what in check(records)
    ]
    if "I12" not in unchecked:
        found += [f"I12: run {records.run.run_id}: {what}" for what in _clean(records, secrets)]
    return found


def _heads_go_forward(records: RunRecords) -> Iterator[str]:
    """I1: a head never regresses, unless a fall back is on record."""
    by_digest = {item.head.digest: item.head for item in records.heads}
    began = {digest for digest in by_digest if by_digest[digest].parent not in by_digest}
    for digest in began - {item.head.digest for item in records.heads[:1]}:
        yield f"head {digest[:19]} follows no head of the run"
    ancestors = {digest: _ancestors(digest, by_digest) for digest in by_digest}
    for item in records.heads:
        parent = by_digest.get(item.head.parent or "")
        if parent is not None and (parent.step > item.head.step or parent.epoch > item.head.epoch):
            yield f"head {item.head.digest[:19]} at step {item.head.step} follows one at step {parent.step}"
    for before, after in pairwise(records.heads):
        if not _follows(before.head.digest, after.head.parent, ancestors, records):
            yield (
                f"head {after.head.digest[:19]} does not go on from {before.head.digest[:19]}, "
                "and no fall back from that is on record"
            )
    present = records.run.head
    if records.heads and (present is None or present.digest not in by_digest):
        yield f"the present head {present} was never committed"
    elif present is not None and records.run.outcome not in (Outcome.RUNNING, Outcome.PAUSED):
        last = records.heads[-1].head
        if present.digest != last.digest and not _follows(last.digest, present.digest, ancestors, records):
            yield f"the present head is at step {present.step}, the last one at step {last.step}"
    for rewind in records.rewinds:
        # One that was left itself later is on no line any more.
        left = {each.from_head for each in records.rewinds}
        if rewind.to_head not in ancestors.get(rewind.from_head, ()) and rewind.to_head not in left:
            yield f"a fall back from {rewind.from_head[:19]} leads to {rewind.to_head[:19]}, no ancestor of it"
    for report in _own_reports(records):
        if by_digest.get(report.head.digest) != report.head:
            yield f"the head of the report of epoch {report.epoch} is none of the run's"
        borrowed = report.head.step < report.step and records.run.config.training.checkpoint_every.epochs > 1
        if (report.head.step, report.head.epoch) != (report.step, report.epoch) and not borrowed:
            yield f"the report of epoch {report.epoch} and its head tell of different steps"


def _ancestors(digest: str, heads: dict[str, object]) -> frozenset[str]:
    found: list[str] = []
    current: str | None = digest
    while current in heads and current not in found:
        found.append(current)
        current = heads[current].parent  # type: ignore[attr-defined]
    return frozenset(found)


def _follows(last: str, parent: str | None, ancestors: dict[str, frozenset[str]], records: RunRecords) -> bool:
    """Whether a commit on `parent` may come after the commit of `last`: directly, or after a fall back from it. A
    commit of the same bytes as before leaves no row, so the line may have come forward again unseen."""
    if parent == last:
        return True
    falls = (rewind for rewind in records.rewinds if last in ancestors.get(rewind.from_head, ()))
    return any(rewind.to_head in ancestors.get(parent or "", ()) for rewind in falls)


def _nothing_twice(records: RunRecords) -> Iterator[str]:
    """I2: an adaptation is applied once in a lineage."""
    for (adaptation_id, kind), count in Counter((f.adaptation_id, f.decides) for f in records.facts).items():
        if count > 1:
            yield f"{count} facts decide over the {kind} of {adaptation_id}"
    for item, manifest in records.manifests_of_line():
        grafts = Counter(fact.adaptation_id for fact in manifest.state.executed if fact.kind is FactKind.GRAFT)
        yield from (
            f"head at step {item.head.step} has applied {adaptation_id} {count} times"
            for adaptation_id, count in grafts.items()
            if count > 1
        )
        present = Counter(seed.adaptation_id for seed in _seeds(manifest).values() if seed.state in _GROWN)
        yield from (
            f"head at step {item.head.step} has {count} blocks of {adaptation_id}"
            for adaptation_id, count in present.items()
            if count > 1
        )


_GROWN = (SeedState.TRAINING, SeedState.GRAFTING, SeedState.FOSSILIZED, SeedState.ERROR_RECOVERY)


def _seeds(manifest: CheckpointManifest) -> dict[tuple[str, int], Seed]:
    return {(site.site, grown.seed.index): grown.seed for site in manifest.growth.sites for grown in site.seeds}


def _right_generation(records: RunRecords) -> Iterator[str]:
    """I3: a kernel is applied to the generation of the seed that it was made for, and to no other model."""
    places: Counter[tuple[str | None, int | None, int]] = Counter()
    for fact in records.facts:
        if fact.kind is not FactKind.GRAFT:
            continue
        if fact.delivery is None:
            yield f"the graft of {fact.adaptation_id} names no kernel"
            continue
        order = fact.delivery.adaptation
        if (order.adaptation_id, order.site, order.seed) != (fact.adaptation_id, fact.site, fact.seed):
            yield f"the kernel of {order.adaptation_id} was delivered for {fact.adaptation_id}"
        places[fact.site, fact.seed, order.seed_generation] += 1
        kernel = records.kernels.get(fact.delivery.kernel)
        if kernel is not None and kernel.site.site != fact.site:
            yield f"{fact.adaptation_id} grafts a kernel for {kernel.site.site} into {fact.site}"
    for (site, seed, generation), count in places.items():
        if count > 1:
            yield f"{count} grafts into generation {generation} of seed {seed} at {site}"
    deliveries = {fact.adaptation_id: fact.delivery for fact in records.facts if fact.kind is FactKind.GRAFT}
    for item, manifest in records.manifests_of_line():
        for seed in _seeds(manifest).values():
            delivery = deliveries.get(seed.adaptation_id or "")
            if seed.state not in _GROWN or delivery is None:
                continue
            wanted = delivery.kernel, delivery.adaptation.seed_generation
            if (seed.kernel, seed.generation) != wanted:
                yield (
                    f"head at step {item.head.step}: seed {seed.index} at {seed.site} (generation {seed.generation}) "
                    f"has a kernel that {seed.adaptation_id} delivered for generation {wanted[1]}"
                )
    for (_, before), (item, after) in pairwise(records.manifests_of_line()):
        if after.growth.generation < before.growth.generation:
            yield f"the model of the head at step {item.head.step} is of an older generation than the one before"


def _ledger_keeps(records: RunRecords) -> Iterator[str]:
    """I4: what a committed head has acknowledged is in every later head, and every change is a recorded fact."""
    recorded = {(fact.adaptation_id, fact.name): fact for fact in records.facts}
    for (before, earlier), (after, later) in pairwise(records.manifests_of_line()):
        kept = {(fact.adaptation_id, fact.name) for fact in later.state.executed}
        for fact in earlier.state.executed:
            if (fact.adaptation_id, fact.name) not in kept:
                yield (
                    f"{fact.kind} of {fact.adaptation_id}, which the head at step {before.head.step} has, "
                    f"is missing at step {after.head.step}"
                )
    for item, manifest in records.manifests_of_line():
        executed = {(fact.adaptation_id, fact.name) for fact in manifest.state.executed}
        for fact in manifest.state.executed:
            if not _same_fact(recorded.get((fact.adaptation_id, fact.name)), fact):
                yield f"head at step {item.head.step} executed a {fact.kind} of {fact.adaptation_id} that no fact tells"
        for fact in records.facts:
            due = fact.kind in _CHANGES and fact.apply_step < item.head.step
            # A kernel that ended its process twice is not executed: that it is quarantined takes its graft's place.
            spared = fact.kind is FactKind.GRAFT and (fact.adaptation_id, FactKind.QUARANTINE.value) in executed
            if due and not spared and (fact.adaptation_id, fact.name) not in executed:
                yield (
                    f"{fact.kind} of {fact.adaptation_id} was due at step {fact.apply_step}; the head at step "
                    f"{item.head.step} lacks it"
                )


def _same_fact(recorded: Fact | None, executed: Fact) -> bool:
    if recorded is None:
        return False
    places = ("apply_step", "site", "seed", "judge_step")
    same = all(getattr(recorded, name) == getattr(executed, name) for name in places)
    kernels = [fact.delivery.kernel if fact.delivery is not None else None for fact in (recorded, executed)]
    return same and kernels[0] == kernels[1]


def _every_sample_once(records: RunRecords) -> Iterator[str]:
    """I5, as far as records can show it: the epochs follow each other without a gap, each has as many steps and rows
    as every other, and within an epoch the rows are those of the steps taken. Which rows they are is a pure function
    of seed, epoch and position (`sampler`)."""
    reports = _own_reports(records)
    first = records.heads[0].head if records.run.lineage is not None and records.heads else None
    begun = first.epoch if first is not None else 0
    expected = list(range(begun + 1, begun + 1 + len(reports)))
    if [report.epoch for report in reports] != expected:
        yield f"the reports are of epochs {[report.epoch for report in reports]}"
        return
    head = records.run.head
    if head is not None and head.epoch > begun + len(reports):
        yield f"the head ends epoch {head.epoch}, {len(reports)} epochs are reported"
    if not reports:
        return
    batch = records.run.config.training.batch_size
    rows = reports[0].samples
    steps = -(-rows // batch)
    for report in reports:
        if report.samples != rows:
            yield f"epoch {report.epoch} used {report.samples} rows, the first {rows}"
        if report.step != report.epoch * steps:
            yield f"epoch {report.epoch} ends at step {report.step}, not {report.epoch * steps}"
    for item, manifest in records.manifests_of_line():
        if first is not None and item.head.digest == first.digest:
            continue
        if (manifest.step, manifest.epoch) != (item.head.step, item.head.epoch):
            yield f"the manifest of the head at step {item.head.step} is of step {manifest.step}"
        position = manifest.step - manifest.epoch * steps
        if not 0 <= position <= steps:
            yield f"the head at step {manifest.step} has ended {manifest.epoch} epochs of {steps} steps"
        elif manifest.state.loss_rows != min(position * batch, rows):
            yield f"the head at step {manifest.step} has used {manifest.state.loss_rows} rows of its epoch"


def _own_reports(records: RunRecords) -> list:
    """The reports of epochs that this run trained itself: a branch begins with copies of its parent's."""
    begun = records.run.lineage.epoch if records.run.lineage is not None else 0
    return [report for report in records.reports if report.epoch > begun]


def _legal_lives(records: RunRecords) -> Iterator[str]:
    """I6: seeds move only as the lifecycle allows, also over a resume; facts of one adaptation come in order."""
    for (_, before), (item, after) in pairwise(records.manifests_of_line()):
        now = _seeds(after)
        for place, old in _seeds(before).items():
            new = now.get(place)
            if new is None:
                yield f"seed {place} is gone at step {item.head.step}"
            elif not _may_become(old, new):
                yield (
                    f"seed {old.index} at {old.site} was {old.state} (generation {old.generation}) and is {new.state} "
                    f"(generation {new.generation}) at step {item.head.step}"
                )
    for item, manifest in records.manifests_of_line():
        executed = {(fact.adaptation_id, fact.name) for fact in manifest.state.executed}
        for seed in _seeds(manifest).values():
            kept = (seed.adaptation_id or "", FactKind.FOSSILIZE.value) in executed
            if (seed.state is SeedState.FOSSILIZED) and not kept:
                yield f"head at step {item.head.step}: {seed.adaptation_id} is fossilized, and no verdict says so"
            if seed.state in (SeedState.TRAINING, SeedState.GRAFTING) and kept:
                yield f"head at step {item.head.step}: {seed.adaptation_id} was kept and is {seed.state}"
    yield from _order_of_facts(records.facts)


def _may_become(old: Seed, new: Seed) -> bool:
    """Whether a lifecycle leads from one to the other; a slot that is freed begins a new generation."""
    if new.generation != old.generation:
        return new.generation > old.generation
    reached, waiting = {old.state}, [old.state]
    while waiting:
        state = waiting.pop()
        following = TRANSITIONS[state] - reached - ({SeedState.DORMANT} if state is SeedState.CULLED else set())
        reached |= following
        waiting += following
    return new.state in reached


def _order_of_facts(facts: Iterable[Fact]) -> Iterator[str]:
    known: dict[str, dict[FactKind, Fact]] = {}
    for fact in facts:
        known.setdefault(fact.adaptation_id, {})[fact.kind] = fact
    for adaptation_id, kinds in known.items():
        graft = kinds.get(FactKind.GRAFT)
        for kind in (FactKind.FOSSILIZE, FactKind.CULL, FactKind.REMOVE, FactKind.BREAKER):
            later = kinds.get(kind)
            if later is not None and graft is None:
                yield f"{kind} of {adaptation_id}, which was never grafted"
            elif later is not None and graft is not None and later.apply_step < graft.apply_step:
                yield f"{kind} of {adaptation_id} at step {later.apply_step}, before its graft"
        if FactKind.GRAFT in kinds and FactKind.MISSED in kinds:
            yield f"{adaptation_id} was grafted and missed"
        kept, culled = kinds.get(FactKind.FOSSILIZE), kinds.get(FactKind.CULL)
        if kept is not None and culled is not None and culled.apply_step <= kept.apply_step:
            yield f"{adaptation_id} was kept after it was culled"


def _blobs_are_whole(records: RunRecords) -> Iterator[str]:
    """I7: what a record names is there, and its bytes are those that it names."""
    yield from (f"{name}: {why}" for name, why in records.unreadable.items())


def _one_outcome(records: RunRecords) -> Iterator[str]:
    """I8: every adaptation ends in one outcome that people can see, and that the facts agree with."""
    facts: dict[str, dict[FactKind, Fact]] = {}
    for fact in records.facts:
        facts.setdefault(fact.adaptation_id, {})[fact.kind] = fact
    ended = records.run.outcome is Outcome.COMPLETED
    known = {adaptation.adaptation_id for adaptation in records.adaptations}
    if ended:
        yield from (
            f"{adaptation_id} has facts and no record"
            for adaptation_id, kinds in facts.items()
            if adaptation_id not in known and FactKind.STOP not in kinds
        )
    for adaptation in records.adaptations:
        kinds = facts.get(adaptation.adaptation_id, {})
        removed = any(kind in kinds for kind in _REMOVALS)
        state = adaptation.state
        if ended and state not in TERMINAL:
            yield f"{adaptation.adaptation_id} is {state} although the run is over"
        elif state is AdaptationState.FOSSILIZED and FactKind.FOSSILIZE not in kinds:
            yield f"{adaptation.adaptation_id} is fossilized, and no fact says so"
        elif ended and state is AdaptationState.FOSSILIZED and removed:
            yield f"{adaptation.adaptation_id} is fossilized, and a fact removed it"
        elif state is AdaptationState.CULLED and not removed:
            yield f"{adaptation.adaptation_id} is culled, and no fact says so"
        elif state in (AdaptationState.MISSED, AdaptationState.STALE, AdaptationState.VETOED):
            if FactKind.GRAFT in kinds:
                yield f"{adaptation.adaptation_id} is {state}, and it was grafted"
        elif state is AdaptationState.FAILED and FactKind.GRAFT in kinds and not removed:
            yield f"{adaptation.adaptation_id} failed, and it is still in the model"
        if not adaptation.reason:
            yield f"{adaptation.adaptation_id} is {state} without a reason"


def _one_owner(records: RunRecords) -> Iterator[str]:
    """I9: once a younger lease has committed, no older one does."""
    for before, after in pairwise(records.heads):
        if after.lease_gen < before.lease_gen:
            yield f"lease {after.lease_gen} committed after lease {before.lease_gen}"
    for older, younger in pairwise(records.rewinds):
        if younger.lease_gen < older.lease_gen:
            yield f"lease {younger.lease_gen} fell back after lease {older.lease_gen}"
    latest = max((item.lease_gen for item in (*records.heads, *records.rewinds)), default=0)
    if latest > records.run.lease_gen:
        yield f"lease {latest} wrote, and only {records.run.lease_gen} were ever issued"


def _growth_fails_nothing(records: RunRecords) -> Iterator[str]:
    """I10: training is never failed by forge or strategist."""
    failure = records.run.failure or {}
    code = str(failure.get("code", ""))
    digits = code.removeprefix("ESP-")
    if records.run.outcome is Outcome.FAILED and digits.isdecimal() and int(digits) in _INNOVATION:
        yield f"it failed with {code}: {failure.get('message')}"


def _digest_of_the_head(records: RunRecords) -> Iterator[str]:
    """I11: the digest that the run names is that of the weights in its head."""
    finished, head = records.run.finished, records.run.head
    if finished is None or head is None or records.run.outcome is not Outcome.COMPLETED:
        return
    if finished.head != head:
        yield f"it ended on another head than that at step {head.step}"
    if finished.digest is None:
        yield "it is completed and has no digest"
    elif records.final_digest is not None and finished.digest != records.final_digest:
        yield f"its digest is {finished.digest[:19]}, the weights in its head have {records.final_digest[:19]}"


def _clean(records: RunRecords, secrets: tuple[str, ...]) -> Iterator[str]:
    """I12: no secret, no tensor bytes and nothing that runs, in histories, records or artifacts."""
    for name, data in records.documents.items():
        if name.startswith("history"):
            yield from faults_of_history(name, data, secrets)
        else:
            yield from runnable(name, data)
            yield from secrets_in(name, data, secrets)
    rows = json.dumps([records.run.model_dump(mode="json"), *(fact.model_dump(mode="json") for fact in records.facts)])
    yield from secrets_in("the rows", rows.encode(), secrets)


CHECKS: dict[str, Callable[[RunRecords], Iterator[str]]] = {
    "I1": _heads_go_forward,
    "I2": _nothing_twice,
    "I3": _right_generation,
    "I4": _ledger_keeps,
    "I5": _every_sample_once,
    "I6": _legal_lives,
    "I7": _blobs_are_whole,
    "I8": _one_outcome,
    "I9": _one_owner,
    "I10": _growth_fails_nothing,
    "I11": _digest_of_the_head,
}
