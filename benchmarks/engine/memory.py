"""What many cycles of growing and culling leave behind: nothing that can be counted, and no memory.

Each row is one kind of cycle on one model and optimizer, in a process of its own: so many cycles of graft, training
step and removal. Counted before and after: parameters, optimizer entries, hooks, tensors and Python objects alive, open
files. The slope is that of the resident memory over the cycles (least squares), after a warm-up in which allocators
find their size; the first row does the same steps and grows nothing: the noise floor.
"""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarks.engine.report import Report
from benchmarks.engine.report import options_of
from torch import Tensor
from torch import nn

import esper

WARM_UP = 0.2
"""Share of the cycles before the first count."""

SAMPLES = 50


@dataclass(frozen=True)
class Count:
    """What is there at one moment. Files are open descriptors; `resident` is in bytes."""

    parameters: int
    entries: int
    hooks: int
    tensors: int
    objects: int
    files: int
    resident: int


def perceptron() -> tuple[nn.Module, Tensor]:
    """Three linear layers of width 256."""
    layers = [nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)]
    return nn.Sequential(*layers), torch.randn(32, 64)


def convolutional() -> tuple[nn.Module, Tensor]:
    """Two convolutions with BatchNorm on images of 16 x 16."""
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 256, 10),
    )
    return model, torch.randn(8, 3, 16, 16)


@dataclass(frozen=True)
class Cycle:
    """One kind of cycle. `grow(model, optimizer)` changes the model and returns how that is undone."""

    model: Callable[[], tuple[nn.Module, Tensor]]
    optimizer: Callable[[Any], torch.optim.Optimizer]
    grow: Callable[[nn.Module, torch.optim.Optimizer], Callable[[], None]]


def _nothing(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    return lambda: None


def _graft(*grafts: tuple[str, str]) -> Callable[[nn.Module, torch.optim.Optimizer], Callable[[], None]]:
    def grow(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
        for site, blueprint in grafts:
            esper.graft(model, site, blueprint, optimizer=optimizer)

        def undo() -> None:
            for site in {site for site, _ in grafts}:
                esper.cull(model, site, optimizer=optimizer)

        return undo

    return grow


def _rolled_back(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    snapshot = esper.snapshot(model, optimizer)
    esper.graft(model, "0", "widen", optimizer=optimizer)
    return lambda: esper.rollback(snapshot)


def _adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)


def _fused_sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, fused=True)


CYCLES: dict[str, Cycle] = {
    "no growth": Cycle(perceptron, _adamw, _nothing),
    "bottleneck, linear, AdamW": Cycle(perceptron, _adamw, _graft(("2", "bottleneck"))),
    "widen, AdamW": Cycle(perceptron, _adamw, _graft(("0", "widen"))),
    "two kinds at one site, SGD fused": Cycle(perceptron, _fused_sgd, _graft(("2", "lowrank"), ("2", "bottleneck"))),
    "bottleneck, convolution, AdamW": Cycle(convolutional, _adamw, _graft(("3", "bottleneck"))),
    "widen, then rolled back": Cycle(perceptron, _adamw, _rolled_back),
}


def count(model: nn.Module, optimizer: torch.optim.Optimizer) -> Count:
    """Everything that a cycle could leave behind, after a full collection."""
    gc.collect()
    alive = gc.get_objects()
    page = os.sysconf("SC_PAGE_SIZE")
    return Count(
        parameters=sum(p.numel() for p in model.parameters()),
        entries=sum(len(group["params"]) for group in optimizer.param_groups) + len(optimizer.state),
        hooks=sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
        tensors=sum(issubclass(type(item), Tensor) for item in alive),
        objects=len(alive),
        files=len(list(Path("/proc/self/fd").iterdir())),
        resident=int(Path("/proc/self/statm").read_text().split()[1]) * page,
    )


def measure(name: str, cycles: int) -> dict[str, Any]:
    """Run one kind of cycle in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cycle = CYCLES[name]
    model, x = cycle.model()
    esper.wrap(model, example_inputs=x)
    optimizer = cycle.optimizer(model.parameters())
    first = int(cycles * WARM_UP)
    every = max(1, (cycles - first) // SAMPLES)
    samples: list[tuple[int, Count]] = []
    for number in range(cycles + 1):
        if number >= first and (number - first) % every == 0:
            samples.append((number, count(model, optimizer)))
        undo = cycle.grow(model, optimizer)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        undo()
    return {
        "cycle": name,
        "samples": [[number, asdict(found)] for number, found in samples],
        "slope": slope([(number, found.resident) for number, found in samples]),
    }


def slope(points: list[tuple[int, int]]) -> float:
    """Least squares: bytes a cycle."""
    middle = sum(x for x, _ in points) / len(points)
    level = sum(y for _, y in points) / len(points)
    return sum((x - middle) * (y - level) for x, y in points) / sum((x - middle) ** 2 for x, _ in points)


def main() -> None:
    parser = options_of("memory: what graft and cull leave behind")
    parser.add_argument("--cycles", type=int, default=1000, help="cycles of each kind (default: %(default)s)")
    parser.add_argument("--only", choices=CYCLES, help="measure one kind in this process and print it as JSON")
    options = parser.parse_args()
    if options.only is not None:
        print(json.dumps(measure(options.only, options.cycles)))
        return
    report = Report(
        "memory",
        f"What {options.cycles:,} cycles of growth leave behind",
        ("cycle", "parameters", "entries", "hooks", "tensors", "objects", "files", "resident, MB", "bytes a cycle"),
    )
    for name in CYCLES:
        command = [sys.executable, "-m", "benchmarks.engine.memory", "--cycles", str(options.cycles), "--only", name]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        before, after = found["samples"][0][1], found["samples"][-1][1]
        counted = [
            f"{before[key]} -> {after[key]}"
            for key in ("parameters", "entries", "hooks", "tensors", "objects", "files")
        ]
        resident = f"{before['resident'] / 1e6:.1f} -> {after['resident'] / 1e6:.1f}"
        report.rows.append((name, *counted, resident, f"{found['slope']:+.0f}"))
        report.data.append(found)
    report.notes = [
        f"Before and after: at the end of the warm-up (the first {WARM_UP:.0%} of the cycles) and at the end.",
        "Entries: parameters in the optimizer's groups and states that it keeps. Hooks: forward hooks of all modules. "
        "Tensors, objects: what Python's collector sees after a full collection, in the whole process.",
        "Slope: resident memory by cycle, least squares over the samples. The first row grows nothing: its "
        "slope is the noise floor.",
    ]
    report.publish(options)


if __name__ == "__main__":
    main()
