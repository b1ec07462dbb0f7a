"""A grown model as two files: `growth.json` (structure, digests) and `model.safetensors` (weights).

Nothing is ever unpickled, and one flipped bit in either file is refused. Codes of `IntegrityError`:

    ESP-401 digest                      ESP-407 a file is missing, truncated or not of the format
    ESP-404 damaged kernel manifest     ESP-408 of another architecture than the base
"""

import glob
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import safetensors.torch
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor
from torch import nn

from esper.contracts.assets import ArtifactRef
from esper.contracts.base import Contract
from esper.contracts.base import Digest
from esper.errors import ConfigurationError
from esper.errors import GrowthError
from esper.errors import IntegrityError
from esper.runtime.kasmina.cache import kernel_cache
from esper.runtime.kasmina.digest import weights_digest
from esper.runtime.kasmina.keeping.manifest import GrowthManifest
from esper.runtime.kasmina.keeping.manifest import added_units
from esper.runtime.kasmina.keeping.manifest import growth_manifest
from esper.runtime.kasmina.keeping.manifest import lengthened_shapes
from esper.runtime.kasmina.keeping.manifest import rebuild
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


def save(model: nn.Module, folder: str | Path) -> None:
    """Write a wrapped model to `folder`, which is made; files that are there are replaced, each at once.

    Raises SiteError ESP-314 (not wrapped), GrowthError ESP-438 (extra state that is no tensor), ConfigurationError
    ESP-208 (a folder that cannot be written).
    """
    manifest = growth_manifest(model)
    tensors, tied = unique_tensors(model)
    weights = safetensors.torch.save(tensors)
    document = SavedGrowth(
        growth=manifest,
        weights=ArtifactRef(digest=digest_of(weights), size_bytes=len(weights)),
        weights_digest=weights_digest(model),
        tied=tied,
    )
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        _write(path / WEIGHTS_FILE, weights)
        _write(path / GROWTH_FILE, growth_bytes(document))
    except OSError as error:
        raise ConfigurationError("ESP-208", f"cannot save to '{path}': {error.strerror or error}") from error


def load(folder: str | Path, base: M) -> M:
    """Put a saved model onto a plain base of the same architecture and return it wrapped, in place.

    Both files are verified before the base is touched; the base keeps its device. Raises IntegrityError ESP-401,
    ESP-404, ESP-407, ESP-408, SiteError ESP-314 (a base that cannot be wrapped).
    """
    path = Path(folder)
    document = _read_growth(path / GROWTH_FILE)
    tensors = _read_weights(path / WEIGHTS_FILE, document)
    _check_base(base, document, tensors)
    names = [glob.escape(site.site) for site in document.growth.sites]
    held = max(1, kernel_cache().limit // 2**20)
    wrap(base, names, seeds_per_layer=document.growth.seeds_per_layer, cache_size_mb=held)
    rebuild(base, document.growth)
    base.load_state_dict(tensors, strict=True)
    found = weights_digest(base)
    if found != document.weights_digest:
        raise IntegrityError(
            "ESP-401", f"the loaded weights are {found[:19]}, saved were {document.weights_digest[:19]}"
        )
    return base


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


def _read_weights(path: Path, document: SavedGrowth) -> dict[str, Tensor]:
    data = _read(path)
    if len(data) != document.weights.size_bytes:
        raise IntegrityError("ESP-407", f"'{path}' has {len(data)} bytes, must have {document.weights.size_bytes}")
    if digest_of(data) != document.weights.digest:
        raise IntegrityError("ESP-401", f"'{path}' is damaged: its digest is not the one in {GROWTH_FILE}")
    try:
        tensors = safetensors.torch.load(data)
    except SafetensorError as error:
        raise IntegrityError("ESP-407", f"'{path}' is no safetensors file: {error}") from error
    return tensors | {name: tensors[source] for name, source in document.tied.items()}


def _check_base(base: nn.Module, document: SavedGrowth, tensors: Mapping[str, Tensor]) -> None:
    """Every tensor of the base is there with its shape and dtype (but for units that were added for good), and the
    file has none that neither base nor growth has."""
    needed = {name: tensor for name, tensor in base.state_dict().items() if isinstance(tensor, Tensor)}
    shapes = {name: tuple(tensor.shape) for name, tensor in needed.items()}
    longer = added_units(document.growth)
    for site in document.growth.sites:
        if site.site in longer and f"{site.site}.weight" in shapes:
            own = {
                name: shapes[f"{site.site}.{name}"] for name in ("weight", "bias") if f"{site.site}.{name}" in shapes
            }
            for name, shape in lengthened_shapes(own, longer[site.site], site.parameter_shapes).items():
                shapes[f"{site.site}.{name}"] = shape
    grown = tuple(f"{site.site}.kasmina." for site in document.growth.sites)
    stored = {name: tensor for name, tensor in tensors.items() if not name.startswith(grown)}
    missing, extra = sorted(shapes.keys() - stored.keys()), sorted(stored.keys() - shapes.keys())
    if missing or extra:
        told = f"lacks {', '.join(missing[:3])}" if missing else f"also has {', '.join(extra[:3])}"
        raise IntegrityError("ESP-408", f"the saved model is of another architecture: it {told}")
    for name, shape in shapes.items():
        dtype = needed[name].dtype if name in needed else stored[name].dtype
        if tuple(stored[name].shape) != shape or stored[name].dtype != dtype:
            raise IntegrityError(
                "ESP-408",
                f"'{name}' is {stored[name].dtype} {tuple(stored[name].shape)}, the base needs {dtype} {shape}",
                hint="give a base of the same architecture and dtype",
            )


def growth_bytes(document: SavedGrowth) -> bytes:
    """`growth.json`: canonical, with the digest of everything else in it."""
    body = document.model_dump(mode="json")
    return canonical_json({**body, "digest": digest_of(canonical_json(body))})


def unique_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of `state_dict()` on the CPU, each storage once, and the names that share one.
    Raises GrowthError ESP-438 for extra state that is no tensor."""
    stored: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[tuple[object, ...], str] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise GrowthError(
                "ESP-438",
                f"'{name}' is extra state of type {type(value).__name__}, which cannot be stored without pickling",
                hint="make it a buffer",
            )
        key = (value.data_ptr(), tuple(value.shape), value.stride(), value.dtype, str(value.device))
        if value.numel() and key in first:
            tied[name] = first[key]
            continue
        first[key] = name
        stored[name] = value.detach().cpu().contiguous().clone()
    return stored, tied


def _write(path: Path, data: bytes) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with draft.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
