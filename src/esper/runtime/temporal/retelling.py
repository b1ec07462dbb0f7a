"""What the histories of a run's workflows tell of its records, for when Urza's database is lost: no server is asked.

Every record of a run was an activity's argument or answer, so it stands in a history: the run's own (all executions of
its workflow), those of its decisions and those of its forges. What a process wrote and could not tell any more is in
none; that much is trained again.
"""

import json
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from itertools import count
from typing import Any
from typing import TypeVar

from pydantic import ValidationError

from esper.contracts.assets import Kernel
from esper.contracts.base import Contract
from esper.contracts.base import first_problem
from esper.contracts.enums import FactKind
from esper.contracts.enums import Verdict
from esper.contracts.operational import Adaptation
from esper.contracts.operational import AdaptationDecision
from esper.contracts.operational import EpochReport
from esper.contracts.operational import EpochResult
from esper.contracts.operational import Fact
from esper.contracts.operational import HeadRef
from esper.contracts.operational import JudgeReport
from esper.contracts.orders import BuiltKernel
from esper.contracts.orders import CheckpointRequest
from esper.contracts.orders import EpochRequest
from esper.contracts.orders import FinishedRun
from esper.contracts.orders import InstallResult
from esper.contracts.orders import KnownRun
from esper.contracts.orders import Lease
from esper.contracts.orders import LoadedRun
from esper.contracts.orders import LoadRequest
from esper.contracts.orders import PublishRequest
from esper.contracts.orders import RecordAdaptation
from esper.contracts.orders import ReleaseRequest
from esper.contracts.orders import RunRecord
from esper.contracts.orders import TrainingRequest
from esper.errors import IntegrityError
from esper.runtime.temporal.history_document import ENDINGS
from esper.runtime.temporal.history_document import first_payload
from esper.runtime.temporal.history_document import parse_history
from esper.runtime.temporal.workflow_types import TAMIYO_DECISION
from esper.runtime.temporal.workflow_types import TEZZERET_COMPILE
from esper.runtime.temporal.workflow_types import TRAINING_RUN

ContractT = TypeVar("ContractT", bound=Contract)

CHILDREN = (TAMIYO_DECISION, TEZZERET_COMPILE)

LEASE_MARGIN = 1000
"""A claim whose answer never reached the workflow is in no history: more of those than anybody ever made."""

_VERDICTS = {Verdict.KEEP: FactKind.FOSSILIZE, Verdict.CULL: FactKind.CULL}
_ENDINGS_OF_A_HOLD = (FactKind.FOSSILIZE, FactKind.CULL, FactKind.REMOVE, FactKind.BREAKER, FactKind.QUARANTINE)


@dataclass(frozen=True)
class Execution:
    """One execution of a workflow: who it is by its own history, and when (ISO 8601) its last event was."""

    workflow_id: str
    workflow_type: str
    temporal_run_id: str
    ended: str
    closed: bool

    @property
    def run_id(self) -> str:
        """The run that it belongs to."""
        return self.workflow_id.partition("/")[0]

    @property
    def order(self) -> tuple[str, str]:
        """Sorts the executions of a run as they followed each other: each ended before the next one did."""
        return self.ended.rstrip("Z"), self.temporal_run_id


@dataclass(frozen=True)
class ToldHead:
    """A head that a trainer told of, and the lease under which it did."""

    head: HeadRef
    lease_gen: int


@dataclass(frozen=True)
class ToldLoad:
    """A trainer's word on where the run stood when it took it over."""

    loaded: LoadedRun
    lease_gen: int


@dataclass
class ToldRun:
    """All that the histories of one run tell, each kind in the order in which it was told."""

    run_id: str
    request: TrainingRequest
    """Of the oldest execution that there is a history of."""
    complete: bool
    """Whether that is the first one of all."""
    records: list[RunRecord] = field(default_factory=list)
    """How the run stood: the last one is how it stands."""
    lease_gen: int = 0
    """The highest lease that was ever told of."""
    loads: list[ToldLoad] = field(default_factory=list)
    heads: list[ToldHead] = field(default_factory=list)
    facts: dict[int, Fact] = field(default_factory=dict)
    """By `seq`."""
    reports: dict[int, EpochReport] = field(default_factory=dict)
    """By epoch; the first one stands."""
    decisions: dict[int, AdaptationDecision] = field(default_factory=dict)
    """By epoch; the first one stands."""
    adaptations: list[Adaptation] = field(default_factory=list)
    """Every state that an adaptation was recorded in."""
    judgements: list[JudgeReport] = field(default_factory=list)
    verdicts: dict[str, JudgeReport] = field(default_factory=dict)
    """By adaptation, as the trainer took them: each was a fact before it was told."""
    kernels: dict[str, Kernel] = field(default_factory=dict)
    """By the adaptation that they were published for."""

    @property
    def record(self) -> RunRecord | None:
        """How the run stands; `None` when it was never recorded."""
        return self.records[-1] if self.records else None


def identify(history: Mapping[str, Any]) -> Execution:
    """Which execution a history is of. Raises `IntegrityError` (ESP-408) when it is no history."""
    events = parse_history(dict(history))["events"]
    try:
        started = events[0]["workflowExecutionStartedEventAttributes"]
        run_id = started["originalExecutionRunId"]
        for event in events:
            # A reset run begins with the events of the one it was reset from, whose id stands in the first of them.
            run_id = event.get("workflowTaskFailedEventAttributes", {}).get("newRunId") or run_id
        return Execution(
            workflow_id=started["workflowId"],
            workflow_type=started["workflowType"]["name"],
            temporal_run_id=run_id,
            ended=events[-1]["eventTime"],
            closed=any(ending in events[-1] for ending in ENDINGS),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise IntegrityError("ESP-408", f"the history does not say which workflow it is of: {error!r}") from error


def training_request(history: Mapping[str, Any]) -> TrainingRequest:
    """What an execution of a run's workflow was begun with. Raises `IntegrityError` (ESP-408)."""
    event = history["events"][0]
    return _read(TrainingRequest, event["workflowExecutionStartedEventAttributes"].get("input"), event)


def retell(histories: Iterable[tuple[Execution, Mapping[str, Any]]]) -> ToldRun:
    """What the executions of one run tell together, whatever their order. There is one of the run's own workflow.

    Raises `IntegrityError` (ESP-408) at an event that this Esper cannot read.
    """
    ordered = sorted(histories, key=lambda each: each[0].order)
    own = [(execution, history) for execution, history in ordered if execution.workflow_type == TRAINING_RUN]
    first = own[0][1]["events"][0]["workflowExecutionStartedEventAttributes"]
    complete = not first.get("continuedExecutionRunId")
    told = ToldRun(own[0][0].run_id, training_request(own[0][1]), complete)
    # First the children, whose answers their run repeats: what stands is what was recorded first.
    for execution, history in ordered:
        if execution.workflow_type != TRAINING_RUN:
            _hear(told, history)
    for _, history in own:
        request = training_request(history)
        _hear_beginning(told, request)
        _hear(told, history)
    return told


def facts_of(told: ToldRun, executed: Iterable[Fact]) -> tuple[Fact, ...]:
    """All facts by `seq`: those that the heads have `executed`, those that were told (the first of two that decide the
    same), and each verdict that was told before anybody told of its fact."""
    facts = {fact.seq: told.facts[fact.seq] if told.facts.get(fact.seq) == fact else fact for fact in executed}
    for seq, fact in sorted(told.facts.items()):
        if not any((fact.adaptation_id, fact.decides) == (each.adaptation_id, each.decides) for each in facts.values()):
            facts.setdefault(seq, fact)
    endings = [fact for fact in facts.values() if fact.kind in _ENDINGS_OF_A_HOLD]
    grafts = {fact.adaptation_id: fact for fact in facts.values() if fact.kind is FactKind.GRAFT}
    for adaptation_id, verdict in told.verdicts.items():
        kind, graft = _VERDICTS.get(verdict.verdict), grafts.get(adaptation_id)
        known = [fact for fact in endings if fact.adaptation_id == adaptation_id and fact.apply_step <= verdict.step]
        if kind is None or graft is None or known:
            continue
        seq = next(number for number in count(graft.seq + 1) if number not in facts)
        facts[seq] = graft.successor(kind, verdict.step, verdict.reason).model_copy(update={"seq": seq})
    return tuple(facts[seq] for seq in sorted(facts))


def _hear_beginning(told: ToldRun, request: TrainingRequest) -> None:
    """What an execution was given from the one before it: of use where that one's history is gone."""
    told.lease_gen = max(told.lease_gen, request.recovers_above)
    if request.state is not None:
        told.lease_gen = max(told.lease_gen, request.state.lease_gen)
        told.adaptations += request.state.adaptations
        _hear_report(told, request.state.report)


def _hear(told: ToldRun, history: Mapping[str, Any]) -> None:
    for event, name, argument, answer in _answers(history["events"]):
        if name == "record_run":
            known = _read(KnownRun, answer, event)
            _hear_record(told, known.record)
            _hear_report(told, known.report)
            told.adaptations += known.adaptations
        elif name == "record_outcome":
            _hear_record(told, _read(RunRecord, answer, event))
        elif name == "claim_trainer":
            told.lease_gen = max(told.lease_gen, _read(Lease, answer, event).lease_gen)
        elif name in ("record_decision", TAMIYO_DECISION):
            decision = _read(AdaptationDecision, answer, event)
            told.decisions.setdefault(decision.epoch, decision)
        elif name == "record_adaptation":
            told.adaptations.append(_read(RecordAdaptation, answer, event).adaptation)
            judged = _read(RecordAdaptation, argument, event).adaptation.judge
            told.judgements += [] if judged is None else [judged]
        elif name == "publish_kernel":
            build = _read(PublishRequest, argument, event).build
            told.kernels.setdefault(build.adaptation.adaptation_id, _read(BuiltKernel, answer, event).kernel)
        elif name not in CHILDREN:
            _hear_trainer(told, event, name, argument, answer)


def _hear_trainer(told: ToldRun, event: Mapping[str, Any], name: str, argument: Any, answer: Any) -> None:
    if name == "load_run":
        loaded, lease = _read(LoadedRun, answer, event), _read(LoadRequest, argument, event).lease
        told.loads.append(ToldLoad(loaded, lease.lease_gen))
        _hear_facts(told, loaded.facts)
    elif name == "train_epoch":
        report, lease = _read(EpochResult, answer, event).report, _read(EpochRequest, argument, event).lease
        if report is not None:
            _hear_report(told, report)
            told.heads.append(ToldHead(report.head, lease.lease_gen))
    elif name == "checkpoint":
        lease = _read(CheckpointRequest, argument, event).lease
        told.heads.append(ToldHead(_read(HeadRef, answer, event), lease.lease_gen))
    elif name == "release_trainer":
        head, lease = _read(FinishedRun, answer, event).head, _read(ReleaseRequest, argument, event).lease
        told.heads += [] if head is None else [ToldHead(head, lease.lease_gen)]
    elif name == "judge_seed":
        verdict = _read(JudgeReport, answer, event)
        told.verdicts.setdefault(verdict.adaptation_id, verdict)
    elif name in ("install_kernel", "abandon_kernel", "remove_seed"):
        fact = _read(InstallResult, answer, event).fact
        _hear_facts(told, () if fact is None else (fact,))


def _hear_record(told: ToldRun, record: RunRecord) -> None:
    told.records.append(record)
    told.lease_gen = max(told.lease_gen, record.lease_gen)


def _hear_report(told: ToldRun, report: EpochReport | None) -> None:
    if report is not None:
        told.reports.setdefault(report.epoch, report)
        _hear_facts(told, report.facts)


def _hear_facts(told: ToldRun, facts: Sequence[Fact]) -> None:
    for fact in facts:
        told.facts.setdefault(fact.seq, fact)


def _answers(events: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], str, Any, Any]]:
    """Each completed activity, and each decision that the run was answered: its event, name, argument and answer."""
    ordered: dict[str, Mapping[str, Any]] = {}
    for event in events:
        if (scheduled := event.get("activityTaskScheduledEventAttributes")) is not None:
            ordered[str(event["eventId"])] = scheduled
        elif (completed := event.get("activityTaskCompletedEventAttributes")) is not None:
            order = ordered[str(completed["scheduledEventId"])]
            yield event, str(order["activityType"]["name"]), order.get("input"), completed.get("result")
        elif (child := event.get("childWorkflowExecutionCompletedEventAttributes")) is not None:
            # A forge answers its run by a signal.
            yield event, str(child["workflowType"]["name"]), None, child.get("result")


def _read(contract: type[ContractT], payloads: Any, event: Mapping[str, Any]) -> ContractT:
    try:
        return contract.model_validate_json(first_payload(payloads))
    except (KeyError, IndexError, TypeError, ValueError) as error:
        why = ": ".join(first_problem(error)) if isinstance(error, ValidationError) else str(error).splitlines()[0]
        raise IntegrityError(
            "ESP-408",
            f"event {event.get('eventId')} holds no {contract.__name__} that this Esper can read: {why}",
            hint="Rebuild with the version of Esper that ran it",
        ) from error


def is_history(beginning: bytes) -> bool:
    """Whether stored bytes may be a history, by their first ones: what the historian wrote begins like this."""
    return beginning.startswith(b'{"events":[')


def parse_stored(data: bytes) -> Mapping[str, Any] | None:
    """A stored object as a history of one of a run's workflows; `None` when it is none."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return None
    try:
        execution = identify(document) if isinstance(document, dict) else None
    except IntegrityError:
        return None
    return document if execution is not None and execution.workflow_type in (TRAINING_RUN, *CHILDREN) else None
