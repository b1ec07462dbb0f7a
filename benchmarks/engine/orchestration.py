"""What Temporal costs a run: orchestrated wall time over the time the training thread is busy, and over a plain loop.

A real local stack (server, orchestrator, trainer, forge, strategist) in a home of its own, on this machine, trains
`workload.task`; a decision is taken after every epoch, on a probe, and orders nothing, so that the run does the same
steps as the plain PyTorch loop in a process of its own (the digests must agree). Both take turns.

Wall time is from the start of the first `train_epoch` to the end of the last, by the run's own history on the server.
Goals: wall / busy <= 1.02 and wall / plain <= 1.1 for epochs of about 1 s, 1.15 and 1.6 for epochs of about 0.1 s.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import time
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.engine.measure import Spread
from benchmarks.engine.measure import spread
from benchmarks.engine.report import Report
from benchmarks.engine.report import options_of
from benchmarks.engine.stack import Stack
from benchmarks.engine.stack import histories
from benchmarks.engine.stack import run_and_exit
from temporalio.api.history.v1 import HistoryEvent
from temporalio.client import Client

from esper.runtime.worker_files import read_all

HIDDEN = 256
BATCH_SIZE = 128


@dataclass(frozen=True)
class Length:
    """How long an epoch is about, and what is asked of it."""

    seconds: float
    epochs: int
    over_busy: float
    over_plain: float


LENGTHS = (Length(1.0, 12, 1.02, 1.1), Length(0.1, 80, 1.15, 1.6))


@dataclass(frozen=True)
class Epoch:
    """One epoch as the history and its report tell it; times in seconds of the server's clock."""

    number: int
    scheduled: float
    started: float
    completed: float
    busy: float
    stall: float


@dataclass(frozen=True)
class Orchestrated:
    """One run. `warm_at` is when the next trainer was warm: until then its start takes processor time."""

    epochs: tuple[Epoch, ...]
    digest: str
    decisions: int
    load: float
    warm_at: float | None

    @property
    def wall(self) -> float:
        return self.epochs[-1].completed - min(epoch.started for epoch in self.epochs)

    @property
    def busy(self) -> float:
        return sum(epoch.busy for epoch in self.epochs)

    def settled(self) -> float | None:
        """Wall / busy from the first epoch that ended after the next trainer was warm; None if few were left."""
        later = [epoch for epoch in self.epochs if self.warm_at is not None and epoch.completed >= self.warm_at]
        if len(later) < 4:
            return None
        return (later[-1].completed - later[0].completed) / sum(epoch.busy for epoch in later[1:])


@dataclass(frozen=True)
class Plain:
    """One plain loop in a process of its own."""

    epochs: tuple[float, ...]
    digest: str
    load: float

    @property
    def wall(self) -> float:
        return sum(self.epochs)


def plain(stack: Stack, *, rows: int, epochs: int, most_steps: int | None = None) -> dict[str, Any]:
    """The plain loop in a process of its own."""
    sizes = {"--rows": rows, "--hidden": HIDDEN, "--epochs": epochs, "--batch-size": BATCH_SIZE}
    if most_steps is not None:
        sizes["--most-steps"] = most_steps
    given = [word for name, value in sizes.items() for word in (name, str(value))]
    found: dict[str, Any] = json.loads(stack.python("benchmarks.engine.workload", *given))
    return found


def rows_for(stack: Stack, seconds: float) -> int:
    """Rows with which an epoch of the plain loop takes about so long on an idle machine: whole batches."""
    few, many = (
        statistics.median(plain(stack, rows=64_000, epochs=5, most_steps=steps)["cpu"][1:]) for steps in (20, 120)
    )
    step = (many - few) / 100
    return BATCH_SIZE * max(1, round((seconds - few) / step) + 20)


async def orchestrated(stack: Stack, run_id: str, rows: int, epochs: int) -> Orchestrated:
    """One run, detached: nobody polls while it trains."""
    load = os.getloadavg()[0]
    values = {
        "run.name": "benchmark",
        "run.max_epochs": epochs,
        "run.threads": 1,
        "run.device": "cpu",
        "optimizer.name": "adamw",
        "optimizer.lr": 1e-3,
        "training.batch_size": BATCH_SIZE,
        # A policy that always decides, on a probe, and may never order: the steps stay those of the plain loop.
        "tamiyo.policy": "heuristic",
        "tamiyo.adaptation_frequency": 1,
        "tamiyo.max_adaptations": 0,
        "tamiyo.hold_epochs": 1,
        "tamiyo.hold_steps": 0,
    }
    configuration = stack.home.parent / "run.yaml"
    target = "benchmarks.engine.workload:task"
    configuration.write_text(f'task: {{target: "{target}", arguments: {{rows: {rows}, hidden: {HIDDEN}}}}}\n')
    settings = [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
    await asyncio.to_thread(
        stack.command, "start-run", "--config", str(configuration), "--run-id", run_id, "--detach", *settings
    )
    client = await Client.connect(stack.address())
    warm = asyncio.create_task(_when_warm(stack))
    record = await client.get_workflow_handle(run_id).result()
    warm.cancel()
    found = await _epochs(client, run_id)
    if [epoch.number for epoch in found] != list(range(1, epochs + 1)):
        raise RuntimeError(f"{run_id}: the history holds the epochs {[epoch.number for epoch in found]}")
    document = json.loads(await asyncio.to_thread(stack.command, "show", run_id, "--json"))
    if record["outcome"] != "completed" or document["adaptations"]:
        raise RuntimeError(f"{run_id} ended {record['outcome']} with {document['adaptations']}")
    warm_at = warm.result() if warm.done() and not warm.cancelled() else None
    return Orchestrated(tuple(found), document["digest"], document["decisions"], load, warm_at)


async def _when_warm(stack: Stack) -> float:
    """When the successor of the claimed trainer is warm, on the clock that the server uses as well."""
    while True:
        if any("trainer" in worker.roles and worker.state == "idle" for worker in read_all(stack.home).values()):
            return time.time()
        await asyncio.sleep(0.25)


async def _epochs(client: Client, run_id: str) -> list[Epoch]:
    """Every `train_epoch` of the run, over all executions that it was continued in."""
    found = [epoch for events in await histories(client, run_id) for epoch in _epochs_in(events)]
    return sorted(found, key=lambda epoch: epoch.number)


def _epochs_in(events: list[HistoryEvent]) -> list[Epoch]:
    scheduled: dict[int, float] = {}
    started: dict[int, float] = {}
    found: list[Epoch] = []
    for event in events:
        when = _seconds(event.event_time.ToDatetime())
        match event.WhichOneof("attributes"):
            case "activity_task_scheduled_event_attributes":
                if event.activity_task_scheduled_event_attributes.activity_type.name == "train_epoch":
                    scheduled[event.event_id] = when
            case "activity_task_started_event_attributes":
                started[event.activity_task_started_event_attributes.scheduled_event_id] = when
            case "activity_task_completed_event_attributes":
                ended = event.activity_task_completed_event_attributes
                if ended.scheduled_event_id not in scheduled:
                    continue
                result = json.loads(ended.result.payloads[0].data)
                report = result["report"]
                found.append(
                    Epoch(
                        number=result["epoch"],
                        scheduled=scheduled[ended.scheduled_event_id],
                        started=started[ended.scheduled_event_id],
                        completed=when,
                        busy=report["busy_seconds"],
                        stall=report["stall_seconds"],
                    )
                )
    return found


def _seconds(moment: datetime) -> float:
    return (moment - datetime(1970, 1, 1)).total_seconds()


async def measure(
    stack: Stack, length: Length, rounds: int, order: random.Random
) -> tuple[int, list[Orchestrated], list[Plain]]:
    """Rounds of one orchestrated run and one plain loop, in a random order."""
    rows = rows_for(stack, length.seconds)
    runs: list[Orchestrated] = []
    plains: list[Plain] = []
    for number in range(rounds):
        for arm in order.sample(("orchestrated", "plain"), 2):
            stack.wait_until_quiet()
            if arm == "plain":
                ended = await asyncio.to_thread(plain, stack, rows=rows, epochs=length.epochs)
                plains.append(Plain(tuple(ended["epochs"]), ended["digest"], ended["load"]))
            else:
                run_id = f"epochs-{length.seconds:g}s-{number}".replace(".", "_")
                runs.append(await orchestrated(stack, run_id, rows, length.epochs))
        if runs[-1].digest != plains[-1].digest:
            raise RuntimeError(f"not the same work: {runs[-1].digest} orchestrated, {plains[-1].digest} plain")
    return rows, runs, plains


def row(length: Length, rows: int, runs: list[Orchestrated], plains: list[Plain]) -> tuple[str, ...]:
    over_busy = spread([run.wall / run.busy for run in runs])
    over_plain = spread([run.wall / plain.wall for run, plain in zip(runs, plains, strict=True)])
    settled = [value for run in runs if (value := run.settled()) is not None]
    epoch = statistics.median([second for plain in plains for second in plain.epochs])
    stall = sum(one.stall for run in runs for one in run.epochs) / sum(run.wall for run in runs)
    return (
        f"{length.seconds:g} s x {length.epochs}",
        str(-(-rows // BATCH_SIZE)),
        f"{epoch:.3f}",
        _against(over_busy, length.over_busy),
        _against(over_plain, length.over_plain),
        spread(settled).show(3) if settled else "-",
        f"{spread([run.busy / plain.wall for run, plain in zip(runs, plains, strict=True)]).median:.3f}",
        f"{stall:.1%}",
    )


def _against(found: Spread, goal: float) -> str:
    return f"{found.show(3)} {'met' if found.median <= goal else 'missed'} (<= {goal:g})"


def chosen(options: argparse.Namespace) -> list[Length]:
    lengths = [length for length in LENGTHS if options.only in (None, length.seconds)]
    if options.epochs is None:
        return lengths
    return [Length(each.seconds, options.epochs, each.over_busy, each.over_plain) for each in lengths]


async def run_all(options: argparse.Namespace, home: Path) -> None:
    stack = Stack(home)
    report = Report(
        "orchestration",
        "Orchestrated run: wall / busy and wall / plain loop, with a decision after every epoch",
        (
            "epochs",
            "steps each",
            "plain epoch, s",
            "wall / busy",
            "wall / plain",
            "wall / busy, settled",
            "busy / plain",
            "stalled",
        ),
    )
    order = random.Random(0)
    try:
        await asyncio.to_thread(stack.command, "up")
        for length in chosen(options):
            stack.wait_until_quiet()
            rows, runs, plains = await measure(stack, length, options.rounds, order)
            report.rows.append(row(length, rows, runs, plains))
            report.data.append(
                {
                    "epoch_seconds": length.seconds,
                    "rows": rows,
                    "orchestrated": [
                        {
                            "wall": run.wall,
                            "busy": run.busy,
                            "settled": run.settled(),
                            "warm_at": run.warm_at,
                            "decisions": run.decisions,
                            "load_before": run.load,
                            "epochs": [vars(epoch) for epoch in run.epochs],
                        }
                        for run in runs
                    ],
                    "plain": [
                        {"wall": plain.wall, "epochs": plain.epochs, "load_after": plain.load} for plain in plains
                    ],
                }
            )
    finally:
        await asyncio.to_thread(stack.command, "down")
    report.notes = [
        f"`wall`: first `train_epoch` started to last completed, in the server's history; MLP 64-{HIDDEN}-{HIDDEN}-10, "
        f"batch {BATCH_SIZE}, 1 thread, AdamW; medians [quartiles] over {options.rounds} round(s), order shuffled; the "
        "digests of both arms agreed in every round.",
        "`busy` is what the trainer reports for its epochs: steps, evaluation and the probe of the decision. "
        "`busy / plain` is what training itself costs more: telemetry, the boundary of each step, probe, and the "
        "processor that server and orchestrator take from the trainer on this machine.",
        "`settled`: only epochs after the next trainer was warm; a claimed trainer's successor imports torch for some "
        "seconds beside the first epochs. `stalled`: share of the wall time in which training waited for a commit.",
    ]
    report.publish(options)


def main() -> None:
    parser = options_of("orchestrated run against its training thread and a plain loop")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each length (default: %(default)s)")
    parser.add_argument("--only", type=float, choices=[length.seconds for length in LENGTHS], help="one length only")
    parser.add_argument("--epochs", type=int, help="epochs of a run, instead of the length's own number")
    parser.add_argument("--home", type=Path, help="ESPER_HOME to use and keep (default: a temporary one)")
    options = parser.parse_args()
    run_and_exit(partial(run_all, options), options.home)


if __name__ == "__main__":
    main()
