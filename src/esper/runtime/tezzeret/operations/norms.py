"""Normalisations of the kernel IR. A norm of one value is refused: it gives zero whatever it reads."""

import math
from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from esper.contracts.base import Contract
from esper.runtime.tezzeret.operations.kinds import Buffer
from esper.runtime.tezzeret.operations.kinds import ChannelAxis
from esper.runtime.tezzeret.operations.kinds import Operation
from esper.runtime.tezzeret.operations.kinds import Shape
from esper.runtime.tezzeret.operations.kinds import ShapeError
from esper.runtime.tezzeret.operations.kinds import Size

Epsilon = Annotated[float, Field(gt=0.0, le=1.0)]
ONES = {"weight": 1.0}


class LayerNormAttributes(Contract):
    """Over the channels of each place by itself (Ba et al., arXiv 1607.06450): as `torch.nn.LayerNorm` where they are
    the last dimension."""

    channel_axis: ChannelAxis = "last"
    eps: Epsilon = 1e-5
    affine: bool = True


class GroupNormAttributes(Contract):
    """Over groups of channels and all places of (C, ...), as `torch.nn.GroupNorm` (Wu & He, arXiv 1803.08494)."""

    groups: Size
    eps: Epsilon = 1e-5
    affine: bool = True


class BatchNormAttributes(Contract):
    """Over batch and places of (C, ...), as `torch.nn.BatchNorm1d/2d/3d` (Ioffe & Szegedy, arXiv 1502.03167).
    `momentum` None takes the cumulative mean of all batches."""

    eps: Epsilon = 1e-5
    momentum: Annotated[float, Field(ge=0.0, le=1.0)] | None = 0.1
    affine: bool = True
    track_running_stats: bool = True


def _infer_layer_norm(attributes: LayerNormAttributes, shapes: tuple[Shape, ...]) -> Shape:
    (shape,) = shapes
    if not shape or _channels(attributes, shape) < 2:
        raise ShapeError(f"layer_norm needs two channels or more, its input is {shape}")
    return shape


def _channels(attributes: LayerNormAttributes, shape: Shape) -> int:
    return shape[0] if attributes.channel_axis == "first" else shape[-1]


def _infer_group_norm(attributes: GroupNormAttributes, shapes: tuple[Shape, ...]) -> Shape:
    (shape,) = shapes
    if not shape or shape[0] % attributes.groups:
        raise ShapeError(f"groups {attributes.groups} must divide the channels, its input is {shape}")
    if math.prod(shape) // attributes.groups < 2:
        raise ShapeError(f"group_norm needs two values or more in a group, its input is {shape}")
    return shape


def _infer_batch_norm(attributes: BatchNormAttributes, shapes: tuple[Shape, ...]) -> Shape:
    (shape,) = shapes
    if not 1 <= len(shape) <= 4:
        raise ShapeError(f"batch_norm needs (channels, ...) of 1 to 4 dimensions, its input has {len(shape)}")
    return shape


def _affine_tensors(affine: bool, channels: int) -> Mapping[str, Shape]:
    return {"weight": (channels,), "bias": (channels,)} if affine else {}


def _batch_norm_buffers(attributes: BatchNormAttributes, shapes: tuple[Shape, ...]) -> Mapping[str, Buffer]:
    if not attributes.track_running_stats:
        return {}
    channels = (shapes[0][0],)
    return {
        "running_mean": Buffer(channels, 0.0),
        "running_var": Buffer(channels, 1.0),
        "num_batches_tracked": Buffer((), 0.0, counts=True),
    }


NORMS: Mapping[str, Operation] = {
    "layer_norm": Operation(
        LayerNormAttributes,
        _infer_layer_norm,
        tensors=lambda attributes, shapes: _affine_tensors(attributes.affine, _channels(attributes, shapes[0])),
        neutral=ONES,
    ),
    "group_norm": Operation(
        GroupNormAttributes,
        _infer_group_norm,
        tensors=lambda attributes, shapes: _affine_tensors(attributes.affine, shapes[0][0]),
        neutral=ONES,
    ),
    "batch_norm": Operation(
        BatchNormAttributes,
        _infer_batch_norm,
        tensors=lambda attributes, shapes: _affine_tensors(attributes.affine, shapes[0][0]),
        buffers=_batch_norm_buffers,
        neutral=ONES,
    ),
}
