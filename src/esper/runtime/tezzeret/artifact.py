"""A kernel as two byte strings, and the proof that they are what they must be before anything is built from them.

`manifest.json` is canonical JSON, `weights.safetensors` holds the tensors; the kernel's digest is the sha256 of the
manifest, which names the digest of the weights. Nothing here unpickles. Codes of `IntegrityError`:

    ESP-401 digest      ESP-403 schema      ESP-405 not finite
    ESP-402 size        ESP-404 contract
"""

import hashlib
import json
import math
from dataclasses import dataclass
from functools import cached_property
from typing import NoReturn

import safetensors.torch
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor

from esper.contracts.base import Digest
from esper.contracts.base import first_problem
from esper.errors import BlueprintError
from esper.errors import IntegrityError
from esper.runtime.tezzeret.ir import canonical_json
from esper.runtime.tezzeret.ir import check_graph
from esper.runtime.tezzeret.ir import strict_json
from esper.runtime.tezzeret.manifest import MAX_MANIFEST_BYTES
from esper.runtime.tezzeret.manifest import KernelManifest
from esper.runtime.tezzeret.module import TORCH_DTYPES

HEADER_BYTES = 64 * 1024
"""More than the header of a safetensors file of the largest graph can take."""

_STORED_DTYPES = {**TORCH_DTYPES, "int64": torch.int64}
"""Counters of a batch norm are whole numbers."""


def digest_of(data: bytes) -> Digest:
    """`sha256:<hex>` of bytes."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@dataclass(frozen=True)
class KernelFiles:
    """The two files of a kernel, as stored. Unproven until `verify`."""

    manifest: bytes
    weights: bytes

    @cached_property
    def digest(self) -> Digest:
        """The kernel's digest: the sha256 of the manifest's bytes."""
        return digest_of(self.manifest)

    @property
    def size_bytes(self) -> int:
        """Bytes of both files."""
        return len(self.manifest) + len(self.weights)


def manifest_bytes(manifest: KernelManifest) -> bytes:
    """The canonical JSON of a manifest."""
    return canonical_json(manifest.model_dump(mode="json"))


def weights_bytes(tensors: dict[str, Tensor]) -> bytes:
    """A safetensors file with its tensors in order of name and no metadata: equal tensors give equal bytes."""
    return safetensors.torch.save({name: tensors[name].detach().contiguous() for name in sorted(tensors)})


def verify(files: KernelFiles, expected_digest: Digest) -> KernelManifest:
    """Prove both files, in this order: size, digest, schema, contract, finite. Returns the manifest.

    Raises IntegrityError ESP-401..405, naming the check that failed and what was expected.
    """
    return _verified(files, expected_digest)[0]


def verified_tensors(files: KernelFiles, expected_digest: Digest) -> tuple[KernelManifest, dict[str, Tensor]]:
    """As `verify`, with private copies of the tensors. Raises IntegrityError ESP-401..405."""
    manifest, tensors = _verified(files, expected_digest)
    # What safetensors hands out are views of one buffer.
    return manifest, {name: tensor.clone() for name, tensor in tensors.items()}


def _verified(files: KernelFiles, expected_digest: Digest) -> tuple[KernelManifest, dict[str, Tensor]]:
    if len(files.manifest) > MAX_MANIFEST_BYTES:
        _refuse("ESP-402", f"manifest has {len(files.manifest)} bytes, the limit is {MAX_MANIFEST_BYTES}")
    if files.digest != expected_digest:
        _refuse("ESP-401", f"manifest digest is {_short(files.digest)}, expected {_short(expected_digest)}")
    manifest = _read_manifest(files.manifest)
    _check_manifest(manifest)
    if len(files.weights) != manifest.weights.size_bytes:
        _refuse("ESP-402", f"weights have {len(files.weights)} bytes, expected {manifest.weights.size_bytes}")
    found = digest_of(files.weights)
    if found != manifest.weights.digest:
        _refuse("ESP-401", f"weights digest is {_short(found)}, expected {_short(manifest.weights.digest)}")
    tensors = _read_weights(files.weights)
    _check_tensors(manifest, tensors)
    return manifest, tensors


def _read_manifest(data: bytes) -> KernelManifest:
    try:
        document = strict_json(data, where="manifest", limit=MAX_MANIFEST_BYTES)
        manifest = KernelManifest.model_validate_json(data)
    except BlueprintError as error:
        _refuse("ESP-403", f"manifest schema: {error.message}")
    except ValidationError as error:
        place, problem = first_problem(error)
        _refuse("ESP-403", f"manifest schema: {ascii(place)[1:-1]}: {problem}")
    if canonical_json(document) != data:
        _refuse("ESP-403", "manifest schema: not in canonical form")
    return manifest


def _check_manifest(manifest: KernelManifest) -> None:
    """The graph keeps the rules, and is what the site and the tensor table say."""
    try:
        typed = check_graph(manifest.graph)
    except BlueprintError as error:
        _refuse("ESP-404", f"manifest contract: {error.code}: {error.message}")
    site = manifest.site
    if typed.input_shape != site.input_shape:
        _refuse("ESP-404", f"manifest contract: graph reads {typed.input_shape}, the site has {site.input_shape}")
    if typed.output_shape != site.output_shape:
        _refuse("ESP-404", f"manifest contract: graph gives {typed.output_shape}, the site needs {site.output_shape}")
    if site.dtype not in TORCH_DTYPES:
        _refuse("ESP-404", f"manifest contract: dtype {site.dtype!r} is none of {', '.join(TORCH_DTYPES)}")
    declared = {spec.name: (spec.dtype, spec.shape) for spec in manifest.tensors}
    needed = typed.stored(site.dtype)
    if declared != needed or len(declared) != len(manifest.tensors):
        _refuse("ESP-404", f"manifest contract: tensors are {sorted(declared)}, the graph has {sorted(needed)}")
    if manifest.parameter_count != typed.parameter_count:
        _refuse(
            "ESP-404",
            f"manifest contract: {manifest.parameter_count} parameters named, the graph has {typed.parameter_count}",
        )
    most = 8 * sum(math.prod(shape) for _, shape in needed.values()) + HEADER_BYTES
    if manifest.weights.size_bytes > most:
        _refuse("ESP-402", f"weights of {manifest.weights.size_bytes} bytes are named, the graph needs at most {most}")


def _read_weights(data: bytes) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(data)
    except (SafetensorError, json.JSONDecodeError, KeyError, ValueError) as error:
        _refuse("ESP-403", f"weights schema: not a safetensors file: {error}")


def _check_tensors(manifest: KernelManifest, tensors: dict[str, Tensor]) -> None:
    needed = {spec.name: (_STORED_DTYPES[spec.dtype], spec.shape) for spec in manifest.tensors}
    if tensors.keys() != needed.keys():
        _refuse("ESP-404", f"weights contract: tensors are {sorted(tensors)}, expected {sorted(needed)}")
    for name, tensor in sorted(tensors.items()):
        if (tensor.dtype, tuple(tensor.shape)) != needed[name]:
            dtype, shape = needed[name]
            _refuse(
                "ESP-404",
                f"weights contract: '{name}' is {tensor.dtype} {tuple(tensor.shape)}, expected {dtype} {shape}",
            )
    for name, tensor in sorted(tensors.items()):
        if not bool(tensor.isfinite().all()):
            _refuse("ESP-405", f"weights: '{name}' holds NaN or infinity")


def _short(digest: str) -> str:
    return digest[:19]


def _refuse(code: str, message: str) -> NoReturn:
    raise IntegrityError(code, f"kernel {message}", hint="the stored bytes are damaged or of another kernel")
