"""Operations of the kernel IR that make many places one."""

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from esper.contracts.base import Contract
from esper.runtime.tezzeret.operations.kinds import Extent
from esper.runtime.tezzeret.operations.kinds import Operation
from esper.runtime.tezzeret.operations.kinds import Shape
from esper.runtime.tezzeret.operations.kinds import ShapeError
from esper.runtime.tezzeret.operations.kinds import Size


class MeanAttributes(Contract):
    """The mean over `axes` of a sample (0 is the first one after the batch), which stay with size 1."""

    axes: Annotated[tuple[Annotated[int, Field(ge=0, le=7)], ...], Field(min_length=1)]


class MaxPool2dAttributes(Contract):
    """The largest of each window of (C, H, W), as `torch.nn.MaxPool2d`."""

    kernel_size: tuple[Size, Size]
    stride: tuple[Size, Size]
    padding: tuple[Extent, Extent] = (0, 0)
    dilation: tuple[Size, Size] = (1, 1)
    ceil_mode: bool = False


class AvgPool2dAttributes(Contract):
    """The mean of each window of (C, H, W), as `torch.nn.AvgPool2d`."""

    kernel_size: tuple[Size, Size]
    stride: tuple[Size, Size]
    padding: tuple[Extent, Extent] = (0, 0)
    ceil_mode: bool = False
    count_include_pad: bool = True


def _infer_mean(attributes: MeanAttributes, shapes: tuple[Shape, ...]) -> Shape:
    (shape,) = shapes
    axes = attributes.axes
    if len(set(axes)) != len(axes) or max(axes) >= len(shape):
        raise ShapeError(f"axes {axes} are not different dimensions of {shape}")
    return tuple(1 if axis in axes else size for axis, size in enumerate(shape))


def _infer_pool(attributes: MaxPool2dAttributes | AvgPool2dAttributes, shapes: tuple[Shape, ...]) -> Shape:
    (shape,) = shapes
    if len(shape) != 3:
        raise ShapeError(f"a pool needs (channels, height, width), its input has {len(shape)} dimensions")
    dilation = attributes.dilation if isinstance(attributes, MaxPool2dAttributes) else (1, 1)
    sizes = []
    for axis in (0, 1):
        window, step, padding = attributes.kernel_size[axis], attributes.stride[axis], attributes.padding[axis]
        if padding > window // 2:
            raise ShapeError(f"padding {padding} is more than half of the window {window}")
        room = shape[axis + 1] + 2 * padding - dilation[axis] * (window - 1) - 1
        if room < 0:
            raise ShapeError(f"the window {window} is wider than the padded input, {shape[axis + 1] + 2 * padding}")
        size = room // step + 1
        if attributes.ceil_mode and room % step and size * step < shape[axis + 1] + padding:
            # A last window may hang over the end, but must not begin in the padding behind it.
            size += 1
        sizes.append(size)
    return (shape[0], *sizes)


POOLING: Mapping[str, Operation] = {
    "mean": Operation(MeanAttributes, _infer_mean),
    "max_pool2d": Operation(MaxPool2dAttributes, _infer_pool),
    "avg_pool2d": Operation(AvgPool2dAttributes, _infer_pool),
}
