"""A user's task whose size can be chosen, and the same task trained by a plain PyTorch loop in a process of its own.

`python -m benchmarks.engine.workload --rows R --epochs N ...` runs the plain loop and prints one JSON object. The loop
follows the documented recipe (`esper.runtime.tolaria.recipe`), so that an orchestrated run that grows nothing must end
in the same digest: then both did the same work.
"""

import argparse
import json
import os
import random
import time
from pathlib import Path
from typing import Any

import numpy
import torch
from benchmarks.engine.step_log import logged
from torch import Tensor
from torch import nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.utils.data import TensorDataset

import esper

FEATURES = 64
CLASSES = 10
VALIDATION_ROWS = 1024
SPLIT_SEED = 20_011
"""Of the permutation whose first half of the validation data is evaluated after each epoch."""


def network(hidden: int) -> nn.Module:
    """Three linear layers and ReLU."""
    return nn.Sequential(
        nn.Linear(FEATURES, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, CLASSES),
    )


def data(rows: int) -> tuple[TensorDataset, TensorDataset]:
    """Labels of a fixed random teacher; rows for training, and 1,024 for validation."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows + VALIDATION_ROWS, FEATURES, generator=generator)
    first = torch.randn(FEATURES, 32, generator=generator)
    second = torch.randn(32, CLASSES, generator=generator)
    y = (torch.relu(x @ first) @ second).argmax(1)
    return TensorDataset(x[:rows], y[:rows]), TensorDataset(x[rows:], y[rows:])


def loss(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return functional.cross_entropy(model(x), y)


def task(rows: int, hidden: int) -> "esper.Task":
    """What the orchestrated run trains: `task.target: benchmarks.engine.workload:task`."""
    model = network(hidden)
    train, validation = data(rows)
    return esper.Task(model=model, train=train, validation=validation, loss=loss)


def logged_task(rows: int, hidden: int, log: str) -> "esper.Task":
    """`task`, whose AdamW keeps a `step_log` in the folder `log`."""
    made = task(rows, hidden)

    def optimizer(parameters: Any) -> Optimizer:
        return logged(torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0), Path(log))

    made.optimizer = optimizer
    return made


def plain_loop(
    *, rows: int, hidden: int, epochs: int, batch_size: int, seed: int, lr: float, most_steps: int | None
) -> tuple[nn.Module, list[float], list[float]]:
    """The trained model, and of each epoch with its evaluation the seconds of wall time and of CPU time."""
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    model = network(hidden)
    train, validation = data(rows)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    half = torch.randperm(VALIDATION_ROWS, generator=torch.Generator().manual_seed(SPLIT_SEED))
    reported = half[: (VALIDATION_ROWS + 1) // 2].sort().values
    wall: list[float] = []
    cpu: list[float] = []
    for epoch in range(epochs):
        began, worked = time.perf_counter(), time.thread_time()
        order = torch.randperm(rows, generator=torch.Generator().manual_seed((seed + 1) * 1_000_003 + epoch))
        for indices in order.split(batch_size)[:most_steps]:
            optimizer.zero_grad(set_to_none=True)
            loss(model, [tensor[indices] for tensor in train.tensors]).backward()
            optimizer.step()
        with torch.no_grad():
            model.eval()
            for indices in reported.split(batch_size):
                float(loss(model, [tensor[indices] for tensor in validation.tensors]))
            model.train()
        wall.append(time.perf_counter() - began)
        cpu.append(time.thread_time() - worked)
    return model, wall, cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--hidden", type=int, required=True)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--most-steps", type=int, help="end every epoch after so many steps (to see what one costs)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warm_up()
    model, wall, cpu = plain_loop(**vars(options))
    from esper.runtime.kasmina.digest import weights_digest

    print(json.dumps({"epochs": wall, "cpu": cpu, "digest": weights_digest(model), "load": os.getloadavg()[0]}))


def warm_up() -> None:
    """The first optimizer of a process pulls in seconds of imports; a trainer process has them behind it as well."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 2)).sum().backward()
    optimizer.step()


if __name__ == "__main__":
    main()
