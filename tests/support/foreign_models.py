"""Models that others wrote, tiny and with random weights: what growth must live with without having been asked."""

from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from typing import Any

import torch
from torch import Tensor
from torch import nn
from torch.nn import functional
from torchvision.models.resnet import BasicBlock
from torchvision.models.resnet import ResNet
from transformers import BertConfig
from transformers import BertForSequenceClassification
from transformers import GPT2Config
from transformers import GPT2LMHeadModel
from transformers import ViTConfig
from transformers import ViTForImageClassification


@dataclass(frozen=True)
class Growth:
    """One graft: where, what, of what kind the site is, and whether it becomes part of the host's weights."""

    site: str
    blueprint: str
    kind: str
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    folds: bool = False


@dataclass(frozen=True)
class Foreign:
    """A model of others: how it is made and called, and what is grown in it.

    `batch()` are the named arguments of one call; `loss` takes what the call returns. `blocks` are globs that name
    whole blocks, `exclude` those of layers that can be no site.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[], dict[str, Any]]
    loss: Callable[[Any], Tensor]
    grows: tuple[Growth, ...]
    blocks: tuple[str, ...]
    exclude: tuple[str, ...] = ()


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(11)


def _ids(*shape: int, most: int = 24) -> Tensor:
    return torch.randint(1, most, shape, generator=_generator())


def _floats(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_generator())


def _classes(logits: Tensor) -> Tensor:
    """Cross entropy with the classes 0, 1, 2, 0, ... of what may have places besides the batch: (N, classes, ...)."""
    target = torch.arange(logits[:, 0].numel()).reshape(logits[:, 0].shape) % 3
    return functional.cross_entropy(logits, target)


def gpt2(**how: Any) -> nn.Module:
    settings = {"vocab_size": 24, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2} | how
    return GPT2LMHeadModel(GPT2Config(**settings, bos_token_id=0, eos_token_id=0, pad_token_id=0))


def bert(**how: Any) -> nn.Module:
    settings = {"vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2} | how
    return BertForSequenceClassification(
        BertConfig(**settings, intermediate_size=24, max_position_embeddings=16, num_labels=3)
    )


def bert_batch() -> dict[str, Any]:
    """Three sequences, the last two shorter than the first."""
    mask = (torch.arange(6) < torch.tensor([6, 4, 3]).unsqueeze(1)).long()
    return {"input_ids": _ids(3, 6) * mask, "attention_mask": mask, "labels": torch.tensor([0, 1, 2])}


def vit() -> nn.Module:
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
        num_labels=3,
        hidden_dropout_prob=0.1,
    )
    return ViTForImageClassification(config)


def resnet() -> nn.Module:
    """torchvision's, cut off after its second stage."""
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3)
    model.layer3, model.layer4, model.fc = nn.Identity(), nn.Identity(), nn.Linear(128, 3)
    return model


class Double(nn.Module):
    """Two convolutions with what a U-Net has beside them."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, padding_mode="reflect")
        self.norm2 = nn.GroupNorm(2, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm1(self.conv1(x)), inplace=True)
        return functional.silu(self.norm2(self.conv2(x)))


class UNet(nn.Module):
    """Down, across, and up again with skips; an odd size is cut to fit."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.inwards = Double(2, width)
        self.down = Double(width, 2 * width)
        self.bottom = Double(2 * width, 2 * width)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.outwards = Double(2 * width, width)
        self.head = nn.Conv2d(width, 3, 1)

    def forward(self, image: Tensor) -> Tensor:
        skip = self.inwards(image)
        deep = self.bottom(self.down(functional.max_pool2d(skip, 2)))
        up = self.up(deep)
        up = functional.pad(up, (0, skip.shape[-1] - up.shape[-1], 0, skip.shape[-2] - up.shape[-2]))
        return self.head(self.outwards(torch.cat([skip, up], dim=1)))


class LanguageModel(nn.Module):
    """Embedding, LSTM, linear; the weights of first and last are one."""

    def __init__(self, words: int = 24, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width, padding_idx=0)
        self.cells = nn.LSTM(width, width, 2, batch_first=True, dropout=0.2)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, words)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, state: tuple[Tensor, Tensor] | None = None) -> dict[str, Any]:
        hidden, state = self.cells(self.embed(ids), state)
        return {"state": state, "logits": self.head(self.norm(hidden))}


class Expert(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.gelu(self.up(x)))


class Mixture(nn.Module):
    """Experts that each see only the rows that are sent to them (one of them none), fed and answering with
    dictionaries that hold more than tensors."""

    def __init__(self, width: int = 8, experts: int = 3) -> None:
        super().__init__()
        self.project = nn.ModuleDict({"text": nn.Embedding(24, width), "image": nn.Conv1d(2, width, 3, padding=1)})
        self.gate = nn.Linear(width, experts)
        self.experts = nn.ModuleList(Expert(width) for _ in range(experts))
        self.head = nn.Linear(width, 3)
        with torch.no_grad():
            self.gate.bias.copy_(torch.tensor([0.0, 0.0, -100.0]))

    def forward(self, batch: dict[str, Any], *, scale: float = 1.0) -> dict[str, Any]:
        x = self.project["text"](batch["text"]) + self.project["image"](batch["image"]).transpose(1, 2)
        rows = x.flatten(0, 1)
        weights, chosen = self.gate(rows).softmax(-1).max(-1)
        mixed = torch.zeros_like(rows)
        for index, expert in enumerate(self.experts):
            mine = chosen == index
            mixed[mine] = weights[mine].unsqueeze(-1) * expert(rows[mine])
        hidden = (rows + scale * mixed).unflatten(0, x.shape[:2])
        return {"names": batch["names"], "logits": self.head(hidden).transpose(1, 2), "sizes": [chosen.bincount()]}


class Encoder(nn.Module):
    """torch's own encoder, which leaves for a fused path in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.head(self.encoder(x, src_key_padding_mask=padding)).transpose(1, 2)


def _labelled(output: Any) -> Tensor:
    loss: Tensor = output.loss
    return loss


FOREIGN: dict[str, Foreign] = {
    "gpt2": Foreign(
        make=gpt2,
        batch=lambda: {"input_ids": _ids(3, 7), "labels": _ids(3, 7)},
        loss=_labelled,
        blocks=("transformer.h.?", "transformer.h.?.mlp", "transformer.h.?.attn"),
        grows=(
            Growth("transformer.wte", "lowrank", "embedding"),
            Growth("transformer.h.0.ln_1", "bottleneck", "layer_norm"),
            Growth("transformer.h.0.attn.c_attn", "bottleneck", "transformers_conv1d"),
            Growth("transformer.h.0.mlp.c_proj", "lowrank", "transformers_conv1d", folds=True),
            Growth("transformer.h.0.attn", "scale_shift", "block"),
            Growth("transformer.h.0.mlp", "depth_block", "block"),
            Growth("transformer.h.1", "attention", "block"),
            Growth("lm_head", "bottleneck", "linear"),
        ),
    ),
    "bert": Foreign(
        make=bert,
        batch=bert_batch,
        loss=_labelled,
        blocks=("bert.encoder.layer.?", "bert.encoder.layer.?.attention"),
        grows=(
            Growth("bert.embeddings.word_embeddings", "lowrank", "embedding", folds=True),
            Growth("bert.embeddings.LayerNorm", "norm_gate", "layer_norm"),
            Growth("bert.encoder.layer.0.attention.self.query", "lowrank", "linear", folds=True),
            Growth("bert.encoder.layer.0.intermediate.dense", "widen", "linear", folds=True),
            Growth("bert.encoder.layer.0.attention", "bottleneck", "block"),
            Growth("bert.encoder.layer.1", "attention", "block", {"causal": False}),
            Growth("bert.pooler.dense", "bottleneck", "linear"),
            Growth("classifier", "scale_shift", "linear", folds=True),
        ),
    ),
    "vit": Foreign(
        make=vit,
        batch=lambda: {"pixel_values": _floats(3, 3, 8, 8), "labels": torch.tensor([0, 1, 2])},
        loss=_labelled,
        blocks=("vit.layers.?", "vit.layers.?.mlp"),
        grows=(
            Growth("vit.embeddings.patch_embeddings.projection", "bottleneck", "conv2d"),
            Growth("vit.layers.0.attention.q_proj", "lowrank", "linear", folds=True),
            Growth("vit.layers.0.layernorm_before", "scale_shift", "layer_norm", folds=True),
            Growth("vit.layers.0.mlp", "bottleneck", "block"),
            Growth("vit.layers.0.mlp.fc1", "widen", "linear", folds=True),
            Growth("vit.layers.1", "attention", "block", {"causal": False}),
            Growth("classifier", "bottleneck", "linear"),
        ),
    ),
    "resnet": Foreign(
        make=resnet,
        batch=lambda: {"x": _floats(4, 3, 16, 16)},
        loss=_classes,
        blocks=("layer1.0", "layer1"),
        grows=(
            Growth("conv1", "lowrank", "conv2d", folds=True),
            Growth("bn1", "scale_shift", "batch_norm", folds=True),
            Growth("layer1.0.conv1", "widen", "conv2d", folds=True),
            Growth("layer1.0", "conv_bottleneck", "block"),
            Growth("layer2.0.conv1", "depthwise", "conv2d"),
            Growth("layer2.0.bn2", "se_gate", "batch_norm"),
            Growth("fc", "bottleneck", "linear"),
        ),
    ),
    "unet": Foreign(
        make=UNet,
        batch=lambda: {"image": _floats(3, 2, 9, 10)},
        loss=_classes,
        blocks=("bottom",),
        grows=(
            Growth("inwards.conv1", "widen", "conv2d", folds=True),
            Growth("down.conv2", "bottleneck", "conv2d"),
            Growth("down.norm1", "norm_gate", "batch_norm"),
            Growth("bottom", "conv_bottleneck", "block"),
            Growth("outwards.norm2", "se_gate", "group_norm"),
            Growth("outwards.conv1", "conv_bottleneck", "conv2d"),
            Growth("head", "lowrank", "conv2d", folds=True),
        ),
    ),
    "lstm": Foreign(
        make=LanguageModel,
        batch=lambda: {"ids": _ids(3, 6)},
        loss=lambda output: functional.cross_entropy(output["logits"].transpose(1, 2), _ids(3, 6)),
        blocks=("cells",),
        grows=(
            Growth("embed", "lowrank", "embedding"),
            Growth("cells", "depth_block", "block"),
            Growth("norm", "bottleneck", "layer_norm"),
            Growth("head", "bottleneck", "linear"),
        ),
    ),
    "mixture": Foreign(
        make=Mixture,
        batch=lambda: {
            "batch": {"text": _ids(3, 5), "image": _floats(3, 2, 5), "names": ["a", "b", "c"]},
            "scale": 0.5,
        },
        loss=lambda output: _classes(output["logits"]),
        blocks=("experts.?",),
        grows=(
            Growth("project.text", "scale_shift", "embedding", folds=True),
            Growth("project.image", "bottleneck", "conv1d"),
            Growth("experts.0", "bottleneck", "block"),
            Growth("experts.0.up", "widen", "linear", folds=True),
            Growth("experts.1.down", "depth_block", "linear"),
            Growth("gate", "lowrank", "linear", folds=True),
        ),
    ),
    "encoder": Foreign(
        make=Encoder,
        batch=lambda: {"x": _floats(3, 5, 8)},
        loss=_classes,
        blocks=("encoder.layers.?",),
        exclude=("*.out_proj",),
        grows=(
            Growth("encoder.layers.0.self_attn", "attention", "attention", {"causal": False}),
            Growth("encoder.layers.0.linear1", "widen", "linear", folds=True),
            Growth("encoder.layers.0.norm2", "bottleneck", "layer_norm"),
            Growth("encoder.layers.1", "depth_block", "block"),
            Growth("encoder.layers.1.linear2", "lowrank", "linear", folds=True),
            Growth("head", "lowrank", "linear", folds=True),
        ),
    ),
}
