"""What active seeds cost beside the floating point operations that they add: forward and backward of one linear layer.

The layer stands alone and its input needs a gradient, as in the middle of a network. The seeds are bottlenecks
(d -> rank -> d, ReLU) that have left zero, as after their first step. Floor: floating point operations of the
grown layer / of the bare one, both counted (`torch.utils.flop_counter`) over the same forward and backward.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from benchmarks.engine.measure import VERDICTS
from benchmarks.engine.measure import Spread
from benchmarks.engine.measure import alternate
from benchmarks.engine.measure import median_interval
from benchmarks.engine.measure import ratios
from benchmarks.engine.measure import spread
from benchmarks.engine.measure import verdict
from benchmarks.engine.report import Report
from benchmarks.engine.report import options_of
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import esper

BATCH = 128
SEEDS = (1, 4)
CASES = ((512, 16), (512, 32), (1024, 16), (1024, 32))
"""Width of the layer, rank of each seed."""
GOALS = {512: 1.15, 1024: 1.1}
BUILDS = 3
"""Every arm is made so many times: where its tensors lie in memory moves its time by some per cent."""
BASE = "dormant"
AGAIN = "dormant again"
SITE = "0"


@dataclass(frozen=True)
class Arm:
    """One layer in one state: a pass to be timed, and what it takes in floating point operations."""

    run: Callable[[], None]
    flops: int


def layer(width: int, rank: int, seeds: int) -> nn.Module:
    """A wrapped linear layer with so many active seeds. Each has random weights everywhere: none is newborn."""
    model = esper.wrap(nn.Sequential(nn.Linear(width, width)), example_inputs=torch.zeros(BATCH, width))
    for _ in range(seeds):
        esper.graft(model, SITE, "bottleneck", rank=rank, activation="relu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".kasmina." in name:
                nn.init.normal_(parameter, std=0.02)
    return model


def arm(model: nn.Module, width: int, times: int) -> Arm:
    """`times` passes a turn; gradients of input and all parameters are made anew in each."""
    x = torch.randn(BATCH, width, requires_grad=True)
    towards = torch.randn(BATCH, width)
    leaves = [x, *model.parameters()]

    def once() -> None:
        for leaf in leaves:
            leaf.grad = None
        model(x).backward(towards)

    def run() -> None:
        for _ in range(times):
            once()

    once()
    counter = FlopCounterMode(display=False)
    with counter:
        once()
    if any(leaf.grad is None or not bool(leaf.grad.any()) for leaf in leaves):
        raise RuntimeError("a parameter got no gradient: the seeds were not active")
    return Arm(run, counter.get_total_flops())


def measure(width: int, rank: int, rounds: int, times: int) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of each arm by round, and floating point operations of one pass."""
    torch.manual_seed(0)
    seconds: dict[str, list[float]] = {}
    for number in range(BUILDS):
        arms = {name: arm(layer(width, rank, 0), width, times) for name in (BASE, AGAIN)}
        arms |= {str(seeds): arm(layer(width, rank, seeds), width, times) for seeds in SEEDS}
        taken = alternate({name: each.run for name, each in arms.items()}, rounds, order_seed=number)
        for name, values in taken.items():
            seconds.setdefault(name, []).extend(values)
    return seconds, {name: each.flops for name, each in arms.items()}


def over(found: Spread, floor: float) -> Spread:
    """The ratio of times in units of the floor."""
    return Spread(found.low / floor, found.median / floor, found.high / floor, found.count)


def main() -> None:
    parser = options_of("time of a layer with active seeds / the same dormant, over the floor of operations")
    parser.add_argument("--rounds", type=int, default=50, help="rounds of each case and build (default: %(default)s)")
    parser.add_argument("--times", type=int, default=10, help="passes of one turn (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    report = Report(
        "active",
        f"A linear layer with active seeds, batch {BATCH}: forward and backward over the floor of operations",
        ("layer", "seeds", "dormant, us", "dormant again", "grown / dormant", "floor", "over the floor", "goal", ""),
    )
    for width, rank in CASES:
        seconds, flops = measure(width, rank, options.rounds, options.times)
        base = spread([1e6 * taken / options.times for taken in seconds[BASE]])
        for seeds in SEEDS:
            grown = median_interval(ratios(seconds, str(seeds), BASE))
            floor = flops[str(seeds)] / flops[BASE]
            report.rows.append(
                (
                    f"{width}, rank {rank}",
                    str(seeds),
                    f"{base.median:.0f}",
                    median_interval(ratios(seconds, AGAIN, BASE)).show(3),
                    grown.show(3),
                    f"{floor:.4f}",
                    over(grown, floor).show(3),
                    f"<= {GOALS[width]}",
                    verdict(over(grown, floor), GOALS[width]),
                )
            )
        report.data.append({"width": width, "rank": rank, "flops": flops, "thread_seconds_per_turn": seconds})
    report.notes = [
        "`grown / dormant`: thread CPU time of forward and backward (gradients of the input and of all parameters) of "
        "the layer with its seeds / of the same wrapped layer without; median of within-round ratios [95 % interval of "
        "the median], 1 thread, order shuffled every round, garbage collection off; all arms built anew three times. "
        "`dormant again` is the noise floor.",
        "`floor`: floating point operations of the two, counted over the same pass; 1 + 2 x rank x seeds / width. "
        "`over the floor` is the one divided by the other. A ratio of whole training steps is nearer to 1.",
        "In the one step after its birth a seed runs beside the wide pass, so that its birth changes no rounding: not "
        "in these numbers.",
        VERDICTS,
    ]
    report.publish(options)


if __name__ == "__main__":
    main()
