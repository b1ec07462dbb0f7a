"""The fused evaluation paths of torch's transformer modules: never a silent way around what has grown."""

import copy
from typing import Any

import pytest
import torch
from host_zoo import stirred
from torch import Tensor
from torch import nn

import esper
from esper.runtime.kasmina.layer import state_of

PARTS = ("self_attn", "linear1", "linear2", "norm1", "norm2", "dropout1")


class Encoder(nn.Module):
    def __init__(self, layers: int = 2, **how: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, **how)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=not how.get("norm_first", False))

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.encoder(x, src_key_padding_mask=padding)


def inputs() -> tuple[Tensor, Tensor]:
    """Three sequences of up to five steps; the padding mask is True where there is nothing."""
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(2))
    return x, torch.arange(5) >= torch.tensor([5, 3, 2]).unsqueeze(1)


def is_fused(layer: nn.Module, x: Tensor) -> bool:
    """Whether a call of an encoder layer goes around its first linear layer."""
    called: list[Any] = []
    linear = layer.linear1
    linear.forward = lambda h: called.append(h) or nn.functional.linear(h, linear.weight, linear.bias)
    try:
        with torch.no_grad():
            layer(x)
    finally:
        del linear.forward
    return not called


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_a_site_inside_an_encoder_layer_runs_in_evaluation_as_in_training(
    part: str, norm_first: bool, activation: str
) -> None:
    torch.manual_seed(0)
    model = Encoder(norm_first=norm_first, activation=activation).eval()
    x, _ = inputs()
    with torch.no_grad():
        fused = model(x)
    esper.wrap(model, [f"encoder.layers.1.{part}"], example_inputs=x)
    site = f"encoder.layers.1.{part}"
    with torch.no_grad():
        assert torch.equal(model(x), fused)
        esper.graft(model, site, "bottleneck")
        torch.testing.assert_close(model(x), fused)
        stirred(model, site)
        evaluated = model(x)
        assert not torch.allclose(evaluated, fused, atol=1e-3)
    torch.testing.assert_close(model.train()(x).detach(), evaluated)
    model.eval()
    with torch.no_grad(), esper.dormant(model):
        assert torch.equal(model(x), fused)
    esper.cull(model, site)
    with torch.no_grad():
        assert torch.equal(model(x), fused)


def test_only_the_layer_that_has_grown_leaves_its_fused_path() -> None:
    model = Encoder().eval()
    x, _ = inputs()
    esper.wrap(model, example_inputs=x)
    first, second = model.encoder.layers
    assert is_fused(first, x)
    assert is_fused(second, x)
    esper.graft(model, "encoder.layers.1.norm1", "scale_shift")
    assert is_fused(first, x)
    assert not is_fused(second, x)
    twin = copy.deepcopy(model)
    assert not is_fused(twin.encoder.layers[1], x)
    esper.cull(model, "encoder.layers.1.norm1")
    assert is_fused(second, x)


@pytest.mark.parametrize("reads", ["bottleneck", "depth_block"])
def test_a_whole_encoder_layer_grows_around_its_fused_path(reads: str) -> None:
    torch.manual_seed(0)
    model = Encoder().eval()
    x, _ = inputs()
    with torch.no_grad():
        fused = model(x)
    esper.wrap(model, [nn.TransformerEncoderLayer], example_inputs=x)
    assert [s.name for s in esper.status(model).sites] == ["encoder.layers.0", "encoder.layers.1"]
    with torch.no_grad():
        assert torch.equal(model(x), fused)
        esper.graft(model, "encoder.layers.0", reads)
        assert torch.equal(model(x), fused)
        stirred(model, "encoder.layers.0")
        evaluated = model(x)
    assert is_fused(model.encoder.layers[0], x)
    assert not torch.allclose(evaluated, fused, atol=1e-3)
    torch.testing.assert_close(model.train()(x).detach(), evaluated)


@pytest.mark.parametrize("site", ["encoder.layers.0", "encoder.layers.0.linear2", "encoder.layers.1.self_attn"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_padded_batches_run_what_has_grown_where_torch_would_nest_them(site: str) -> None:
    torch.manual_seed(0)
    model = Encoder().eval()
    x, padding = inputs()
    with torch.no_grad():
        nested = model(x, padding)
    esper.wrap(model, [site], example_inputs=(x, padding))
    kept = ~padding
    with torch.no_grad():
        assert torch.equal(model(x, padding), nested)
        esper.graft(model, site, "bottleneck")
        torch.testing.assert_close(model(x, padding)[kept], nested[kept])
        stirred(model, site)
        evaluated = model(x, padding)
    assert not torch.allclose(evaluated[kept], nested[kept], atol=1e-3)
    torch.testing.assert_close(model.train()(x, padding).detach()[kept], evaluated[kept])
    model.eval()
    esper.cull(model, site)
    with torch.no_grad():
        assert torch.equal(model(x, padding), nested)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_first_forward_proves_nothing() -> None:
    model = Encoder().eval()
    x, padding = inputs()
    esper.wrap(model, [nn.TransformerEncoderLayer])
    with torch.no_grad():
        model(x, padding)
    with pytest.raises(esper.GrowthError, match="has not been called yet"):
        esper.graft(model, "encoder.layers.0", "bottleneck")
    model(x)
    esper.graft(model, "encoder.layers.0", "bottleneck")


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("blueprint", ["bottleneck", "scale_shift", "attention"])
def test_attention_grows_beside_its_own_native_path(batch_first: bool, blueprint: str) -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.attention(x, x, x, average_attn_weights=False)

    torch.manual_seed(0)
    model, x = Attends().eval(), torch.randn(3, 5, 8)
    with torch.no_grad():
        plain, weights = model(x)
    esper.wrap(model, ["attention"], example_inputs=x)
    with torch.no_grad():
        esper.graft(model, "attention", blueprint)
        assert torch.equal(model(x)[0], plain)
        stirred(model, "attention")
        evaluated = model(x)
        assert torch.equal(evaluated[1], weights)
        assert not torch.allclose(evaluated[0], plain, atol=1e-3)
    torch.testing.assert_close(model.train()(x)[0].detach(), evaluated[0])
    assert state_of(model.attention).input_shape == ((5, 8) if batch_first else (3, 8))


def test_attention_delta_is_that_of_the_batch_whatever_axis_it_is_on() -> None:
    outputs = []
    for batch_first in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential()
        model.host = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        model.forward = lambda x, host=model.host: host(x, x, x)[0]
        x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))
        given = x if batch_first else x.transpose(0, 1)
        esper.wrap(model, ["host"], example_inputs=given)
        esper.graft(model, "host", "attention")
        stirred(model)
        esper.graft(model, "host", "se_gate")
        stirred(model, slot=1)
        output = model(given)
        outputs.append(output if batch_first else output.transpose(0, 1))
    torch.testing.assert_close(*outputs)


def test_one_sequence_without_a_batch_grows_too() -> None:
    model = nn.Sequential()
    model.host = nn.MultiheadAttention(8, 2, batch_first=True)
    model.forward = lambda x: model.host(x, x, x)[0]
    x = torch.randn(3, 5, 8)
    esper.wrap(model, ["host"], example_inputs=x)
    for slot, blueprint in enumerate(("bottleneck", "attention", "se_gate", "scale_shift")):
        esper.graft(model, "host", blueprint)
        stirred(model, slot=slot)
    torch.testing.assert_close(model(x[1]), model(x)[1])


def test_out_proj_of_attention_stays_refused_by_name() -> None:
    with pytest.raises(esper.SiteError, match=r"'encoder\.layers\.0\.self_attn\.out_proj' cannot be a site"):
        esper.wrap(Encoder(), ["*.out_proj"])
