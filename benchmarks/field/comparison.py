"""Esper and gromo widen the same trained hosts: what the output does at the growth, where training ends, what it takes.

Every method continues from the same host in the middle of its training, with the same batches. The learning rate is
chosen per method out of one grid by the mean validation loss over the seeds; what is shown is the test loss there.
"""

import argparse
import copy
import importlib.metadata
import statistics
from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import asdict
from dataclasses import dataclass
from functools import partial

import torch
from benchmarks.engine.measure import alternate
from benchmarks.engine.measure import median_interval
from benchmarks.engine.report import Report
from benchmarks.engine.report import options_of
from benchmarks.field import ours
from benchmarks.field import theirs
from benchmarks.field.work import WORKS
from benchmarks.field.work import Data
from benchmarks.field.work import Learner
from benchmarks.field.work import Recipe
from benchmarks.field.work import Rows
from benchmarks.field.work import Work
from benchmarks.field.work import begin
from benchmarks.field.work import load
from benchmarks.field.work import loss_of
from benchmarks.field.work import train

SEEDS = 5
PROBE = 512
"""Rows of the training data that Esper looks at before it grows; a run's default."""
OURS = "esper"
WIDE = "wide from the start"

Grow = Callable[[Learner, Rows, int], int]


@dataclass(frozen=True)
class Method:
    """One way to grow. `rows` is how many of the training rows it looks at (None: all); `take_over` makes what it
    grows of a host, which is not part of the growth."""

    name: str
    grow: Grow | None
    rows: int | None = PROBE
    take_over: Callable[[Learner, Rows], Learner] | None = None

    def prepared(self, host: Learner, rows: Rows) -> Learner:
        """A copy of the host that this method may grow."""
        model, optimizer = copy.deepcopy((host.model, host.optimizer))
        learner = Learner(model, optimizer)
        return learner if self.take_over is None else self.take_over(learner, rows)

    def looked_at(self, data: Data, seed: int) -> Rows:
        """Training rows drawn without repetition."""
        x, y = data.train
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))[: self.rows]
        return x[order], y[order]


METHODS = (
    Method("no growth", None),
    Method(OURS, ours.grow_with_samples),
    Method("esper, no samples", ours.grow_by_one_call),
    Method("esper, new optimizer", ours.grow_and_restart),
    Method("gromo", theirs.grow, None, theirs.take_over),
    Method("gromo, more scales", partial(theirs.grow, scales=theirs.MORE_SCALES), None, theirs.take_over),
    Method("gromo, 512 rows", theirs.grow, PROBE, theirs.take_over),
)


@dataclass(frozen=True)
class Ended:
    """One training. `change` is the largest absolute difference of the test outputs that the growth made; losses
    `before` and `after` it are over all training rows."""

    method: str
    lr: float
    seed: int
    validation: float
    test: float
    added: int = 0
    change: float | None = None
    before: float | None = None
    after: float | None = None


def trained_host(work: Work, data: Data, recipe: Recipe) -> Learner:
    """The narrow host in the middle of its training."""
    host = begin(work, work.narrow, recipe)
    train(host, data, recipe, range(recipe.growth))
    return host


def continued(method: Method, host: Learner, work: Work, data: Data, recipe: Recipe) -> Ended:
    """Grow a copy of the host and train it to the end."""
    rows = method.looked_at(data, recipe.seed)
    learner = method.prepared(host, rows)
    added, change, before, after = 0, None, None, None
    if method.grow is not None:
        was, before = outputs(learner, data), loss_of(learner.model, data.train)
        added = method.grow(learner, rows, work.added)
        change = float((outputs(learner, data) - was).abs().max())
        after = loss_of(learner.model, data.train)
    train(learner, data, recipe, range(recipe.growth, recipe.steps))
    validation, test = loss_of(learner.model, data.validation), loss_of(learner.model, data.test)
    return Ended(method.name, recipe.lr, recipe.seed, validation, test, added, change, before, after)


def outputs(learner: Learner, data: Data) -> torch.Tensor:
    learner.model.eval()
    with torch.no_grad():
        found: torch.Tensor = learner.model(data.test[0])
    return found


def trainings(work: Work, data: Data, options: argparse.Namespace) -> list[Ended]:
    """Every method at every learning rate and seed, and the final width from the first step on."""
    found: list[Ended] = []
    for lr in work.grid:
        for seed in range(options.seeds):
            recipe = Recipe(lr, seed, options.steps, options.steps // 3)
            host = trained_host(work, data, recipe)
            found += [continued(method, host, work, data, recipe) for method in METHODS]
            wide = begin(work, work.narrow + work.added, recipe)
            train(wide, data, recipe, range(recipe.steps))
            found.append(Ended(WIDE, lr, seed, loss_of(wide.model, data.validation), loss_of(wide.model, data.test)))
    return found


def at_best(found: Sequence[Ended], name: str, grid: Sequence[float]) -> list[Ended]:
    """The trainings of a method at the learning rate with the least mean validation loss, by seed."""
    own = [each for each in found if each.method == name]
    best = min(grid, key=lambda lr: statistics.mean(each.validation for each in own if each.lr == lr))
    return sorted((each for each in own if each.lr == best), key=lambda each: each.seed)


def growth_seconds(work: Work, data: Data, options: argparse.Namespace) -> dict[str, list[float]]:
    """CPU seconds of one growth of each method, alternated; copies of the host are made before."""
    host = trained_host(work, data, Recipe(work.grid[1], 0, options.steps, options.steps // 3))
    arms: dict[str, Callable[[], object]] = {}
    for method in METHODS:
        if method.grow is not None:
            rows = method.looked_at(data, 0)
            ready = [method.prepared(host, rows) for _ in range(options.rounds + 1)]
            arms[method.name] = partial(_grow_next, method.grow, ready, rows, work.added)
    return alternate(arms, options.rounds)


def _grow_next(grow: Grow, ready: list[Learner], rows: Rows, added: int) -> int:
    return grow(ready.pop(), rows, added)


def row(work: Work, name: str, found: Sequence[Ended], seconds: dict[str, list[float]]) -> tuple[str, ...]:
    own, reference = at_best(found, name, work.grid), at_best(found, OURS, work.grid)
    wins = sum(mine.test < other.test for mine, other in zip(reference, own, strict=True))
    changes = [each.change for each in own if each.change is not None]
    jumps = [(each.before, each.after) for each in own if each.before is not None and each.after is not None]
    return (
        work.name,
        name,
        "-" if not changes else f"+{min(each.added for each in own)}",
        "-" if not changes else f"{max(changes):.2g}",
        "-" if not jumps else " -> ".join(f"{statistics.mean(side):.3f}" for side in zip(*jumps, strict=True)),
        f"{statistics.mean(each.test for each in own):.4f}",
        f"{own[0].lr:g}",
        "-" if name == OURS else f"{wins} of {len(own)}",
        f"{1e3 * median_interval(seconds[name]).median:.1f}" if name in seconds else "-",
    )


def main() -> None:
    parser = options_of("Esper and gromo on the same widening")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="trainings of each arm (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=900, help="steps, growth after a third (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="growths that are timed (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    version = importlib.metadata.version("gromo")
    report = Report(
        "field",
        f"Widening a network in the middle of its training: Esper {importlib.metadata.version('esper-morphogenetic')} "
        f"and gromo {version}",
        (
            "host",
            "method",
            "units",
            "largest output change",
            "train loss at the growth",
            "test loss at the end",
            "lr",
            "esper lower",
            "one growth, CPU ms",
        ),
    )
    for work in WORKS:
        data = load(work)
        found = trainings(work, data, options)
        seconds = growth_seconds(work, data, options)
        names = [*(method.name for method in METHODS), WIDE]
        report.rows += [row(work, name, found, seconds) for name in names]
        report.data.append(
            {"work": work.name, "trainings": [asdict(each) for each in found], "growth_thread_seconds": seconds}
        )
    report.notes = [
        "scikit-learn's digits (9,000 rows with shifts), batch 64, AdamW, cosine over "
        f"{options.steps} steps, growth after a third; {options.seeds} seeds; the learning rate of each row is that of "
        "the host's grid with the least mean validation loss. Hosts, batches, schedule and grid are the same in all "
        f"rows. Grids: {', '.join(f'{work.name} {work.grid}' for work in WORKS)}.",
        "`largest output change`: over all test rows and seeds, at the growth. `train loss at the growth`: before -> "
        "after, mean over seeds. `test loss at the end`: mean over seeds; `esper lower`: seeds in which the row "
        "`esper` has the lower one. `one growth`: median CPU time, 1 thread, methods alternated.",
        "The methods differ. `esper` adds units whose outgoing weights are zero, so that the function stays; their "
        f"incoming weights are aligned with the residual gradient of {PROBE} rows; its time includes wrapping, probe "
        "and birth certificate; the optimizer goes on. `gromo` solves for new units and for better old weights "
        "together, tries four scales and takes the best: it changes the function on purpose, to lower the loss at "
        f"once. It looks at all training rows, as its tutorial does, or at the same {PROBE}; its parameters are new "
        "tensors, so the optimizer begins anew.",
        "`gromo, more scales`: the tutorial's line search ends at scale 1; this one goes on to 32.",
        "`esper, no samples` is `esper.graft` alone (Kaiming weights). `esper, new optimizer` shows what carrying the "
        "optimizer's state is worth. `wide from the start` has the final width in all steps.",
    ]
    report.publish(options)
