"""The one digest of a model's weights, by which two runs are compared."""

import hashlib
import sys
from collections.abc import Mapping

import torch
from torch import nn


def weights_digest(model: nn.Module) -> str:
    """`"sha256:<hex>"` over `state_dict()` sorted by name.

    For each tensor `name\\ndtype\\ncomma-joined shape\\n` in UTF-8 (dtype as `float32`), then its contiguous
    little-endian bytes. Entries that are not tensors are left out. Any device.
    """
    return tensors_digest({n: t for n, t in model.state_dict().items() if isinstance(t, torch.Tensor)})


def tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """The digest that `weights_digest` gives for a model with these tensors in its `state_dict()`."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        shape = ",".join(str(size) for size in tensor.shape)
        digest.update(f"{name}\n{dtype_name(tensor.dtype)}\n{shape}\n".encode())
        digest.update(tensor_bytes(tensor))
    return f"sha256:{digest.hexdigest()}"


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """The contiguous little-endian bytes of a tensor of any dtype, shape and device."""
    # reshape before view: a tensor without dimensions cannot be viewed as bytes.
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if sys.byteorder == "big":
        flat = flat.view(torch.uint8).view(-1, tensor.element_size()).flip(1).reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()
