"""Makes stored histories: `python tests/replay/make_histories.py ADDRESS [SCENE...]`, ADDRESS of a Temporal dev server
that has Esper's search attributes.

Without names it makes those that are not there yet; what is there is remade only when it is named: the histories of
earlier releases are what replaying them is worth something for.

The activities are fakes, so that a history holds what the workflows ordered and nothing of a machine.
"""

import asyncio
import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "support"))

from execution_chain import chain  # noqa: E402
from fake_activities import FakeWorld  # noqa: E402
from history_scenes import SCENES  # noqa: E402
from history_scenes import Run  # noqa: E402
from temporalio.client import WorkflowHistory  # noqa: E402
from workflow_stage import Stage  # noqa: E402
from workflow_stage import stage  # noqa: E402


async def histories(on: Stage, run: Run, world: FakeWorld) -> dict[str, WorkflowHistory]:
    """By file name: every execution of the run, its first decision, and every forge."""
    own = await chain(on.client, run.id)
    if own[0].run_id != run.first_execution_run_id:
        first = on.client.get_workflow_handle(run.id, run_id=run.first_execution_run_id)
        own.insert(0, await first.fetch_history())
    found = {f"run-{part}": history for part, history in enumerate(own)}
    children = {f"{run.id}/tamiyo/{decision.epoch}": f"tamiyo-{decision.epoch}" for decision in world.decisions[:1]}
    children |= {f"{run.id}/tezzeret/a{a.number}": f"tezzeret-a{a.number}" for a in world.adaptations}
    for workflow_id, name in children.items():
        found |= {f"{name}-{part}": each for part, each in enumerate(await chain(on.client, workflow_id))}
    return found


async def make(address: str, folder: Path, wanted: list[str]) -> None:
    missing = [name for name in SCENES if not list(folder.glob(f"{name}.*.json"))]
    for name in wanted or missing:
        scene, world_of = SCENES[name]
        world = world_of()
        async with stage(address, world) as on:
            for part, history in (await histories(on, await scene(on), world)).items():
                (folder / f"{name}.{part}.json").write_text(json.dumps(history.to_json_dict(), indent=None) + "\n")
        print(name)


if __name__ == "__main__":
    asyncio.run(make(sys.argv[1], HERE / "histories", sys.argv[2:]))
