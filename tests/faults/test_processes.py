"""Trainer processes that are told to end, stopped, stuck, or no longer needed: rows A4, A5, A12 and A13, on real
processes and a real server."""

import asyncio
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trainer_stage import EPOCHS
from trainer_stage import STEPS_PER_EPOCH
from trainer_stage import TrainerStage
from trainer_stage import assert_whole
from trainer_stage import digest as digest
from trainer_stage import trainer_stage

from esper.contracts.orders import RunRecord

pytestmark = [pytest.mark.temporal, pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(400)]

Scene = Callable[[TrainerStage], Any]


@pytest.fixture
def play(temporal_address: str, tmp_path: Path) -> Callable[..., Any]:
    def playing(scene: Scene, *, trainers: int = 2) -> Any:
        async def whole() -> Any:
            async with trainer_stage(tmp_path, temporal_address, trainers=trainers) as stage:
                return await scene(stage)

        return asyncio.run(whole())

    return playing


@pytest.mark.fault("A4", "I1", "I9", "I11")
def test_a_stopped_trainer_that_wakes_after_its_successor_came_commits_nothing_and_ends(
    play: Callable[..., Any], digest: str
) -> None:
    async def scene(on: TrainerStage) -> tuple[RunRecord, list[int], float, int, list[str]]:
        handle = await on.start(EPOCHS, pace=0.3)
        zombie = await on.claimed()
        await on.trained(handle.id, 1)
        os.kill(zombie, signal.SIGSTOP)
        old = await on.library.lease(handle.id)
        assert old is not None
        await on.claimed(other_than=zombie)
        before = await on.heads_of(handle.id, old.lease_gen)
        os.kill(zombie, signal.SIGCONT)
        awake = time.monotonic()
        code = await on.ended(zombie)
        took = time.monotonic() - awake
        on.obey("pace", "0")
        record = await asyncio.wait_for(handle.result(), 120)
        late = [step for step in await on.heads_of(handle.id, old.lease_gen) if step not in before]
        return record, late, took, code, on.said(zombie)

    record, late, took, code, said = play(scene)
    assert_whole(record, digest)
    assert late == []
    assert any("LeaseLost" in line for line in said), said
    assert code == 0
    assert took < 60
    print(f"the zombie ended {took:.1f} s after SIGCONT; restarts {record.restarts}")


@pytest.mark.fault("A5", "I11")
@pytest.mark.parametrize("hang", ["gil", "loop", "deadlock"])
def test_a_stuck_step_is_found_and_its_process_ends_itself(play: Callable[..., Any], digest: str, hang: str) -> None:
    async def scene(on: TrainerStage) -> tuple[RunRecord, int, float, float, str]:
        handle = await on.start(EPOCHS, pace=0.1)
        stuck = await on.claimed()
        await on.trained(handle.id, 1)
        on.obey("hang", hang)
        await on.until(lambda: (on.home / "hung").exists(), "the hang")
        began = time.monotonic()
        await on.claimed(other_than=stuck)
        taken = time.monotonic() - began
        code = await on.ended(stuck)
        gone = time.monotonic() - began
        return await asyncio.wait_for(handle.result(), 120), code, taken, gone, on.output.read_text()

    record, code, taken, gone, output = play(scene)
    assert_whole(record, digest)
    assert code == 1
    assert "Timeout (0:00:" in output and "in obey" in output, output
    assert taken < 60
    print(f"{hang}: claimed elsewhere after {taken:.1f} s, ended after {gone:.1f} s; restarts {record.restarts}")


@pytest.mark.fault("A5")
def test_a_long_step_that_its_run_allows_costs_no_trainer(play: Callable[..., Any], digest: str) -> None:
    async def scene(on: TrainerStage) -> RunRecord:
        handle = await on.start(EPOCHS, pace=0.1, step_timeout_s=60.0)
        await on.claimed()
        await on.trained(handle.id, 1)
        on.obey("pace", "14")
        await asyncio.sleep(2)
        on.obey("pace", "0")
        return await asyncio.wait_for(handle.result(), 120)

    record = play(scene)
    assert_whole(record, digest)
    assert record.restarts == 0


@pytest.mark.fault("A12", "I1", "I5", "I11")
def test_one_signal_loses_no_step_and_a_second_one_ends_at_once(play: Callable[..., Any], digest: str) -> None:
    async def scene(on: TrainerStage) -> tuple[RunRecord, list[int], float, float]:
        handle = await on.start(EPOCHS, pace=0.3)
        first = await on.claimed()
        await on.trained(handle.id, 1)
        await asyncio.sleep(1)
        began = time.monotonic()
        os.kill(first, signal.SIGTERM)
        assert await on.ended(first) == 0, on.words()
        drained = time.monotonic() - began
        heads = [each.head.step for each in await on.library.heads(handle.id)]
        second = await on.claimed(other_than=first)
        await on.until(lambda: any("loaded" in line for line in on.said(second)), "a loaded run")
        assert f"step {heads[-1]}" in next(line for line in on.said(second) if "loaded" in line)
        # A step so long that the first signal alone would have to wait for its end.
        on.obey("pace", "8")
        await asyncio.sleep(1)
        os.kill(second, signal.SIGTERM)
        await asyncio.sleep(0.5)
        began = time.monotonic()
        os.kill(second, signal.SIGINT)
        assert await on.ended(second) == 130, on.words()
        hurried = time.monotonic() - began
        on.obey("pace", "0")
        return await asyncio.wait_for(handle.result(), 120), heads, drained, hurried

    record, heads, drained, hurried = play(scene, trainers=3)
    assert_whole(record, digest)
    assert heads == sorted(set(heads))
    assert heads[-1] % STEPS_PER_EPOCH, f"the signal came in the middle of an epoch: {heads}"
    assert drained < 25 and hurried < 10
    print(f"drained in {drained:.1f} s, the second signal took {hurried:.1f} s")


@pytest.mark.fault("A13", "I1", "I11")
def test_a_signal_while_nothing_can_be_stored_ends_in_time_and_says_so(play: Callable[..., Any], digest: str) -> None:
    async def scene(on: TrainerStage) -> tuple[RunRecord, int, float, list[int], list[int]]:
        handle = await on.start(EPOCHS, pace=0.3)
        first = await on.claimed()
        await on.trained(handle.id, 1)
        stored = on.home / "objects" / "sha256"
        stored.rename(on.home / "stored")
        stored.write_text("no folder")
        heads = [each.head.step for each in await on.library.heads(handle.id)]
        await asyncio.sleep(1)
        began = time.monotonic()
        os.kill(first, signal.SIGTERM)
        code = await on.ended(first)
        took = time.monotonic() - began
        after = [each.head.step for each in await on.library.heads(handle.id)]
        stored.unlink()
        (on.home / "stored").rename(stored)
        on.obey("pace", "0")
        record = await asyncio.wait_for(handle.result(), 120)
        assert "could not be committed" in on.output.read_text()
        return record, code, took, heads, after

    record, code, took, heads, after = play(scene)
    assert_whole(record, digest)
    assert code == 1
    assert after == heads, "the head before the signal stands"
    assert took < 30
    print(f"ended in {took:.1f} s")


@pytest.mark.fault("I9", "I11")
def test_a_terminated_run_frees_its_only_trainer_though_its_id_lives_again(
    play: Callable[..., Any], digest: str
) -> None:
    async def scene(on: TrainerStage) -> tuple[RunRecord, int, float]:
        handle = await on.start(EPOCHS, pace=0.3)
        only = await on.claimed()
        await on.trained(handle.id, 1)
        began = time.monotonic()
        await handle.terminate("by hand")
        again = await on.start(EPOCHS, run_id=handle.id)
        code = await on.ended(only)
        took = time.monotonic() - began
        # As its supervisor does.
        on.spawn()
        return await asyncio.wait_for(again.result(), 180), code, took

    record, code, took = play(scene, trainers=1)
    assert_whole(record, digest)
    assert code == 0
    assert took < 60
    print(f"free after {took:.1f} s")


SKEWED = """
import time
from pathlib import Path

_true = time.time


def skewed():
    return _true() + (-7200.0 if Path({jump!r}).exists() else 7200.0)


time.time = skewed
time.time_ns = lambda: int(skewed() * 1e9)
"""


@pytest.mark.fault("C9", "I11")
def test_a_clock_that_is_hours_wrong_and_jumps_back_changes_no_bit(
    play: Callable[..., Any], digest: str, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(SKEWED.format(jump=str(tmp_path / "jump")))

    async def scene(on: TrainerStage) -> RunRecord:
        on.spawn(PYTHONPATH=str(tmp_path))
        await on.warm(1)
        handle = await on.start(EPOCHS, pace=0.1)
        await on.claimed()
        await on.trained(handle.id, 2)
        (tmp_path / "jump").touch()
        return await asyncio.wait_for(handle.result(), 120)

    record = play(scene, trainers=0)
    assert_whole(record, digest)
    assert record.restarts == 0
