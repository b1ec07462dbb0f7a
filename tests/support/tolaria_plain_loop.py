"""The recipe in plain PyTorch, without a line of esper in the loop: what a session must match to the bit."""

import math
import random
from collections.abc import Callable

import numpy
import torch
from torch import nn


def plain_loop(
    make_task: Callable[[], tuple[nn.Module, torch.utils.data.TensorDataset, Callable]],
    make_optimizer: Callable,
    *,
    seed: int,
    epochs: int,
    batch_size: int,
    lr: float,
    schedule: str = "constant",
    warmup: float = 0.0,
    clip: float | None = None,
    stop_after: int | None = None,
) -> nn.Module:
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    model, train, loss_function = make_task()
    optimizer = make_optimizer(model.parameters())
    rows = len(train)
    total = epochs * math.ceil(rows / batch_size)
    warmup_steps = round(warmup * total)
    step = 0
    for epoch in range(epochs):
        generator = torch.Generator()
        generator.manual_seed((seed + 1) * 1_000_003 + epoch)
        for indices in torch.randperm(rows, generator=generator).split(batch_size):
            if step == stop_after:
                return model
            if step < warmup_steps:
                factor = (step + 1) / warmup_steps
            else:
                progress = (step - warmup_steps) / (total - warmup_steps)
                factor = {
                    "constant": 1.0,
                    "linear": 1.0 - progress,
                    "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
                }[schedule]
            optimizer.zero_grad(set_to_none=True)
            loss_function(model, [tensor[indices] for tensor in train.tensors]).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
            optimizer.step()
            step += 1
    return model
