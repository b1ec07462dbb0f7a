"""A trainer whose kernel ends the process: `python quarantine_child.py FOLDER HOW`. If it lives, it prints digest and
facts."""

import ctypes
import json
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))

from failing_kernels import failing
from tolaria_world import Driver
from tolaria_world import World
from tolaria_world import make_config
from tolaria_world import ordered

from esper.runtime import failpoints


def segfault(output: torch.Tensor) -> torch.Tensor:
    ctypes.string_at(0)
    return output


def main() -> None:
    folder, how = Path(sys.argv[1]), sys.argv[2]
    failpoints.arm_process(os.environ)
    world = World(folder)
    config = make_config(tamiyo={"hold_epochs": 2, "hold_steps": 0})
    driver = Driver(world, world.open(config, "run"), "run")
    driver.schedule = (ordered(1, 14),)
    run = driver.session._shared.run
    begun = run.step
    steps = {"birth": (True, 14), "step": (False, 14), "never": (False, -1)}
    evaluating, at = steps[how]
    with failing(segfault, [at], lambda: driver.session._shared.run.step, evaluating=evaluating):
        if begun == 0:
            (first,) = driver.train(1, expects_decision=True)
            assert driver.session.install(world.deliver(first, driver.schedule[0])).accepted
        driver.train(*range(2 if begun == 0 else driver.session.describe().epoch + 1, 7))
    digest = driver.digest()
    print(json.dumps({"begun": begun, "digest": digest, "facts": world.facts()}))
    world.close()


main()
