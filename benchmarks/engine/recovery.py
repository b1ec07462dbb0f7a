"""What a killed trainer costs a run: time to the first new step, steps lost, goodput, and history events per epoch.

A real local stack trains `workload.logged_task` twice: undisturbed, and with `kill -9` of its trainer every so many
seconds. Each step is on record with its time and number, written by the task itself, also those that a kill threw away.
Both runs must end in the same digest. Goal: goodput >= 90 % under a kill each 60 s; the heartbeat time-out (10 s) plays
no part where a supervisor reports the death.
"""

import argparse
import asyncio
import json
import os
import signal
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

from benchmarks.engine.measure import spread
from benchmarks.engine.report import Report
from benchmarks.engine.report import options_of
from benchmarks.engine.stack import Stack
from benchmarks.engine.stack import histories
from benchmarks.engine.stack import run_and_exit
from benchmarks.engine.step_log import steps_by_process
from temporalio.client import Client

HIDDEN = 256
BATCH_SIZE = 128
STEPS_PER_EPOCH = 400
GOAL = 0.9


@dataclass(frozen=True)
class Step:
    """One optimizer step that a process made; `number` counts from 1 along the run."""

    when: float
    number: int


@dataclass(frozen=True)
class Trained:
    """One run: what each trainer process did, in the order of their first steps, and when one was killed."""

    processes: tuple[tuple[Step, ...], ...]
    kills: tuple[float, ...]
    digest: str
    epochs: int
    events: int

    @property
    def wall(self) -> float:
        """Seconds from the first step to the last."""
        return self.processes[-1][-1].when - self.processes[0][0].when

    @property
    def recoveries(self) -> list[float]:
        """Seconds from each kill to the first step of the successor."""
        return [after[0].when - kill for kill, after in zip(self.kills, self.processes[1:], strict=True)]

    @property
    def lost(self) -> list[int]:
        """Steps that were made and had to be made again, by kill."""
        return [before[-1].number - after[0].number + 1 for before, after in pairwise(self.processes)]


async def train(stack: Stack, run_id: str, epochs: int, kill_every: float | None) -> Trained:
    log = stack.home.parent / f"{run_id}-steps"
    log.mkdir()
    configuration = stack.home.parent / f"{run_id}.yaml"
    arguments = {"rows": STEPS_PER_EPOCH * BATCH_SIZE, "hidden": HIDDEN, "log": str(log)}
    document = {
        "run": {"name": "recovery", "max_epochs": epochs, "threads": 1, "device": "cpu"},
        "task": {"target": "benchmarks.engine.workload:logged_task", "arguments": arguments},
        "training": {"batch_size": BATCH_SIZE},
        # A policy that decides after every epoch and may order nothing.
        "tamiyo": {"policy": "heuristic", "max_adaptations": 0, "hold_epochs": 1, "hold_steps": 0},
    }
    configuration.write_text(json.dumps(document))
    await asyncio.to_thread(stack.command, "start-run", "--config", str(configuration), "--run-id", run_id, "--detach")
    client = await Client.connect(stack.address())
    handle = client.get_workflow_handle(run_id)
    ended = asyncio.create_task(handle.result())
    kills: list[float] = []
    if kill_every is not None:
        kills = await _kill(stack, run_id, log, ended, kill_every)
    record = await ended
    if record["outcome"] != "completed":
        raise RuntimeError(f"{run_id} ended {record['outcome']}")
    shown = json.loads(await asyncio.to_thread(stack.command, "show", run_id, "--json"))
    events = sum(len(part) for part in await histories(client, run_id))
    return Trained(_steps(log), tuple(kills), shown["digest"], epochs, events)


async def _kill(stack: Stack, run_id: str, log: Path, ended: "asyncio.Task[object]", every: float) -> list[float]:
    """Kill the run's trainer `every` seconds after its predecessor's death (the first: after its first step)."""
    kills: list[float] = []
    since: float | None = None
    while not ended.done():
        await asyncio.sleep(0.05)
        pid = stack.trainer_of(run_id)
        if pid is None or not (log / str(pid)).exists():
            continue
        since = time.time() if since is None else since
        if time.time() - since >= every:
            os.kill(pid, signal.SIGKILL)
            since = time.time()
            kills.append(since)
            while stack.trainer_of(run_id) == pid and not ended.done():
                await asyncio.sleep(0.02)
    return kills


def _steps(log: Path) -> tuple[tuple[Step, ...], ...]:
    made = [tuple(Step(*each) for each in steps) for steps in steps_by_process(log)]
    return tuple(sorted(made, key=lambda steps: steps[0].when))


def row(name: str, run: Trained, undisturbed: Trained) -> tuple[str, ...]:
    lost = run.lost
    goodput = undisturbed.wall / run.wall
    return (
        name,
        f"{run.wall:.1f}",
        str(len(run.kills)),
        spread(run.recoveries).show(2) if run.kills else "-",
        f"{statistics.mean(lost):.0f} (most {max(lost)})" if lost else "-",
        f"{_median_step(run) * statistics.mean(lost):.2f}" if lost else "-",
        f"{goodput:.1%} {'met' if goodput >= GOAL else 'missed'} (>= {GOAL:.0%})" if run.kills else "-",
        f"{_standing_share(run):.1%}",
        f"{run.events / run.epochs:.1f}",
    )


def _median_step(run: Trained) -> float:
    return statistics.median(_durations(run.processes))


def _durations(processes: Sequence[Sequence[Step]]) -> list[float]:
    return [b.when - a.when for steps in processes for a, b in pairwise(steps)]


def _standing_share(run: Trained) -> float:
    """Share of the wall time in which no step that counts was being made: down, or thrown away."""
    down = sum(run.recoveries) + sum(run.lost) * _median_step(run)
    return down / run.wall


async def run_all(options: argparse.Namespace, home: Path) -> None:
    stack = Stack(home)
    report = Report(
        "recovery",
        f"A trainer killed every {options.every:g} s: recovery, lost steps, goodput, history events per epoch",
        (
            "run",
            "wall, s",
            "kills",
            "kill to first new step, s",
            "steps lost a kill",
            "as seconds",
            "goodput",
            "down or thrown away",
            "events an epoch",
        ),
    )
    try:
        await asyncio.to_thread(stack.command, "up")
        stack.wait_until_quiet()
        undisturbed = await train(stack, "undisturbed", options.epochs, None)
        stack.wait_until_quiet()
        killed = await train(stack, "killed", options.epochs, options.every)
        if killed.digest != undisturbed.digest:
            raise RuntimeError(f"not the same bits: {killed.digest} killed, {undisturbed.digest} undisturbed")
        if not killed.kills:
            raise RuntimeError("the run ended before the first kill: give more --epochs")
    finally:
        await asyncio.to_thread(stack.command, "down")
    for name, run in (("undisturbed", undisturbed), ("killed", killed)):
        report.rows.append(row(name, run, undisturbed))
        report.data.append(
            {
                "run": name,
                "wall": run.wall,
                "recoveries": run.recoveries,
                "lost": run.lost,
                "median_step": _median_step(run),
                "events": run.events,
                "epochs": run.epochs,
                "digest": run.digest,
            }
        )
    report.notes = [
        f"MLP 64-{HIDDEN}-{HIDDEN}-10, batch {BATCH_SIZE}, {STEPS_PER_EPOCH} steps an epoch, {options.epochs} epochs, "
        "a decision after each, 1 thread; supervisor, server, orchestrator, forge and successors on one machine.",
        "The kill is SIGKILL of the process that trains; the supervisor tells the workflow, the warm successor claims "
        "the run and goes on from the last head, the end of an epoch. Both runs ended in the same digest.",
        "`goodput`: wall time of the undisturbed run / that of the killed one, first step to last; `down or thrown "
        "away` is a share of the killed run's own wall time, by its own median step.",
    ]
    report.publish(options)


def main() -> None:
    parser = options_of("what a killed trainer costs")
    parser.add_argument("--every", type=float, default=60.0, help="seconds between kills (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=400, help="epochs of a run (default: %(default)s)")
    options = parser.parse_args()
    run_and_exit(partial(run_all, options))


if __name__ == "__main__":
    main()
