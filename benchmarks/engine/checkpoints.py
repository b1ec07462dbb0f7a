"""What a checkpoint costs training: how long the steps around it are, and how many bytes it writes.

A live session trains in one thread; in the middle of an epoch another thread asks for a checkpoint every so many
steps. The stall is how much longer than the median of its session the steps took together, from the request until the
head stood: the copy between two steps, and what the writer's thread takes from training while it packs, hashes, stores
and commits. Goal: at one checkpoint per 5 s, <= 3 % of the time.

Bytes: what one checkpoint is made of, and what it wrote anew, with nothing frozen and with all but the last layer
frozen (what does not train is stored once, under the digest of its content).
"""

import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from benchmarks.engine.live_session import SEEN
from benchmarks.engine.live_session import LiveRun
from benchmarks.engine.live_session import configuration
from benchmarks.engine.live_session import use_one_thread
from benchmarks.engine.live_session import wait_for_steps
from benchmarks.engine.measure import spread
from benchmarks.engine.measure import verdict
from benchmarks.engine.measure import without_garbage_collection
from benchmarks.engine.report import Report
from benchmarks.engine.report import options_of

from esper.contracts.assets import ArtifactRef
from esper.runtime.tolaria.checkpoint import read_manifest

EVERY_SECONDS = 5.0
GOAL = 0.03

SIZES = ((64, 32), (256, 128), (1024, 256), (3072, 256))
"""Width of the hidden layers, batch."""


@dataclass(frozen=True)
class Cost:
    """One checkpoint: seconds that training stood or was slowed, and bytes."""

    stall: float
    copy: float
    """Of it, the one step in which the state was copied."""
    took: float
    """From the request until the head stood."""
    referenced: int
    written: int


@dataclass(frozen=True)
class Session:
    step: float
    parameters: int
    costs: tuple[Cost, ...]


def train(folder: Path, size: tuple[int, int], steps: int, checkpoints: int, *, frozen: bool) -> Session:
    """One long epoch with checkpoints at even distances of steps in it."""
    hidden, batch_size = size
    config = configuration(
        rows=steps * (checkpoints + 1) * batch_size,
        hidden=hidden,
        batch_size=batch_size,
        epochs=1,
        mode="scheduled",
        frozen=frozen,
    )
    asked: list[tuple[int, float, int, float, int, int]] = []
    with LiveRun(folder, config, f"checkpoints-{hidden}-{'frozen' if frozen else 'whole'}") as run:
        training = threading.Thread(target=run.train, args=(1,), name="training")
        with without_garbage_collection():
            training.start()
            for number in range(1, checkpoints + 1):
                wait_for_steps(number * steps, training)
                before = run.stored_bytes()
                first, began = len(SEEN), time.perf_counter()
                head = run.session.checkpoint(hold=False)
                last, ended = len(SEEN), time.perf_counter()
                referenced = _referenced(run, run.manifest_of(head))
                asked.append((first, began, last, ended, referenced, run.stored_bytes() - before))
            training.join()
        parameters = run.session.describe().parameters
        taken = [after.wall - before.wall for before, after in pairwise(SEEN)]
    # The first steps warm caches up; a step's number and its time are one apart.
    median = statistics.median(taken[steps // 2 :])
    return Session(
        step=median,
        parameters=parameters,
        costs=tuple(_cost(taken, median, *each) for each in asked),
    )


def _cost(
    taken: Sequence[float], median: float, first: int, began: float, last: int, ended: float, referenced: int, new: int
) -> Cost:
    # One step more: the thread that trains may still have stood when the answer came.
    around = taken[max(0, first - 1) : last + 1]
    return Cost(
        stall=sum(around) - median * len(around),
        copy=max(around) - median,
        took=ended - began,
        referenced=referenced,
        written=new,
    )


def _referenced(run: LiveRun, manifest: ArtifactRef) -> int:
    files = read_manifest(manifest, run.objects.get).files
    return manifest.size_bytes + sum(file.size_bytes for file in files)


def row(size: tuple[int, int], name: str, session: Session) -> tuple[str, ...]:
    stall = spread([cost.stall for cost in session.costs])
    share = spread([cost.stall / EVERY_SECONDS for cost in session.costs])
    return (
        f"{size[0]} wide, batch {size[1]}, {name}",
        f"{session.parameters:,}",
        f"{1e3 * session.step:.2f}",
        f"{1e3 * stall.median:.1f} [{1e3 * stall.low:.1f}, {1e3 * stall.high:.1f}]",
        f"{1e3 * statistics.median([cost.copy for cost in session.costs]):.1f}",
        f"{1e3 * statistics.median([cost.took for cost in session.costs]):.0f}",
        f"{share.median:.2%} {verdict(share, GOAL)} (<= {GOAL:.0%})",
        f"{statistics.median([cost.referenced for cost in session.costs]):,.0f}",
        f"{statistics.median([cost.written for cost in session.costs]):,.0f}",
    )


def main() -> None:
    parser = options_of("what a checkpoint costs")
    parser.add_argument("--checkpoints", type=int, default=9, help="in a session (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="steps between two checkpoints (default: %(default)s)")
    parser.add_argument("--sizes", type=int, default=len(SIZES), help="how many sizes, smallest first")
    options = parser.parse_args()
    use_one_thread()
    report = Report(
        "checkpoints",
        f"What a checkpoint costs training, and its share of the time at one per {EVERY_SECONDS:g} s",
        (
            "model",
            "parameters",
            "step, ms",
            "stall, ms",
            "of it in one step",
            "until the head stood, ms",
            "share of time",
            "bytes",
            "written anew",
        ),
    )
    for size in SIZES[: options.sizes]:
        for frozen in (False, True):
            name = "all but the last layer frozen" if frozen else "all trained"
            with tempfile.TemporaryDirectory(prefix="esper-benchmark-") as folder:
                session = train(Path(folder), size, options.steps, options.checkpoints, frozen=frozen)
            report.rows.append(row(size, name, session))
            report.data.append(
                {
                    "hidden": size[0],
                    "batch": size[1],
                    "frozen": frozen,
                    "parameters": session.parameters,
                    "step": session.step,
                    "costs": [vars(cost) for cost in session.costs],
                }
            )
    report.notes = [
        f"MLP 64-d-d-10 with AdamW, one thread; {options.checkpoints} checkpoints a session, {options.steps} steps "
        "apart; medians [quartiles]; SQLite and a folder for objects.",
        "`stall`: what the steps from the request until the head stood took together beyond as many medians, so it "
        "also holds what the writer's thread takes of the processor; `of it in one step`: the longest of them.",
        "`bytes`: manifest, model, optimizer and random states of one checkpoint; `written anew`: what the objects' "
        "folder grew by (equal content has one digest and is stored once).",
    ]
    report.publish(options)


if __name__ == "__main__":
    main()
