"""What stored histories tell of a run's records, and how its heads are put in order again from what was told."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies

from esper.contracts.assets import ArtifactRef
from esper.contracts.enums import AdaptationState
from esper.contracts.enums import DecisionKind
from esper.contracts.enums import FactKind
from esper.contracts.enums import Outcome
from esper.contracts.enums import Verdict
from esper.contracts.operational import HeadRef
from esper.contracts.operational import LayerGraph
from esper.contracts.orders import LoadedRun
from esper.errors import IntegrityError
from esper.runtime.temporal.retelling import Execution
from esper.runtime.temporal.retelling import ToldHead
from esper.runtime.temporal.retelling import ToldLoad
from esper.runtime.temporal.retelling import facts_of
from esper.runtime.temporal.retelling import identify
from esper.runtime.temporal.retelling import is_history
from esper.runtime.temporal.retelling import parse_stored
from esper.runtime.temporal.retelling import retell
from esper.runtime.temporal.retold_heads import FoundManifest
from esper.runtime.temporal.retold_heads import RetoldLine
from esper.runtime.temporal.retold_heads import retold_line

pytestmark = pytest.mark.fault("E2")

HISTORIES = Path(__file__).parent.parent / "replay" / "histories"
SCENES = sorted({path.name.partition(".")[0] for path in HISTORIES.glob("*.json")})


def of(scene: str, parts: str = "*") -> list[tuple[Execution, dict[str, Any]]]:
    documents = [json.loads(path.read_text()) for path in sorted(HISTORIES.glob(f"{scene}.{parts}.json"))]
    return [(identify(document), document) for document in documents]


@pytest.mark.parametrize("scene", SCENES)
def test_every_stored_history_is_told_again(scene: str) -> None:
    told = retell(of(scene))
    assert told.complete and told.record is not None
    assert told.record.outcome in (Outcome.COMPLETED, Outcome.STOPPED)
    assert sorted(told.reports) == list(range(1, max(told.reports) + 1))
    assert {report.run_id for report in told.reports.values()} == {told.run_id}
    assert told.loads and told.lease_gen >= max(load.lease_gen for load in told.loads)
    for report in told.reports.values():
        assert all(told.facts[fact.seq] == fact for fact in report.facts)


@pytest.mark.parametrize("scene", SCENES)
def test_the_order_in_which_histories_are_read_does_not_matter(scene: str) -> None:
    assert retell(of(scene)) == retell(reversed(of(scene)))


def test_a_grown_run_is_told_with_its_graft_its_verdict_and_its_kernel() -> None:
    told = retell(of("grow_and_keep"))
    assert [decision.kind for decision in told.decisions.values()].count(DecisionKind.GERMINATE) == 1
    assert [fact.kind for fact in told.facts.values()] == [FactKind.GRAFT]
    states = [adaptation.state for adaptation in told.adaptations]
    assert states[0] is AdaptationState.ORDERED and states[-1] is AdaptationState.FOSSILIZED
    (adaptation_id,) = told.kernels
    assert told.adaptations[-1].kernel == told.kernels[adaptation_id].digest
    assert told.verdicts[adaptation_id] == told.judgements[0]


def test_the_fact_of_a_verdict_that_was_told_before_its_fact_is_made_from_it() -> None:
    told = retell(of("grow_and_cull"))
    graft, verdict = facts_of(told, ())
    assert told.verdicts[graft.adaptation_id].verdict is Verdict.CULL
    assert (verdict.kind, verdict.apply_step) == (FactKind.CULL, told.verdicts[graft.adaptation_id].step)
    assert verdict.seq > graft.seq
    assert facts_of(told, [verdict]) == (graft, verdict)


def test_all_parts_of_a_long_run_are_one_and_without_the_first_it_says_so() -> None:
    parts = of("long_run")
    assert len({execution.temporal_run_id for execution, _ in parts if execution.workflow_type == "TrainingRun"}) == 3
    whole, late = retell(parts), retell([each for each in parts if each[1]["events"][0]["eventTime"] > _begun(parts)])
    assert whole.complete and not late.complete
    assert late.record == whole.record
    assert set(late.reports) < set(whole.reports)


def _begun(parts: Sequence[tuple[Execution, dict[str, Any]]]) -> str:
    return min(history["events"][0]["eventTime"] for _, history in parts)


def test_a_reset_execution_is_known_by_the_name_that_the_reset_gave_it() -> None:
    ((execution, history),) = of("reset", "run-0")
    base = history["events"][0]["workflowExecutionStartedEventAttributes"]["originalExecutionRunId"]
    assert execution.temporal_run_id != base
    assert execution.closed and execution.workflow_id == execution.run_id


def test_a_run_that_is_under_way_is_told_as_far_as_it_came() -> None:
    ((_, history),) = of("grow_and_keep", "run-0")
    events = history["events"]
    ends = [index for index, event in enumerate(events) if "activityTaskCompletedEventAttributes" in event]
    seen: set[int] = set()
    for end in ends:
        cut = {"events": events[: end + 1]}
        execution = identify(cut)
        assert not execution.closed
        told = retell([(execution, cut)])
        seen.add(len(told.reports))
    assert seen == set(range(len(retell(of("grow_and_keep")).reports) + 1))


def test_an_event_that_cannot_be_read_is_named() -> None:
    ((execution, history),) = of("wait_only", "run-0")
    broken = copy.deepcopy(history)
    answer = next(e for e in broken["events"] if "activityTaskCompletedEventAttributes" in e)
    answer["activityTaskCompletedEventAttributes"]["result"]["payloads"][0]["data"] = "e30="
    with pytest.raises(IntegrityError, match=f"event {answer['eventId']} holds no KnownRun") as refused:
        retell([(execution, broken)])
    assert refused.value.code == "ESP-408"


def test_histories_are_found_among_stored_bytes_and_nothing_else_is() -> None:
    ((_, history),) = of("wait_only", "run-0")
    stored = json.dumps(history, separators=(",", ":")).encode()
    assert is_history(stored[:16]) and parse_stored(stored) == history
    for other in (b'{"device":"cpu"}', b'{"events":[]}', b'{"events":[{}]}', b'{"events":[{"eventId":1}', b"\x00", b""):
        assert parse_stored(other) is None
    foreign = copy.deepcopy(history)
    foreign["events"][0]["workflowExecutionStartedEventAttributes"]["workflowType"]["name"] = "SomebodyElses"
    assert parse_stored(json.dumps(foreign).encode()) is None


def head(number: int, parent: int | None, step: int | None = None) -> HeadRef:
    step = 10 * number if step is None else step
    return HeadRef(
        digest=_digest(number), parent=None if parent is None else _digest(parent), step=step, epoch=step // 10
    )


def _digest(number: int) -> str:
    return f"sha256:{number:064x}"


def load(at: HeadRef, lease_gen: int, *warnings: str) -> ToldLoad:
    loaded = LoadedRun(
        step=at.step,
        epoch=at.epoch,
        steps_per_epoch=10,
        head=at,
        device="cpu",
        threads=1,
        parameters=1,
        model_name="Net",
        graph=LayerGraph(nodes=(), edges=()),
        warnings=warnings,
    )
    return ToldLoad(loaded, lease_gen)


def numbers(line: RetoldLine) -> list[int]:
    return [int(item.head.digest.removeprefix("sha256:"), 16) for item in line.heads]


def nothing(digest: str) -> None:
    return None


def everything(digest: str) -> FoundManifest:
    number = int(digest.removeprefix("sha256:"), 16)
    return FoundManifest(ArtifactRef(digest=digest, size_bytes=7), 10 * number, number)


def test_epochs_that_were_told_in_the_wrong_order_are_put_right() -> None:
    told = [ToldHead(head(2, 1), 1), ToldHead(head(1, 0), 1)]
    line = retold_line([load(head(0, None), 1)], told, everything)
    assert numbers(line) == [0, 1, 2]
    assert (line.head, line.rewinds, line.untold) == (_digest(2), (), ())
    assert {item.manifest.size_bytes for item in line.heads} == {7}


def test_a_head_that_nobody_told_of_is_known_by_its_successor_and_its_manifest() -> None:
    told = [ToldHead(head(1, 0), 1), ToldHead(head(3, 2), 2)]
    line = retold_line([load(head(0, None), 1), load(head(1, 0), 2)], told, everything)
    assert numbers(line) == [0, 1, 2, 3]
    assert line.untold == (_digest(2),)
    middle = line.heads[2]
    assert (middle.head, middle.lease_gen) == (head(2, 1), 1)


def test_a_head_that_is_gone_too_stands_where_its_successor_does() -> None:
    line = retold_line([load(head(0, None), 1)], [ToldHead(head(3, 2), 1)], nothing)
    assert numbers(line) == [0, 2, 3]
    assert line.heads[1].head == HeadRef(digest=_digest(2), parent=_digest(0), step=30, epoch=0)
    assert line.heads[1].manifest.size_bytes == 0


def test_a_fall_to_an_older_head_is_told_with_its_reason() -> None:
    loads = [load(head(0, None), 1), load(head(1, 0), 2, "other", "the checkpoint at step 20 was damaged: bytes")]
    told = [ToldHead(head(1, 0), 1), ToldHead(head(2, 1), 1), ToldHead(head(2, 1), 2), ToldHead(head(3, 2), 2)]
    line = retold_line(loads, told, everything)
    assert numbers(line) == [0, 1, 2, 3]
    assert line.head == _digest(3)
    (fall,) = line.rewinds
    assert (fall.from_head, fall.to_head, fall.lease_gen) == (_digest(2), _digest(1), 2)
    assert "step 20 was damaged" in fall.reason


@given(strategies.lists(strategies.sampled_from(["commit", "unseen", "take over", "fall", "repeat"]), max_size=30))
def test_whatever_happened_every_head_follows_one_that_is_there(happenings: list[str]) -> None:
    """A made up run: what its trainers committed, and of that what they could tell."""
    heads, line, leases = {0: head(0, None)}, [0], 1
    loads, told = [load(heads[0], 1)], []
    for happening in happenings:
        if happening in ("commit", "unseen"):
            number = max(heads) + 1
            heads[number] = HeadRef(digest=_digest(number), parent=_digest(line[-1]), step=10 * number, epoch=number)
            line.append(number)
            told += [ToldHead(heads[number], leases)] if happening == "commit" else []
        elif happening == "repeat":
            told.append(ToldHead(heads[line[-1]], leases))
        else:
            leases += 1
            if happening == "fall" and len(line) > 1:
                line.pop()
            loads.append(load(heads[line[-1]], leases))
    made = retold_line(loads, told, everything)
    known: set[str] = set()
    for item in made.heads:
        assert item.head.parent is None or item.head.parent in known
        known.add(item.head.digest)
        assert item.head.digest in {each.digest for each in heads.values()}
    assert {each.head.digest for each in told} | {each.loaded.head.digest for each in loads} <= known
    assert [item.lease_gen for item in made.heads] == sorted(item.lease_gen for item in made.heads)
    last = loads[-1].loaded.head if not told or told[-1].lease_gen < loads[-1].lease_gen else told[-1].head
    assert made.head == last.digest
    assert all({fall.from_head, fall.to_head} <= known for fall in made.rewinds)
