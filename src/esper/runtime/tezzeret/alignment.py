"""First weights of a kernel from data: hidden features that explain what the layer cannot express yet.

The residual functional gradient is R = G - [X, 1] W*: the gradient at the output after what is linear in the
layer's own input has been regressed out (TINY, arXiv 2405.19816; SENN, arXiv 2307.04526). Directions are chosen
greedily from a pool by how much energy of R their features take away (orthogonal matching pursuit). All of it is
computed in float64 on the CPU and drawn from the caller's generator: equal input gives equal bytes at one thread
count.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from esper.runtime.tezzeret.operations.convolutions import Conv1dAttributes
from esper.runtime.tezzeret.operations.convolutions import ConvAttributes
from esper.runtime.tezzeret.operations.convolutions import padding_amounts

MAX_ROWS = 2048
POOL_PER_UNIT = 2
MAX_ALIGNED = 256
"""So many units are aligned; more of them are Kaiming. The pursuit costs pool^2 rows."""
RIDGE = 1e-3
QUANTILES = (0.25, 0.5, 0.75)
LONGEST_ROW = 8.0
"""A data-driven row may be so many times as long as a Kaiming row: a direction without variance is noise."""

GAINS = {"relu": math.sqrt(2.0), "gelu": math.sqrt(2.0), "silu": math.sqrt(2.0), "tanh": 5.0 / 3.0, "sigmoid": 1.0}
"""`torch.nn.init.calculate_gain`; GELU and SiLU as ReLU."""

ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


@dataclass(frozen=True)
class Rows:
    """Input and output gradient as matrices: x (rows, inputs), g (rows, outputs), float64."""

    x: Tensor
    g: Tensor


def linear_rows(x: Tensor, g: Tensor, generator: torch.Generator) -> Rows:
    """Rows of a linear layer: every leading dimension is a row."""
    return _subsampled(x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1]), generator)


def convolution_rows(x: Tensor, g: Tensor, attributes: ConvAttributes, generator: torch.Generator) -> Rows:
    """Rows of a convolution over one or two axes: one per output position, the input is the unfolded patch
    (channels, *window)."""
    # A few samples hold enough positions: unfolding all of them would take kernel-area times the memory.
    keep = min(x.shape[0], max(1, math.ceil(8 * MAX_ROWS / math.prod(g.shape[2:]))))
    mode = "constant" if attributes.padding_mode == "zeros" else attributes.padding_mode
    amounts = [amount for pair in reversed(padding_amounts(attributes)) for amount in pair]
    padded = functional.pad(x[:keep].double(), amounts, mode=mode)
    window, dilation, stride = attributes.kernel_size, attributes.dilation, attributes.stride
    if isinstance(attributes, Conv1dAttributes):
        # Unfolding knows images only: a sequence is one of height one.
        padded, window, dilation, stride = padded.unsqueeze(2), (1, *window), (1, *dilation), (1, *stride)
    patches = functional.unfold(padded, window, dilation=dilation, stride=stride)
    flat = patches.transpose(1, 2).reshape(-1, patches.shape[1])
    return _subsampled(flat, g[:keep].flatten(2).transpose(1, 2).reshape(-1, g.shape[1]), generator)


def kaiming_uniform(
    shape: tuple[int, ...], gain: float, generator: torch.Generator, fan_in: int | None = None
) -> Tensor:
    """Uniform with variance gain^2 / fan_in (He et al., arXiv 1502.01852), float64; `fan_in` is by default what one
    row of a weight (outputs, inputs, *window) sums up."""
    bound = gain * math.sqrt(3.0 / (math.prod(shape[1:]) if fan_in is None else fan_in))
    draw = torch.rand(shape, generator=generator, device="cpu", dtype=torch.float64)
    return (2.0 * draw - 1.0) * bound


def residual_gradient(rows: Rows) -> Tensor:
    """R = G - [X, 1] W*, W* by ridge regression (relative strength `RIDGE`), in the primal or dual form, whichever
    is smaller. Shape (rows, outputs)."""
    x = rows.x - rows.x.mean(dim=0)
    g = rows.g - rows.g.mean(dim=0)
    count, width = x.shape
    energy = float(x.square().sum())
    if energy == 0.0:
        return g
    eye = torch.eye(min(count, width), dtype=torch.float64, device="cpu")
    strength = RIDGE * energy / min(count, width)
    if width <= count:
        solution: Tensor = torch.linalg.solve(x.T @ x + strength * eye, x.T @ g)
        return g - x @ solution
    dual: Tensor = torch.linalg.solve(x @ x.T + strength * eye, g)
    return strength * dual


def aligned_rows(
    rows: Rows, units: int, activation: str | None, generator: torch.Generator
) -> tuple[Tensor, Tensor] | None:
    """(weight (units, inputs), bias (units,)) of a first operation, float64; None when the gradient is zero or the
    samples vary in too few directions. At most `MAX_ALIGNED` units.

    Without an activation features are linear in x, R holds nothing of them, and the target is the centred G; the
    bias is then zero. Rows are scaled so that pre-activations vary as Kaiming weights would make them; biases put
    the threshold at a quantile of the samples.
    """
    gain = 1.0 if activation is None else GAINS[activation]
    centred = rows.x - rows.x.mean(dim=0)
    spread = math.sqrt(float(centred.square().mean()))
    target = rows.g - rows.g.mean(dim=0) if activation is None else residual_gradient(rows)
    if spread == 0.0 or float(target.square().sum()) == 0.0:
        return None
    pool = _pool(rows, target, units, gain, generator)
    projected = centred @ pool.T
    deviation = projected.square().mean(dim=0).sqrt()
    scale = gain * spread / deviation.clamp_min(1e-300)
    usable = (deviation > 0.0) & (scale * pool.norm(dim=1) <= LONGEST_ROW * gain)
    weight = pool[usable] * scale[usable, None]
    if weight.shape[0] < units:
        return None
    before = rows.x @ weight.T
    if activation is None:
        bias = torch.zeros(weight.shape[0], dtype=torch.float64, device="cpu")
        hidden = before
    else:
        levels = torch.tensor(QUANTILES, dtype=torch.float64, device="cpu")
        which = torch.arange(weight.shape[0], device="cpu") % len(QUANTILES)
        bias = -torch.quantile(before, levels, dim=0).gather(0, which[None, :])[0]
        hidden = ACTIVATION_FUNCTIONS[activation](before + bias)
    chosen = _pursue(hidden - hidden.mean(dim=0), target, units)
    return weight[chosen], bias[chosen]


def _pool(rows: Rows, target: Tensor, units: int, gain: float, generator: torch.Generator) -> Tensor:
    """Candidate directions (many, inputs): Kaiming ones (always enough of them), the leading directions of X^T G
    with both signs, and differences of samples, drawn where the target is strong."""
    width = rows.x.shape[1]
    random = kaiming_uniform(((1 + POOL_PER_UNIT) * units, width), gain, generator)
    centred = rows.x - rows.x.mean(dim=0)
    cross = centred.T @ (rows.g - rows.g.mean(dim=0))
    leading = torch.linalg.svd(cross, full_matrices=False)[0].T[:units]
    strength = target.square().sum(dim=1)
    count = POOL_PER_UNIT * units
    ends = torch.multinomial(strength, 2 * count, replacement=True, generator=generator)
    differences = rows.x[ends[:count]] - rows.x[ends[count:]]
    return torch.cat((random, leading, -leading, differences))


def _pursue(hidden: Tensor, target: Tensor, units: int) -> Tensor:
    """Indices of `units` columns of `hidden`, greedily by the energy of `target` that each one takes away after
    those before it. Works on the Gram matrix with a growing Cholesky factor: columns * units^2 in all."""
    gram = hidden.T @ hidden
    cross = hidden.T @ target
    energy = gram.diagonal().clone()
    floor = 1e-9 * float(energy.max())
    open_columns = torch.ones(hidden.shape[1], dtype=torch.bool, device="cpu")
    factor = torch.zeros((hidden.shape[1], units), dtype=torch.float64, device="cpu")
    chosen: list[int] = []
    for step in range(units):
        score = cross.square().sum(dim=1) / energy.clamp_min(1e-300)
        # A column that those before it already span adds nothing; it comes last, in order.
        score = torch.where(energy > floor, score, torch.zeros_like(score))
        best = int(score.masked_fill(~open_columns, -1.0).argmax())
        chosen.append(best)
        open_columns[best] = False
        left = float(energy[best])
        if left > floor:
            column = (gram[:, best] - factor[:, :step] @ factor[best, :step]) / math.sqrt(left)
            factor[:, step] = column
            cross = cross - torch.outer(column, cross[best] / math.sqrt(left))
            energy = energy - column.square()
    return torch.tensor(chosen, dtype=torch.int64, device="cpu")


def _subsampled(x: Tensor, g: Tensor, generator: torch.Generator) -> Rows:
    if x.shape[0] > MAX_ROWS:
        keep = torch.randperm(x.shape[0], generator=generator, device="cpu")[:MAX_ROWS]
        x, g = x[keep], g[keep]
    return Rows(x.double(), g.double())
