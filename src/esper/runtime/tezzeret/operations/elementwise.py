"""Operations of the kernel IR that work number by number: activations, scales and gates, sums and products."""

from collections.abc import Mapping
from typing import Literal

from esper.contracts.base import Contract
from esper.runtime.tezzeret.operations.kinds import ChannelAxis
from esper.runtime.tezzeret.operations.kinds import Operation
from esper.runtime.tezzeret.operations.kinds import Shape
from esper.runtime.tezzeret.operations.kinds import ShapeError
from esper.runtime.tezzeret.operations.kinds import same_shape

ACTIVATIONS = ("relu", "gelu", "tanh", "silu", "sigmoid")


class ActivationAttributes(Contract):
    """An elementwise non-linearity; `gelu` is the exact one."""

    name: Literal["relu", "gelu", "tanh", "silu", "sigmoid"]


class AffineAttributes(Contract):
    """`y = x w (+ b)` with one number for each channel."""

    channel_axis: ChannelAxis
    bias: bool


class GateAttributes(Contract):
    """`y = tanh(w) x` with one gate for each channel: closed at w = 0."""

    channel_axis: ChannelAxis


class CombinationAttributes(Contract):
    """Two tensors of equal rank, number by number; a size of one is repeated."""


def _channels(shape: Shape, axis: ChannelAxis, name: str) -> int:
    if not shape:
        raise ShapeError(f"{name} needs at least one dimension, its input has none")
    return shape[0] if axis == "first" else shape[-1]


def _infer_affine(attributes: AffineAttributes, shapes: tuple[Shape, ...]) -> Shape:
    _channels(shapes[0], attributes.channel_axis, "affine")
    return shapes[0]


def _affine_tensors(attributes: AffineAttributes, shapes: tuple[Shape, ...]) -> Mapping[str, Shape]:
    channels = (_channels(shapes[0], attributes.channel_axis, "affine"),)
    return {"weight": channels, "bias": channels} if attributes.bias else {"weight": channels}


def _infer_gate(attributes: GateAttributes, shapes: tuple[Shape, ...]) -> Shape:
    _channels(shapes[0], attributes.channel_axis, "gate")
    return shapes[0]


def _gate_tensors(attributes: GateAttributes, shapes: tuple[Shape, ...]) -> Mapping[str, Shape]:
    return {"weight": (_channels(shapes[0], attributes.channel_axis, "gate"),)}


def _infer_combination(attributes: CombinationAttributes, shapes: tuple[Shape, ...]) -> Shape:
    left, right = shapes
    if len(left) != len(right) or any(a != b and 1 not in (a, b) for a, b in zip(left, right, strict=True)):
        raise ShapeError(f"its inputs {left} and {right} do not go together")
    return tuple(max(pair) for pair in zip(left, right, strict=True))


_COMBINATION = Operation(CombinationAttributes, _infer_combination, arity=2)

ELEMENTWISE: Mapping[str, Operation] = {
    "activation": Operation(ActivationAttributes, same_shape),
    "affine": Operation(AffineAttributes, _infer_affine, tensors=_affine_tensors, neutral={"weight": 1.0}),
    "gate": Operation(GateAttributes, _infer_gate, tensors=_gate_tensors, neutral={"weight": 0.0}),
    "add": _COMBINATION,
    "subtract": _COMBINATION,
    "multiply": _COMBINATION,
}
