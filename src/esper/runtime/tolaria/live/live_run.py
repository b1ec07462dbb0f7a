"""The run as the one thread that has the turn sees it: model, state, and the facts that change both."""

from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from contextlib import nullcontext

from esper.contracts.enums import FactKind
from esper.contracts.enums import Verdict
from esper.contracts.operational import Fact
from esper.contracts.operational import JudgeReport
from esper.contracts.operational import LayerGraph
from esper.runtime.failpoints import hit
from esper.runtime.kasmina.lineage import layer_graph
from esper.runtime.kasmina.telemetry import Telemetry
from esper.runtime.kasmina.wrapping.morphable import model_state
from esper.runtime.tezzeret.build import KernelModule
from esper.runtime.tolaria.checkpoint import Snapshot
from esper.runtime.tolaria.checkpoint import snapshot
from esper.runtime.tolaria.evaluation import chunk_losses
from esper.runtime.tolaria.evaluation import mean_look
from esper.runtime.tolaria.judging import Judgement
from esper.runtime.tolaria.judging import judge
from esper.runtime.tolaria.live import surgery
from esper.runtime.tolaria.live.damage import read_start
from esper.runtime.tolaria.live.flops import FlopMeter
from esper.runtime.tolaria.live.run_state import HeldGraft
from esper.runtime.tolaria.live.run_state import RunState
from esper.runtime.tolaria.live.twin import Twin
from esper.runtime.tolaria.live.twin import look_is_due
from esper.runtime.tolaria.live.twin import train_twin
from esper.runtime.tolaria.live.writer import Committed
from esper.runtime.tolaria.live.writer import HeadWriter
from esper.runtime.tolaria.live.writer import ReportMaker
from esper.runtime.tolaria.live.writer import SampleMaker
from esper.runtime.tolaria.randomness import restore_random_state
from esper.runtime.tolaria.store import SessionStore
from esper.runtime.tolaria.trainee import Trainee

VERDICTS = {Verdict.KEEP: FactKind.FOSSILIZE, Verdict.CULL: FactKind.CULL}
"""A verdict and the fact that executes it."""

Wait = Callable[[Future[Committed]], Committed]
"""Waits for a commit, and tells the caller meanwhile that this is what it waits for."""

Tick = Callable[[int], None]
"""Called before each step of a twin; raises to give up."""


class LiveRun:
    """Belongs to the thread that has the session's turn; only reads are safe from elsewhere."""

    def __init__(self, run_id: str, trainee: Trainee, state: RunState, store: SessionStore, writer: HeadWriter) -> None:
        self.run_id = run_id
        self.trainee = trainee
        self.state = state
        self.meter = FlopMeter()
        self.telemetry = Telemetry(trainee.model)
        self._store = store
        self._writer = writer
        self._changed = False
        self._submitted: Future[Committed] | None = None
        self._submitted_step: int | None = None if writer.last is None else writer.last.head.step
        self._start: Future[Committed] | None = None
        plan = trainee.plan
        self._graph = layer_graph(trainee.model, lambda: plan.loss(trainee.model, plan.first_batch()))

    @property
    def step(self) -> int:
        return self.trainee.step

    @property
    def changed(self) -> bool:
        """Whether a fact was executed that no head holds yet."""
        return self._changed

    @property
    def committed(self) -> bool:
        """Whether the head of just this state stands, or is on its way."""
        return not self._changed and self._submitted_step == self.step

    def graph(self) -> LayerGraph:
        """The sites and the dataflow between them, with the seeds as they stand."""
        seeds: dict[str, list[object]] = {}
        for seed in surgery.all_seeds(self.trainee.model):
            seeds.setdefault(seed.site, []).append(seed)
        nodes = (node.model_copy(update={"seeds": tuple(seeds[node.contract.site])}) for node in self._graph.nodes)
        return self._graph.model_copy(update={"nodes": tuple(nodes)})

    def take_step(self, *, checked: bool = False) -> int:
        """One step, with the blocks that are on their way out, and without a kernel that has failed it; returns the
        rows of its batch. `checked` is that of `Trainee.advance`."""
        held = self.state.held
        if not self.state.ramps and held is None:
            rows = self.trainee.advance(self.telemetry)
            self.meter.count(rows)
            return rows
        surgery.follow_ramps(self.trainee, self.state)
        struck = held is not None and held.struck_at == self.step
        left_out: AbstractContextManager[None] = nullcontext()
        if held is not None and struck:
            left_out = surgery.asleep(self.trainee.model, *surgery.place_of(held.fact))
        with left_out:
            rows = self.trainee.advance(self.telemetry, checked=checked)
        self.meter.count(rows)
        if not struck:
            self.state = surgery.recover(self.trainee, self.state)
        if any(self.step >= ramp.end_step for ramp in self.state.ramps):
            hit("remove.before_excision")
            self._restructuring()
            self.state = surgery.end_ramps(self.trainee, self.state)
            hit("remove.after_excision")
        return rows

    def count_flops(self) -> None:
        """Bring `state.training_flops` up to date."""
        total = self.state.training_flops + self.meter.take(self.trainee)
        self.state = self.state.model_copy(update={"training_flops": total})

    def count_probe(self, flops: float) -> None:
        """Compute that is not training of the live model."""
        self.state = self.state.model_copy(update={"probe_flops": self.state.probe_flops + flops})

    def commit(self, report: ReportMaker | None = None, samples: SampleMaker | None = None) -> Future[Committed]:
        """Copy the run and hand it to the writer, which must be idle."""
        return self._submit(self._copy(), report, samples)

    def report(self, report: ReportMaker) -> Future[Committed]:
        """Hand a report to the writer, which must be idle, without a head of its own."""
        self._submitted = self._writer.submit_report(report)
        return self._submitted

    def _copy(self) -> Snapshot:
        hit("commit.before_snapshot")
        if self._changed:
            hit("change.before_head")
        self.count_flops()
        held = self.state.held
        if held is not None and held.start is None and self._start is not None:
            start = self._start.result().manifest
            self.state = self.state.model_copy(update={"held": held.model_copy(update={"start": start})})
        self._changed, self._submitted_step = False, self.step
        taken = snapshot(self.trainee, self.state)
        hit("commit.after_snapshot")
        return taken

    def _submit(
        self, taken: Snapshot, report: ReportMaker | None = None, samples: SampleMaker | None = None
    ) -> Future[Committed]:
        self._submitted = self._writer.submit(taken, report, samples)
        return self._submitted

    def wait_for_writer(self, wait: Wait) -> None:
        """Until no commit is in flight. Raises what the last one raised."""
        if self._submitted is not None:
            wait(self._submitted)

    def graft(self, fact: Fact, kernel: KernelModule, wait: Wait) -> str | None:
        """Execute a graft. Returns the reason when the block must go again at once.

        The head of this step is where the twin will begin. It is copied first, unless it stands already, and handed
        to the writer when the graft is done: the writer's thread would only be in its way.
        """
        taken: Snapshot | None = None
        if not self.committed:
            self.wait_for_writer(wait)
            taken = self._copy()
        # At the cost before the graft: counting the new structure can wait until the epoch is over.
        self.count_probe(2 * surgery.BIRTH_ROWS * self.meter.cost(self.trainee).forward)
        self._restructuring()
        hit("graft.before_surgery")
        self.state, refusal = surgery.graft(self.trainee, self.state, fact, kernel)
        hit("graft.after_surgery")
        if taken is not None:
            self._submit(taken)
        if self.state.held is not None:
            self._note_start()
        self._done(fact)
        return refusal

    def leave_out(self, graft: Fact) -> None:
        """A graft that is never made."""
        self._done(graft)

    def execute(self, fact: Fact) -> None:
        """Execute a fact that is neither a graft nor a verdict."""
        match fact.kind:
            case FactKind.REMOVE:
                self.state = surgery.begin_removal(self.trainee, self.state, fact)
                hit("remove.begun")
            case FactKind.CULL:
                self._restructuring()
                self.state = surgery.discard(self.trainee, self.state, fact)
            case FactKind.STRIKE:
                self.state = surgery.strike(self.trainee, self.state, fact)
            case FactKind.BREAKER | FactKind.QUARANTINE:
                self._restructuring()
                self.state = surgery.give_up(self.trainee, self.state, fact)
            case FactKind.MISSED | FactKind.STOP:
                pass
            case FactKind.GRAFT | FactKind.FOSSILIZE:
                raise ValueError(f"{fact.kind} of {fact.adaptation_id} is not executed by itself")
        self._done(fact)

    def look(self) -> HeldGraft | None:
        """At the end of an epoch: the graft on probation, with its losses if its verdict is near."""
        held, trainee = self.state.held, self.trainee
        if held is None or not look_is_due(trainee, held.fact.judge_step):
            return held
        self.count_probe(trainee.plan.judge_rows * self.meter.cost(trainee).forward)
        losses = chunk_losses(trainee.model, trainee.plan.validation, trainee.plan.judged, trainee.plan.loss)
        return held.model_copy(update={"looks": (*held.looks, tuple(losses))})

    def judge_held(self, tick: Tick, wait: Wait) -> tuple[Twin, Judgement]:
        """Train the twin of the graft on probation to the present step and compare the two on the judge slice."""
        held = self.state.held
        if held is None:
            raise ValueError("no graft is on probation")
        self.wait_for_writer(wait)
        start = held.start if held.start is not None or self._start is None else self._start.result().manifest
        if start is None:
            raise ValueError(f"the start of {held.fact.adaptation_id} is not known")
        plan = self.trainee.plan
        others = [fact for fact in self.state.executed if fact.adaptation_id != held.fact.adaptation_id]
        twin = train_twin(plan, read_start(held.fact, start, self._store), others, self.step, tick)
        return twin, judge(mean_look(held.looks), mean_look(twin.looks), plan.config.tamiyo.keep_margin)

    def carry_out(self, fact: Fact, twin: Twin, judgement: Judgement) -> JudgeReport:
        """Execute a verdict: the recorded fact rules, also where it is not what was found."""
        self._restructuring()
        if fact.kind is FactKind.FOSSILIZE:
            hit("keep.before_fossilization")
            self.state = surgery.keep(self.trainee, self.state, fact)
            hit("keep.after_fossilization")
        else:
            hit("cull.before_adoption")
            self._adopt(fact, twin)
            hit("cull.after_adoption")
        self.count_probe(twin.flops)
        verdict = next(verdict for verdict, kind in VERDICTS.items() if kind is fact.kind)
        report = judge_report(self.run_id, fact.adaptation_id, self.step, verdict, judgement, twin.flops)
        self.state = self.state.model_copy(update={"judgements": (*self.state.judgements, report)})
        self._done(fact)
        return report

    def _adopt(self, fact: Fact, twin: Twin) -> None:
        """The run goes on as one that never grafted: the twin's model, optimizer, generators and early stopping."""
        site, seed = surgery.place_of(fact)
        twin.trainee.completed = self.trainee.completed
        # It counts changes, and going back is one: a model's generation never falls.
        model_state(twin.trainee.model).generation = model_state(self.trainee.model).generation + 1
        self.trainee = twin.trainee
        self.telemetry = Telemetry(self.trainee.model)
        hit("cull.in_adoption")
        restore_random_state(twin.random)
        surgery.free_slot(self.trainee.model, site, seed)
        self.state = self.state.model_copy(
            update={"held": None, "ramps": twin.state.ramps, "early_stop": twin.state.early_stop}
        )

    def _note_start(self) -> None:
        last = self._writer.last
        if self._submitted is not None:
            self._start = self._submitted
        elif last is not None and self.state.held is not None:
            held = HeldGraft(fact=self.state.held.fact, start=last.manifest)
            self.state = self.state.model_copy(update={"held": held})

    def _restructuring(self) -> None:
        """The model is about to change: what was trained so far is counted at the present cost."""
        self.count_flops()
        self.meter.structure_changed()

    def _done(self, fact: Fact) -> None:
        self.state = self.state.model_copy(update={"executed": (*self.state.executed, fact)})
        self._changed = True
        hit("fact.executed", fact.kind.value)


def judge_report(
    run_id: str, adaptation_id: str, step: int, verdict: Verdict, judgement: Judgement, flops: float
) -> JudgeReport:
    """A judgement as the run's record shows it."""
    return JudgeReport(
        run_id=run_id,
        adaptation_id=adaptation_id,
        verdict=verdict,
        step=step,
        grown_loss=judgement.grown_loss,
        twin_loss=judgement.twin_loss,
        gain=judgement.gain,
        gain_lower_bound=judgement.lower_bound,
        margin=judgement.margin,
        chunks=judgement.chunks,
        twin_flops=flops,
        reason=judgement.reason,
    )
