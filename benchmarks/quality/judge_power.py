"""How often the judge keeps grafts that help and grafts that cannot, for its own rule and for honest alternatives.

For each seed of the `digits` quick start one host is trained to a graft, then forked: a twin, a useful graft
(`bottleneck`) and grafts that add no capacity (`lowrank`), all on the same batches, to the step of the verdict. The
losses of every row that is never trained on are stored at several steps before it; every rule is then applied to the
same numbers. `python judge_power.py` measures what is missing and writes `results/judge_power.md` and `.json`.
"""

import copy

import torch
from arms import plan_and_model
from arms import quick_start
from torch.nn import functional

from esper.contracts.config import EsperConfig
from esper.runtime.kasmina import growth
from esper.runtime.kasmina.fitting import site_contract
from esper.runtime.kasmina.probe import probe
from esper.runtime.tezzeret.build import build_kernel
from esper.runtime.tezzeret.build import load_kernel
from esper.runtime.tolaria.trainee import Trainee
from esper.runtime.tolaria.trainee import begin

GRAFTS = (("bottleneck", "layers.0"), ("lowrank", "layers.0"), ("lowrank", "layers.2"), ("lowrank", "layers.4"))
LOOK_EVERY = 47
LOOKS = 9
"""A third of an epoch between looks, and three epochs of looks before the verdict."""


def fork(trainee: Trainee) -> Trainee:
    model, optimizer = copy.deepcopy((trainee.model, trainee.optimizer))
    return Trainee(trainee.plan, model, optimizer, step=trainee.step, completed=trainee.completed)


def train(trainee: Trainee, until: int) -> None:
    while trainee.step < until:
        trainee.advance()


def held_out_rows(trainee: Trainee) -> list[float]:
    """The loss of each validation row, then of each test row: none of them is trained on."""
    plan = trainee.plan
    assert plan.test is not None
    losses = []
    with torch.no_grad():
        for batches in (plan.validation, plan.test):
            x, y = batches.rows(range(len(batches)))
            losses.append(functional.cross_entropy(trainee.model(x), y, reduction="none"))
    return [float(value) for value in torch.cat(losses)]


def looks(trainee: Trainee, until: int) -> list[list[float]]:
    """Train to step `until` and return the losses of all rows at the last steps, the last one last."""
    seen = []
    for number in reversed(range(LOOKS)):
        train(trainee, until - number * LOOK_EVERY)
        seen.append(held_out_rows(trainee))
    return seen


def attach(trainee: Trainee, blueprint: str, site: str, seed: int, samples: object) -> None:
    contract = site_contract(trainee.model, site, blueprint)
    files = build_kernel(blueprint, contract, {}, seed=seed, samples=samples, max_parameters=10**7)  # type: ignore[arg-type]
    growth.attach(trainee.model, site, load_kernel(files, files.digest), optimizer=trainee.optimizer)


def measure(config: EsperConfig, graft_epoch: int, hold_epochs: int) -> dict[str, object]:
    """One seed: the losses by row of the twin and of each graft, and what the useful one was worth at the end."""
    plan, model = plan_and_model(config)
    host = begin(plan, model)
    train(host, (graft_epoch - 1) * plan.steps_per_epoch)
    batch = plan.train.peek(plan.probed)
    samples = probe(host.model, lambda: plan.loss(host.model, batch)).samples
    train(host, graft_epoch * plan.steps_per_epoch)
    until = (graft_epoch + hold_epochs) * plan.steps_per_epoch
    found: dict[str, object] = {}
    for arm in (None, *GRAFTS):
        trainee = fork(host)
        if arm is not None:
            attach(trainee, *arm, seed=1000 + config.run.seed, samples=samples[arm[1]])
        found["twin" if arm is None else "@".join(arm)] = looks(trainee, until)
        if arm in (None, GRAFTS[0]):
            train(trainee, plan.total_steps)
            found["twin end" if arm is None else "@".join(arm) + " end"] = held_out_rows(trainee)
    return found


def measure_one(task: tuple[int, float, int, int]) -> dict[str, object]:
    seed, lr, graft_epoch, hold_epochs = task
    return measure(quick_start("digits", seed=seed, lr=lr), graft_epoch, hold_epochs)
