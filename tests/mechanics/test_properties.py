"""Properties of a graft over shapes, groups, strides and padding: whatever the geometry, the mechanics hold."""

import math

import pytest
import torch
from hypothesis import HealthCheck
from hypothesis import assume
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from torch import nn

import esper
from esper.runtime.kasmina.growing.fitting import site_contract
from esper.runtime.tezzeret.blueprints.registry import list_blueprints

QUICK = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
BLUEPRINTS = [blueprint.name for blueprint in list_blueprints() if blueprint.name != "noop"]


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Conv1d | nn.Conv2d, tuple[int, ...]]:
    """A convolution of any geometry, and the shape of a sample that it takes."""
    axes = draw(st.integers(1, 2))
    groups = draw(st.integers(1, 3))
    inputs, outputs = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    kernel = [draw(st.integers(1, 3)) for _ in range(axes)]
    dilation = [draw(st.integers(1, 2)) for _ in range(axes)]
    stride = [draw(st.integers(1, 3)) for _ in range(axes)]
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    sizes = [draw(st.integers(5, 9)) for _ in range(axes)]
    padding = draw(st.sampled_from(["same", "valid", None]))
    if padding == "same":
        stride = [1] * axes
    amounts = [draw(st.integers(0, size)) for size in kernel] if padding is None else padding
    kind = nn.Conv1d if axes == 1 else nn.Conv2d
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = kind(
            inputs, outputs, kernel, stride, amounts, dilation, groups, bias=draw(st.booleans()), padding_mode=mode
        )
    return layer, (inputs, *sizes)


def fits(model: nn.Module, site: str, blueprint: str) -> bool:
    try:
        site_contract(model, site, blueprint)
    except esper.GrowthError as refusal:
        assert refusal.code == "ESP-434"
        return False
    return True


def check_graft(model: nn.Module, site: str, blueprint: str, x: torch.Tensor) -> None:
    """Exact at birth; every parameter learns within two steps; the kept model is plain and computes the same."""
    esper.wrap(model, example_inputs=(x,))
    assume(fits(model, site, blueprint))
    model.eval()
    before = model(x).detach()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    graft = esper.graft(model, site, blueprint, optimizer=optimizer)
    assert torch.equal(model(x), before)
    assert graft.birth_difference == 0.0
    weight = torch.randn(before.shape, generator=torch.Generator().manual_seed(2))
    learnt: set[str] = set()
    for _ in range(2):
        optimizer.zero_grad()
        (model(x) * weight).mean().backward()
        named = dict(model.named_parameters())
        learnt |= {name for name in graft.parameter_names if bool(named[name].grad.any())}
        optimizer.step()
    assert learnt == set(graft.parameter_names)
    grown = model(x).detach()
    assert not torch.equal(grown, before)
    esper.fossilize(model, optimizer=optimizer)
    plain = esper.unwrap(model, optimizer=optimizer)
    assert torch.allclose(plain(x), grown, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@QUICK
@given(convolutions(), st.sampled_from(BLUEPRINTS))
def test_any_convolution_can_be_grown(made, blueprint):
    layer, shape = made
    x = torch.randn((8, *shape), generator=torch.Generator().manual_seed(1))
    try:
        output = layer(x)
    except RuntimeError:
        # A geometry that torch itself refuses (padding wider than the input, a kernel that is too large).
        assume(False)
    assume(math.prod(output.shape[1:]) >= 2)
    check_graft(nn.Sequential(layer), "0", blueprint, x)


@QUICK
@given(
    st.integers(1, 9),
    st.integers(2, 9),
    st.lists(st.integers(1, 4), max_size=2),
    st.sampled_from(BLUEPRINTS),
    st.booleans(),
)
def test_any_linear_layer_can_be_grown(inputs, outputs, places, blueprint, bias):
    x = torch.randn((8, *places, inputs), generator=torch.Generator().manual_seed(1))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = nn.Linear(inputs, outputs, bias=bias)
    check_graft(nn.Sequential(layer), "0", blueprint, x)


@QUICK
@given(
    st.integers(1, 6),
    st.integers(2, 7),
    st.integers(1, 5),
    st.sampled_from([nn.ReLU, nn.GELU, nn.Tanh, nn.SiLU, nn.Sigmoid]),
    st.booleans(),
    st.booleans(),
)
def test_any_pair_can_be_widened(inputs, width, outputs, activation, first_bias, second_bias):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = (nn.Linear(inputs, width, bias=first_bias), activation(), nn.Linear(width, outputs, bias=second_bias))
    x = torch.randn((8, inputs), generator=torch.Generator().manual_seed(1))
    model = nn.Sequential(*layers)
    check_graft(model, "0", "widen", x)
    assert model[0].out_features > width
    assert model[2].in_features == model[0].out_features


@QUICK
@given(st.integers(1, 3), st.integers(2, 5), st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.booleans())
def test_any_pair_of_convolutions_can_be_widened(inputs, width, outputs, window, stride, pooled):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first = nn.Conv2d(inputs, width, window, stride=stride, padding=window // 2)
        second = nn.Conv2d(width, outputs, 1)
    between = [nn.BatchNorm2d(width), nn.ReLU(), *([nn.MaxPool2d(2)] if pooled else [])]
    x = torch.randn((8, inputs, 8, 8), generator=torch.Generator().manual_seed(1))
    model = nn.Sequential(first, *between, second)
    check_graft(model, "0", "widen", x)
    assert model[0].out_channels > width
    assert model[1].num_features == model[0].out_channels
