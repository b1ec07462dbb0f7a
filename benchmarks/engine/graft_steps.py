"""How long the steps are around a graft: nothing may interrupt training while a kernel arrives and grows in.

A live session trains in one thread; a kernel is fetched, verified, built and recorded from another (`install`), and
grafted by the training thread, in three arms that take turns: no kernel; one that arrives in the middle of an epoch
(`asap`); one for the first step of the next epoch (`scheduled`, the default of a run). Goal: no step of the epoch is
longer than twice the median plus one step. The arm without a kernel shows how long a step gets for other reasons.
"""

import random
import statistics
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from benchmarks.engine.live_session import SEEN
from benchmarks.engine.live_session import LiveRun
from benchmarks.engine.live_session import Moment
from benchmarks.engine.live_session import configuration
from benchmarks.engine.live_session import use_one_thread
from benchmarks.engine.live_session import wait_for_steps
from benchmarks.engine.measure import spread
from benchmarks.engine.measure import without_garbage_collection
from benchmarks.engine.report import Report
from benchmarks.engine.report import options_of

from esper.contracts.enums import FactKind
from esper.contracts.operational import EpochReport

GOAL = 3.0
"""Twice the median plus one step, in medians."""

SIZES = ((64, 32, 8), (256, 128, 32), (512, 256, 32), (1024, 256, 32))
"""Width of the hidden layers, batch, rank of the kernel."""

ARMS = ("none", "asap", "scheduled")
EPOCHS = 8


@dataclass(frozen=True)
class Run:
    """One session: seconds of each step, wall and CPU of the training thread; index i is step i + 1."""

    wall: list[float]
    thread: list[float]
    apply_step: int | None
    steps_per_epoch: int

    def within(self, seconds: Sequence[float]) -> list[float]:
        """The steps of the second and third epoch, without the first one of each, which has an evaluation before it."""
        size = self.steps_per_epoch
        return [taken for step, taken in enumerate(seconds) if step >= size and step % size]

    def boundary(self, seconds: Sequence[float]) -> float:
        """From the last step of the second epoch to the end of the first of the third: evaluation, commit, graft."""
        return seconds[2 * self.steps_per_epoch]


def train(folder: Path, arm: str, size: tuple[int, int, int], steps: int, number: int) -> Run:
    """Three epochs; the kernel is built after the first and delivered in the second, a third of its way in."""
    hidden, batch_size, rank = size
    config = configuration(
        rows=steps * batch_size,
        hidden=hidden,
        batch_size=batch_size,
        epochs=EPOCHS,
        mode="scheduled" if arm == "none" else arm,
    )
    with LiveRun(folder, config, f"{arm}-{hidden}-{number}") as run:
        report = run.train(1, probe=True)
        apply_step = 2 * steps if arm == "scheduled" else None
        wanted = run.adaptation(apply_step, rank)
        delivery = None if arm == "none" else run.forge(report, wanted)
        schedule = (wanted,) if arm == "scheduled" else ()
        reports: list[EpochReport] = []

        def order(epoch: int) -> None:
            reports.append(run.train(epoch, schedule))

        with without_garbage_collection():
            # Each order has a thread of its own, and one epoch is ordered ahead, as a run's workflow does it.
            training, ahead = (threading.Thread(target=order, args=(epoch,), name=f"epoch {epoch}") for epoch in (2, 3))
            training.start()
            ahead.start()
            if delivery is not None:
                wait_for_steps(steps + steps // 3, training)
                accepted = run.session.install(delivery)
                if not accepted.accepted:
                    raise RuntimeError(f"the kernel was refused: {accepted.reason}")
            training.join()
            ahead.join()
        grafts = [fact.apply_step for each in reports for fact in each.facts if fact.kind is FactKind.GRAFT]
        if len(reports) != 2 or (delivery is not None) != (len(grafts) == 1):
            raise RuntimeError(f"{arm}: {len(reports)} epochs and grafts at {grafts}")
        moments = list(SEEN)
    return Run(
        wall=_between(moments, "wall"),
        thread=_between(moments, "thread"),
        apply_step=grafts[0] if grafts else None,
        steps_per_epoch=steps,
    )


def _between(moments: Sequence[Moment], clock: str) -> list[float]:
    """Seconds of each step; the first one has no beginning that was seen. Epochs run in threads of their own, so the
    CPU time of the first step of an epoch means nothing."""
    times = [getattr(moment, clock) for moment in moments]
    return [0.0, *[after - before for before, after in pairwise(times)]]


def row(size: tuple[int, int, int], arm: str, runs: Sequence[Run], plain: Sequence[Run]) -> tuple[str, ...]:
    """One line: everything in units of the median step of the same session."""
    longest, tail, grafted, worked, boundary = [], [], [], [], []
    for run in runs:
        steps = run.within(run.wall)
        median = statistics.median(steps)
        longest.append(max(steps) / median)
        tail.append(sorted(steps)[int(0.99 * (len(steps) - 1))] / median)
        boundary.append(run.boundary(run.wall) / median)
        if run.apply_step is not None:
            grafted.append(run.wall[run.apply_step] / median)
            worked.append(run.thread[run.apply_step] / statistics.median(run.within(run.thread)))
    at_boundary = statistics.median([each.boundary(each.wall) / _usual(each) for each in plain])
    median_ms = 1e3 * statistics.median([_usual(run) for run in runs])
    return (
        f"{size[0]} wide, batch {size[1]}",
        arm,
        f"{median_ms:.2f}",
        f"{statistics.median(tail):.2f}",
        spread(longest).show(2),
        spread(grafted).show(2) if arm == "asap" else "-",
        spread(worked).show(2) if arm == "asap" else "-",
        f"{statistics.median(boundary):.1f}",
        f"{statistics.median(boundary) - at_boundary:+.1f}" if arm == "scheduled" else "-",
        f"{sum(value <= GOAL for value in longest)} of {len(runs)}",
    )


def _usual(run: Run) -> float:
    return statistics.median(run.within(run.wall))


def main() -> None:
    parser = options_of("step times around a graft in a live session")
    parser.add_argument("--rounds", type=int, default=4, help="sessions of each arm and size (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=80, help="steps of an epoch (default: %(default)s)")
    parser.add_argument("--sizes", type=int, default=len(SIZES), help="how many sizes, smallest first")
    options = parser.parse_args()
    use_one_thread()
    report = Report(
        "graft_steps",
        "Step times around a graft, in medians of the same session (goal: longest <= 2 x median + one step = 3)",
        (
            "model",
            "kernel",
            "median, ms",
            "99 %",
            "longest step",
            "step with the graft",
            "of it CPU",
            "between epochs",
            "graft there",
            "sessions within goal",
        ),
    )
    order = random.Random(0)
    for size in SIZES[: options.sizes]:
        runs: dict[str, list[Run]] = {arm: [] for arm in ARMS}
        for number in range(options.rounds):
            for arm in order.sample(ARMS, len(ARMS)):
                # A folder of its own: what an earlier session stored would make the next one's commits cheap.
                with tempfile.TemporaryDirectory(prefix="esper-benchmark-") as folder:
                    runs[arm].append(train(Path(folder), arm, size, options.steps, number))
        report.rows += [row(size, arm, runs[arm], runs["none"]) for arm in ARMS]
        report.data += [
            {
                "size": size,
                "arm": arm,
                "apply_step": run.apply_step,
                "steps_per_epoch": run.steps_per_epoch,
                "wall_ms": [round(1e3 * taken, 3) for taken in run.wall],
                "thread_ms": [round(1e3 * taken, 3) for taken in run.thread],
            }
            for arm in ARMS
            for run in runs[arm]
        ]
    report.notes = [
        "Steps of the second and third epoch, wall time from one optimizer step to the next, with everything that "
        "happens between; medians [quartiles] over sessions. `none` is the noise floor: no kernel arrives.",
        "`step with the graft` holds the commit of the head from which the twin would begin, the check that the birth "
        "changes nothing, and the graft; `of it CPU` is CPU time of the training thread over its median.",
        "`between epochs`: evaluation, report, snapshot and the first step of epoch 3, for `scheduled` with the graft; "
        "`graft there` is what that arm takes longer than the arm without a kernel.",
    ]
    report.publish(options)


if __name__ == "__main__":
    main()
