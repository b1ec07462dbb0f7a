"""Sites under autocast, a gradient scaler, half and double weights, and memory formats."""

from typing import Any

import pytest
import torch
from host_zoo import HOSTS
from host_zoo import made
from host_zoo import stirred
from torch import Tensor
from torch import nn

import esper

READERS = ("input", "output")


def grown(name: str, reads: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    """A model with a seed at `host` that has learned something."""
    model, x = made(name)
    model.to(dtype)
    x = x.to(dtype) if x.is_floating_point() else x
    esper.wrap(model, ["host"], example_inputs=x)
    esper.graft(model, "host", blueprint(name, reads))
    stirred(model)
    return model, x


def blueprint(name: str, reads: str) -> str:
    if reads == "output" or name == "batch_norm3d":
        return "depth_block" if name in ("linear", "conv2d") else "scale_shift"
    return "lowrank" if HOSTS[name].form == "embedding" else "bottleneck"


def seen_outputs(model: nn.Module, x: Tensor) -> list[Any]:
    seen: list[Any] = []
    handle = model.host.register_forward_hook(lambda module, args, output: seen.append(output))
    model(x)
    handle.remove()
    return seen


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.bfloat16) for name in HOSTS]
    + [(name, torch.float16) for name in ("linear", "conv2d", "embedding", "layer_norm", "attention", "block")],
)
@pytest.mark.parametrize("reads", READERS)
def test_autocast_kernel_keeps_the_dtype_and_learns_finite(name: str, dtype: torch.dtype, reads: str) -> None:
    model, x = grown(name, reads)
    with torch.autocast("cpu", dtype=dtype):
        with esper.dormant(model):
            plain = model(x)
        output = model(x)
        assert output.dtype is plain.dtype
        assert not torch.equal(output, plain)
        output.float().square().mean().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.host.kasmina.parameters())
    assert {p.grad.dtype for p in model.host.kasmina.parameters()} == {torch.float32}
    with torch.autocast("cpu", dtype=dtype), torch.no_grad():
        half = model(x)
    with torch.no_grad():
        torch.testing.assert_close(half.float(), model(x), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", ["linear", "conv2d", "embedding", "layer_norm", "attention", "convolutional_block"])
@pytest.mark.parametrize("reads", READERS)
def test_birth_under_autocast_is_exact(name: str, reads: str) -> None:
    model, x = made(name)
    esper.wrap(model, ["host"], example_inputs=x).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = model(x)
        esper.graft(model, "host", blueprint(name, reads))
        assert torch.equal(model(x), before)
    assert {p.dtype for p in model.host.kasmina.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["linear", "conv2d", "embedding", "layer_norm", "group_norm", "block"])
@pytest.mark.parametrize("reads", READERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_models_of_other_precisions_grow_in_theirs(name: str, reads: str, dtype: torch.dtype) -> None:
    model, x = made(name)
    model.to(dtype).eval()
    x = x.to(dtype) if x.is_floating_point() else x
    esper.wrap(model, ["host"], example_inputs=x)
    before = model(x)
    esper.graft(model, "host", blueprint(name, reads))
    assert torch.equal(model(x), before)
    assert {p.dtype for p in model.host.kasmina.parameters()} == {dtype}
    stirred(model)
    assert model(x).dtype is dtype
    assert not torch.equal(model(x), before)


@pytest.mark.parametrize("name", ["linear", "conv2d", "embedding", "layer_norm", "batch_norm2d", "block"])
def test_a_grown_model_follows_a_change_of_precision(name: str) -> None:
    model, x = grown(name, "input")
    esper.graft(model, "host", "scale_shift")
    stirred(model, slot=1)
    model.eval()
    expected = model(x)
    model.double()
    wide = model(x.double() if x.is_floating_point() else x)
    assert wide.dtype is torch.float64
    torch.testing.assert_close(wide.float(), expected)
    model.bfloat16()
    narrow = model(x.bfloat16() if x.is_floating_point() else x)
    assert narrow.dtype is torch.bfloat16
    torch.testing.assert_close(narrow.float(), expected, rtol=0.1, atol=0.1)


def test_a_norm_that_is_kept_wider_than_its_model_grows() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 8, dtype=torch.bfloat16)
            self.norm = nn.LayerNorm(8)
            self.last = nn.Linear(8, 2, dtype=torch.bfloat16)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.norm(self.first(x)).to(torch.bfloat16))

    model, x = Mixed(), torch.randn(4, 8, dtype=torch.bfloat16)
    esper.wrap(model, ["norm"], example_inputs=x)
    before = model(x)
    for blueprint_name in ("bottleneck", "scale_shift"):
        esper.graft(model, "norm", blueprint_name)
    assert torch.equal(model(x), before)
    assert {p.dtype for p in model.norm.kasmina.parameters()} == {torch.float32}
    stirred(model, "norm")
    model(x).float().sum().backward()
    assert not torch.equal(model(x), before)


@pytest.mark.parametrize("name", ["conv2d", "batch_norm2d", "group_norm", "convolutional_block"])
@pytest.mark.parametrize("blueprint_name", ["bottleneck", "scale_shift", "norm_gate", "se_gate", "depth_block"])
def test_memory_format_of_the_output_is_kept(name: str, blueprint_name: str) -> None:
    model, x = made(name)
    model.to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    esper.wrap(model, ["host"], example_inputs=x)
    (plain,) = seen_outputs(model, x)
    esper.graft(model, "host", blueprint_name)
    stirred(model)
    (output,) = seen_outputs(model, x)
    plain, output = (t[0] if isinstance(t, tuple) else t for t in (plain, output))
    assert not torch.equal(output, plain)
    assert output.stride() == plain.stride()


@pytest.mark.parametrize("name", ["linear", "conv1d", "block"])
def test_layout_of_an_ordinary_output_is_kept(name: str) -> None:
    model, x = grown(name, "input")
    with esper.dormant(model):
        (plain,) = seen_outputs(model, x)
    (output,) = seen_outputs(model, x)
    plain, output = (t["hidden"] if isinstance(t, dict) else t for t in (plain, output))
    assert output.stride() == plain.stride()


def test_scaled_gradients_train_what_has_grown_as_unscaled_ones_do() -> None:
    ends = []
    for scaled in (False, True):
        model, x = made("linear")
        esper.wrap(model, ["host"], example_inputs=x)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=8.0)
        for step in range(4):
            if step == 1:
                esper.graft(model, "host", "bottleneck", optimizer=optimizer)
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(x).float().square().mean()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*ends, rtol=0.02, atol=0.002)


def test_an_overflow_skips_the_step_of_newborns_too() -> None:
    model, x = made("linear")
    esper.wrap(model, ["host"], example_inputs=x)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    esper.graft(model, "host", "bottleneck", optimizer=optimizer)
    before = esper.weights_digest(model)
    scaler.scale(model(x * float("inf")).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert esper.weights_digest(model) == before
    assert scaler.get_scale() == 4.0
