"""A claimed trainer whose run is over, or is another process's now, becomes free; one that works does not."""

import asyncio
import uuid
from collections.abc import Callable

import pytest
from temporalio import workflow
from temporalio.client import Client
from temporalio.worker import UnsandboxedWorkflowRunner
from temporalio.worker import Worker

from esper import worker
from esper.contracts.orders import Lease
from esper.errors import DatabaseUnavailable

pytestmark = pytest.mark.temporal


class Claimed:
    doubted: asyncio.Event

    def __init__(self, *, idle: bool, holds: Callable[[int], bool]) -> None:
        self.idle = idle
        self.lease: Lease | None = Lease(run_id=f"gone-{uuid.uuid4().hex[:8]}", task_queue="q1", lease_gen=1)
        self.claimed_by: str | None = None
        self.looks = 0
        self._holds = holds

    async def holds_lease(self) -> bool:
        self.looks += 1
        return self._holds(self.looks)


def away_once(look: int) -> bool:
    if look == 1:
        raise DatabaseUnavailable("ESP-333", "locked")
    return True


@pytest.mark.fault("C8")
@pytest.mark.parametrize(
    ("trainer", "freed"),
    [
        (Claimed(idle=True, holds=lambda look: True), True),
        (Claimed(idle=True, holds=away_once), True),
        (Claimed(idle=False, holds=lambda look: True), False),
        (Claimed(idle=False, holds=lambda look: False), True),
        (Claimed(idle=False, holds=lambda look: look % 2 == 0), False),
    ],
    ids=["run gone", "database away for a moment", "at work", "fenced while stuck", "fenced for one look only"],
)
def test_a_trainer_that_nobody_needs_becomes_free(
    temporal_address: str, monkeypatch: pytest.MonkeyPatch, trainer: Claimed, freed: bool
) -> None:
    monkeypatch.setattr(worker, "ORPHAN_CHECK_S", 0.005)
    monkeypatch.setattr(worker, "SECOND_LOOK_S", 0.005)

    async def scene() -> bool:
        client = await Client.connect(temporal_address)
        trainer.doubted, orphaned = asyncio.Event(), asyncio.Event()
        watching = asyncio.create_task(worker._watch(client, trainer, orphaned))
        async with asyncio.timeout(20):
            while not watching.done() and trainer.looks < 6:
                await asyncio.sleep(0.005)
        watching.cancel()
        return orphaned.is_set()

    assert asyncio.run(scene()) is freed


@workflow.defn(name="AnotherLife")
class AnotherLife:
    @workflow.run
    async def run(self, more: int) -> None:
        if more:
            workflow.continue_as_new(more - 1)
        await workflow.wait_condition(lambda: False)


@pytest.mark.fault("C8")
def test_another_life_of_a_run_is_not_the_one_that_claimed_a_trainer(temporal_address: str) -> None:
    async def scene() -> list[bool]:
        client = await Client.connect(temporal_address)
        run_id = queue = f"lives-{uuid.uuid4().hex[:8]}"
        async with Worker(
            client, task_queue=queue, workflows=[AnotherLife], workflow_runner=UnsandboxedWorkflowRunner()
        ):
            first = await client.start_workflow("AnotherLife", 1, id=run_id, task_queue=queue)
            async with asyncio.timeout(20):
                while (await first.describe()).run_id == first.first_execution_run_id:
                    await asyncio.sleep(0.05)
            continued = await worker._is_over(client, run_id, first.first_execution_run_id)
            await client.get_workflow_handle(run_id).terminate()
            ended = await worker._is_over(client, run_id, first.first_execution_run_id)
            again = await client.start_workflow("AnotherLife", 0, id=run_id, task_queue=queue)
            another = await worker._is_over(client, run_id, first.first_execution_run_id)
            own = await worker._is_over(client, run_id, again.first_execution_run_id)
            await again.terminate()
        return [continued, ended, another, own]

    assert asyncio.run(scene()) == [False, True, True, False]
