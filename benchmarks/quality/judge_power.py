"""How often the judge keeps grafts that help and grafts that cannot, for its own rule and for honest alternatives.

For each seed of the `digits` quick start one host is trained to a graft, then forked: a twin, a useful graft
(`bottleneck` at `layers.0`) and three that add no capacity (`lowrank`), all on the same batches, to the verdict. The
losses of every row that is never trained on are stored at several steps before it; every rule is then applied to the
same numbers, on judge slices drawn at random from these rows. `python benchmarks/quality/judge_power.py` measures
what is missing (7 minutes on one idle core) and writes `benchmarks/results/judge_power.md` and `.json`.
"""

import argparse
import copy
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from arms import plan_and_model
from arms import quick_start
from report import Table
from report import write_results
from store import Store
from torch import Tensor
from torch.nn import functional
from workers import in_processes

from esper.contracts.config import EsperConfig
from esper.contracts.enums import Verdict
from esper.runtime.kasmina import growth
from esper.runtime.kasmina.growing.fitting import site_contract
from esper.runtime.kasmina.probe import probe
from esper.runtime.tezzeret.build import build_kernel
from esper.runtime.tezzeret.build import load_kernel
from esper.runtime.tezzeret.samples import SiteSamples
from esper.runtime.tolaria.judging import judge
from esper.runtime.tolaria.trainee import Trainee
from esper.runtime.tolaria.trainee import begin

GRAFTS = (("bottleneck", "layers.0"), ("lowrank", "layers.0"), ("lowrank", "layers.2"), ("lowrank", "layers.4"))
HOLD_EPOCHS = 6
KEEP_MARGIN = 0.02
SLICES = 60
LOOK_EVERY = 47
LOOKS = 9
"""A third of an epoch between looks; the last one is at the verdict."""
LAST = (-1,)
EPOCH_ENDS = (-1, -4, -7)
ALL = tuple(range(-LOOKS, 0))


@dataclass(frozen=True)
class Setting:
    """A learning rate and the epoch after which is grafted."""

    lr: float
    epoch: int

    @property
    def title(self) -> str:
        return f"lr {self.lr:g}, epoch {self.epoch}"


@dataclass(frozen=True)
class Rule:
    """How many rows the judge has, in chunks of how many, at which looks."""

    rows: int
    chunk_rows: int
    looks: tuple[int, ...]

    @property
    def title(self) -> str:
        when = {LAST: "at the verdict", EPOCH_ENDS: "mean of 3 epoch ends", ALL: "mean of 9 looks in 3 epochs"}
        return f"{self.rows} rows, chunks of {self.chunk_rows}, {when[self.looks]}"


SETTINGS = (Setting(0.006, 16), Setting(0.012, 16), Setting(0.012, 31), Setting(0.024, 16))
RULES = tuple(
    Rule(rows, chunk_rows, looks)
    for rows in (250, 333, 400)
    for chunk_rows in (32, 8)
    for looks in (LAST, EPOCH_ENDS, ALL)
)


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


def attach(trainee: Trainee, blueprint: str, site: str, seed: int, samples: SiteSamples) -> None:
    contract = site_contract(trainee.model, site, blueprint)
    files = build_kernel(blueprint, contract, {}, seed=seed, samples=samples, max_parameters=10**7)
    growth.attach(trainee.model, site, load_kernel(files, files.digest), optimizer=trainee.optimizer)


def measure(config: EsperConfig, graft_epoch: int, hold_epochs: int) -> dict[str, Any]:
    """One seed: the losses by row of the twin and of each graft, and what the useful one was worth at the end."""
    plan, model = plan_and_model(config)
    host = begin(plan, model)
    train(host, (graft_epoch - 1) * plan.steps_per_epoch)
    batch = plan.train.peek(plan.probed)
    samples = probe(host.model, lambda: plan.loss(host.model, batch)).samples
    train(host, graft_epoch * plan.steps_per_epoch)
    until = (graft_epoch + hold_epochs) * plan.steps_per_epoch
    found: dict[str, Any] = {}
    for arm in (None, *GRAFTS):
        trainee = fork(host)
        if arm is not None:
            attach(trainee, *arm, seed=1000 + config.run.seed, samples=samples[arm[1]])
        found["twin" if arm is None else "@".join(arm)] = looks(trainee, until)
        if arm in (None, GRAFTS[0]):
            train(trainee, plan.total_steps)
            found["twin end" if arm is None else "useful end"] = held_out_rows(trainee)
    return found


def measure_one(task: tuple[Setting, int]) -> dict[str, Any]:
    setting, seed = task
    return measure(quick_start("digits", seed=seed, lr=setting.lr), setting.epoch, HOLD_EPOCHS)


def averaged(looks: Sequence[Sequence[float]], which: Sequence[int]) -> Tensor:
    """The loss of each row, averaged over some looks."""
    return torch.tensor([looks[index] for index in which], dtype=torch.float64).mean(dim=0)


def keeps(rule: Rule, record: Mapping[str, Any], arm: str, rows: Tensor) -> bool:
    """What Esper's own `judge` says when it is given these rows in these chunks at these looks."""
    chunks = rows.tensor_split(max(2, round(len(rows) / rule.chunk_rows)))
    grown, twin = averaged(record[arm], rule.looks), averaged(record["twin"], rule.looks)
    losses = [[float(model[chunk].mean()) for chunk in chunks] for model in (grown, twin)]
    return judge(losses[0], losses[1], KEEP_MARGIN).verdict is Verdict.KEEP


def shares(rule: Rule, records: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """(share of useful grafts kept, share of null grafts kept), over seeds and judge slices."""
    generator = torch.Generator().manual_seed(0)
    pool = len(records[0]["twin"][0])
    slices = [torch.randperm(pool, generator=generator)[: rule.rows].sort().values for _ in range(SLICES)]
    found = [fmean(keeps(rule, record, "@".join(arm), rows) for record in records for rows in slices) for arm in GRAFTS]
    return found[0], fmean(found[1:])


def gain(records: Sequence[Mapping[str, Any]], arm: str) -> float:
    """Mean share of the twin's loss that an arm saves at the verdict, on all rows."""
    return fmean(1 - fmean(record[arm][-1]) / fmean(record["twin"][-1]) for record in records)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(8)))
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    store = Store("judge_power")
    places = {f"{setting.lr:g}-{setting.epoch}-{seed}": (setting, seed) for setting in SETTINGS for seed in given.seeds}
    found = in_processes(store, places, measure_one, processes=given.processes)
    by_setting = {
        setting: [found[key] for key, (measured, _) in places.items() if measured == setting] for setting in SETTINGS
    }
    worth = [
        [
            setting.title,
            *(f"{gain(records, '@'.join(arm)):+.1%}" for arm in GRAFTS),
            f"{fmean(1 - fmean(each['useful end']) / fmean(each['twin end']) for each in records):+.1%}",
        ]
        for setting, records in by_setting.items()
    ]
    data, rows = [], []
    for rule in RULES:
        results = [shares(rule, records) for records in by_setting.values()]
        rows.append([rule.title, *(f"{useful:.0%} / {null:.1%}" for useful, null in results)])
        data.append({"rule": rule.title, "kept": {s.title: r for s, r in zip(SETTINGS, results, strict=True)}})
    tables = [
        Table(
            "What the grafts are worth",
            ["setting", *(f"{blueprint} `{site}`" for blueprint, site in GRAFTS), "bottleneck, end of training"],
            worth,
            ["Share of the twin's loss saved on all rows that are not trained on; the last column after 60 epochs."],
        ),
        Table(
            "Kept: useful / null grafts",
            ["rule", *(setting.title for setting in SETTINGS)],
            rows,
            [
                f"{len(given.seeds)} seeds, {SLICES} random judge slices each, margin {KEEP_MARGIN:.0%}, one-sided "
                "95 % bound in every rule. The bound over rows knows nothing of the noise of training: of two runs "
                "that differ in a worthless block one is better at any one step. Several looks average that out.",
            ],
        ),
    ]
    path = write_results("judge_power", "The judge's power", [f"Code {store.code}."], tables, data)
    print(path.read_text())


if __name__ == "__main__":
    main()
