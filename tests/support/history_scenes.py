"""The scenes whose histories are kept: one run each, with fake activities, from its first event to its last."""

import asyncio
from collections.abc import Awaitable
from collections.abc import Callable
from dataclasses import dataclass

from fake_activities import PINNED
from fake_activities import FakeWorld
from faulty_world import FaultyWorld
from ledger_world import LedgerWorld
from resetting import reset
from temporalio import activity
from temporalio.client import WorkflowHandle
from temporalio.common import WorkflowIDReusePolicy
from temporalio.exceptions import ApplicationError
from workflow_stage import Stage
from workflow_stage import configuration

from esper.activities import names
from esper.contracts.enums import FactKind
from esper.contracts.enums import Outcome
from esper.contracts.enums import Verdict
from esper.contracts.messages import CullSeed
from esper.contracts.messages import Envelope
from esper.contracts.messages import Pause
from esper.contracts.messages import Resume
from esper.contracts.messages import Stop
from esper.contracts.messages import TrainerLost
from esper.contracts.messages import Veto
from esper.contracts.operational import Fact
from esper.contracts.orders import EpochRequest
from esper.contracts.orders import KnownRun
from esper.contracts.orders import Lease
from esper.contracts.orders import LoadedRun
from esper.contracts.orders import LoadRequest
from esper.contracts.orders import RecordRun
from esper.contracts.orders import RunRecord
from esper.contracts.orders import TrainingRequest
from esper.runtime.temporal import queues
from esper.workflows.training_run import TrainingRun

Run = WorkflowHandle[TrainingRun, RunRecord]


def lost() -> ApplicationError:
    return ApplicationError("lost", type="LeaseLost", non_retryable=True)


def cold() -> ApplicationError:
    return ApplicationError("not now")


@dataclass
class CrashingKernel(FakeWorld):
    """Its first graft ends the trainer at its first step, twice; the third trainer finds it quarantined."""

    crashes: int = 0

    def _facts_at(self, step: int) -> tuple[Fact, ...]:
        if self.crashes < 2 and any(fact.apply_step == step for fact in self.grafts.values()):
            self.crashes += 1
            raise lost()
        return super()._facts_at(step)

    @activity.defn(name=names.LOAD_RUN.name)
    async def load_run(self, request: LoadRequest) -> LoadedRun:
        if self.crashes == 2 and self.grafts:
            subject, graft = self.grafts.popitem()
            self.abandoned[subject] = "quarantined"
            changes = {"kind": FactKind.QUARANTINE, "seq": 2, "judge_step": None, "reason": "two crashes"}
            self.facts.append(graft.model_copy(update=changes))
        return await super().load_run(request)


@dataclass
class RememberingWorld(FakeWorld):
    """Its Urza knows what the run did in an earlier execution."""

    @activity.defn(name=names.RECORD_RUN.name)
    async def record_run(self, request: RecordRun) -> KnownRun:
        known = await super().record_run(request)
        if self.epoch == 0:
            return known
        adaptations = {adaptation.adaptation_id: adaptation for adaptation in self.adaptations}
        lease = Lease(run_id=request.run_id, task_queue=PINNED, lease_gen=self.lease_gen)
        return known.model_copy(
            update={
                "adaptations": tuple(adaptations.values()),
                "report": self._report(EpochRequest(lease=lease, epoch=self.epoch), ()),
                "decided_epoch": max(decision.epoch for decision in self.decisions),
                "decisions": len(self.decisions),
            }
        )


async def grow_and_keep(on: Stage) -> Run:
    handle = await on.start(configuration(6))
    await handle.result()
    return handle


async def long_run(on: Stage) -> Run:
    handle = await on.start(configuration(5), continue_after_epochs=2)
    await handle.result()
    return handle


async def wait_only(on: Stage) -> Run:
    handle = await on.start(configuration(4))
    await handle.result()
    return handle


async def lose_pause_and_stop(on: Stage) -> Run:
    handle = await on.start(configuration(50))
    await on.until(lambda: on.world.epoch >= 2)
    await _pause_and_resume(on, handle)
    await on.until(lambda: on.world.epoch >= 4)
    await on.tell(handle, "stop", Stop())
    await handle.result()
    return handle


async def pause_and_veto(on: Stage) -> Run:
    """The forge takes its time, so that the veto comes before the kernel."""
    handle = await on.start(configuration(5, delivery={"lag_epochs": 2}))
    await on.until(lambda: bool(on.world.adaptations))
    await on.tell(handle, "veto", Veto(adaptation_id=f"{handle.id}/a1"))
    await _pause_and_resume(on, handle)
    await handle.result()
    return handle


async def cull_by_hand(on: Stage) -> Run:
    handle = await on.start(configuration(6))
    await on.until(lambda: any(adaptation.state.value == "training" for adaptation in on.world.adaptations))
    await on.tell(handle, "cull_seed", CullSeed(site="layers.0"))
    await handle.result()
    return handle


async def kill_and_resume(on: Stage) -> Run:
    """A trainer that is known to be dead, a run that is stopped, and a second execution that goes on with it."""
    handle = await on.start(configuration(8))
    await on.until(lambda: on.world.epoch >= 2)
    payload = TrainerLost(task_queue=PINNED, reason="killed")
    message = Envelope(event_id="1", trace_id=handle.id, causation_id="1", sender="test", payload=payload)
    await handle.signal("trainer_lost", message)
    await on.until(lambda: on.world.lease_gen == 2 and on.world.epoch >= 4)
    await on.tell(handle, "stop", Stop())
    await handle.result()
    request = TrainingRequest(run_id=handle.id, config=configuration(8))
    again = await on.client.start_workflow(
        TrainingRun.run,
        request,
        id=handle.id,
        task_queue=queues.ORCHESTRATION,
        id_reuse_policy=WorkflowIDReusePolicy.ALLOW_DUPLICATE,
    )
    await again.result()
    return handle


async def strategist_ended(on: Stage) -> Run:
    """A person ends a decision: it is recorded as one to wait."""
    assert isinstance(on.world, FaultyWorld)
    waiting = on.world.before["score_sites"]
    handle = await on.start(configuration(3))
    await on.until(lambda: len(waiting) < 4)
    await on.client.get_workflow_handle(f"{handle.id}/tamiyo/1").terminate()
    await handle.result()
    return handle


async def strange_messages(on: Stage) -> Run:
    handle = await on.start(configuration(4))
    for name in ("kernel_ready", "nobody_knows_this"):
        await handle.signal(name, args=[{"version": 2}])
        await asyncio.sleep(0.05)
    await handle.signal("trainer_lost", args=["one", "too many"])
    await handle.result()
    return handle


async def reset_by_hand(on: Stage) -> Run:
    handle = await on.start(configuration(6))
    await on.until(lambda: on.world.epoch >= 4)
    run_id = await reset(on.client, handle.id, 1)
    await on.client.get_workflow_handle(handle.id, run_id=run_id).result()
    return handle


async def _pause_and_resume(on: Stage, handle: Run) -> None:
    await on.tell(handle, "pause", Pause())
    await on.until(lambda: Outcome.PAUSED in on.world.outcomes)
    await on.tell(handle, "resume", Resume())


Scene = tuple[Callable[[Stage], Awaitable[Run]], Callable[[], FakeWorld]]

SCENES: dict[str, Scene] = {
    "grow_and_keep": (grow_and_keep, lambda: FakeWorld(grow_at=1, epoch_seconds=0.05)),
    "grow_and_cull": (grow_and_keep, lambda: FakeWorld(grow_at=1, epoch_seconds=0.05, verdict=Verdict.CULL)),
    "cull_by_hand": (cull_by_hand, lambda: FakeWorld(grow_at=1, epoch_seconds=0.2)),
    "wait_only": (wait_only, FakeWorld),
    "long_run": (long_run, lambda: FakeWorld(grow_at=1)),
    "lose_pause_and_stop": (
        lose_pause_and_stop,
        lambda: FaultyWorld(epoch_seconds=0.2, before={"train_epoch": [lost()]}),
    ),
    "kill_and_resume": (kill_and_resume, lambda: RememberingWorld(grow_at=1, epoch_seconds=0.2)),
    "quarantine": (grow_and_keep, lambda: CrashingKernel(grow_at=1, epoch_seconds=0.05)),
    "pause_and_veto": (
        pause_and_veto,
        lambda: FaultyWorld(grow_at=1, epoch_seconds=0.2, before={"build_kernel": [cold() for _ in range(3)]}),
    ),
    "forge_down": (grow_and_keep, lambda: FakeWorld(grow_at=1, forge_fails=True)),
    "strategist_down": (wait_only, lambda: FakeWorld(grow_at=1, score_fails=True)),
    "strategist_ended": (strategist_ended, lambda: FaultyWorld(before={"score_sites": [cold() for _ in range(4)]})),
    "reset": (reset_by_hand, lambda: LedgerWorld(grow_at=1, epoch_seconds=0.1)),
    "strange_messages": (strange_messages, lambda: FakeWorld(grow_at=1, epoch_seconds=0.1)),
}
"""By the name that their files begin with."""
