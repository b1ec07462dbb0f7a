"""A compiled model that is wrapped and grows nothing / the same model compiled plain: forward, loss and backward.

`torch.compile` with inductor, whole model, no graph breaks allowed (`fullgraph`), each arm with graphs of its own. What
can differ is what is checked before each call (the guards of the sites) and the code that was generated.
"""

import copy
import itertools
import sys
import time
from collections.abc import Callable

import torch
from benchmarks.engine.measure import VERDICTS
from benchmarks.engine.measure import alternate
from benchmarks.engine.measure import median_interval
from benchmarks.engine.measure import ratios
from benchmarks.engine.measure import spread
from benchmarks.engine.measure import verdict
from benchmarks.engine.report import Report
from benchmarks.engine.report import options_of
from benchmarks.engine.subjects import SUBJECTS
from benchmarks.engine.subjects import Batch
from benchmarks.engine.subjects import Subject
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional

import esper
from esper.runtime.tezzeret.parity import c_compiler

GOAL = 1.02
CHOSEN = ("MLP 8x64, batch 32", "MLP 8x256, batch 128", "CNN with BatchNorm, batch 32")
BATCHES = 8
TURN = 4
"""Steps of one arm before it is another's turn."""


def stepping(model: nn.Module, batches: list[Batch]) -> Callable[[], None]:
    """A function that compiles the model at its first call and takes a turn of forwards and backwards."""
    compiled = torch.compile(model, fullgraph=True, dynamic=False, isolate_recompiles=True)
    coming = itertools.cycle(batches)

    def run() -> None:
        for x, y in itertools.islice(coming, TURN):
            model.zero_grad(set_to_none=True)
            functional.cross_entropy(compiled(x), y).backward()

    return run


def graphs() -> int:
    """How many graphs the compiler has made in this process."""
    return int(counters["stats"]["unique_graphs"])


def measure(subject: Subject, rounds: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of each arm by round, and of each arm's first turn, in which it is compiled."""
    torch.manual_seed(0)
    batches = [subject.batch() for _ in range(BATCHES)]
    plain = subject.model()
    models = {
        "plain": plain,
        "plain again": copy.deepcopy(plain),
        "dormant": esper.wrap(copy.deepcopy(plain), example_inputs=batches[0][0]),
    }
    arms = {name: stepping(model, batches) for name, model in models.items()}
    compiling: dict[str, float] = {}
    for name, run in arms.items():
        before, began = graphs(), time.perf_counter()
        run()
        compiling[name] = time.perf_counter() - began
        if graphs() != before + 1:
            raise RuntimeError(f"{subject.name}, {name}: {graphs() - before} graphs where there should be 1")
    made = graphs()
    seconds = alternate(arms, rounds)
    if graphs() != made:
        raise RuntimeError(f"{subject.name}: {graphs() - made} recompilations while time was taken")
    same_gradients(subject, models)
    return seconds, compiling


def same_gradients(subject: Subject, models: dict[str, nn.Module]) -> None:
    """Raise RuntimeError unless the last step of the wrapped model had the gradients of the plain one, to the bit."""
    for (name, ours), theirs in zip(models["dormant"].named_parameters(), models["plain"].parameters(), strict=True):
        if ours.grad is None or theirs.grad is None or not torch.equal(ours.grad, theirs.grad):
            raise RuntimeError(f"{subject.name}: the gradient of {name} is not that of the plain model")


def main() -> None:
    parser = options_of("compiled dormant model / compiled plain model")
    parser.add_argument("--rounds", type=int, default=100, help="rounds of the slowest model (default: %(default)s)")
    options = parser.parse_args()
    if c_compiler() is None:
        sys.exit("torch.compile needs a C++ compiler on the CPU, and none was found: install g++ (or set CXX)")
    torch.set_num_threads(1)
    report = Report(
        "compiled",
        f"Compiled and dormant / compiled and plain (forward, loss, backward; goal <= {GOAL})",
        ("model", "sites", "plain, us", "plain again", "dormant", "goal", "compiling, s"),
    )
    for subject in (each for each in SUBJECTS if each.name in CHOSEN):
        seconds, compiling = measure(subject, options.rounds * subject.share)
        dormant = median_interval(ratios(seconds, "dormant", "plain"))
        report.rows.append(
            (
                subject.name,
                str(len(esper.status(esper.wrap(subject.model(), example_inputs=subject.batch()[0])).sites)),
                f"{spread([1e6 * taken / TURN for taken in seconds['plain']]).median:.0f}",
                median_interval(ratios(seconds, "plain again", "plain")).show(4),
                dormant.show(4),
                verdict(dormant, GOAL),
                " ".join(f"{compiling[name]:.0f}" for name in ("plain", "plain again", "dormant")),
            )
        )
        report.data.append({"model": subject.name, "thread_seconds_per_turn": seconds, "compiling_seconds": compiling})
    report.notes = [
        "Medians of within-round ratios of thread CPU time [95 % interval of the median], 1 thread, order shuffled "
        f"every round, garbage collection off; a turn is {TURN} steps. `plain again` is a second compiled copy: the "
        "noise floor.",
        "One graph a model, none made while time was taken, and equal gradients to the bit at the end (all checked). "
        "No optimizer step: it is the same in both and would hide a difference.",
        "`compiling`: wall time of the first turn of plain, plain again, dormant; what was compiled before is found in "
        "the compiler's cache on disk.",
        VERDICTS,
    ]
    report.publish(options)


if __name__ == "__main__":
    main()
