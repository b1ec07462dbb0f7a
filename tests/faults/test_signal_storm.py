"""Messages that nobody can read, and far too many of those that can be: the run goes on, and says what it put aside."""

import asyncio
import json
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
from execution_chain import MOST_BYTES
from execution_chain import chain
from execution_chain import size_bytes
from fake_activities import PINNED
from fake_activities import FakeWorld
from temporalio.api.common.v1 import Payload
from temporalio.client import WorkflowHandle
from temporalio.common import RawValue
from temporalio.service import RPCError
from workflow_stage import Stage
from workflow_stage import configuration
from workflow_stage import stage

from esper.contracts.enums import Outcome
from esper.contracts.messages import Envelope
from esper.contracts.messages import TrainerLost
from esper.contracts.orders import RunRecord
from esper.contracts.orders import RunStatus
from esper.workflows.training_run import TrainingRun

pytestmark = pytest.mark.temporal

MOST_EVENTS_IN_A_STORM = 5_000
SENDERS = 20


def lost(run_id: str, queue: str) -> Envelope[TrainerLost]:
    payload = TrainerLost(task_queue=queue, reason="test")
    return Envelope(event_id="1", trace_id=run_id, causation_id="1", sender="test", payload=payload)


def future(run_id: str) -> dict[str, Any]:
    """A message as a later release would send it."""
    document: dict[str, Any] = json.loads(lost(run_id, PINNED).model_dump_json())
    return document | {"version": 2}


@pytest.mark.fault("F4", "I10")
@pytest.mark.parametrize("cached", [1000, 0])
def test_what_cannot_be_read_is_put_aside_counted_and_shown(temporal_address: str, cached: int) -> None:
    world = FakeWorld(epoch_seconds=0.2)

    async def whole() -> tuple[RunRecord, RunStatus, int, str]:
        async with stage(temporal_address, world, cached=cached) as on:
            handle = await on.start(configuration(4, tamiyo={"policy": "none"}))
            await on.until(lambda: world.epoch >= 1)
            sent = 0
            for name in ("kernel_ready", "kernel_failed", "trainer_lost"):
                letters: list[list[Any]] = [[], [None], [7], [["kernel"]], [{"payload": {}}], [future(handle.id)]]
                letters += [[lost(handle.id, PINNED), "and more"], [1, 2, 3]]
                for letter in letters:
                    await handle.signal(name, args=letter)
                    sent += 1
            for name in ("nobody_knows_this", "kernel.ready", "x" * 200):
                await handle.signal(name, args=[future(handle.id)])
                sent += 1
            await handle.signal("nobody_knows_this", args=[RawValue(Payload(data=b"\xff\x00"))])
            with pytest.raises(RPCError) as refused:
                await handle.signal("kernel_ready", "x" * (3 * 2**20))
            record = await handle.result()
            return record, await handle.query(TrainingRun.status), sent + 1, str(refused.value)

    record, status, sent, refused = asyncio.run(whole())
    assert (record.outcome, record.restarts) == (Outcome.COMPLETED, 0)
    assert [epoch for what, epoch in world.journal if what == "epoch"] == [1, 2, 3, 4]
    assert status.messages.dead_letters == sent
    assert status.messages.recent[-1] == "nobody_knows_this: no such signal"
    assert any(f"{sent} message(s) could not be read" in warning for warning in world.warnings)
    assert "size" in refused or "larger" in refused


@dataclass(frozen=True)
class Storm:
    """What became of a run under a storm of signals."""

    record: RunRecord
    status: RunStatus
    accepted: int
    refused: Counter[str]
    events: list[int]
    sizes: list[int]
    seconds_after: float


def storm(address: str, world: FakeWorld, *, signals: int, rate: float, epochs: int, parts: int) -> Storm:
    async def whole() -> Storm:
        async with stage(address, world) as on:
            config = configuration(epochs, tamiyo={"policy": "none"})
            handle = await on.start(config, limit=timedelta(minutes=15), continue_after_epochs=parts)
            await on.until(lambda: world.epoch >= 1)
            accepted, refused = await send(on, handle, signals, rate)
            loop = asyncio.get_running_loop()
            ended = loop.time()
            record = await handle.result()
            after = loop.time() - ended
            status = await on.client.get_workflow_handle_for(TrainingRun.run, handle.id).query(TrainingRun.status)
            histories = await chain(on.client, handle.id)
        return Storm(
            record,
            status,
            accepted,
            refused,
            [len(history.events) for history in histories],
            [size_bytes(history) for history in histories],
            after,
        )

    return asyncio.run(whole())


async def send(
    on: Stage, handle: WorkflowHandle[TrainingRun, RunRecord], signals: int, rate: float
) -> tuple[int, Counter[str]]:
    """Send that many from several senders at about `rate` a second; how many were accepted, and why others not."""
    refused: Counter[str] = Counter()
    left = iter(range(signals))
    accepted = 0
    other = lost(handle.id, "somebody@else")

    async def sender() -> None:
        nonlocal accepted
        for number in left:
            # By workflow id alone, so that it reaches whichever execution is open.
            target = on.client.get_workflow_handle(handle.id)
            try:
                await target.signal(*(("trainer_lost", other) if number % 2 else ("noise", number)))
                accepted += 1
            except RPCError as error:
                refused[error.status.name] += 1
            await asyncio.sleep(SENDERS / rate)

    await asyncio.gather(*(sender() for _ in range(SENDERS)))
    return accepted, refused


def check(world: FakeWorld, seen: Storm, epochs: int) -> None:
    assert (seen.record.outcome, seen.record.restarts) == (Outcome.COMPLETED, 0)
    assert [epoch for what, epoch in world.journal if what == "epoch"] == list(range(1, epochs + 1))
    assert max(seen.events) <= MOST_EVENTS_IN_A_STORM
    assert max(seen.sizes) <= MOST_BYTES
    # A run that has ended takes no more; until then none is lost.
    assert set(seen.refused) <= {"NOT_FOUND"}
    assert seen.status.messages.dead_letters >= (seen.accepted - 1) // 2
    assert seen.seconds_after <= 60


@pytest.mark.fault("F4", "I10")
def test_a_burst_of_signals_holds_up_neither_epochs_nor_continue_as_new(temporal_address: str) -> None:
    world = FakeWorld(epoch_seconds=0.15)
    seen = storm(temporal_address, world, signals=400, rate=200, epochs=16, parts=3)
    check(world, seen, 16)
    # One during or right after the burst, which may put it off, and those of the epochs after it.
    assert len(seen.events) >= 3


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.fault("F4", "I10")
def test_a_minute_of_a_hundred_signals_a_second_is_survived(temporal_address: str) -> None:
    world = FakeWorld(epoch_seconds=0.5)
    seen = storm(temporal_address, world, signals=6_000, rate=100, epochs=100, parts=10)
    check(world, seen, 100)
    assert seen.accepted + sum(seen.refused.values()) == 6_000
