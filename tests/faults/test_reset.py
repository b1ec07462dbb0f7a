"""`workflow reset`: the run goes on from the head and its records, not from what the older history believed (C8)."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from fake_activities import PINNED
from ledger_world import LedgerWorld
from local_stack import LocalStack
from resetting import reset
from temporalio.client import Client
from temporalio.client import WorkflowFailureError
from temporalio.exceptions import ApplicationError
from workflow_stage import WORKFLOWS
from workflow_stage import configuration
from workflow_stage import stage

from esper.contracts.enums import AdaptationState
from esper.contracts.enums import Outcome
from esper.contracts.orders import RunRecord
from esper.runtime.temporal.chronicle import chronicle
from esper.runtime.temporal.executions import executions
from esper.runtime.temporal.plugin import EsperPlugin
from esper.runtime.temporal.replay import replay_history
from esper.workflows.training_run import TrainingRun

pytestmark = pytest.mark.temporal


@pytest.mark.fault("C8", "I1", "I2", "I8")
@pytest.mark.parametrize("changed", [False, True], ids=["the same policy", "another policy"])
def test_a_reset_run_takes_what_is_recorded_and_goes_on_from_the_head(temporal_address: str, changed: bool) -> None:
    world = LedgerWorld(grow_at=1, epoch_seconds=0.1)

    async def scene() -> tuple[RunRecord, list[str], list[Any]]:
        async with stage(temporal_address, world) as on:
            handle = await on.start(configuration(10))
            await on.until(lambda: world.epoch >= 6)
            if changed:
                # The strategist of today would not have grown.
                world.grow_at = None
            run_id = await reset(on.client, handle.id, 1)
            again = on.client.get_workflow_handle_for(TrainingRun.run, handle.id, run_id=run_id)
            record = await again.result()
            found = await executions(on.client, handle.id)
            assert [temporal_run for temporal_run, _ in found][-1] == run_id and len(found) == 2
            histories = [history.to_json_dict() for _, history in found]
            for history in histories:
                assert (await replay_history(history, WORKFLOWS)).clean
            return record, [happening.text for happening in chronicle(histories)], histories

    record, told, _ = asyncio.run(scene())
    assert record.outcome is Outcome.COMPLETED
    assert [epoch for what, epoch in world.journal if what == "epoch"] == list(range(1, 11))
    assert [(fact.kind.value, fact.apply_step) for fact in world.facts] == [("graft", 20), ("fossilize", 40)]
    final = {adaptation.adaptation_id: adaptation.state for adaptation in world.adaptations}
    assert list(final.values()) == [AdaptationState.FOSSILIZED]
    assert (world.divergences > 0) == changed
    assert any(text.startswith("was reset to here from execution") for text in told)


@pytest.mark.fault("C8", "I1", "I9")
def test_a_reset_run_whose_trainer_is_gone_claims_a_new_lease(
    temporal_address: str,
) -> None:
    world = LedgerWorld(grow_at=1, epoch_seconds=0.1)

    async def scene() -> RunRecord:
        async with stage(temporal_address, world) as on:
            handle = await on.start(configuration(8))
            await handle.result()
            # The process that the older history knows has ended, and nobody serves its queue.
            world.queue = f"{PINNED}-2"
            await on.serve(world.queue)
            await on.close(PINNED)
            run_id = await reset(on.client, handle.id, 1)
            again = on.client.get_workflow_handle_for(TrainingRun.run, handle.id, run_id=run_id)
            return await again.result()

    record = asyncio.run(scene())
    assert record.outcome is Outcome.COMPLETED
    assert [gen for what, gen in world.journal if what == "claim"] == [1, 2]
    assert [epoch for what, epoch in world.journal if what == "epoch"] == list(range(1, 9))
    assert [(fact.kind.value, fact.apply_step) for fact in world.facts] == [("graft", 20), ("fossilize", 40)]


# --- on the real stack ----------------------------------------------------------------------------------------------


def reset_on(stack: LocalStack, run_id: str, epoch: int) -> Client:
    address = stack.stack()["temporal"]["address"]

    async def scene() -> Client:
        client = await Client.connect(address, plugins=[EsperPlugin()])
        await reset(client, run_id, epoch)
        return client

    return asyncio.run(scene())


@pytest.mark.slow
@pytest.mark.system
@pytest.mark.timeout(1800)
@pytest.mark.fault("C8", "I1", "I2", "I11")
def test_a_run_reset_to_before_its_graft_ends_in_the_same_bits(stack: LocalStack, tmp_path: Path) -> None:
    undisturbed = stack.ok("start-run", "--quick-start", "digits", "--run-id", "whole", "--json", timeout=600).document
    stack.ok("start-run", "--quick-start", "digits", "--run-id", "back", "--detach", timeout=300)
    grafted = max(adaptation["epoch"] for adaptation in undisturbed["adaptations"])
    far = stack.until("back", lambda it: it["epochs"] >= grafted + 12 or it["outcome"] != "running", seconds=300)
    assert far["outcome"] == "running"
    reset_on(stack, "back", 3)
    document = stack.until("back", lambda it: it["outcome"] not in ("running", "paused"), seconds=400)
    assert document["outcome"] == "completed", document
    assert document["digest"] == undisturbed["digest"]
    assert document["divergences"] == 0, stack.ok("history", "back").out
    told = [event["text"] for event in stack.ok("history", "back", "--json").document["workflow"]["events"]]
    assert any(text.startswith("was reset to here") for text in told)
    assert stack.ok("reproduce", "back", "--json", timeout=600).document["clean"]

    # What has completed stays so: a reset of it is refused by the records.
    async def refused() -> str:
        client = await Client.connect(stack.stack()["temporal"]["address"], plugins=[EsperPlugin()])
        await reset(client, "whole", 3)
        with pytest.raises(WorkflowFailureError) as failed:
            await client.get_workflow_handle("whole").result()
        assert isinstance(failed.value.cause, ApplicationError)
        return str(failed.value.cause.details[0]["code"])

    assert asyncio.run(refused()) == "ESP-504"
    after = stack.shown("whole")
    assert (after["outcome"], after["digest"]) == ("completed", undisturbed["digest"])
