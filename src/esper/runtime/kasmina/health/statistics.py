"""What rows of a layer say of it: how many of its directions are in use, what its input cannot explain, how noisy its
gradient is. Pure functions of matrices."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from esper.runtime.kasmina.health.rows import evenly

MAX_UNITS = 1024
"""Units that spectra and correlations are taken over, evenly chosen where a layer has more."""
NOISE_UNITS = 64
"""Inputs and outputs that the gradient's noise is taken over, evenly chosen."""
NOISE_PARTS = 8
"""Parts of the batch whose gradients are compared."""


@dataclass(frozen=True)
class Spread:
    """`saturation` is exp(entropy(s / sum s)) / width for the singular values s of centred rows, NORTH (arXiv
    2202.08539); 1: every unit carries its own direction. `correlation` is the mean Pearson correlation between two
    different units. None where there are too few rows or units to know."""

    saturation: float | None
    correlation: float | None


def spread(y: Tensor) -> Spread:
    """Of outputs y (rows, units), float64. The saturation needs as many rows as there are units."""
    y = y[:, evenly(y.shape[1], MAX_UNITS)]
    centred = y - y.mean(0)
    # The Gram matrix in float64 costs half of the singular value decomposition; what it loses of the smallest
    # values (below 1e-8 of the largest) weighs nothing in the entropy.
    gram = centred.T @ centred
    return Spread(_saturation(gram) if y.shape[0] >= y.shape[1] else None, _correlation(gram))


def saturation(y: Tensor) -> float | None:
    """See `Spread`."""
    return spread(y).saturation


def residual_gradient(x: Tensor, g: Tensor) -> tuple[float | None, float | None]:
    """The share of the energy of g (rows, fan out) that no affine function of x (rows, fan in) explains, and the
    Frobenius norm of that rest (TINY, arXiv 2405.19816; SENN, arXiv 2307.04526). None with fewer than twice as many
    rows as x has columns. float64."""
    rows, width = x.shape
    if rows < 2 * (width + 1) or not bool(torch.isfinite(x).all() and torch.isfinite(g).all()):
        return None, None
    energy = float(g.square().sum())
    if energy == 0.0:
        return 0.0, 0.0
    design = torch.cat([x, torch.ones(rows, 1, dtype=x.dtype)], dim=1)
    # gelsy pivots: inputs that never vary (an image's border) make the design rank-deficient.
    solution = torch.linalg.lstsq(design, g, driver="gelsy").solution
    rest = float((g - design @ solution).square().sum())
    return min(1.0, rest / energy), math.sqrt(rest)


def signal_to_noise(x: Tensor, g: Tensor, samples: int) -> float | None:
    """|G|^2 / tr(S) of the weight gradient, G its mean and S the covariance of one sample's: the inverse of the simple
    noise scale of McCandlish et al. (arXiv 1812.06162, section 2.2).

    x (rows, fan in) and g (rows, fan out) are rows of `samples` samples, in the order of the samples; estimated from
    the gradients x^T g of `NOISE_PARTS` parts, without the bias that the noise adds to |G|^2. None with fewer than two
    samples a part, or without a gradient.
    """
    rows = min(x.shape[0], g.shape[0])
    if samples < 2 * NOISE_PARTS or rows < 2 * NOISE_PARTS:
        return None
    x = x[:, evenly(x.shape[1], NOISE_UNITS)]
    g = g[:, evenly(g.shape[1], NOISE_UNITS)]
    each = rows // NOISE_PARTS
    used = each * NOISE_PARTS
    parts = x[:used].reshape(NOISE_PARTS, each, -1).transpose(1, 2) @ g[:used].reshape(NOISE_PARTS, each, -1)
    mean = parts.mean(0)
    of_parts = float((parts - mean).square().sum()) / (NOISE_PARTS - 1)
    signal = float(mean.square().sum()) - of_parts / NOISE_PARTS
    noise = of_parts * (samples / NOISE_PARTS)
    if not math.isfinite(noise) or noise <= 0.0:
        return None
    return max(0.0, signal) / noise


def _saturation(gram: Tensor) -> float:
    s = torch.linalg.eigvalsh(gram).clamp_min(0.0).sqrt()
    total = float(s.sum())
    if total == 0.0:
        return 0.0
    p = s / total
    entropy = -float(torch.xlogy(p, p).sum())
    return math.exp(entropy) / gram.shape[0]


def _correlation(gram: Tensor) -> float | None:
    """None with fewer than two units that vary."""
    scale = gram.diagonal().clamp_min(0.0).sqrt()
    varying = scale > 0
    units = int(varying.sum())
    if units < 2:
        return None
    inverse = torch.where(varying, 1.0 / scale, torch.zeros_like(scale))
    total = float(inverse @ gram @ inverse)
    return max(-1.0, min(1.0, (total - units) / (units * (units - 1))))
