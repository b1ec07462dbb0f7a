"""The trainer's activities around a real session: leases, draining, letting go."""

import asyncio
import os
import sys
import threading
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from activity_bench import Bench
from temporalio.exceptions import ApplicationError
from temporalio.exceptions import CancelledError
from temporalio.testing import ActivityEnvironment

from esper.activities import patience
from esper.activities import trainer as trainer_module
from esper.activities.trainer import TrainerActivities
from esper.contracts.enums import EpochStatus
from esper.contracts.enums import Outcome
from esper.contracts.operational import ScheduledAdaptation
from esper.contracts.orders import AbandonRequest
from esper.contracts.orders import CheckpointRequest
from esper.contracts.orders import ClaimRequest
from esper.contracts.orders import CodeLocation
from esper.contracts.orders import EpochRequest
from esper.contracts.orders import JudgeRequest
from esper.contracts.orders import Lease
from esper.contracts.orders import LoadRequest
from esper.contracts.orders import RecordRun
from esper.contracts.orders import ReleaseRequest
from esper.contracts.orders import RemoveRequest
from esper.errors import LeaseLost
from esper.errors import ObjectsUnavailable
from esper.errors import TargetError
from esper.runtime.tolaria.live import turns
from esper.runtime.watchdog import Watchdog

Play = Callable[..., Any]


@pytest.fixture(autouse=True)
def same_place(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A trainer moves to where the run was started; the tests come back. And every step of a tiny epoch beats."""
    monkeypatch.setattr(turns, "BEAT_SECONDS", 1e-6)
    directory, path = Path.cwd(), list(sys.path)
    yield
    os.chdir(directory)
    sys.path[:] = path
    sys.modules.pop("tiny_task", None)


async def claimed(bench: Bench, queue: str = "q1", run_id: str = "r1") -> tuple[TrainerActivities, Lease]:
    await bench.library.record_run(RecordRun(run_id=run_id, config=bench.config()), "2030-01-01T00:00:00+00:00")
    trainer = TrainerActivities(queue, bench.connections, asyncio.get_running_loop())
    return trainer, await bench.run(trainer.claim_trainer, ClaimRequest(run_id=run_id, urza=bench.urza))


def load_request(bench: Bench, lease: Lease) -> LoadRequest:
    return LoadRequest(lease=lease, config=bench.config(), code=CodeLocation(directory=str(bench.folder)))


async def loaded(bench: Bench) -> tuple[TrainerActivities, Lease]:
    trainer, lease = await claimed(bench)
    await bench.run(trainer.load_run, load_request(bench, lease))
    return trainer, lease


def test_a_run_is_claimed_loaded_trained_and_released(play: Play) -> None:
    async def scene(bench: Bench) -> None:
        trainer, lease = await claimed(bench)
        assert (lease.task_queue, trainer.claimed.is_set(), trainer.idle) == ("q1", True, True)
        assert await trainer.holds_lease()
        described = await bench.run(trainer.load_run, load_request(bench, lease))
        assert (described.epoch, described.steps_per_epoch) == (0, 4)
        heard: list[Any] = []
        environment = ActivityEnvironment()
        environment.on_heartbeat = heard.append
        result = await bench.run(trainer.train_epoch, EpochRequest(lease=lease, epoch=1), environment=environment)
        assert (result.status, result.step) == (EpochStatus.COMPLETED, 4)
        assert heard[0].phase
        head = await bench.run(trainer.checkpoint, CheckpointRequest(lease=lease, hold=False))
        assert head.step == 4
        finished = await bench.run(
            trainer.release_trainer, ReleaseRequest(lease=lease, finish=True, outcome=Outcome.COMPLETED)
        )
        assert finished.digest is not None
        await asyncio.wait_for(trainer.released.wait(), 5)
        await trainer.give_up()
        assert await bench.library.lease("r1") is None
        assert not await trainer.holds_lease()

    play(scene)


def test_a_trainer_serves_one_run(play: Play) -> None:
    async def scene(bench: Bench) -> None:
        trainer, _ = await claimed(bench)
        with pytest.raises(ApplicationError) as refused:
            await bench.run(trainer.claim_trainer, ClaimRequest(run_id="other", urza=bench.urza))
        assert refused.value.type == "TrainerBusy"
        assert not refused.value.non_retryable

    play(scene)


def test_a_trainer_that_shuts_down_is_not_claimed(play: Play) -> None:
    async def scene(bench: Bench) -> None:
        trainer = TrainerActivities("q1", bench.connections, asyncio.get_running_loop())
        environment = ActivityEnvironment()
        environment.worker_shutdown()
        request = ClaimRequest(run_id="r1", urza=bench.urza)
        with pytest.raises(ApplicationError, match="shuts down"):
            await bench.run(trainer.claim_trainer, request, environment=environment)
        assert not trainer.claimed.is_set()
        await trainer.give_up()

    play(scene)


def test_orders_under_another_lease_are_refused(play: Play) -> None:
    async def scene(bench: Bench) -> None:
        trainer, lease = await loaded(bench)
        adaptation = ScheduledAdaptation(
            adaptation_id="r1/a1",
            number=1,
            site="0",
            seed=0,
            seed_generation=0,
            blueprint="bottleneck",
            hyperparameters={},
            decided_epoch=1,
            apply_step=4,
        )
        stale = (lease.model_copy(update={"lease_gen": 99}), lease.model_copy(update={"run_id": "other"}))
        for wrong in stale:
            for activity, request in (
                (trainer.train_epoch, EpochRequest(lease=wrong, epoch=1)),
                (trainer.abandon_kernel, AbandonRequest(lease=wrong, adaptation=adaptation, reason="x")),
                (trainer.judge_seed, JudgeRequest(lease=wrong, adaptation_id="r1/a1")),
                (trainer.remove_seed, RemoveRequest(lease=wrong, adaptation_id="r1/a1", site="0")),
                (trainer.release_trainer, ReleaseRequest(lease=wrong, finish=False, outcome=Outcome.FAILED)),
            ):
                with pytest.raises(LeaseLost, match="reached a trainer that holds"):
                    await bench.run(activity, request)
        assert not trainer.released.is_set()
        assert trainer.idle
        missed = await bench.run(
            trainer.abandon_kernel, AbandonRequest(lease=lease, adaptation=adaptation, reason="no forge")
        )
        assert (missed.accepted, missed.reason) == (False, "no forge")
        removed = await bench.run(trainer.remove_seed, RemoveRequest(lease=lease, adaptation_id="r1/a1", site="0"))
        assert not removed.accepted
        void = await bench.run(trainer.judge_seed, JudgeRequest(lease=lease, adaptation_id="r1/a1"))
        assert void.verdict.value == "void"

    play(scene)


@pytest.mark.fault("A4", "I9")
def test_a_zombie_is_fenced_at_its_next_commit(play: Play) -> None:
    async def scene(bench: Bench) -> None:
        zombie, old = await loaded(bench)
        _, new = await claimed(bench, "q2")
        assert new.lease_gen == old.lease_gen + 1
        assert not await zombie.holds_lease()
        with pytest.raises(LeaseLost):
            await bench.run(zombie.train_epoch, EpochRequest(lease=old, epoch=1))
        run = await bench.library.run("r1")
        assert run.steps == 0

    play(scene)


@pytest.mark.fault("A12")
def test_sigterm_commits_where_training_stood(play: Play) -> None:
    async def scene(bench: Bench) -> int:
        trainer, lease = await loaded(bench)
        environment = ActivityEnvironment()
        environment.on_heartbeat = lambda said: getattr(said, "step", 0) >= 2 and environment.worker_shutdown()
        with pytest.raises(ApplicationError) as drained:
            await bench.run(trainer.train_epoch, EpochRequest(lease=lease, epoch=1), environment=environment)
        assert drained.value.type == "WorkerDraining"
        return (await bench.library.run("r1")).steps

    assert 2 <= play(scene) < 4


def test_a_cancelled_epoch_goes_on_where_it_stood(play: Play) -> None:
    async def scene(bench: Bench) -> None:
        trainer, lease = await loaded(bench)
        environment = ActivityEnvironment()
        environment.on_heartbeat = lambda progress: progress.step >= 1 and environment.cancel()
        with pytest.raises(CancelledError):
            await bench.run(trainer.train_epoch, EpochRequest(lease=lease, epoch=1), environment=environment)
        result = await bench.run(trainer.train_epoch, EpochRequest(lease=lease, epoch=1))
        assert (result.status, result.step) == (EpochStatus.COMPLETED, 4)

    play(scene)


@pytest.mark.fault("A13")
def test_what_cannot_be_committed_at_the_end_is_known_and_the_head_before_it_stands(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "DRAINING_LIMIT_S", 0.0)

    async def scene(bench: Bench) -> tuple[TrainerActivities, int]:
        trainer, lease = await loaded(bench)
        assert trainer.uncommitted is None
        environment = ActivityEnvironment()
        stored = bench.folder / "objects" / "sha256"

        def end(said: Any) -> None:
            if getattr(said, "step", 0) >= 2 and stored.is_dir():
                stored.rename(bench.folder / "stored")
                stored.write_text("no folder")
                trainer._patience.limit_s = 0.0
                environment.worker_shutdown()

        environment.on_heartbeat = end
        with pytest.raises(ApplicationError) as drained:
            await bench.run(trainer.train_epoch, EpochRequest(lease=lease, epoch=1), environment=environment)
        assert drained.value.type == "WorkerDraining"
        stored.unlink()
        (bench.folder / "stored").rename(stored)
        return trainer, (await bench.library.run("r1")).steps

    trainer, steps = play(scene)
    assert isinstance(trainer.uncommitted, ObjectsUnavailable)
    assert steps == 0


@pytest.mark.fault("A5")
def test_a_stuck_trainer_is_not_claimed_again(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(bench: Bench) -> None:
        trainer, lease = await loaded(bench)
        monkeypatch.setattr(Watchdog, "silence", lambda watchdog: 11.0)
        with pytest.raises(ApplicationError, match="is stuck") as refused:
            await bench.run(trainer.claim_trainer, ClaimRequest(run_id="r1", urza=bench.urza))
        assert refused.value.type == "TrainerBusy"
        assert trainer.lease == lease and await trainer.holds_lease()

    play(scene)


def test_a_run_may_allow_its_steps_more_time(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(bench: Bench) -> None:
        trainer, lease = await claimed(bench)
        patient = bench.config(training={"batch_size": 16, "step_timeout_s": 60.0})
        await bench.run(
            trainer.load_run, LoadRequest(lease=lease, config=patient, code=load_request(bench, lease).code)
        )
        monkeypatch.setattr(Watchdog, "silence", lambda watchdog: 11.0)
        again = await bench.run(trainer.claim_trainer, ClaimRequest(run_id="r1", urza=bench.urza))
        assert again.lease_gen == lease.lease_gen + 1

    play(scene)


@pytest.mark.fault("A4", "I9")
def test_a_question_that_a_successor_has_answered_takes_nothing_from_it(play: Play) -> None:
    async def scene(bench: Bench) -> None:
        woken, _ = await loaded(bench)
        successor, new = await claimed(bench, "q2")
        with pytest.raises(ApplicationError, match="claimed since") as refused:
            await bench.run(woken.claim_trainer, ClaimRequest(run_id="r1", urza=bench.urza, preferred_queue="q1"))
        assert refused.value.type == "TrainerBusy"
        assert await bench.library.lease("r1") == new
        assert await successor.holds_lease()

    play(scene)


def test_failing_work_makes_a_trainer_doubt_that_it_is_needed(play: Play) -> None:
    async def scene(bench: Bench) -> None:
        trainer, lease = await loaded(bench)
        await bench.run(trainer.train_epoch, EpochRequest(lease=lease, epoch=1))
        assert not trainer.doubted.is_set()
        environment = ActivityEnvironment()
        environment.on_heartbeat = lambda said: environment.cancel()
        with pytest.raises(CancelledError):
            await bench.run(trainer.train_epoch, EpochRequest(lease=lease, epoch=2), environment=environment)
        await asyncio.wait_for(trainer.doubted.wait(), 5)
        assert trainer.idle

    play(scene)


@pytest.mark.fault("C1")
def test_a_reclaimed_trainer_lets_its_old_work_end_first(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(bench: Bench) -> None:
        trainer, old = await loaded(bench)
        started, go_on = threading.Event(), threading.Event()
        environment = ActivityEnvironment()

        def hear(progress: Any) -> None:
            started.set()
            assert go_on.wait(10)

        environment.on_heartbeat = hear
        training = asyncio.create_task(
            bench.run(trainer.train_epoch, EpochRequest(lease=old, epoch=1), environment=environment)
        )
        await asyncio.to_thread(started.wait, 10)
        new = await bench.run(trainer.claim_trainer, ClaimRequest(run_id="r1", urza=bench.urza, preferred_queue="q1"))
        monkeypatch.setattr(trainer_module, "OLD_WORK", 0.005)
        with pytest.raises(LeaseLost, match="does not end"):
            await bench.run(trainer.load_run, load_request(bench, new))
        monkeypatch.setattr(trainer_module, "OLD_WORK", 1)
        loading = asyncio.create_task(bench.run(trainer.load_run, load_request(bench, new)))
        await asyncio.sleep(0.05)
        assert not loading.done()
        go_on.set()
        with pytest.raises(LeaseLost, match="reached a trainer that holds"):
            await training
        assert (await loading).step == 0
        assert (await bench.run(trainer.train_epoch, EpochRequest(lease=new, epoch=1))).step == 4

    play(scene)


def test_a_run_that_cannot_be_loaded_is_let_go(play: Play) -> None:
    async def scene(bench: Bench) -> None:
        trainer, lease = await claimed(bench)
        broken = LoadRequest(lease=lease, config=bench.config(target="nowhere_at_all:tiny"))
        with pytest.raises(TargetError):
            await bench.run(trainer.load_run, broken)
        with pytest.raises(LeaseLost, match="not loaded"):
            await bench.run(trainer.train_epoch, EpochRequest(lease=lease, epoch=1))
        finished = await bench.run(
            trainer.release_trainer, ReleaseRequest(lease=lease, finish=False, outcome=Outcome.FAILED)
        )
        assert finished.head is None
        await asyncio.wait_for(trainer.released.wait(), 5)
        assert trainer.idle

    play(scene)
