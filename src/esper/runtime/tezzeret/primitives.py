"""Operations of the kernel IR for which torch has no module of its own. It imports torch only and each class stands
alone, so an exported model may carry their source.

Parameters are cast to what they meet: under autocast a scale in float32 must not turn a half precision delta wide.
"""

import torch
from torch import Tensor
from torch import nn
from torch.nn import functional


class Affine(nn.Module):
    """`x * weight (+ bias)` with one number for each channel; the channels are axis 1 (`first`) or the last one."""

    def __init__(
        self, channels: int, channel_axis: str, bias: bool, device: str = "cpu", dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype)) if bias else None
        self.channel_axis = channel_axis

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, ...), gives the same shape."""
        form = (-1, *[1] * (x.dim() - 2)) if self.channel_axis == "first" else (-1,)
        scaled = x * self.weight.to(x.dtype).reshape(form)
        return scaled if self.bias is None else scaled + self.bias.to(x.dtype).reshape(form)


class Gate(nn.Module):
    """`tanh(weight) * x` with one gate for each channel; the channels are axis 1 (`first`) or the last one."""

    def __init__(self, channels: int, channel_axis: str, device: str = "cpu", dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))
        self.channel_axis = channel_axis

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, ...), gives the same shape."""
        form = (-1, *[1] * (x.dim() - 2)) if self.channel_axis == "first" else (-1,)
        return x * torch.tanh(self.weight.to(x.dtype)).reshape(form)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over axis 1, at each place by itself."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, channels, ...), gives the same shape."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Add(nn.Module):
    """The sum of two tensors."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """left, right: (batch, ...) of equal rank."""
        return left + right


class Subtract(nn.Module):
    """The difference of two tensors."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """left, right: (batch, ...) of equal rank."""
        return left - right


class Multiply(nn.Module):
    """The product of two tensors, number by number."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """left, right: (batch, ...) of equal rank."""
        return left * right


class Mean(nn.Module):
    """The mean over axes of a sample, which stay with size 1."""

    def __init__(self, axes: tuple[int, ...]) -> None:
        super().__init__()
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, ...)."""
        return x.mean(dim=[axis + 1 for axis in self.axes], keepdim=True)


class SelfAttention(nn.Module):
    """Scaled dot-product attention of a sequence with itself. `weight` (3 * heads * head_dim, channels) stacks the
    projections to queries, keys and values; each is heads times head_dim wide."""

    def __init__(
        self,
        channels: int,
        heads: int,
        head_dim: int,
        causal: bool,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3 * heads * head_dim, channels, device=device, dtype=dtype))
        self.heads = heads
        self.head_dim = head_dim
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, places, channels), gives (batch, places, heads * head_dim)."""
        batch, places = x.shape[0], x.shape[1]
        projected = functional.linear(x, self.weight)
        query, key, value = projected.reshape(batch, places, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return mixed.transpose(1, 2).reshape(batch, places, self.heads * self.head_dim)
