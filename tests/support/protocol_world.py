"""Trainers that may overlap and die anywhere, around the real ownership, delivery and lifecycle code.

Real: Urza's ledger and leases (SQLite in memory), `FactBook`, `check_ledger`, `RunState`, `install`, `abandon`,
`remove`, the boundary, the verdict, the writer's commit, the lifecycle table, the workflow's `AdaptationBook`.
Stood in for: the model (seeds without tensors), the clock (steps), the objects (a dict), threads (a commit in flight
is a phase of its own, so that anything may happen between its files and its head).
"""

import json
from collections.abc import Callable
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import field
from types import SimpleNamespace
from typing import Any

import pytest
from memory_urza import Store
from plain_report import plain_report

from esper.contracts.assets import ArtifactRef
from esper.contracts.assets import Seed
from esper.contracts.enums import FactKind
from esper.contracts.enums import SeedState
from esper.contracts.enums import Verdict
from esper.contracts.operational import EpochReport
from esper.contracts.operational import Fact
from esper.contracts.operational import HeadRef
from esper.contracts.operational import JudgeReport
from esper.contracts.operational import KernelDelivery
from esper.contracts.operational import LayerGraph
from esper.contracts.operational import Metrics
from esper.contracts.operational import ScheduledAdaptation
from esper.contracts.operational import SiteNode
from esper.contracts.orders import Lease
from esper.errors import SiteError
from esper.runtime.kasmina.lifecycle import advance
from esper.runtime.tolaria.judging import Judgement
from esper.runtime.tolaria.live import boundary
from esper.runtime.tolaria.live import deliveries
from esper.runtime.tolaria.live import writer as writer_module
from esper.runtime.tolaria.live.facts import FactBook
from esper.runtime.tolaria.live.facts import check_ledger
from esper.runtime.tolaria.live.live_run import VERDICTS
from esper.runtime.tolaria.live.live_run import judge_report
from esper.runtime.tolaria.live.run_state import HeldGraft
from esper.runtime.tolaria.live.run_state import Ramp
from esper.runtime.tolaria.live.run_state import RunState
from esper.runtime.tolaria.live.shared_run import SharedRun
from esper.runtime.tolaria.live.turns import Turn
from esper.runtime.tolaria.live.writer import Committed
from esper.runtime.tolaria.live.writer import HeadWriter
from esper.runtime.urza import ledger
from esper.runtime.urza.objects import reference

SITES = ("first", "second")
STEPS_PER_EPOCH = 4
EPOCHS = 10
TOTAL_STEPS = STEPS_PER_EPOCH * EPOCHS
HOLD_STEPS = 4
REMOVAL_STEPS = 3
REJECTED_AT_BIRTH = 2
"""Every adaptation whose number is a multiple of this changes the function at its birth, and goes again at once."""


class Plan:
    """The steps of a run, in the terms of `TrainingPlan`."""

    steps_per_epoch = STEPS_PER_EPOCH
    total_steps = TOTAL_STEPS
    device = SimpleNamespace(type="cpu")
    config = SimpleNamespace(tezzeret=SimpleNamespace(timeout_s=0.0, compile=None))

    def judge_step(self, apply_step: int) -> int:
        return -(-(apply_step + HOLD_STEPS) // STEPS_PER_EPOCH) * STEPS_PER_EPOCH


@dataclass(frozen=True)
class Copy:
    """A snapshot: what a checkpoint of the stand-in holds."""

    step: int
    epoch: int
    state: RunState
    seeds: tuple[Seed, ...]

    def to_bytes(self) -> bytes:
        seeds = [seed.model_dump(mode="json") for seed in self.seeds]
        document = {"step": self.step, "epoch": self.epoch, "state": self.state.model_dump(mode="json")}
        return json.dumps(document | {"seeds": seeds}, sort_keys=True).encode()


def copy_from(data: bytes) -> Copy:
    document = json.loads(data)
    seeds = tuple(Seed.model_validate_json(json.dumps(seed)) for seed in document["seeds"])
    state = RunState.model_validate_json(json.dumps(document["state"]))
    return Copy(document["step"], document["epoch"], state, seeds)


def moved(seed: Seed, *states: SeedState, **changes: object) -> Seed:
    """The seed after these moves of the lifecycle table; as the library does, DORMANT is the next generation."""
    for to in states:
        advance(seed.state, to)
        seed = seed.model_copy(update={"state": to})
        if to is SeedState.DORMANT:
            seed = Seed(site=seed.site, index=seed.index, generation=seed.generation + 1)
    return seed.model_copy(update=changes)


class StandInRun:
    """`LiveRun` without tensors: the same facts do the same to its seeds and its state."""

    def __init__(self, run_id: str, copy: Copy, writer: "PhasedWriter") -> None:
        self.run_id = run_id
        self.step = copy.step
        self.completed = copy.epoch
        self.state = copy.state
        self.seeds = {seed.site: seed for seed in copy.seeds}
        self.trainee = SimpleNamespace(plan=Plan(), model=self.seeds)
        self.keep_next = True
        self._writer = writer
        self._changed = False
        self._copied_step: int | None = None if writer.last is None else writer.last.head.step

    @property
    def committed(self) -> bool:
        return not self._changed and self._copied_step == self.step

    def copy(self) -> Copy:
        self._changed, self._copied_step = False, self.step
        return Copy(self.step, self.completed, self.state, tuple(self.seeds.values()))

    def take_step(self) -> None:
        self.step += 1
        for ramp in self.state.ramps:
            if self.step >= ramp.end_step:
                self.seeds[ramp.site] = moved(self.seeds[ramp.site], SeedState.CULLED, SeedState.DORMANT)
        ramps = tuple(ramp for ramp in self.state.ramps if self.step < ramp.end_step)
        self.state = self.state.model_copy(update={"ramps": ramps})

    def graft(self, fact: Fact, kernel: object, wait: object) -> str | None:
        assert fact.site is not None
        assert fact.delivery is not None
        if not self.committed:
            self._writer.begin(self.copy(), None)
        seed = self.seeds[fact.site]
        if seed.state is not SeedState.DORMANT:
            self._done(fact)
            return "rejected: the seed is taken"
        grown = (SeedState.GERMINATED, SeedState.TRAINING, SeedState.GRAFTING)
        self.seeds[fact.site] = moved(seed, *grown, adaptation_id=fact.adaptation_id)
        self.state = self.state.model_copy(update={"held": HeldGraft(fact=fact)})
        self._done(fact)
        return "rejected: its birth" if fact.delivery.adaptation.number % REJECTED_AT_BIRTH == 0 else None

    def execute(self, fact: Fact) -> None:
        if fact.kind is FactKind.REMOVE:
            self._begin_removal(fact)
        elif fact.kind is FactKind.CULL:
            self._cull(fact)
        self._done(fact)

    def judge_held(self, tick: object, wait: object) -> tuple[object, Judgement]:
        verdict = Verdict.KEEP if self.keep_next else Verdict.CULL
        return SimpleNamespace(flops=0.0), Judgement(verdict, "judged", None, None, None, None, None)

    def carry_out(self, fact: Fact, twin: Any, judgement: Judgement) -> JudgeReport:
        assert fact.site is not None
        if fact.kind is FactKind.FOSSILIZE:
            self.seeds[fact.site] = moved(self.seeds[fact.site], SeedState.FOSSILIZED)
            self.state = self.state.model_copy(update={"held": None})
        else:
            self._cull(fact)
        verdict = next(verdict for verdict, kind in VERDICTS.items() if kind is fact.kind)
        report = judge_report(self.run_id, fact.adaptation_id, self.step, verdict, judgement, 0.0)
        self.state = self.state.model_copy(update={"judgements": (*self.state.judgements, report)})
        self._done(fact)
        return report

    def _cull(self, fact: Fact) -> None:
        assert fact.site is not None
        seed = self.seeds[fact.site]
        if seed.state is SeedState.DORMANT:
            seed = moved(seed, SeedState.GERMINATED)
        self.seeds[fact.site] = moved(seed, SeedState.CULLED, SeedState.DORMANT)
        self.state = self.state.model_copy(update={"held": None})

    def _begin_removal(self, fact: Fact) -> None:
        assert fact.site is not None
        seed = self.seeds[fact.site]
        if seed.adaptation_id != fact.adaptation_id or seed.state not in deliveries.REMOVABLE:
            return
        end = min(fact.apply_step + REMOVAL_STEPS, TOTAL_STEPS)
        ramp = Ramp(adaptation_id=fact.adaptation_id, site=fact.site, seed=0, start_step=fact.apply_step, end_step=end)
        held = self.state.held
        if held is not None and held.fact.adaptation_id == fact.adaptation_id:
            held = None
        self.state = self.state.model_copy(update={"held": held, "ramps": (*self.state.ramps, ramp)})

    def _done(self, fact: Fact) -> None:
        self.state = self.state.model_copy(update={"executed": (*self.state.executed, fact)})
        self._changed = True


class PhasedWriter:
    """The real writer, but what it does in its thread is done when the test says so."""

    def __init__(self, store: Store, last: Committed | None) -> None:
        self._store = store
        self._writer = HeadWriter(store, last)
        self.waiting: tuple[Copy, Any] | None = None

    @property
    def last(self) -> Committed | None:
        return self._writer.last

    def begin(self, copy: Copy, report: Any) -> None:
        assert self.waiting is None, "two commits in flight"
        self._store.check_before_files(None if self.last is None else self.last.head.digest)
        self.waiting = copy, report

    def finish(self) -> Committed:
        """Files, then head. Raises what the store raises, and stays in flight then."""
        assert self.waiting is not None
        copy, report = self.waiting
        committed = self._writer._commit(copy, report, None)  # type: ignore[arg-type]
        self.waiting = None
        return committed


@dataclass(repr=False, eq=False)
class Trainer:
    """One process: its lease, and its session once it has loaded."""

    lease: Lease
    store: Store
    shared: SharedRun | None = None
    run: StandInRun | None = None
    writer: PhasedWriter | None = None
    verdicts: list[JudgeReport] = field(default_factory=list)
    """Judgements whose commit is in flight: nobody was told yet."""

    def __repr__(self) -> str:
        where = "not loaded" if self.run is None else f"step {self.run.step}"
        return f"<trainer under lease {self.lease.lease_gen}, {where}>"


def load(trainer: Trainer, book_kind: type[FactBook] = FactBook) -> tuple[Fact, ...]:
    """What `load_run` does, with the same real parts in the same order; returns the facts of the run."""
    run_id = trainer.lease.run_id
    known = trainer.store.urza.transact(lambda connection: ledger.take_over(connection, trainer.lease))
    copy = Copy(0, 0, RunState(), tuple(Seed(site=site, index=0) for site in SITES))
    last = None
    if known.head is not None:
        copy = copy_from(trainer.store.get(known.manifest))
        last = Committed(known.head, known.manifest)
    check_ledger(known.facts, copy.state, copy.step, run_id)
    trainer.writer = PhasedWriter(trainer.store, last)
    trainer.run = StandInRun(run_id, copy, trainer.writer)
    trainer.shared = SharedRun(
        run=trainer.run,  # type: ignore[arg-type]
        book=book_kind(known.facts, known.frontier),
        turn=Turn(1, None),  # type: ignore[arg-type]
        store=trainer.store,  # type: ignore[arg-type]
        passed=copy.step - 1,
    )
    if last is None:
        trainer.writer.begin(trainer.run.copy(), None)
        settle(trainer)
    return known.facts


def settle(trainer: Trainer) -> Committed:
    """The commit in flight ends, and whoever waits for it is told, by the real `await_commit`."""
    assert trainer.writer is not None
    assert trainer.shared is not None
    done: Future[Committed] = Future()
    try:
        done.set_result(trainer.writer.finish())
    except Exception as error:
        done.set_exception(error)
    return trainer.shared.await_commit(done, lambda phase: None)


def close_epoch(trainer: Trainer) -> None:
    """What `close_epoch` does at a full epoch, while no commit is in flight."""
    run = trainer.run
    assert run is not None
    assert trainer.writer is not None
    state, epoch = run.state, run.completed + 1
    graph = graph_of(run)

    def report(head: HeadRef, samples: object) -> EpochReport:
        return plain_report(
            run.run_id,
            head,
            metrics=Metrics(train_loss=0.5, val_loss=0.5),
            samples=STEPS_PER_EPOCH,
            graph=graph,
            held_adaptation=None if state.held is None else state.held.fact.adaptation_id,
            facts=state.executed[state.reported :],
        )

    run.completed = epoch
    run.state = state.model_copy(update={"reported": len(state.executed)})
    trainer.writer.begin(run.copy(), report)


def graph_of(run: StandInRun) -> LayerGraph:
    contract = {"kind": "linear", "input_shape": (4,), "output_shape": (4,), "dtype": "float32"}
    nodes = tuple(
        SiteNode.model_validate(
            {
                "contract": contract | {"site": site, "output_site": site},
                "parameter_count": 1,
                "flops_per_sample": 1,
                "depth": 1,
                "seeds": (seed,),
            }
        )
        for site, seed in run.seeds.items()
    )
    return LayerGraph(nodes=nodes, edges=())


def delivery_of(adaptation: ScheduledAdaptation) -> KernelDelivery:
    """The same kernel whenever it is delivered."""
    ref = reference(adaptation.adaptation_id.encode())
    return KernelDelivery(
        delivery_id=ref.digest, adaptation=adaptation, kernel=ref.digest, manifest=ref, weights=ref, certificate=ref
    )


def _seed_of(model: dict[str, Seed], site: str, seed: int) -> Seed | None:
    if site not in model:
        raise SiteError("ESP-314", f"there is no site {site}")
    return model[site] if seed == 0 else None


def _write(taken: Copy, put: Callable[[bytes], ArtifactRef], across: object) -> ArtifactRef:
    return put(taken.to_bytes())


@contextmanager
def stand_ins() -> Iterator[pytest.MonkeyPatch]:
    """The places where the real code would touch tensors."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (deliveries, boundary):
            patch.setattr(module, "prepare_kernel", lambda delivery, store, device: SimpleNamespace())
        patch.setattr(deliveries, "_compile", lambda shared, kernel: None)
        patch.setattr(deliveries, "seed_of", _seed_of)
        patch.setattr(writer_module, "write", _write)
        yield patch
