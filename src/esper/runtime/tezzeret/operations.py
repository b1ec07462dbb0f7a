"""The allow-list of the kernel IR: for every operation its attributes, its shape rule, its tensors and its cost.

A new kind of operation is one more entry in `OPERATIONS` here and one more module in `module.MODULES`; nothing
else in the forge knows how many there are. No torch is imported: the orchestrator and the strategist read costs.
"""

import math
from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated
from typing import Any
from typing import Literal

from pydantic import Field

from esper.contracts.base import Contract

Shape = tuple[int, ...]
"""The shape of one sample: without the batch dimension."""

MAX_DIMENSION = 2**24
"""The largest size of one dimension, of a site or of an operation."""

Size = Annotated[int, Field(ge=1, le=MAX_DIMENSION)]
Pair = tuple[Size, Size]
Extent = Annotated[int, Field(ge=0, le=MAX_DIMENSION)]
PaddingPair = tuple[Extent, Extent]

ACTIVATIONS = ("relu", "gelu", "tanh", "silu", "sigmoid")


class ShapeError(ValueError):
    """An operation cannot take its inputs; `str()` says why."""


class LinearAttributes(Contract):
    """`y = x W^T (+ b)` over the last dimension, as `torch.nn.Linear`."""

    out_features: Size
    bias: bool


class Conv2dAttributes(Contract):
    """A convolution over (C, H, W), as `torch.nn.Conv2d`."""

    out_channels: Size
    kernel_size: Pair
    stride: Pair
    padding: PaddingPair | Literal["same", "valid"]
    dilation: Pair
    groups: Size
    padding_mode: Literal["zeros", "reflect", "replicate", "circular"]
    bias: bool


class ActivationAttributes(Contract):
    """An elementwise non-linearity; `gelu` is the exact one."""

    name: Literal["relu", "gelu", "tanh", "silu", "sigmoid"]


@dataclass(frozen=True)
class Operation:
    """One kind of node.

    `infer(attributes, shapes)` gives the output shape of one sample or raises `ShapeError`;
    `tensors(attributes, shapes)` names the trainable tensors with their shapes; `flops(attributes, shapes,
    output)` counts the multiplications and additions of matrix products for one sample (two per
    multiply-accumulate, as `torch.utils.flop_counter` does: biases and elementwise work count nothing).
    """

    attributes: type[Contract]
    arity: int
    infer: Callable[[Any, tuple[Shape, ...]], Shape]
    tensors: Callable[[Any, tuple[Shape, ...]], Mapping[str, Shape]]
    flops: Callable[[Any, tuple[Shape, ...], Shape], int]


def _infer_linear(attributes: LinearAttributes, shapes: tuple[Shape, ...]) -> Shape:
    (shape,) = shapes
    if not shape:
        raise ShapeError("linear needs at least one dimension, its input has none")
    return (*shape[:-1], attributes.out_features)


def _linear_tensors(attributes: LinearAttributes, shapes: tuple[Shape, ...]) -> Mapping[str, Shape]:
    weight = {"weight": (attributes.out_features, shapes[0][-1])}
    return weight | {"bias": (attributes.out_features,)} if attributes.bias else weight


def _linear_flops(attributes: LinearAttributes, shapes: tuple[Shape, ...], output: Shape) -> int:
    return 2 * math.prod(output) * shapes[0][-1]


def padding_amounts(attributes: Conv2dAttributes) -> tuple[tuple[int, int], tuple[int, int]]:
    """(before, after) for height and width; an odd `same` total puts the larger half after, as torch does."""
    if attributes.padding == "valid":
        return (0, 0), (0, 0)
    if attributes.padding == "same":
        totals = [d * (k - 1) for d, k in zip(attributes.dilation, attributes.kernel_size, strict=True)]
        return (totals[0] // 2, totals[0] - totals[0] // 2), (totals[1] // 2, totals[1] - totals[1] // 2)
    height, width = attributes.padding
    return (height, height), (width, width)


def _infer_conv2d(attributes: Conv2dAttributes, shapes: tuple[Shape, ...]) -> Shape:
    (shape,) = shapes
    if len(shape) != 3:
        raise ShapeError(f"conv2d needs (channels, height, width), its input has {len(shape)} dimensions")
    if shape[0] % attributes.groups or attributes.out_channels % attributes.groups:
        raise ShapeError(
            f"groups {attributes.groups} must divide the channels, in {shape[0]} and out {attributes.out_channels}"
        )
    if attributes.padding == "same" and attributes.stride != (1, 1):
        raise ShapeError("padding 'same' needs stride (1, 1)")
    sizes = []
    for axis, (before, after) in enumerate(padding_amounts(attributes)):
        extent = shape[axis + 1]
        widest = {"zeros": MAX_DIMENSION, "replicate": MAX_DIMENSION, "circular": extent, "reflect": extent - 1}
        if max(before, after) > widest[attributes.padding_mode]:
            raise ShapeError(f"{attributes.padding_mode} padding {max(before, after)} is too wide for size {extent}")
        reach = attributes.dilation[axis] * (attributes.kernel_size[axis] - 1) + 1
        size = (extent + before + after - reach) // attributes.stride[axis] + 1
        if size < 1:
            raise ShapeError(f"the kernel reaches over {reach}, the padded input has {extent + before + after}")
        sizes.append(size)
    return (attributes.out_channels, *sizes)


def _conv2d_tensors(attributes: Conv2dAttributes, shapes: tuple[Shape, ...]) -> Mapping[str, Shape]:
    channels = shapes[0][0] // attributes.groups
    weight = {"weight": (attributes.out_channels, channels, *attributes.kernel_size)}
    return weight | {"bias": (attributes.out_channels,)} if attributes.bias else weight


def _conv2d_flops(attributes: Conv2dAttributes, shapes: tuple[Shape, ...], output: Shape) -> int:
    patch = shapes[0][0] // attributes.groups * math.prod(attributes.kernel_size)
    return 2 * math.prod(output) * patch


OPERATIONS: Mapping[str, Operation] = {
    "linear": Operation(LinearAttributes, 1, _infer_linear, _linear_tensors, _linear_flops),
    "conv2d": Operation(Conv2dAttributes, 1, _infer_conv2d, _conv2d_tensors, _conv2d_flops),
    "activation": Operation(
        ActivationAttributes,
        1,
        lambda attributes, shapes: shapes[0],
        lambda attributes, shapes: {},
        lambda attributes, shapes, output: 0,
    ),
}
