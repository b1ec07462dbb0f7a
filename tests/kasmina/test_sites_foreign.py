"""Models that others wrote: dormant they are what they were, to the bit; each grows at a layer and at a block."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from host_zoo import stirred
from torch import Tensor
from torch import nn
from torch_geometric.nn import GATConv
from torch_geometric.nn import GCNConv
from torch_geometric.nn import GINConv
from torchvision.models.resnet import BasicBlock
from torchvision.models.resnet import ResNet

import esper

Batch = dict[str, Any]


def _gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=20, n_positions=8, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
        )
    )


def _bert() -> nn.Module:
    return transformers.BertModel(
        transformers.BertConfig(
            vocab_size=20,
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=8,
        )
    )


def _vit() -> nn.Module:
    return transformers.ViTModel(
        transformers.ViTConfig(
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            image_size=8,
            patch_size=4,
            num_channels=3,
        )
    )


class UNet(nn.Module):
    """Two levels, a skip connection, transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.SiLU())
        self.middle = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.up = nn.ConvTranspose2d(6, 6, 2, stride=2)
        self.last = nn.Conv2d(12, 2, 3, padding="same")

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        low = self.middle(nn.functional.max_pool2d(skip, 2))
        return self.last(torch.cat([skip, self.up(low)], dim=1))


class Recurrent(nn.Module):
    """A language model with an LSTM that is called by keywords and returns its state."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.lstm = nn.LSTM(8, 8, num_layers=2)
        self.head = nn.Linear(8, 20)

    def forward(self, ids: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        hidden, state = self.lstm(self.embedding(ids), state)
        return self.head(hidden), state


class Graphs(nn.Module):
    """Three PyG convolutions of one width."""

    def __init__(self) -> None:
        super().__init__()
        self.gcn = GCNConv(8, 8)
        self.gat = GATConv(8, 4, heads=2)
        self.gin = GINConv(nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        for convolution in (self.gcn, self.gat, self.gin):
            x = torch.relu(convolution(x, edge_index))
        return self.head(x)


class Mixture(nn.Module):
    """Soft experts over one mapping as the only argument."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 2)
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(2)])

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        weights = self.gate(batch["x"]).softmax(-1)
        mixed = sum(weights[:, i : i + 1] * expert(batch["x"]) for i, expert in enumerate(self.experts))
        return {"out": mixed, "weights": weights}


def _graph() -> Batch:
    edges = torch.tensor([[0, 1, 2, 3, 4, 1], [1, 2, 3, 4, 0, 0]])
    return {"x": torch.randn(5, 8), "edge_index": edges}


@dataclass(frozen=True)
class Foreign:
    make: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    layer: tuple[str, str]
    """A layer and a blueprint for it."""
    block: tuple[str, str]


FOREIGN: dict[str, Foreign] = {
    "gpt2": Foreign(
        _gpt2,
        lambda: {"input_ids": torch.randint(20, (2, 6))},
        ("transformer.h.0.mlp.c_fc", "bottleneck"),
        ("transformer.h.1", "attention"),
    ),
    "bert": Foreign(
        _bert,
        lambda: {"input_ids": torch.randint(20, (2, 6)), "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2])},
        ("embeddings.LayerNorm", "norm_gate"),
        ("encoder.layer.0", "depth_block"),
    ),
    "vit": Foreign(
        _vit,
        lambda: {"pixel_values": torch.randn(2, 3, 8, 8)},
        ("embeddings.patch_embeddings.projection", "lowrank"),
        ("layers.0", "attention"),
    ),
    "resnet": Foreign(
        lambda: ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3),
        lambda: {"x": torch.randn(2, 3, 32, 32)},
        ("layer2.0.conv1", "bottleneck"),
        ("layer1.0", "conv_bottleneck"),
    ),
    "unet": Foreign(UNet, lambda: {"x": torch.randn(2, 3, 8, 8)}, ("down.1", "scale_shift"), ("middle", "depthwise")),
    "lstm": Foreign(
        Recurrent, lambda: {"ids": torch.randint(20, (6, 2))}, ("embedding", "lowrank"), ("lstm", "bottleneck")
    ),
    "graphs": Foreign(Graphs, _graph, ("head", "bottleneck"), ("gat", "bottleneck")),
    "gin": Foreign(Graphs, _graph, ("gin.nn.0", "bottleneck"), ("gin", "depth_block")),
    "mixture": Foreign(
        Mixture, lambda: {"batch": {"x": torch.randn(4, 6)}}, ("gate", "bottleneck"), ("experts.0", "bottleneck")
    ),
}


def made(name: str) -> tuple[nn.Module, Batch]:
    torch.manual_seed(0)
    model = FOREIGN[name].make()
    torch.manual_seed(1)
    return model, FOREIGN[name].batch()


def outputs(value: Any) -> list[Tensor]:
    """Every floating tensor in what a model returned."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return [tensor for part in parts for tensor in outputs(part)]


def step(model: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer) -> tuple[list[Tensor], list[Tensor | None]]:
    torch.manual_seed(2)
    optimizer.zero_grad()
    found = outputs(model(**batch))
    sum(tensor.square().mean() for tensor in found).backward()
    gradients = [p.grad for p in model.parameters()]
    optimizer.step()
    return found, gradients


def equal(left: list[Any], right: list[Any]) -> bool:
    pairs = zip(left, right, strict=True)
    return all((a is None and b is None) or torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("targets", ["auto", "block"])
def test_dormant_it_is_what_it_was_in_forward_backward_and_step(name: str, targets: str) -> None:
    plain, batch = made(name)
    ours, _ = made(name)
    esper.wrap(ours, "auto" if targets == "auto" else [FOREIGN[name].block[0]], example_inputs=batch)
    assert all(site.proven for site in esper.status(ours).sites)
    for _ in range(2):
        left = step(plain, batch, torch.optim.AdamW(plain.parameters(), lr=0.01))
        right = step(ours, batch, torch.optim.AdamW(ours.parameters(), lr=0.01))
        assert equal(left[0], right[0]) and equal(left[1], right[1])
    assert esper.weights_digest(plain) == esper.weights_digest(ours)
    plain.eval(), ours.eval()
    with torch.no_grad():
        assert equal(outputs(plain(**batch)), outputs(ours(**batch)))


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("where", ["layer", "block"])
def test_it_grows_exactly_learns_and_is_given_back(name: str, where: str) -> None:
    site, blueprint = getattr(FOREIGN[name], where)
    model, batch = made(name)
    esper.wrap(model, [site], example_inputs=batch)
    model.eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    before = [t.detach() for t in outputs(model(**batch))]
    made_graft = esper.graft(model, site, blueprint, optimizer=optimizer)
    assert made_graft.certificate is not None and made_graft.certificate.passed
    assert equal([t.detach() for t in outputs(model(**batch))], before)
    grown = dict(model.get_submodule(f"{site}.kasmina.0").named_parameters())
    moved: set[str] = set()
    for _ in range(2):
        step(model, batch, optimizer)
        moved |= {n for n, p in grown.items() if p.grad is not None and bool(p.grad.any())}
    assert moved == set(grown)
    stirred(model, site)
    with esper.dormant(model):
        host_only = [t.detach() for t in outputs(model(**batch))]
    assert not equal([t.detach() for t in outputs(model(**batch))], host_only)
    esper.cull(model, site, optimizer=optimizer)
    assert equal([t.detach() for t in outputs(model(**batch))], host_only)


def test_generation_with_a_cache_runs_what_has_grown() -> None:
    model, batch = made("gpt2")
    esper.wrap(model, ["transformer.h.0", "transformer.h.1.mlp.c_fc"], example_inputs=batch)
    for site in ("transformer.h.0", "transformer.h.1.mlp.c_fc"):
        esper.graft(model, site, "bottleneck")
        stirred(model, site)
    model.eval()
    with torch.no_grad():
        ids = batch["input_ids"]
        whole = model(input_ids=ids).logits[:, -1]
        cached = model(input_ids=ids[:, :-1], use_cache=True)
        last = model(input_ids=ids[:, -1:], past_key_values=cached.past_key_values).logits[:, -1]
    torch.testing.assert_close(last, whole)
