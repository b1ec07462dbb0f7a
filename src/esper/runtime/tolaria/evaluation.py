"""Measuring a model on data without touching it: reported metrics, and the judge's losses by chunk."""

from collections.abc import Callable
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch import nn

from esper.runtime.kasmina.wrapping.undisturbed import undisturbed
from esper.runtime.tolaria.sampler import Batches

SPLIT_SEED = 20_011
JUDGE_CHUNK_ROWS = 32
JUDGE_CHUNKS = 32
"""At least so many chunks where there are eight rows for each: with 8 chunks a third of the judge's power is lost."""
JUDGE_LOOKS = 3
"""Losses are means over so many epoch ends, the last at the verdict: at any one step the noise of training makes one
of two equal runs the better one."""

LossFunction = Callable[[nn.Module, Any], Tensor]
MetricsFunction = Callable[[nn.Module, Any], dict[str, Tensor]]


def split_validation(rows: int) -> tuple[Tensor, Tensor]:
    """Row numbers (reported, judge) of the validation data: a third and the rest of one fixed permutation, int64, each
    sorted.

    The judge's part is neither trained on nor reported, so that a verdict is not taken on what was watched.
    """
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(SPLIT_SEED))
    reported = (rows + 2) // 3
    return order[:reported].sort().values, order[reported:].sort().values


def evaluate(
    model: nn.Module,
    batches: Batches,
    rows: Tensor,
    batch_size: int,
    loss: LossFunction,
    metrics: MetricsFunction | None,
    tick: Callable[[], None],
) -> tuple[float, dict[str, float]]:
    """Means over samples of the loss and of the task's metrics, in eval mode and without gradients.

    A metric that gives one value a row is averaged over rows; one that gives a single value counts as the mean of
    its batch. Sums are kept in float64. `tick` is called before each batch.
    """
    total_loss = 0.0
    sums: dict[str, float] = {}
    with undisturbed(model), torch.no_grad():
        model.eval()
        for chunk in torch.split(rows, batch_size):
            tick()
            batch = batches.rows(chunk)
            total_loss += float(loss(model, batch)) * len(chunk)
            for name, value in (metrics(model, batch) if metrics is not None else {}).items():
                values = value.detach().to(torch.float64)
                sums[name] = sums.get(name, 0.0) + float(values.mean()) * len(chunk)
    count = len(rows)
    return total_loss / count, {name: total / count for name, total in sums.items()}


def judge_chunks(rows: Tensor) -> tuple[Tensor, ...]:
    """The judge's rows in chunks of about 32, or fewer where that makes less than 32 chunks, but not below eight; at
    least two where there are two rows, as equal as can be."""
    chunks = max(round(len(rows) / JUDGE_CHUNK_ROWS), min(JUDGE_CHUNKS, len(rows) // 8))
    return rows.tensor_split(max(min(2, len(rows)), chunks))


def chunk_losses(model: nn.Module, batches: Batches, chunks: Sequence[Tensor], loss: LossFunction) -> list[float]:
    """The mean loss of each chunk, in eval mode and without gradients."""
    with undisturbed(model), torch.no_grad():
        model.eval()
        return [float(loss(model, batches.rows(chunk))) for chunk in chunks]


def mean_look(looks: Sequence[Sequence[float]]) -> list[float]:
    """The loss of each chunk, averaged over looks that are equally many for both models."""
    return [fmean(chunk) for chunk in zip(*looks, strict=True)]
