"""Convolutions of the kernel IR in one and two dimensions: one set of rules for both."""

import math
from collections.abc import Mapping
from typing import Literal

from esper.contracts.base import Contract
from esper.runtime.tezzeret.operations.kinds import MAX_DIMENSION
from esper.runtime.tezzeret.operations.kinds import Extent
from esper.runtime.tezzeret.operations.kinds import Operation
from esper.runtime.tezzeret.operations.kinds import Shape
from esper.runtime.tezzeret.operations.kinds import ShapeError
from esper.runtime.tezzeret.operations.kinds import Size


class Conv1dAttributes(Contract):
    """A convolution over (C, L), as `torch.nn.Conv1d`."""

    out_channels: Size
    kernel_size: tuple[Size]
    stride: tuple[Size]
    padding: tuple[Extent] | Literal["same", "valid"]
    dilation: tuple[Size]
    groups: Size
    padding_mode: Literal["zeros", "reflect", "replicate", "circular"]
    bias: bool


class Conv2dAttributes(Contract):
    """A convolution over (C, H, W), as `torch.nn.Conv2d`."""

    out_channels: Size
    kernel_size: tuple[Size, Size]
    stride: tuple[Size, Size]
    padding: tuple[Extent, Extent] | Literal["same", "valid"]
    dilation: tuple[Size, Size]
    groups: Size
    padding_mode: Literal["zeros", "reflect", "replicate", "circular"]
    bias: bool


ConvAttributes = Conv1dAttributes | Conv2dAttributes


def padding_amounts(attributes: ConvAttributes) -> tuple[tuple[int, int], ...]:
    """(before, after) for each spatial axis; an odd `same` total puts the larger half after, as torch does."""
    if attributes.padding == "valid":
        return tuple((0, 0) for _ in attributes.kernel_size)
    if attributes.padding == "same":
        totals = [d * (k - 1) for d, k in zip(attributes.dilation, attributes.kernel_size, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    assert isinstance(attributes.padding, tuple)
    return tuple((amount, amount) for amount in attributes.padding)


def _infer(attributes: ConvAttributes, shapes: tuple[Shape, ...]) -> Shape:
    (shape,) = shapes
    axes = len(attributes.kernel_size)
    if len(shape) != axes + 1:
        form = "(channels, length)" if axes == 1 else "(channels, height, width)"
        raise ShapeError(f"conv{axes}d needs {form}, its input has {len(shape)} dimensions")
    if shape[0] % attributes.groups or attributes.out_channels % attributes.groups:
        raise ShapeError(
            f"groups {attributes.groups} must divide the channels, in {shape[0]} and out {attributes.out_channels}"
        )
    if attributes.padding == "same" and any(step != 1 for step in attributes.stride):
        raise ShapeError("padding 'same' needs stride 1")
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


def _tensors(attributes: ConvAttributes, shapes: tuple[Shape, ...]) -> Mapping[str, Shape]:
    channels = shapes[0][0] // attributes.groups
    weight = {"weight": (attributes.out_channels, channels, *attributes.kernel_size)}
    return weight | {"bias": (attributes.out_channels,)} if attributes.bias else weight


def _flops(attributes: ConvAttributes, shapes: tuple[Shape, ...], output: Shape) -> int:
    patch = shapes[0][0] // attributes.groups * math.prod(attributes.kernel_size)
    return 2 * math.prod(output) * patch


CONVOLUTIONS: Mapping[str, Operation] = {
    "conv1d": Operation(Conv1dAttributes, _infer, tensors=_tensors, flops=_flops),
    "conv2d": Operation(Conv2dAttributes, _infer, tensors=_tensors, flops=_flops),
}
