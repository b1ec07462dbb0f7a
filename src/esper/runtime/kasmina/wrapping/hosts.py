"""The kinds of layer that seeds can stand beside: one entry of `HOST_KINDS` for each, and nothing else knows them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor
from torch import nn

from esper.contracts.assets import SiteContract
from esper.runtime.kasmina.digest import dtype_name

Shape = tuple[int, ...]


@dataclass(frozen=True)
class HostKind:
    """What growth must know of one type of layer.

    `sample_dims` is the least number of dimensions of one unbatched input; `attributes(module)` its geometry
    as JSON; `flops(module, input, output)` the forward floating point operations of one sample (two per
    multiply-accumulate); `input_rows(module, x)` and `output_rows(module, y)` lay a batch out as the rows of
    the matrix product that the layer is: (rows, fan in) and (rows, fan out), in the same order of rows.
    """

    name: str
    module_type: type[nn.Module]
    sample_dims: int
    attributes: Callable[[Any], dict[str, JsonValue]]
    flops: Callable[[Any, Shape, Shape], int]
    input_rows: Callable[[Any, Tensor], Tensor]
    output_rows: Callable[[Any, Tensor], Tensor]

    def sample_shape(self, tensor: Tensor) -> Shape:
        """The shape of one sample of a batch, or of the tensor itself where it has no batch dimension."""
        shape = tuple(tensor.shape)
        return shape[1:] if len(shape) > self.sample_dims else shape

    def contract(self, name: str, module: nn.Module, input_shape: Shape, output_shape: Shape) -> SiteContract:
        """What a kernel that reads this layer's input and adds to its output must fit."""
        return SiteContract(
            site=name,
            output_site=name,
            kind=self.name,
            input_shape=input_shape,
            output_shape=output_shape,
            dtype=dtype_name(host_weight(module).dtype),
            attributes=self.attributes(module),
        )


def host_weight(module: nn.Module) -> Tensor:
    """The layer's weight as its forward sees it (behind a parametrization: what that computes)."""
    weight = module.weight
    if not isinstance(weight, Tensor):
        raise TypeError(f"the weight of {type(module).__name__} is no tensor")
    return weight


def _linear_attributes(module: nn.Linear) -> dict[str, JsonValue]:
    return {"in_features": module.in_features, "out_features": module.out_features, "bias": module.bias is not None}


def _linear_flops(module: nn.Linear, input_shape: Shape, output_shape: Shape) -> int:
    return 2 * module.in_features * math.prod(output_shape)


def _conv2d_attributes(module: nn.Conv2d) -> dict[str, JsonValue]:
    padding: JsonValue = module.padding if isinstance(module.padding, str) else list(module.padding)
    return {
        "in_channels": module.in_channels,
        "out_channels": module.out_channels,
        "kernel_size": list(module.kernel_size),
        "stride": list(module.stride),
        "padding": padding,
        "dilation": list(module.dilation),
        "groups": module.groups,
        "padding_mode": module.padding_mode,
        "bias": module.bias is not None,
    }


def _conv2d_flops(module: nn.Conv2d, input_shape: Shape, output_shape: Shape) -> int:
    patch = module.in_channels // module.groups * math.prod(module.kernel_size)
    return 2 * patch * math.prod(output_shape)


def _conv2d_input_rows(module: nn.Conv2d, x: Tensor) -> Tensor:
    """Patches of (N, C, H, W) or (C, H, W) as rows (N * places, C * kernel height * kernel width)."""
    x = x if x.dim() == 4 else x.unsqueeze(0)
    # The order (left, right, top, bottom) that torch.nn.functional.pad takes, 'same' and 'valid' resolved.
    amounts: list[int] = list(module._reversed_padding_repeated_twice)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = nn.functional.pad(x, amounts, mode=mode)
    patches = nn.functional.unfold(x, module.kernel_size, dilation=module.dilation, stride=module.stride)
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])


def _conv2d_output_rows(module: nn.Conv2d, y: Tensor) -> Tensor:
    y = y if y.dim() == 4 else y.unsqueeze(0)
    return y.flatten(2).transpose(1, 2).reshape(-1, y.shape[1])


HOST_KINDS: tuple[HostKind, ...] = (
    HostKind(
        name="linear",
        module_type=nn.Linear,
        sample_dims=1,
        attributes=_linear_attributes,
        flops=_linear_flops,
        input_rows=lambda module, x: x.reshape(-1, x.shape[-1]),
        output_rows=lambda module, y: y.reshape(-1, y.shape[-1]),
    ),
    HostKind(
        name="conv2d",
        module_type=nn.Conv2d,
        sample_dims=3,
        attributes=_conv2d_attributes,
        flops=_conv2d_flops,
        input_rows=_conv2d_input_rows,
        output_rows=_conv2d_output_rows,
    ),
)


def host_kind(module: nn.Module) -> HostKind | None:
    """The kind of a layer, or None where seeds cannot stand beside it."""
    return next((kind for kind in HOST_KINDS if isinstance(module, kind.module_type)), None)


def kind_named(name: str) -> HostKind:
    """The kind of that name, as a `SiteContract` carries it. Raises KeyError for one that is not in the table."""
    return {kind.name: kind for kind in HOST_KINDS}[name]


def is_uninitialised(module: nn.Module) -> bool:
    """True for a lazy layer that has not seen its first input."""
    return any(isinstance(p, torch.nn.UninitializedParameter) for p in module.parameters(recurse=False))
