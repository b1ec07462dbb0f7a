"""A grown model as two files: `growth.json` (structure, digests) and `model.safetensors` (weights).

Nothing is ever unpickled, and one flipped bit in either file is refused. Codes of `IntegrityError`:

    ESP-401 digest                      ESP-407 a file is missing, truncated or not of the format
    ESP-404 damaged kernel manifest     ESP-408 of another architecture than the base
"""

import glob
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import safetensors.torch
from pydantic import Field
from pydantic import ValidationError
from torch import Tensor
from torch import nn

from esper.contracts.assets import ArtifactRef
from esper.contracts.base import Contract
from esper.contracts.base import Digest
from esper.errors import ConfigurationError
from esper.errors import EsperError
from esper.errors import IntegrityError
from esper.runtime.atomic_file import write_atomically
from esper.runtime.kasmina.cache import kernel_cache
from esper.runtime.kasmina.digest import dtype_name
from esper.runtime.kasmina.digest import tensors_digest
from esper.runtime.kasmina.digest import weights_digest
from esper.runtime.kasmina.keeping.manifest import GrowthManifest
from esper.runtime.kasmina.keeping.manifest import grown_tensors
from esper.runtime.kasmina.keeping.manifest import growth_manifest
from esper.runtime.kasmina.keeping.manifest import longer_tensors
from esper.runtime.kasmina.keeping.manifest import rebuild
from esper.runtime.kasmina.keeping.unwrap import unwrap
from esper.runtime.kasmina.keeping.weights_file import StoredTensor
from esper.runtime.kasmina.keeping.weights_file import described
from esper.runtime.kasmina.keeping.weights_file import read_weights
from esper.runtime.kasmina.keeping.weights_file import unique_tensors
from esper.runtime.kasmina.model import wrap
from esper.runtime.kasmina.wrapping.morphable import M
from esper.runtime.tezzeret.artifact import digest_of
from esper.runtime.tezzeret.ir import canonical_json

GROWTH_FILE = "growth.json"
WEIGHTS_FILE = "model.safetensors"


class SavedGrowth(Contract):
    """The content of `growth.json`: canonical JSON, whose `digest` is the sha256 of all the rest."""

    schema_version: Literal[1] = 1
    growth: GrowthManifest
    weights: ArtifactRef
    weights_digest: Digest
    tied: dict[str, str]
    """Names that share one tensor with another name: only that other one is stored."""
    tensors: dict[str, StoredTensor] = Field(default_factory=dict)
    """What is stored, by name: so that damage is told by its tensor."""


def save(model: nn.Module, folder: str | Path) -> None:
    """Write a wrapped model to `folder`, which is made; files that are there are replaced, each at once.

    Raises SiteError ESP-314 (not wrapped), GrowthError ESP-438 (extra state that is no tensor), ConfigurationError
    ESP-208 (a folder that cannot be written).
    """
    files = saved_files(model)
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        # The document last: it names the weights, so a write that breaks off is found.
        write_atomically(path / WEIGHTS_FILE, files[WEIGHTS_FILE])
        write_atomically(path / GROWTH_FILE, files[GROWTH_FILE])
    except OSError as error:
        raise ConfigurationError("ESP-208", f"cannot save to '{path}': {error.strerror or error}") from error


def saved_files(model: nn.Module) -> dict[str, bytes]:
    """What `save` writes, by file name. Raises SiteError ESP-314, GrowthError ESP-438."""
    manifest = growth_manifest(model)
    tensors, tied = unique_tensors(model)
    weights = safetensors.torch.save(tensors)
    document = SavedGrowth(
        growth=manifest,
        weights=ArtifactRef(digest=digest_of(weights), size_bytes=len(weights)),
        weights_digest=weights_digest(model),
        tied=tied,
        tensors=described(tensors),
    )
    return {WEIGHTS_FILE: weights, GROWTH_FILE: growth_bytes(document)}


def load(folder: str | Path, base: M) -> M:
    """Put a saved model onto a plain base of the same architecture and return it wrapped, in place.

    Both files are verified before the base is touched; the base keeps its device. Raises IntegrityError ESP-401,
    ESP-404, ESP-407, ESP-408, SiteError ESP-314 (a base that cannot be wrapped).
    """
    document, tensors = read_saved(folder)
    _check_base(base, document, tensors)
    names = [glob.escape(site.site) for site in document.growth.sites]
    held = max(1, kernel_cache().limit // 2**20)
    wrap(base, names, seeds_per_layer=document.growth.seeds_per_layer, cache_size_mb=held)
    try:
        rebuild(base, document.growth)
    except EsperError:
        # It checks before it changes anything: only the wrapping has to be undone.
        unwrap(base)
        raise
    base.load_state_dict(tensors, strict=True)
    return base


def read_saved(folder: str | Path) -> tuple[SavedGrowth, dict[str, Tensor]]:
    """The verified content of a saved folder: its document, and every tensor of the model's `state_dict()` by name
    (tied names hold one tensor). Raises IntegrityError ESP-401, ESP-407."""
    path = Path(folder)
    document = _read_growth(path / GROWTH_FILE)
    weights = path / WEIGHTS_FILE
    tensors = read_weights(weights, _read(weights), document.weights, document.tensors)
    missing = sorted(set(document.tied.values()) - tensors.keys())
    if missing:
        raise IntegrityError("ESP-407", f"'{weights}' lacks the tensor '{missing[0]}', which others share")
    tensors |= {name: tensors[source] for name, source in document.tied.items()}
    found = tensors_digest(tensors)
    if found != document.weights_digest:
        raise IntegrityError(
            "ESP-401", f"the weights in '{weights}' are {found[:19]}, saved were {document.weights_digest[:19]}"
        )
    return document, tensors


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise IntegrityError("ESP-407", f"'{path}' cannot be read: {error.strerror or error}") from error


def _read_growth(path: Path) -> SavedGrowth:
    data = _read(path)
    try:
        body = json.loads(data)
        digest = body.pop("digest")
        canonical = canonical_json({**body, "digest": digest})
        own = digest_of(canonical_json(body))
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise IntegrityError("ESP-407", f"'{path}' is damaged: it is not what esper.save writes") from error
    if canonical != data or own != digest:
        raise IntegrityError("ESP-401", f"'{path}' is damaged: its digest is not the one it names")
    try:
        return SavedGrowth.model_validate_json(canonical_json(body))
    except ValidationError as error:
        raise IntegrityError("ESP-407", f"'{path}' is of another format: {error.errors()[0]['msg']}") from error


def _check_base(base: nn.Module, document: SavedGrowth, tensors: Mapping[str, Tensor]) -> None:
    """Every tensor of the base and of the blocks is there with its shape and dtype (units that were added for good
    make some of the base's longer), and the file has no other."""
    needed = _needed(base, document)
    missing, extra = sorted(needed.keys() - tensors.keys()), sorted(tensors.keys() - needed.keys())
    if missing or extra:
        told = f"lacks {', '.join(missing[:3])}" if missing else f"also has {', '.join(extra[:3])}"
        raise IntegrityError("ESP-408", f"the saved model is of another architecture: it {told}")
    for name, (dtype, shape) in needed.items():
        found = tensors[name]
        if tuple(found.shape) != shape or dtype_name(found.dtype) != dtype:
            raise IntegrityError(
                "ESP-408",
                f"'{name}' is {dtype_name(found.dtype)} {tuple(found.shape)}, the base needs {dtype} {shape}",
                hint="give a base of the same architecture and dtype",
            )


def _needed(base: nn.Module, document: SavedGrowth) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype, shape) of every tensor that the grown model has: the base's and the blocks'."""
    needed = {
        name: (dtype_name(tensor.dtype), tuple(tensor.shape))
        for name, tensor in base.state_dict().items()
        if isinstance(tensor, Tensor)
    }
    longer, grown = longer_tensors(document.growth, base), grown_tensors(document.growth)
    modules: dict[str, nn.Module] = dict(base.named_modules(remove_duplicate=False))
    for owner in {**longer, **{site.site: () for site in document.growth.sites}}:
        # A layer that is reached by several names has its tensors under each of them.
        places = [name for name, module in modules.items() if module is modules.get(owner)] or [owner]
        for place in places:
            for name, shape in longer.get(owner, {}).items():
                known = needed.get(f"{place}.{name}") or needed[f"{place}.weight"]
                needed[f"{place}.{name}"] = (known[0], shape)
            for name, spec in grown.items():
                if name.startswith(f"{owner}.kasmina."):
                    needed[place + name.removeprefix(owner)] = (spec.dtype, spec.shape)
    return needed


def growth_bytes(document: SavedGrowth) -> bytes:
    """`growth.json`: canonical, with the digest of everything else in it."""
    body = document.model_dump(mode="json")
    return canonical_json({**body, "digest": digest_of(canonical_json(body))})
