"""A trainer process that takes over runs left in a folder: `python tolaria_resume_child.py FOLDER CONFIGS`."""

import json
import sys
from pathlib import Path

from tolaria_world import Driver
from tolaria_world import World
from tolaria_world import ordered
from tolaria_world import silent

from esper.contracts.config import EsperConfig


def main() -> None:
    world = World(Path(sys.argv[1]))
    digests = {}
    for run_id, config in json.loads(sys.argv[2]).items():
        session = world.open(EsperConfig.model_validate_json(json.dumps(config)), run_id)
        driver = Driver(world, session, run_id)
        driver.schedule = (ordered(1, 14, run_id=run_id),)
        begun = session.describe()
        driver.train(4)
        session.judge(f"{run_id}/a1", silent)
        driver.train(5, 6)
        digests[run_id] = {"step": begun.step, "digest": driver.digest(), "facts": world.facts(run_id)}
    world.close()
    print(json.dumps(digests))


if __name__ == "__main__":
    main()
