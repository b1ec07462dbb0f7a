"""What a wrapped model costs while nothing is grown: whole training steps, with and without telemetry.

Arms take turns of a few steps, so that a difference of half a per cent shows on a machine that does other things too.
What telemetry adds is measured by its parts, as Tolaria runs it: a window of 64 steps has one that is watched, one at
its end whose change of the weights is measured, and one read. At the end all arms must have the same weights.
"""

import copy
import itertools
import time
from collections.abc import Callable
from dataclasses import asdict
from dataclasses import dataclass

import torch
from benchmarks.engine.measure import VERDICTS
from benchmarks.engine.measure import Spread
from benchmarks.engine.measure import alternate
from benchmarks.engine.measure import median_interval
from benchmarks.engine.measure import ratios
from benchmarks.engine.measure import spread
from benchmarks.engine.measure import verdict
from benchmarks.engine.measure import without_garbage_collection
from benchmarks.engine.report import Report
from benchmarks.engine.report import options_of
from benchmarks.engine.subjects import SUBJECTS
from benchmarks.engine.subjects import Batch
from benchmarks.engine.subjects import Subject
from torch import nn
from torch.nn import functional

import esper
from esper.runtime.kasmina.telemetry import EVERY
from esper.runtime.kasmina.telemetry import Telemetry

GOAL = 1.005
TELEMETRY_GOAL = 1.01
BATCHES = 8
TURN = 4
"""Steps of one arm before it is another's turn."""


@dataclass(frozen=True)
class Found:
    """Ratios to the plain step: a second plain copy, dormant, and dormant with telemetry."""

    seconds: dict[str, list[float]]
    again: Spread
    dormant: Spread
    window: Spread
    watched: Spread
    sites: int


def trained(model: nn.Module, batches: list[Batch]) -> Callable[[], None]:
    """A function that trains a turn of steps, each on the next batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    coming = itertools.cycle(batches)

    def run() -> None:
        for x, y in itertools.islice(coming, TURN):
            optimizer.zero_grad(set_to_none=True)
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()

    return run


def measure(subject: Subject, rounds: int, windows: int) -> Found:
    torch.manual_seed(0)
    batches = [subject.batch() for _ in range(BATCHES)]
    plain = subject.model()
    dormant = esper.wrap(copy.deepcopy(plain), example_inputs=batches[0][0])
    models = {"plain": plain, "plain again": copy.deepcopy(plain), "dormant": dormant}
    watched = copy.deepcopy(dormant)
    seconds = alternate({name: trained(model, batches) for name, model in models.items()}, rounds)
    if len({esper.weights_digest(model) for model in models.values()}) != 1:
        raise RuntimeError(f"{subject.name}: the arms did not do the same work")
    window = window_cost(watched, batches, windows)
    both = ratios(seconds, "dormant", "plain")
    found = median_interval(both)
    return Found(
        seconds=seconds,
        again=median_interval(ratios(seconds, "plain again", "plain")),
        dormant=found,
        window=window,
        watched=Spread(found.low * window.low, found.median * window.median, found.high * window.high, window.count),
        sites=len(esper.status(dormant).sites),
    )


def window_cost(model: nn.Module, batches: list[Batch], windows: int) -> Spread:
    """One window with telemetry / the same window without: everything that its special steps take more than the median
    step, and the taking of what was seen. A run makes signals of that on the thread that writes its heads."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    telemetry = Telemetry(model)
    coming = itertools.cycle(batches)
    found: list[float] = []
    with without_garbage_collection():
        for _ in range(windows + 1):
            taken: list[float] = []
            for step in range(EVERY):
                x, y = next(coming)
                began = time.thread_time()
                optimizer.zero_grad(set_to_none=True)
                with telemetry.step(step, last=step == EVERY - 1):
                    functional.cross_entropy(model(x), y).backward()
                optimizer.step()
                taken.append(time.thread_time() - began)
            began = time.thread_time()
            reading = telemetry.take()
            read = time.thread_time() - began
            if not reading.signals(epoch=1, step=EVERY):
                raise RuntimeError("the window was read and held nothing: telemetry was not on")
            # The change that the watched step made of the weights is taken at the beginning of the second step.
            special = [taken[0], taken[1], taken[-1]]
            usual = spread(taken[2:-1]).median
            found.append(1 + (sum(special) - len(special) * usual + read) / (EVERY * usual))
    return median_interval(found[1:])


def main() -> None:
    parser = options_of("dormant step / plain step")
    parser.add_argument("--rounds", type=int, default=60, help="rounds of the slowest model (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=8, help="telemetry windows of it (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    report = Report(
        "dormant",
        f"Dormant step / plain step (whole AdamW step; goals <= {GOAL}, with telemetry <= {TELEMETRY_GOAL})",
        ("model", "sites", "plain step, us", "plain again", "dormant", "goal", "telemetry adds", "with it", "its goal"),
    )
    for subject in SUBJECTS:
        found = measure(subject, options.rounds * subject.share, options.windows * subject.share)
        plain = spread([1e6 * value / TURN for value in found.seconds["plain"]])
        report.rows.append(
            (
                subject.name,
                str(found.sites),
                f"{plain.median:.0f}",
                found.again.show(4),
                found.dormant.show(4),
                verdict(found.dormant, GOAL),
                found.window.show(4),
                f"{found.watched.median:.4f}",
                verdict(found.watched, TELEMETRY_GOAL),
            )
        )
        report.data.append({"model": subject.name, **asdict(found)})
    report.notes = [
        "Medians of within-round ratios of thread CPU time [95 % interval of the median], 1 thread, order shuffled "
        "every round, garbage collection off. `plain again` is a second copy of the baseline: the noise floor.",
        f"A turn is {TURN} steps. All arms end with the same weights, to the bit (checked). Every supported layer is a "
        "site with 4 seeds.",
        f"`telemetry adds`: what the watched step, the measured change of the weights and the taking of a window of "
        f"{EVERY} steps take more on the thread that trains, over the window (the signals are made on another one). "
        "`with it` is the product of the two.",
        VERDICTS,
    ]
    report.publish(options)


if __name__ == "__main__":
    main()
