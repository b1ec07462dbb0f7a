"""Makes the stored histories anew: `python tests/replay/make_histories.py ADDRESS`, ADDRESS of a Temporal dev server
that has Esper's search attributes. Only when a change of the workflows is meant to break with the runs under way.

The activities are fakes, so that a history holds what the workflows ordered and nothing of a machine.
"""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "support"))

from fake_activities import FakeWorld  # noqa: E402
from faulty_world import FaultyWorld  # noqa: E402
from temporalio.client import Client  # noqa: E402
from temporalio.exceptions import ApplicationError  # noqa: E402
from workflow_stage import Stage  # noqa: E402
from workflow_stage import configuration  # noqa: E402
from workflow_stage import stage  # noqa: E402

from esper.contracts.messages import Pause  # noqa: E402
from esper.contracts.messages import Resume  # noqa: E402
from esper.contracts.messages import Stop  # noqa: E402


async def grow_and_keep(on: Stage) -> str:
    handle = await on.start(configuration(6))
    await handle.result()
    return handle.id


async def long_run(on: Stage) -> str:
    handle = await on.start(configuration(5), continue_after_epochs=2)
    await handle.result()
    return handle.id


async def lose_pause_and_stop(on: Stage) -> str:
    handle = await on.start(configuration(50))
    await on.until(lambda: on.world.epoch >= 2)
    await on.tell(handle, "pause", Pause())
    await on.until(lambda: any(outcome.value == "paused" for outcome in on.world.outcomes))
    await on.tell(handle, "resume", Resume())
    await on.until(lambda: on.world.epoch >= 4)
    await on.tell(handle, "stop", Stop())
    await handle.result()
    return handle.id


def lost() -> ApplicationError:
    return ApplicationError("lost", type="LeaseLost", non_retryable=True)


SCENES = {
    "grow_and_keep": (grow_and_keep, lambda: FakeWorld(grow_at=1, epoch_seconds=0.05)),
    "long_run": (long_run, lambda: FakeWorld(grow_at=1)),
    "lose_pause_and_stop": (
        lose_pause_and_stop,
        lambda: FaultyWorld(epoch_seconds=0.2, before={"train_epoch": [lost()]}),
    ),
}


async def executions(client: Client, run_id: str, ids: list[str]) -> dict[str, dict[str, Any]]:
    found = {}
    for workflow_id in ids:
        temporal_run: str | None = None
        part = 0
        chain: list[dict[str, Any]] = []
        while True:
            history = await client.get_workflow_handle(workflow_id, run_id=temporal_run).fetch_history()
            chain.insert(0, history.to_json_dict())
            started = history.events[0].workflow_execution_started_event_attributes
            if not started.continued_execution_run_id:
                break
            temporal_run = started.continued_execution_run_id
        for part, document in enumerate(chain):
            found[f"{workflow_id.removeprefix(run_id).strip('/').replace('/', '-') or 'run'}-{part}"] = document
    return found


async def make(address: str, folder: Path) -> None:
    for name, (scene, world_of) in SCENES.items():
        world = world_of()
        async with stage(address, world) as on:
            run_id = await scene(on)
            ids = [run_id]
            ids += [f"{run_id}/tamiyo/{decision.epoch}" for decision in world.decisions[:1]]
            ids += [f"{run_id}/tezzeret/a{number}" for number in {a.number for a in world.adaptations}]
            for part, document in (await executions(on.client, run_id, ids)).items():
                (folder / f"{name}.{part}.json").write_text(json.dumps(document, indent=None) + "\n")


if __name__ == "__main__":
    asyncio.run(make(sys.argv[1], HERE / "histories"))
