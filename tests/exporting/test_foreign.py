"""Models that others wrote, grown and taken away as one file that needs torch only."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import esper


def grow(model: nn.Module, site: str, inputs: Any, blueprint: str = "bottleneck") -> nn.Module:
    esper.wrap(model, example_inputs=inputs)
    made = esper.graft(model, site, blueprint)
    for parameter in model.get_submodule(f"{site}.kasmina.{made.seed}").parameters():
        nn.init.normal_(parameter, std=0.05)
    return model


def gpt2() -> tuple[nn.Module, Any, str]:
    """Tied embeddings, transposed weights, keyword arguments, a result that is a dataclass."""
    transformers = pytest.importorskip("transformers")
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    small = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 30, "n_positions": 12}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**small, **ends))
    return model, {"input_ids": torch.randint(0, 30, (2, 7)), "use_cache": False}, "transformer.h.0.mlp.c_fc"


def bert() -> tuple[nn.Module, Any, str]:
    """A mask, two results, an attention of its own."""
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    model = transformers.BertModel(transformers.BertConfig(**small, vocab_size=30, max_position_embeddings=12))
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    inputs = {"input_ids": torch.randint(0, 30, (2, 7)), "attention_mask": mask}
    return model, inputs, "encoder.layer.0.intermediate.dense"


def resnet() -> tuple[nn.Module, Any, str]:
    """BatchNorms, operations in place, residual sums."""
    models = pytest.importorskip("torchvision.models")
    return models.resnet18(num_classes=4), torch.randn(2, 3, 32, 32), "layer2.0.conv1"


def graph_network() -> tuple[nn.Module, Any, str]:
    """Message passing: sums over edges, sizes that follow from values."""
    layers = pytest.importorskip("torch_geometric.nn")

    class Gcn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = layers.GCNConv(4, 8), layers.GCNConv(8, 6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
            return self.head(self.second(self.first(x, edges).relu(), edges))

    edges = torch.tensor([[0, 1, 2, 3, 1], [1, 2, 3, 0, 0]])
    return Gcn(), {"x": torch.randn(4, 4), "edges": edges}, "head"


def encoder() -> tuple[nn.Module, Any, str]:
    """torch's own transformer layer, whose fused path must not be what is written."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), torch.randn(2, 5, 8), "layers.0.linear1"


@pytest.mark.parametrize("factory", [gpt2, bert, resnet, graph_network, encoder])
def test_foreign_models_are_grown_and_taken_away(factory: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs, site = factory()
    grow(model, site, inputs)
    made = esper.export(model, tmp_path, format="python", example_inputs=inputs, name="foreign", verify=True)
    assert made.comparison is not None and made.comparison.passed
    assert made.way == ("torch.fx" if factory is resnet else "torch.export")
    source = (tmp_path / "modeling_foreign.py").read_text()
    assert not any(name in source for name in ("transformers", "torchvision", "torch_geometric", "import esper"))
