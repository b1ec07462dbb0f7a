"""The tensors of a model as one safetensors file, and a file that is not what was written told by its tensors."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor
from torch import nn

from esper.contracts.assets import ArtifactRef
from esper.contracts.base import Contract
from esper.contracts.base import Digest
from esper.errors import GrowthError
from esper.errors import IntegrityError
from esper.runtime.kasmina.digest import dtype_name
from esper.runtime.kasmina.digest import tensor_bytes
from esper.runtime.tezzeret.artifact import digest_of

_LARGEST_HEADER = 100 * 2**20
"""Bytes; the limit of the safetensors format itself."""


class StoredTensor(Contract):
    """One tensor of a weights file: dtype as `float32`, shape, and the sha256 of its bytes in the file."""

    dtype: str
    shape: tuple[int, ...]
    digest: Digest


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


def described(tensors: Mapping[str, Tensor]) -> dict[str, StoredTensor]:
    """What each tensor is, by name."""
    return {
        name: StoredTensor(
            dtype=dtype_name(tensor.dtype), shape=tuple(tensor.shape), digest=digest_of(tensor_bytes(tensor))
        )
        for name, tensor in sorted(tensors.items())
    }


def read_weights(path: Path, data: bytes, ref: ArtifactRef, known: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """The tensors of a weights file whose bytes are `data`, which must be those that `ref` names.

    `known` says what each tensor must be, so that a damaged file is told by its tensor. Raises IntegrityError
    ESP-401, ESP-407.
    """
    if len(data) == ref.size_bytes and digest_of(data) == ref.digest:
        try:
            return safetensors.torch.load(data)
        except SafetensorError as error:
            raise IntegrityError("ESP-407", f"'{path}' is no safetensors file: {error}") from error
    code = "ESP-401" if len(data) == ref.size_bytes else "ESP-407"
    size = "" if len(data) == ref.size_bytes else f"it has {len(data)} bytes, must have {ref.size_bytes}; "
    raise IntegrityError(code, f"'{path}' is damaged: {size}{_damage(data, known)}", hint="restore it from a copy")


def _damage(data: bytes, known: Mapping[str, StoredTensor]) -> str:
    """What is wrong with a weights file, by the first tensor that is not what it must be."""
    header = _header(data)
    if header is None:
        return "its header cannot be read"
    start, entries = header
    if entries.keys() - known.keys():
        return f"it also has the tensor '{min(entries.keys() - known.keys())}'"
    if known.keys() - entries.keys():
        return f"it lacks the tensor '{min(known.keys() - entries.keys())}'"
    end = 0
    for name, (dtype, shape, first, last) in sorted(entries.items(), key=lambda item: item[1][2]):
        wanted = known[name]
        if (dtype, shape) != (_FORMS.get(wanted.dtype, wanted.dtype), wanted.shape):
            return f"'{name}' is {dtype} {shape}, must be {_FORMS.get(wanted.dtype, wanted.dtype)} {wanted.shape}"
        if first != end or last < first:
            return f"'{name}' does not begin where the tensor before it ends"
        if start + last > len(data):
            return f"it ends inside of the tensor '{name}'"
        if digest_of(data[start + first : start + last]) != wanted.digest:
            return f"the tensor '{name}' has other values"
        end = last
    if start + end != len(data):
        return "it goes on after its last tensor"
    return "its header was changed, all tensors are whole"


def _header(data: bytes) -> tuple[int, dict[str, tuple[str, tuple[int, ...], int, int]]] | None:
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > _LARGEST_HEADER or 8 + size > len(data):
        return None
    try:
        body: Any = json.loads(data[8 : 8 + size])
        body.pop("__metadata__", None)
        entries = {}
        for name, entry in body.items():
            first, last = entry["data_offsets"]
            entries[name] = str(entry["dtype"]), tuple(int(n) for n in entry["shape"]), int(first), int(last)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return 8 + size, entries


_FORMS: Mapping[str, str] = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
"""The names of dtypes in a safetensors header."""
