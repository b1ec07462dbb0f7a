"""What the trainer ships to the forge of a site: rows of what a kernel reads and of the gradient at its output."""

from collections.abc import Mapping
from dataclasses import dataclass

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from esper.contracts.assets import SiteContract
from esper.errors import BlueprintError
from esper.errors import IntegrityError

_PARTS = ("g", "x", "y")


@dataclass(frozen=True)
class SiteSamples:
    """One probe batch at one site.

    x: (rows, *input_shape), the layer's input, floating or the ids of an embedding; g: (rows, *output_shape), the
    gradient of the loss with respect to the output that a kernel adds to; y: (rows, *output_shape), that output
    itself, for kernels that read it, or None where it was not taken. Any floating dtype; for a pair x is of the first
    layer, g of the second.
    """

    x: Tensor
    g: Tensor
    y: Tensor | None = None


def reads_ids(site: SiteContract) -> bool:
    """Whether a kernel of this site reads whole numbers (the ids of an embedding) and not floating ones."""
    return site.kind == "embedding" and site.reads == "input"


def check_samples(samples: SiteSamples, site: SiteContract) -> None:
    """Raises BlueprintError ESP-414 when shapes are not the site's, ESP-417 when a number is not what it must be:
    finite and floating, or the id of a row."""
    rows = samples.x.shape[0] if samples.x.dim() else 0
    for name, tensor, shape in (("x", samples.x, site.input_shape), ("g", samples.g, site.output_shape)):
        where = f"samples of site '{site.site}': {name}"
        if rows < 1 or tuple(tensor.shape) != (rows, *shape):
            raise BlueprintError("ESP-414", f"{where} is {tuple(tensor.shape)}, must be (rows, *{shape})")
        if name == "x" and reads_ids(site):
            count = _embeddings(site)
            if tensor.is_floating_point() or bool((tensor < 0).any()) or bool((tensor >= count).any()):
                raise BlueprintError("ESP-417", f"{where} must be whole numbers from 0 to {count - 1}")
        elif not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise BlueprintError("ESP-417", f"{where} must be finite floating numbers")


def samples_for(site: SiteContract, samples: Mapping[str, SiteSamples]) -> SiteSamples | None:
    """The samples of one contract out of a model's: what it reads as x (the output where it `reads` that), g of the
    site that is added to. None where they were not taken."""
    source, target = samples.get(site.site), samples.get(site.output_site)
    if source is None or target is None:
        return None
    read = source.y if site.reads == "output" else source.x
    return None if read is None else SiteSamples(read, target.g)


def pack_samples(samples: Mapping[str, SiteSamples]) -> bytes:
    """A safetensors file of the samples of many sites; equal samples give equal bytes."""
    tensors = {}
    for site in sorted(samples):
        for part in _PARTS:
            tensor = getattr(samples[site], part)
            if tensor is not None:
                tensors[f"{site}:{part}"] = tensor.detach().cpu().contiguous().clone()
    return safetensors.torch.save(tensors)


def unpack_samples(data: bytes) -> dict[str, SiteSamples]:
    """The inverse of `pack_samples`. Raises IntegrityError ESP-403 on anything else."""
    try:
        tensors = safetensors.torch.load(data)
        found: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            site, _, part = name.rpartition(":")
            found.setdefault(site, {})[part] = tensor.clone()
        if any(not {"x", "g"} <= parts.keys() <= set(_PARTS) for parts in found.values()):
            raise ValueError("every site needs x and g, and may have y")
    except (SafetensorError, KeyError, ValueError) as error:
        raise IntegrityError("ESP-403", f"site samples: not a file of samples: {error}") from error
    return {site: SiteSamples(**parts) for site, parts in sorted(found.items())}


def sample_rows(samples: SiteSamples, limit: int) -> SiteSamples:
    """The first `limit` rows, on the CPU."""
    y = None if samples.y is None else samples.y[:limit].detach().cpu()
    return SiteSamples(samples.x[:limit].detach().cpu(), samples.g[:limit].detach().cpu(), y)


def seeded_samples(site: SiteContract, dtype: torch.dtype, rows: int, generator: torch.Generator) -> SiteSamples:
    """Standard normal stand-ins, or ids drawn evenly, where a site shipped none."""
    if reads_ids(site):
        shape = (rows, *site.input_shape)
        x = torch.randint(0, _embeddings(site), shape, generator=generator, device="cpu")
    else:
        x = torch.randn((rows, *site.input_shape), generator=generator, device="cpu", dtype=torch.float32).to(dtype)
    g = torch.randn((rows, *site.output_shape), generator=generator, device="cpu", dtype=torch.float32)
    return SiteSamples(x, g.to(dtype))


def _embeddings(site: SiteContract) -> int:
    count = site.attributes.get("num_embeddings")
    if not isinstance(count, int):
        raise BlueprintError("ESP-417", f"site '{site.site}': an embedding needs 'num_embeddings', it has {count!r}")
    return count
