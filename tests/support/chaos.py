"""A soak: one run on a real stack under random faults must end in the bits of its records, and break no invariant.

`scripts/soak --seed N --seconds S --every M` trains twice for about S seconds each: undisturbed, then with a fault
every M seconds in the mean (exponential intervals, all drawn from the seed). Printed and written to
`benchmarks/results`: what was injected and how long training took to get beyond where it stood, goodput (undisturbed
wall time over disturbed), and every violation of an invariant. Ends with 1 when there is one, or when digests differ.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.engine.report import Report
from benchmarks.engine.report import options_of
from benchmarks.engine.step_log import steps_by_process
from chaos_faults import Chaos
from chaos_faults import Injected
from checked_runs import judge_all
from local_stack import LocalStack

ROOT = Path(__file__).parents[2]
GOAL = 0.9
POLL_S = 0.2
PATIENCE_S = 900.0


@dataclass(frozen=True)
class Soaked:
    """One run: every step that a process made (wall time, number), by time, and how the run ended."""

    steps: tuple[tuple[float, int], ...]
    document: dict[str, Any]

    @property
    def wall(self) -> float:
        """Seconds from the first step to the last."""
        return self.steps[-1][0] - self.steps[0][0]

    def recovery(self, fault: Injected) -> float | None:
        """Seconds from a fault to the first step beyond all that were made before it; `None` after the last step."""
        stood = max((number for when, number in self.steps if when <= fault.when), default=0)
        beyond = (when for when, number in self.steps if when > fault.when and number > stood)
        first = next(beyond, None)
        return None if first is None else first - fault.when


def configuration(epochs: int, log: Path) -> dict[str, Any]:
    return {
        "run": {"name": "soak", "max_epochs": epochs, "threads": 1, "device": "cpu"},
        "task": {"target": "chaos_task:task", "arguments": {"log": str(log)}},
        "optimizer": {"name": "adamw", "lr": 0.012, "schedule": {"name": "cosine", "warmup": 0.05}, "clip": 1.0},
        "training": {"batch_size": 64},
        "tamiyo": {"hold_epochs": 2, "hold_steps": 0, "max_adaptations": 8},
        # A run that waits for what was killed must not give a kernel up: that would be another run.
        "tezzeret": {"timeout_s": 400},
    }


def soak(
    stack: LocalStack, run_id: str, epochs: int, chaos: Chaos | None = None, every: float = 0.0, seconds: float = 0.0
) -> tuple[Soaked, list[Injected]]:
    """Train one run to its end, with faults for as long as `seconds` where there is `chaos`."""
    log = stack.home.parent / f"{run_id}-steps"
    log.mkdir()
    path = stack.home.parent / f"{run_id}.yaml"
    path.write_text(json.dumps(configuration(epochs, log)))
    stack.ok("start-run", "--config", str(path), "--run-id", run_id, "--detach", folder=ROOT)
    wait(lambda: any(log.iterdir()), "the first step")
    injected: list[Injected] = []
    began = time.monotonic()
    while chaos is not None and time.monotonic() - began < seconds and not ended(stack, run_id):
        time.sleep(chaos.pause(every))
        injected.append(chaos.inject())
        print(f"{time.monotonic() - began:7.1f} s  {injected[-1].kind}: {injected[-1].what}", flush=True)
    if chaos is not None:
        chaos.close()
    wait(lambda: ended(stack, run_id), "the end of the run")
    return Soaked(tuple(sorted(chain(*steps_by_process(log)))), stack.ok("show", run_id, "--json").document), injected


def ended(stack: LocalStack, run_id: str) -> bool:
    """A command that fails says nothing: the database may be locked just now."""
    shown = stack.run("show", run_id, "--json")
    return shown.code == 0 and shown.document["outcome"] in ("completed", "failed", "stopped")


def wait(true: Any, what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        if time.monotonic() > deadline:
            raise RuntimeError(f"waited {PATIENCE_S:g} s for {what}")
        time.sleep(POLL_S)


def pace(stack: LocalStack) -> float:
    """Seconds that one epoch takes, by a short run."""
    measured, _ = soak(stack, "pace", 12)
    return measured.wall / 12


def main() -> int:
    parser = options_of("random faults at one run on a real stack")
    parser.add_argument("--seed", type=int, default=0, help="of the faults and their times (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=300.0, help="of faults (default: %(default)s)")
    parser.add_argument("--every", type=float, default=60.0, help="mean seconds between faults (default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="esper-soak-") as folder:
        stack = LocalStack(Path(folder) / "home", OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")
        try:
            stack.ok("up")
            return run(stack, options)
        finally:
            stack.run("down")


def run(stack: LocalStack, options: argparse.Namespace) -> int:
    """The whole soak; 0 when nothing was violated."""
    print(f"seed {options.seed}", flush=True)
    epochs = max(12, round(options.seconds / pace(stack)))
    calm, _ = soak(stack, "undisturbed", epochs)
    print(f"undisturbed: {epochs} epochs in {calm.wall:.1f} s", flush=True)
    chaos = Chaos(stack, "disturbed", Random(options.seed))
    stormy, injected = soak(stack, "disturbed", epochs, chaos, options.every, options.seconds)
    reproduced = stack.run("reproduce", "disturbed", "--json", timeout=PATIENCE_S)
    found = judge_all({})
    record, digest = stormy.document, calm.document["digest"]
    if record["outcome"] != "completed":
        found.append(f"the run ended {record['outcome']}: {record.get('failure')}")
    if reproduced.code or reproduced.document["digest"] != record["digest"]:
        found.append(f"I11: what the records reproduce is another model: {reproduced.out or reproduced.err}")
    if record["missed"] == 0 and record["digest"] != digest:
        found.append(f"I11: nothing was missed, and the digest is {record['digest']}, undisturbed {digest}")
    publish(options, epochs, calm, stormy, injected, found)
    return 1 if found else 0


def publish(
    options: argparse.Namespace, epochs: int, calm: Soaked, stormy: Soaked, injected: list[Injected], found: list[str]
) -> None:
    report = Report("chaos", "One run under random faults", ("fault", "times", "beyond where it stood after, s"))
    recoveries = [(fault, stormy.recovery(fault)) for fault in injected]
    for kind in sorted({fault.kind for fault in injected}):
        times = [seconds for fault, seconds in recoveries if fault.kind == kind]
        shown = ", ".join("after the last step" if each is None else f"{each:.1f}" for each in times)
        report.rows.append((kind, str(len(times)), shown))
    goodput = calm.wall / stormy.wall
    record = stormy.document
    same = record["digest"] == calm.document["digest"]
    report.notes = [
        f"Seed {options.seed}: {len(injected)} faults in {options.seconds:g} s, one in {options.every:g} s in the "
        f"mean; {epochs} epochs, {stormy.steps[-1][1]} steps, {len(record['adaptations'])} adaptations.",
        f"Goodput {goodput:.1%} ({'met' if goodput >= GOAL else 'missed'}, goal >= {GOAL:.0%}): {calm.wall:.1f} s "
        f"undisturbed, {stormy.wall:.1f} s disturbed, first step to last.",
        "Goodput compares two runs that are minutes apart: beside other work on the machine (see its load) it says "
        "little.",
        f"Violations: {len(found)}. Trainers lost: {record['restarts']}. Missed deliveries: {record['missed']}. "
        f"Recorded divergences: {record['divergences']}. "
        f"Digest {'the same as' if same else 'another than'} undisturbed.",
        *found,
    ]
    report.data = [
        {
            "faults": [{**asdict(fault), "recovery": seconds} for fault, seconds in recoveries],
            "goodput": goodput,
            "wall": {"undisturbed": calm.wall, "disturbed": stormy.wall},
            "digest": {"undisturbed": calm.document["digest"], "disturbed": record["digest"]},
            "violations": found,
        }
    ]
    report.publish(options)


if __name__ == "__main__":
    sys.exit(main())
