"""Operations of the kernel IR that multiply by a matrix or look rows of one up: linear, embedding, self-attention."""

import math
from collections.abc import Mapping

from esper.contracts.base import Contract
from esper.runtime.tezzeret.operations.kinds import Extent
from esper.runtime.tezzeret.operations.kinds import Operation
from esper.runtime.tezzeret.operations.kinds import Shape
from esper.runtime.tezzeret.operations.kinds import ShapeError
from esper.runtime.tezzeret.operations.kinds import Size


class LinearAttributes(Contract):
    """`y = x W^T (+ b)` over the last dimension, as `torch.nn.Linear`."""

    out_features: Size
    bias: bool


class EmbeddingAttributes(Contract):
    """One row of a table for every id, as `torch.nn.Embedding`; the row `padding_idx` is zero and stays so."""

    num_embeddings: Size
    embedding_dim: Size
    padding_idx: Extent | None = None


class SelfAttentionAttributes(Contract):
    """Scaled dot-product attention of a sequence with itself (Vaswani et al., arXiv 1706.03762, equation 1), without
    the projection of its output. `causal`: a place reads itself and those before it."""

    heads: Size
    head_dim: Size
    causal: bool


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


def _infer_embedding(attributes: EmbeddingAttributes, shapes: tuple[Shape, ...]) -> Shape:
    padding = attributes.padding_idx
    if padding is not None and padding >= attributes.num_embeddings:
        raise ShapeError(f"padding_idx {padding} is no row of {attributes.num_embeddings}")
    return (*shapes[0], attributes.embedding_dim)


def _embedding_tensors(attributes: EmbeddingAttributes, shapes: tuple[Shape, ...]) -> Mapping[str, Shape]:
    return {"weight": (attributes.num_embeddings, attributes.embedding_dim)}


def _infer_self_attention(attributes: SelfAttentionAttributes, shapes: tuple[Shape, ...]) -> Shape:
    (shape,) = shapes
    if len(shape) != 2:
        raise ShapeError(f"self_attention needs (places, channels), its input has {len(shape)} dimensions")
    return (shape[0], attributes.heads * attributes.head_dim)


def _self_attention_tensors(attributes: SelfAttentionAttributes, shapes: tuple[Shape, ...]) -> Mapping[str, Shape]:
    return {"weight": (3 * attributes.heads * attributes.head_dim, shapes[0][1])}


def _self_attention_flops(attributes: SelfAttentionAttributes, shapes: tuple[Shape, ...], output: Shape) -> int:
    places, channels = shapes[0]
    width = attributes.heads * attributes.head_dim
    # The three projections, then queries by keys and weights by values; a causal mask saves nothing that is counted.
    return 2 * places * channels * 3 * width + 2 * 2 * places * places * width


MATRICES: Mapping[str, Operation] = {
    "linear": Operation(LinearAttributes, _infer_linear, tensors=_linear_tensors, flops=_linear_flops),
    "embedding": Operation(
        EmbeddingAttributes, _infer_embedding, tensors=_embedding_tensors, fan_in=lambda shape: 1, reads_ids=True
    ),
    "self_attention": Operation(
        SelfAttentionAttributes, _infer_self_attention, tensors=_self_attention_tensors, flops=_self_attention_flops
    ),
}
