"""What the trainer ships to the forge of a site: rows of its input and of the gradient at its output."""

from collections.abc import Mapping
from dataclasses import dataclass

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from esper.contracts.assets import SiteContract
from esper.errors import BlueprintError
from esper.errors import IntegrityError


@dataclass(frozen=True)
class SiteSamples:
    """One probe batch at one site.

    x: (rows, *input_shape), the layer's input; g: (rows, *output_shape), the gradient of the loss with respect to
    the output that a kernel adds to. Any floating dtype; for a pair x is of the first layer, g of the second.
    """

    x: Tensor
    g: Tensor


def check_samples(samples: SiteSamples, site: SiteContract) -> None:
    """Raises BlueprintError ESP-414 when shapes are not the site's, ESP-417 when a number is not finite."""
    rows = samples.x.shape[0] if samples.x.dim() else 0
    for name, tensor, shape in (("x", samples.x, site.input_shape), ("g", samples.g, site.output_shape)):
        if rows < 1 or tuple(tensor.shape) != (rows, *shape):
            raise BlueprintError(
                "ESP-414", f"samples of site '{site.site}': {name} is {tuple(tensor.shape)}, must be (rows, *{shape})"
            )
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise BlueprintError("ESP-417", f"samples of site '{site.site}': {name} must be finite floating numbers")


def samples_for(site: SiteContract, samples: Mapping[str, SiteSamples]) -> SiteSamples | None:
    """The samples of one contract out of a model's: x of the site that is read, g of the one that is added to."""
    source, target = samples.get(site.site), samples.get(site.output_site)
    return SiteSamples(source.x, target.g) if source is not None and target is not None else None


def pack_samples(samples: Mapping[str, SiteSamples]) -> bytes:
    """A safetensors file of the samples of many sites; equal samples give equal bytes."""
    tensors = {}
    for site in sorted(samples):
        tensors[f"{site}:g"] = samples[site].g.detach().cpu().contiguous().clone()
        tensors[f"{site}:x"] = samples[site].x.detach().cpu().contiguous().clone()
    return safetensors.torch.save(tensors)


def unpack_samples(data: bytes) -> dict[str, SiteSamples]:
    """The inverse of `pack_samples`. Raises IntegrityError ESP-403 on anything else."""
    try:
        tensors = safetensors.torch.load(data)
        sites = sorted({name.removesuffix(":x") for name in tensors if name.endswith(":x")})
        if sorted(tensors) != sorted(f"{site}:{part}" for site in sites for part in "gx"):
            raise ValueError("every site needs x and g")
    except (SafetensorError, KeyError, ValueError) as error:
        raise IntegrityError("ESP-403", f"site samples: not a file of samples: {error}") from error
    return {site: SiteSamples(tensors[f"{site}:x"].clone(), tensors[f"{site}:g"].clone()) for site in sites}


def sample_rows(samples: SiteSamples, limit: int) -> SiteSamples:
    """The first `limit` rows, on the CPU."""
    return SiteSamples(samples.x[:limit].detach().cpu(), samples.g[:limit].detach().cpu())


def seeded_samples(site: SiteContract, dtype: torch.dtype, rows: int, generator: torch.Generator) -> SiteSamples:
    """Standard normal stand-ins where a site shipped none."""
    x = torch.randn((rows, *site.input_shape), generator=generator, device="cpu", dtype=torch.float32)
    g = torch.randn((rows, *site.output_shape), generator=generator, device="cpu", dtype=torch.float32)
    return SiteSamples(x.to(dtype), g.to(dtype))
