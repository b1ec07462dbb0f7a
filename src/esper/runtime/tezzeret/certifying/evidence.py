"""What a certificate is measured on: rows of the site's input X and of the gradient G at its output."""

import math

import torch

from esper.contracts.assets import SiteContract
from esper.runtime.tezzeret.module import TORCH_DTYPES
from esper.runtime.tezzeret.samples import SiteSamples
from esper.runtime.tezzeret.samples import reads_ids
from esper.runtime.tezzeret.samples import sample_rows
from esper.runtime.tezzeret.samples import seeded_samples

SHIPPED_ROWS = 256
SEEDED_ROWS = 64
FEWEST_ROWS = 4
"""There are so many however large the site is: a batch norm needs two, and memory is counted on two and on four."""
MAX_ELEMENTS = 2**18
"""The most elements of X, and of G: a site that reads (1024, 768) is measured on few rows, not on 200 MB."""


def evidence_of(site: SiteContract, samples: SiteSamples | None, seed: int) -> SiteSamples:
    """X (rows, *input_shape) and G (rows, *output_shape) on the CPU, in the site's dtype but for ids of an embedding.

    Shipped samples as they are; a gradient of zero everywhere proves nothing and is replaced by a seeded one.
    Without samples: standard normal rows, or ids drawn uniformly, and a gradient of one over the number of rows.
    """
    dtype = TORCH_DTYPES[site.dtype]
    generator = torch.Generator(device="cpu").manual_seed(seed)
    if samples is None:
        rows = _rows(site, SEEDED_ROWS)
        drawn = seeded_samples(site, dtype, rows, generator)
        return SiteSamples(drawn.x, drawn.g / rows)
    shipped = sample_rows(samples, min(samples.x.shape[0], _rows(site, SHIPPED_ROWS)))
    x = shipped.x if reads_ids(site) else shipped.x.to(dtype)
    g = shipped.g.to(dtype)
    return SiteSamples(x, g if bool(g.any()) else seeded_samples(site, dtype, x.shape[0], generator).g / x.shape[0])


def _rows(site: SiteContract, wanted: int) -> int:
    largest = max(math.prod(site.input_shape), math.prod(site.output_shape), 1)
    return max(FEWEST_ROWS, min(wanted, MAX_ELEMENTS // largest))
