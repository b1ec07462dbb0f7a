"""The protocol of leases, facts, heads and deliveries as a state machine: who may do what, and what holds after it."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine
from hypothesis.stateful import initialize
from hypothesis.stateful import invariant
from hypothesis.stateful import precondition
from hypothesis.stateful import rule
from memory_urza import MemoryUrza
from memory_urza import Store
from protocol_lineage import Violation
from protocol_lineage import lineage
from protocol_world import EPOCHS
from protocol_world import SITES
from protocol_world import STEPS_PER_EPOCH
from protocol_world import TOTAL_STEPS
from protocol_world import Trainer
from protocol_world import close_epoch
from protocol_world import copy_from
from protocol_world import delivery_of
from protocol_world import load
from protocol_world import settle

from esper.contracts.enums import AdaptationState
from esper.contracts.enums import DecisionKind
from esper.contracts.enums import FactKind
from esper.contracts.enums import SeedState
from esper.contracts.operational import AdaptationDecision
from esper.contracts.operational import EpochReport
from esper.contracts.operational import Fact
from esper.contracts.operational import HeadRef
from esper.contracts.operational import KernelDelivery
from esper.contracts.orders import InstallResult
from esper.contracts.orders import Lease
from esper.errors import DatabaseUnavailable
from esper.errors import LeaseLost
from esper.runtime.tolaria.live import deliveries
from esper.runtime.tolaria.live.boundary import judge_is_due
from esper.runtime.tolaria.live.boundary import pass_boundary
from esper.runtime.tolaria.live.boundary import take_verdict
from esper.runtime.tolaria.live.facts import Expected
from esper.runtime.tolaria.live.facts import FactBook
from esper.runtime.tolaria.live.facts import Unresolved
from esper.workflows.adaptation_book import PENDING
from esper.workflows.adaptation_book import AdaptationBook
from esper.workflows.adaptation_book import scheduled

OVERLAPPING = 3
NO_CHANGE = frozenset({FactKind.MISSED, FactKind.STOP})
MOSTLY = st.sampled_from([True, True, False])
RARELY = st.sampled_from([False, False, False, True])
GRAFTED = frozenset({AdaptationState.TRAINING, AdaptationState.FOSSILIZED, AdaptationState.CULLED})


def waits_for_verdict(trainer: Trainer) -> bool:
    """Whether the process stands at the end of an epoch and trains no further before a verdict."""
    run = trainer.run
    if trainer.shared is None or run is None or run.step != run.completed * STEPS_PER_EPOCH:
        return False
    return judge_is_due(trainer.shared)


class Protocol(RuleBasedStateMachine):
    """One run, its workflow, and up to three processes that hold or once held its lease."""

    store_kind: type[Store] = Store
    book_kind: type[FactBook] = FactBook
    checks_generation = True
    acknowledges_early = False

    def __init__(self, urza: MemoryUrza) -> None:
        super().__init__()
        self.urza = urza
        urza.runs += 1
        self.run_id = f"run{urza.runs}"
        urza.record_run(self.run_id)
        self.objects: dict[str, bytes] = {}
        self.writes: list[int] = []
        self.newest = 0
        self.trainers: list[Trainer] = []
        self.workflow_lease: Lease | None = None
        self.book = AdaptationBook()
        self.report: EpochReport | None = None
        self.sent: list[KernelDelivery] = []
        self.decisions = 0
        self.line: list[HeadRef] = []
        self.facts: tuple[Fact, ...] = ()

    # What the workflow does

    @initialize()
    def begin(self) -> None:
        """The first epoch passes undisturbed: there is a report that something can be ordered on."""
        self.claim(dies=False, loads=True)
        (first,) = self.trainers
        for _ in range(STEPS_PER_EPOCH + 1):
            self.advance(first, impatient=False)
        self.finish_commit(first)

    @rule(dies=st.booleans(), loads=MOSTLY)
    def claim(self, dies: bool, loads: bool) -> None:
        """A new owner. The one before it is dead, or only fell silent."""
        if self.trainers and (dies or len(self.trainers) == OVERLAPPING):
            del self.trainers[-1 if dies else 0]
        lease = self.urza.claim(self.run_id)
        self.newest = lease.lease_gen
        store = self.store_kind(self.urza, self.objects, lease, self.writes)
        self.trainers.append(Trainer(lease, store))
        if loads:
            self.load(self.trainers[-1])

    @precondition(lambda self: self.report is not None)
    @rule(site=st.sampled_from([*SITES, SITES[0]]), lag=st.integers(0, 3), asap=MOSTLY, delivered=st.booleans())
    def order(self, site: str, lag: int, asap: bool, delivered: bool) -> None:
        """A decision on the newest report that is known; where it is `delivered`, the forge took no time."""
        assert self.report is not None
        self.decisions += 1
        decision = AdaptationDecision(
            run_id=self.run_id,
            epoch=self.decisions,
            policy="any",
            kind=DecisionKind.GERMINATE,
            code="grow",
            reason="grow",
            site=site,
            seed=0,
            blueprint="bottleneck",
        )
        step = None if asap else (self.report.epoch + lag) * STEPS_PER_EPOCH
        adaptation = self.book.order(self.run_id, decision, self.report, step)
        assert adaptation is not None
        self.sent.append(delivery_of(scheduled(adaptation)))
        if delivered:
            self.book.deliver(self.sent[-1])
            for trainer in [each for each in self.trainers if each.shared is not None][-1:]:
                self.deliver(trainer, self.sent[-1])

    def settle_delivery(self, trainer: Trainer, result: InstallResult, otherwise: AdaptationState) -> None:
        """As `Dispatcher._settle`; what a trainer says whose lease is over reaches nobody."""
        if trainer.lease != self.workflow_lease:
            return
        if result.fact is not None and result.fact.kind is FactKind.GRAFT:
            self.book.accept(result.fact)
            if self.acknowledges_early:
                self.book.apply(result.fact)
        else:
            self.book.fail(result.adaptation_id, otherwise, result.reason)

    # What the trainers do

    def within(self, trainer: Trainer, work: Callable[[], Any]) -> Any:
        """What a process does until it finds that it is fenced, or that its session is at its end."""
        try:
            return work()
        except (LeaseLost, DatabaseUnavailable):
            over = trainer.shared is None or trainer.shared.turn.failure is not None
            if over and trainer in self.trainers:
                self.trainers.remove(trainer)
            return None

    def draw_delivery(self, data: st.DataObject) -> KernelDelivery:
        return self.sent[-1 - data.draw(st.integers(0, len(self.sent) - 1))]

    def pick(self, data: st.DataObject, *, loaded: bool = True) -> Trainer | None:
        able = [trainer for trainer in self.trainers if (trainer.shared is not None) is loaded]
        return data.draw(st.sampled_from(able)) if able else None

    @precondition(lambda self: any(trainer.shared is None for trainer in self.trainers))
    @rule(data=st.data())
    def load_run(self, data: st.DataObject) -> None:
        trainer = self.pick(data, loaded=False)
        assert trainer is not None
        self.load(trainer)

    def load(self, trainer: Trainer) -> None:
        facts = self.within(trainer, lambda: load(trainer, self.book_kind))
        if facts is not None and trainer.lease.lease_gen == self.newest:
            self.workflow_lease = trainer.lease
            for fact in facts:
                self.book.apply(fact)

    @precondition(lambda self: any(trainer.shared is not None for trainer in self.trainers))
    @rule(
        data=st.data(), steps=st.integers(1, 9), impatient=st.booleans(), commits=st.sampled_from([True, True, False])
    )
    def train(self, data: st.DataObject, steps: int, impatient: bool, commits: bool) -> None:
        """Some steps; where it `commits`, nothing happens between files and head."""
        trainer = self.pick(data)
        assert trainer is not None
        for _ in range(steps):
            if trainer not in self.trainers:
                return
            if commits and trainer.writer is not None and trainer.writer.waiting is not None:
                self.finish_commit(trainer)
            elif not self.within(trainer, lambda: self.advance(trainer, impatient)):
                return

    @precondition(lambda self: any(trainer.shared is not None for trainer in self.trainers))
    @rule(epochs=st.integers(1, 3), keep=RARELY)
    def train_on(self, epochs: int, keep: bool) -> None:
        """Nothing disturbs the newest trainer for a while."""
        trainer = [each for each in self.trainers if each.shared is not None][-1]
        for _ in range(epochs * (STEPS_PER_EPOCH + 3)):
            if trainer not in self.trainers:
                return
            if trainer.writer is not None and trainer.writer.waiting is not None:
                self.finish_commit(trainer)
            elif waits_for_verdict(trainer):
                self.judge_on(trainer, keep=keep)
            else:
                self.within(trainer, lambda: self.advance(trainer, impatient=True))

    def advance(self, trainer: Trainer, impatient: bool) -> bool:
        """One boundary and one step, or the end of an epoch; false where the process would wait."""
        shared, run, writer = trainer.shared, trainer.run, trainer.writer
        assert shared is not None
        assert run is not None
        assert writer is not None
        shared.turn.check()
        if trainer.lease == self.workflow_lease:
            shared.book.expect(self.book.schedule())
        if run.step == (run.completed + 1) * STEPS_PER_EPOCH:
            if writer.waiting is not None:
                return False
            close_epoch(trainer)
            return True
        if run.step >= TOTAL_STEPS or judge_is_due(shared):
            return False
        due = shared.book.due(run.step, run.state)
        if isinstance(due, Unresolved) or (isinstance(due, Expected) and not impatient):
            return False
        changes = [fact for fact in shared.book.all() if fact.apply_step == run.step and fact.kind not in NO_CHANGE]
        if changes and writer.waiting is not None:
            return False
        pass_boundary(shared, lambda phase: None)
        run.take_step()
        return True

    @precondition(lambda self: any(trainer.writer is not None and trainer.writer.waiting for trainer in self.trainers))
    @rule(data=st.data(), answer_lost=st.booleans(), dies=st.booleans())
    def commit(self, data: st.DataObject, answer_lost: bool, dies: bool) -> None:
        """The commit in flight moves the head. Where its answer is lost it is made again, or its process dies."""
        busy = [trainer for trainer in self.trainers if trainer.writer is not None and trainer.writer.waiting]
        trainer = data.draw(st.sampled_from(busy))
        assert trainer.writer is not None
        trainer.store.lose_answer = answer_lost
        if answer_lost:
            try:
                trainer.writer.finish()
            except DatabaseUnavailable:
                pass
            except LeaseLost:
                self.trainers.remove(trainer)
                return
            if dies:
                self.trainers.remove(trainer)
                return
            if trainer.writer.waiting is None:
                # Nothing was to be written: it is the head that stands already.
                trainer.store.lose_answer = False
                return
        self.finish_commit(trainer)

    def finish_commit(self, trainer: Trainer) -> None:
        committed = self.within(trainer, lambda: settle(trainer))
        if committed is None or trainer.lease != self.workflow_lease:
            return
        if committed.report is not None:
            self.report = committed.report
            for fact in committed.report.facts:
                self.book.apply(fact)
        for verdict in trainer.verdicts:
            self.book.judge(verdict)
        trainer.verdicts.clear()
        self.ask_for_verdict(trainer)

    def ask_for_verdict(self, trainer: Trainer) -> None:
        """A verdict that an earlier owner took and nobody was told is asked for again."""
        assert trainer.run is not None
        subject = None if self.report is None else self.book.to_judge(self.report.step)
        for known in trainer.run.state.judgements:
            if known.adaptation_id == subject:
                self.book.judge(known)

    @precondition(lambda self: self.sent and any(trainer.shared is not None for trainer in self.trainers))
    @rule(data=st.data(), answer_lost=RARELY, another=RARELY)
    def install(self, data: st.DataObject, answer_lost: bool, another: bool) -> None:
        """A delivery reaches a trainer: any, at any time, any number of times; sometimes while another is recorded."""
        trainer = self.pick(data)
        assert trainer is not None
        first, second = self.draw_delivery(data), self.draw_delivery(data)
        if another:
            trainer.store.meanwhile = lambda: self.deliver(trainer, second)
        trainer.store.lose_answer = answer_lost
        self.deliver(trainer, first)
        trainer.store.lose_answer, trainer.store.meanwhile = False, None

    def deliver(self, trainer: Trainer, delivery: KernelDelivery) -> None:
        shared, run = trainer.shared, trainer.run
        assert shared is not None
        assert run is not None
        adaptation = delivery.adaptation
        with pytest.MonkeyPatch.context() as patch:
            if not self.checks_generation:
                blind = {"generation": adaptation.seed_generation}
                seen = {site: seed.model_copy(update=blind) for site, seed in run.seeds.items()}
                patch.setattr(run.trainee, "model", seen)
            result = self.within(trainer, lambda: deliveries.install(shared, delivery))
        if result is not None:
            state = AdaptationState.STALE if result.fact is None else AdaptationState.MISSED
            self.settle_delivery(trainer, result, state)

    @precondition(lambda self: self.sent and any(trainer.shared is not None for trainer in self.trainers))
    @rule(data=st.data(), what=st.sampled_from(["kernel_ready", "abandon", "cull"]), answer_lost=RARELY)
    def message(self, data: st.DataObject, what: str, answer_lost: bool) -> None:
        """A kernel is signalled once more; the forge has failed, or a person vetoes; a person removes a block."""
        trainer = self.pick(data)
        delivery = self.draw_delivery(data)
        assert trainer is not None
        shared = trainer.shared
        assert shared is not None
        trainer.store.lose_answer = answer_lost
        if what == "kernel_ready":
            self.book.deliver(delivery)
        elif what == "cull":
            self.within(trainer, lambda: deliveries.remove(shared, delivery.adaptation.adaptation_id))
        else:
            result = self.within(trainer, lambda: deliveries.abandon(shared, delivery.adaptation, "no kernel"))
            if result is not None:
                self.settle_delivery(trainer, result, AdaptationState.FAILED)
        trainer.store.lose_answer = False

    @precondition(lambda self: any(waits_for_verdict(trainer) for trainer in self.trainers))
    @rule(data=st.data(), cull=MOSTLY)
    def judge(self, data: st.DataObject, cull: bool) -> None:
        due = [trainer for trainer in self.trainers if waits_for_verdict(trainer)]
        self.judge_on(data.draw(st.sampled_from(due)), keep=not cull)

    def judge_on(self, trainer: Trainer, keep: bool) -> None:
        shared, run, writer = trainer.shared, trainer.run, trainer.writer
        assert shared is not None
        assert run is not None
        assert writer is not None
        if writer.waiting is not None:
            return
        run.keep_next = keep

        def work() -> None:
            trainer.verdicts.append(take_verdict(shared, lambda phase: None))
            writer.begin(run.copy(), None)

        self.within(trainer, work)

    # What must hold after every step

    @invariant()
    def what_is_written_is_the_newest_owners_and_one_line(self) -> None:
        written, self.writes[:] = list(self.writes), []
        for lease_gen in written:
            if lease_gen != self.newest:
                raise Violation(f"I9: lease {lease_gen} wrote while lease {self.newest} was given")
        if not written:
            return
        committed = self.urza.heads(self.run_id)
        current, _ = self.urza.position(self.run_id)
        above: str | None = None
        step = lease_gen = 0
        for item in committed:
            if item.head.parent != above or item.head.step < step or item.lease_gen < lease_gen:
                raise Violation(f"I1: the head at step {item.head.step} does not follow the one before it")
            above, step, lease_gen = item.head.digest, item.head.step, item.lease_gen
        if committed and current != above:
            raise Violation("I1: the head is not the one that was committed last")
        before, self.line = self.line, [item.head for item in committed]
        if self.line[: len(before)] != before:
            raise Violation("I1: a head is gone")
        self.facts = self.urza.facts(self.run_id)
        self.check_heads()

    def check(self) -> None:
        self.what_is_written_is_the_newest_owners_and_one_line()
        self.a_delivery_has_one_outcome_and_no_head_lacks_it()

    def check_heads(self) -> None:
        """A head holds exactly what its facts say."""
        executed: tuple[Fact, ...] = ()
        for head in self.line[-2:]:
            copy = copy_from(self.objects[head.digest])
            if copy.state.executed[: len(executed)] != executed:
                raise Violation("I6: a later head has forgotten what an earlier one had executed")
            executed = copy.state.executed
            seeds = lineage(executed, copy.step)
            if seeds != {seed.site: seed for seed in copy.seeds}:
                raise Violation(f"I6: the seeds are {copy.seeds}, by the facts they would be {tuple(seeds.values())}")
            held = None if copy.state.held is None else copy.state.held.fact.site
            probation = [site for site, seed in seeds.items() if seed.state is SeedState.GRAFTING]
            leaving = [ramp.site for ramp in copy.state.ramps]
            if [site for site in probation if site != held and site not in leaving]:
                raise Violation(f"I8: nobody will judge what is on probation at {probation}")

    @invariant()
    def a_delivery_has_one_outcome_and_no_head_lacks_it(self) -> None:
        outcomes = [fact for fact in self.facts if fact.decides == FactKind.GRAFT.value]
        for fact in outcomes:
            if [other for other in outcomes if other is not fact and other.adaptation_id == fact.adaptation_id]:
                raise Violation(f"I8: {fact.adaptation_id} has two outcomes")
        grafts = {fact.adaptation_id: fact for fact in outcomes if fact.kind is FactKind.GRAFT}
        for adaptation in self.book.all():
            if adaptation.state in GRAFTED and adaptation.adaptation_id not in grafts:
                raise Violation(f"I4: {adaptation.adaptation_id} was acknowledged, and nothing is recorded of it")
        if self.line:
            copy = copy_from(self.objects[self.line[-1].digest])
            for fact in grafts.values():
                if fact.apply_step < copy.step and not copy.state.has_executed(fact):
                    raise Violation(f"I4: the head at step {copy.step} lacks {fact.adaptation_id}")

    def teardown(self) -> None:
        """Whatever happened, a last owner brings the run to its end, and everything has come to an end (I8)."""
        self.trainers.clear()
        self.claim(dies=False, loads=True)
        (last,) = self.trainers
        assert last.run is not None
        assert last.writer is not None
        for _ in range(10 * TOTAL_STEPS):
            if last.writer.waiting is not None:
                self.finish_commit(last)
            elif waits_for_verdict(last):
                self.judge_on(last, keep=True)
            elif last.run.completed < EPOCHS:
                self.advance(last, impatient=True)
        if last.run.completed != EPOCHS or last.writer.waiting is not None or self.trainers != [last]:
            raise Violation(f"I10: the run stands at step {last.run.step} and does not come to its end")
        self.check()
        for adaptation in self.book.all():
            if adaptation.state in PENDING:
                self.book.fail(adaptation.adaptation_id, AdaptationState.MISSED, "the run has ended")
        grafted = {fact.adaptation_id for fact in last.run.state.executed if fact.kind is FactKind.GRAFT}
        for adaptation in self.book.all():
            if adaptation.state in (AdaptationState.TRAINING, *PENDING):
                raise Violation(f"I8: {adaptation.adaptation_id} ends as {adaptation.state}")
            if (adaptation.state in GRAFTED) is not (adaptation.adaptation_id in grafted):
                raise Violation(f"I8: {adaptation.adaptation_id} is shown as {adaptation.state}, which is not so")
