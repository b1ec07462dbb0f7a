"""What a wrapped model costs while nothing is grown: whole training steps, with and without telemetry.

A block is one telemetry window: 64 steps (one of them watched) and one read at its end, as Tolaria does it for an
epoch. Goal: at most 1.01 of the plain step with telemetry on.
"""

import copy
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from dataclasses import dataclass
from typing import Any

import torch
from benchmarks.engine.measure import Spread
from benchmarks.engine.measure import alternate
from benchmarks.engine.measure import ratio
from benchmarks.engine.measure import spread
from benchmarks.engine.measure import without_garbage_collection
from benchmarks.engine.report import Report
from benchmarks.engine.report import options_of
from torch import Tensor
from torch import nn
from torch.nn import functional

import esper
from esper.runtime.kasmina.telemetry import EVERY
from esper.runtime.kasmina.telemetry import Telemetry

GOAL = 1.01
BATCHES = 8


@dataclass(frozen=True)
class Size:
    """One model under test. `share` scales the rounds: short blocks need more of them."""

    name: str
    model: Callable[[], nn.Module]
    sample: tuple[int, ...]
    batch: int
    share: int


def perceptron(width: int, depth: int = 8) -> nn.Module:
    """`depth` hidden layers of one width, on 64 features."""
    layers: list[nn.Module] = [nn.Linear(64, width), nn.ReLU()]
    for _ in range(depth - 1):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def convolutional() -> nn.Module:
    """Three convolutions, 16 to 64 channels, on images of 16 x 16."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


SIZES = (
    Size("MLP 8x64, batch 32", lambda: perceptron(64), (64,), 32, 4),
    Size("MLP 8x256, batch 128", lambda: perceptron(256), (64,), 128, 2),
    Size("MLP 8x512, batch 128", lambda: perceptron(512), (64,), 128, 1),
    Size("CNN 16-32-64, batch 32", convolutional, (3, 16, 16), 32, 2),
)


def block(model: nn.Module, batches: list[tuple[Tensor, Tensor]], watched: bool, steps: int) -> Callable[[], None]:
    """A function that trains `steps` steps; with telemetry it is read at the end."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    telemetry = Telemetry(model) if watched else None

    def run() -> None:
        for step in range(steps):
            x, y = batches[step % len(batches)]
            optimizer.zero_grad(set_to_none=True)
            around: Any = nullcontext() if telemetry is None else telemetry.step(step)
            with around:
                functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        if telemetry is not None and not telemetry.read(epoch=1, step=steps):
            raise RuntimeError("the window was read and held nothing: telemetry was not on")

    return run


def measure(size: Size, rounds: int, steps: int) -> dict[str, list[float]]:
    torch.manual_seed(0)
    plain = size.model()
    batches = [(torch.randn(size.batch, *size.sample), torch.randint(0, 10, (size.batch,))) for _ in range(BATCHES)]
    dormant = esper.wrap(copy.deepcopy(plain), example_inputs=batches[0][0])
    arms = {
        "plain again": block(copy.deepcopy(plain), batches, False, steps),
        "dormant": block(dormant, batches, False, steps),
        "dormant, telemetry": block(copy.deepcopy(dormant), batches, True, steps),
        "plain": block(plain, batches, False, steps),
    }
    return alternate(arms, rounds)


def window_cost(size: Size, windows: int, steps: int) -> Spread:
    """1 + what one window of telemetry adds / the same window without: the watched step and the read timed apart.

    Steadier than the ratio of whole blocks, in which a per cent drowns on a machine with other work.
    """
    torch.manual_seed(0)
    x, y = torch.randn(size.batch, *size.sample), torch.randint(0, 10, (size.batch,))
    model = esper.wrap(size.model(), example_inputs=x)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    telemetry = Telemetry(model)
    found: list[float] = []
    with without_garbage_collection():
        for _ in range(windows + 1):
            unwatched: list[float] = []
            watched = 0.0
            for step in range(steps):
                began = time.thread_time()
                optimizer.zero_grad(set_to_none=True)
                with telemetry.step(step):
                    functional.cross_entropy(model(x), y).backward()
                optimizer.step()
                took = time.thread_time() - began
                if step % EVERY:
                    unwatched.append(took)
                else:
                    watched += took
            began = time.thread_time()
            telemetry.read(epoch=1, step=steps)
            read = time.thread_time() - began
            usual = spread(unwatched).median
            looks = -(-steps // EVERY)
            found.append(1 + (watched - looks * usual + read) / (steps * usual))
    return spread(found[1:])


def verdict(found: Spread, noise: Spread) -> str:
    """Met, or missed by more than the noise floor moved."""
    if found.median <= GOAL:
        return "met"
    return "missed" if found.median - GOAL > abs(noise.median - 1) else "missed within the noise"


def main() -> None:
    parser = options_of("dormant step / plain step")
    parser.add_argument("--rounds", type=int, default=10, help="rounds of the slowest model (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=EVERY, help="steps of a block (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    arms = ("plain again", "dormant", "dormant, telemetry")
    report = Report(
        "dormant",
        f"Dormant step / plain step (whole AdamW step, goal <= {GOAL} with telemetry)",
        ("model", "plain step, us", *arms, "by parts", "goal"),
    )
    for size in SIZES:
        seconds = measure(size, options.rounds * size.share, options.steps)
        plain = spread([1e6 * value / options.steps for value in seconds["plain"]])
        parts = window_cost(size, options.rounds * size.share, options.steps)
        ratios = {arm: ratio(seconds, arm, "plain") for arm in arms}
        report.rows.append(
            (
                size.name,
                f"{plain.median:.0f}",
                *(ratios[arm].show(3) for arm in arms),
                parts.show(4),
                verdict(ratios["dormant, telemetry"], ratios["plain again"]),
            )
        )
        report.data.append(
            {
                "model": size.name,
                "steps": options.steps,
                "thread_seconds_per_block": seconds,
                "window_cost": asdict(parts),
            }
        )
    report.notes = [
        "Ratios: median [quartiles] of within-round ratios of thread CPU time, 1 thread, order shuffled every round, "
        "garbage collection off. `plain again` is a second copy of the baseline: the noise floor.",
        "`by parts`: 1 + (what the watched step costs more + the read) / the unwatched steps of the window, each timed "
        "by itself: the same quantity as `dormant, telemetry` / `dormant`, steadier where the machine has other work.",
        f"A block is {options.steps} steps; with telemetry one in {EVERY} is watched and the window is read at its "
        "end. Every Linear and Conv2d is a site with 4 seeds.",
    ]
    report.publish(options)


if __name__ == "__main__":
    main()
