"""The geometry of each kind of host: its attributes as JSON, its cost, its batch as rows of a matrix product."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor
from torch import nn

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Frame:
    """How samples lie in a module's tensors: the least number of dimensions of one sample of the input and of the
    output, and the axis of the batch (1 for sequences of shape (time, batch, channels))."""

    input_dims: int
    output_dims: int
    batch_axis: int = 0

    def samples(self, tensor: Tensor, dims: int) -> Tensor:
        """The tensor as (batch, *sample), a view."""
        if tensor.dim() <= dims:
            return tensor.unsqueeze(0)
        return tensor.transpose(0, 1) if self.batch_axis else tensor

    def unsampled(self, samples: Tensor, like: Tensor, dims: int) -> Tensor:
        """The inverse of `samples`: laid out as `like` is."""
        if like.dim() <= dims:
            return samples.squeeze(0)
        return samples.transpose(0, 1) if self.batch_axis else samples


def block_frame(module: nn.Module) -> Frame:
    """Samples of a block are rows of the first axis, but for sequence layers inside that say otherwise."""
    for part in module.modules():
        if isinstance(part, nn.MultiheadAttention | nn.RNNBase):
            return Frame(2, 2, 0 if part.batch_first else 1)
    return Frame(1, 1)


def linear_attributes(module: nn.Linear) -> dict[str, JsonValue]:
    """The geometry of a `Linear`."""
    return {"in_features": module.in_features, "out_features": module.out_features, "bias": module.bias is not None}


def transposed_attributes(module: Any) -> dict[str, JsonValue]:
    """Of the Conv1D of `transformers`: a linear layer whose weight is (in, out)."""
    fan_in, fan_out = module.weight.shape
    return {"in_features": int(fan_in), "out_features": int(fan_out), "bias": True, "transposed": True}


def conv_attributes(module: nn.Conv1d | nn.Conv2d) -> dict[str, JsonValue]:
    """The geometry of a convolution over one or two dimensions."""
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


def embedding_attributes(module: nn.Embedding) -> dict[str, JsonValue]:
    """How many ids there are, and how wide each one is."""
    return {
        "num_embeddings": module.num_embeddings,
        "embedding_dim": module.embedding_dim,
        "padding_idx": module.padding_idx,
    }


def layer_norm_attributes(module: nn.LayerNorm) -> dict[str, JsonValue]:
    """What a `LayerNorm` normalises over."""
    return {"normalized_shape": list(module.normalized_shape), "eps": module.eps, "affine": module.elementwise_affine}


def group_norm_attributes(module: nn.GroupNorm) -> dict[str, JsonValue]:
    """The groups of a `GroupNorm`."""
    return {
        "num_groups": module.num_groups,
        "num_channels": module.num_channels,
        "eps": module.eps,
        "affine": module.affine,
    }


def batch_norm_attributes(module: nn.modules.batchnorm._BatchNorm) -> dict[str, JsonValue]:
    """What a `BatchNorm` of any number of dimensions keeps."""
    return {
        "num_features": module.num_features,
        "eps": module.eps,
        "momentum": module.momentum,
        "affine": module.affine,
        "track_running_stats": module.track_running_stats,
    }


def attention_attributes(module: nn.MultiheadAttention) -> dict[str, JsonValue]:
    """Heads and the axis of the batch."""
    return {"embed_dim": module.embed_dim, "num_heads": module.num_heads, "batch_first": module.batch_first}


def linear_flops(module: nn.Module, input_shape: Shape, output_shape: Shape) -> int:
    """Two for each weight and place."""
    return 2 * (input_shape[-1] if input_shape else 1) * math.prod(output_shape)


def conv_flops(module: nn.Conv1d | nn.Conv2d, input_shape: Shape, output_shape: Shape) -> int:
    """Two for each weight of the patch, output channel and place."""
    patch = module.in_channels // module.groups * math.prod(module.kernel_size)
    return 2 * patch * math.prod(output_shape)


def attention_flops(module: nn.MultiheadAttention, input_shape: Shape, output_shape: Shape) -> int:
    """The four projections, the scores and their weighted sum, for as many keys as there are queries."""
    time = input_shape[0] if len(input_shape) > 1 else 1
    matrices = [p for n, p in module.named_parameters() if n.endswith("weight") and "kasmina" not in n.split(".")]
    width: int = module.embed_dim
    return 2 * time * sum(p.numel() for p in matrices) + 4 * time * time * width


def block_flops(module: nn.Module, input_shape: Shape, output_shape: Shape) -> int:
    """Every matrix inside once for each place of the output: exact for multilayer perceptrons and for convolutions
    that keep the places; without attention scores."""
    first = len(output_shape) >= 3 or any(isinstance(part, nn.modules.conv._ConvNd) for part in module.modules())
    places = math.prod(output_shape[1:] if first else output_shape[:-1])
    matrices = [p.numel() for n, p in module.named_parameters() if p.dim() >= 2 and "kasmina" not in n.split(".")]
    return 2 * places * sum(matrices)


def rows_last(module: nn.Module, t: Tensor) -> Tensor:
    """(batch, ..., channels) as (rows, channels)."""
    return t.reshape(-1, t.shape[-1])


def rows_first(module: nn.Module, t: Tensor) -> Tensor:
    """(batch, channels, ...) as (rows, channels), one for each place of each sample."""
    return t.movedim(1, -1).reshape(-1, t.shape[1])


def one_hot_rows(module: nn.Embedding, ids: Tensor) -> Tensor:
    """Ids as one-hot rows (rows, different ids in this batch): the rest of the table is not read."""
    flat = ids.reshape(-1)
    different: Tensor = torch.unique(flat)
    return (flat.unsqueeze(1) == different.unsqueeze(0)).to(torch.float32)


def conv_input_rows(module: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    """Patches of (N, C, L) or (N, C, H, W) as rows (N * places, C * size of the kernel)."""
    # The order (left, right, top, bottom) that torch.nn.functional.pad takes, 'same' and 'valid' resolved.
    amounts: list[int] = list(module._reversed_padding_repeated_twice)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = nn.functional.pad(x, amounts, mode=mode)
    lone = (1,) * (2 - len(module.kernel_size))
    if lone:
        x = x.unsqueeze(2)
    patches = nn.functional.unfold(
        x, (*lone, *module.kernel_size), dilation=(*lone, *module.dilation), stride=(*lone, *module.stride)
    )
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])
