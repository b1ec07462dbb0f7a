"""What an operation of the kernel IR is: attributes, a shape rule, tensors, buffers, cost and first weights."""

import math
from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
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
Extent = Annotated[int, Field(ge=0, le=MAX_DIMENSION)]
ChannelAxis = Literal["first", "last"]
"""Which dimension of a sample holds the channels."""


class ShapeError(ValueError):
    """An operation cannot take its inputs; `str()` says why."""


@dataclass(frozen=True)
class Buffer:
    """A tensor that a module keeps and no optimizer trains. `value` fills it at birth; `counts` makes it an int64
    counter in place of a number of the kernel's dtype."""

    shape: Shape
    value: float
    counts: bool = False


def no_tensors(attributes: Any, shapes: tuple[Shape, ...]) -> Mapping[str, Shape]:
    """Of an operation that trains nothing."""
    return {}


def no_buffers(attributes: Any, shapes: tuple[Shape, ...]) -> Mapping[str, Buffer]:
    """Of an operation that keeps nothing."""
    return {}


def no_flops(attributes: Any, shapes: tuple[Shape, ...], output: Shape) -> int:
    """Of an operation without a matrix product."""
    return 0


def same_shape(attributes: Any, shapes: tuple[Shape, ...]) -> Shape:
    """Of an elementwise operation."""
    return shapes[0]


def product_of_rest(shape: Shape) -> int:
    """The fan-in of a weight (outputs, inputs, *window)."""
    return math.prod(shape[1:])


@dataclass(frozen=True)
class Operation:
    """One kind of node.

    `infer(attributes, shapes)` gives the output shape of one sample or raises `ShapeError`;
    `tensors(attributes, shapes)` names the trainable tensors with their shapes, `buffers` those that are not trained;
    `flops(attributes, shapes, output)` counts the multiplications and additions of matrix products for one sample
    (two per multiply-accumulate, as `torch.utils.flop_counter` does: biases and elementwise work count nothing).
    `neutral` holds the first value of tensors that are neither drawn nor zero, such as a norm's weights of one;
    `fan_in(shape)` is how many numbers a drawn weight sums up; `reads_ids` says that the input is whole numbers.
    """

    attributes: type[Contract]
    infer: Callable[[Any, tuple[Shape, ...]], Shape]
    arity: int = 1
    tensors: Callable[[Any, tuple[Shape, ...]], Mapping[str, Shape]] = no_tensors
    buffers: Callable[[Any, tuple[Shape, ...]], Mapping[str, Buffer]] = no_buffers
    flops: Callable[[Any, tuple[Shape, ...], Shape], int] = no_flops
    neutral: Mapping[str, float] = field(default_factory=dict)
    fan_in: Callable[[Shape], int] = product_of_rest
    reads_ids: bool = False
