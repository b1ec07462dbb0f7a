import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import nn

import esper
from esper.runtime.kasmina.probe import MAX_ROWS
from esper.runtime.kasmina.probe import probe
from esper.runtime.kasmina.probe import residual_gradient
from esper.runtime.kasmina.probe import saturation
from esper.runtime.kasmina.telemetry import Telemetry


def signals(result: Any) -> dict[str, Any]:
    return {signal.site: signal for signal in result.signals}


@pytest.mark.parametrize("name", ["mlp", "cnn", "normed"])
def test_probe_leaves_everything_bit_identical(zoo: Any, name: str) -> None:
    model, x = zoo.make(name)
    esper.wrap(model, example_inputs=x)
    model(x).square().mean().backward()
    fired: list[int] = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: fired.append(1))
    flags = [m.training for m in model.modules()]
    before = esper.weights_digest(model), [p.grad.clone() for p in model.parameters()], torch.get_rng_state()
    states = [dict(m.__dict__["_kasmina"].__dict__) for m in model.modules() if "_kasmina" in m.__dict__]
    result = probe(model, lambda: model(x).square().mean(), epoch=3, step=7)
    assert esper.weights_digest(model) == before[0]
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before[1], strict=True))
    assert torch.equal(torch.get_rng_state(), before[2])
    assert [m.training for m in model.modules()] == flags
    assert [dict(m.__dict__["_kasmina"].__dict__) for m in model.modules() if "_kasmina" in m.__dict__] == states
    assert not fired
    assert [signal.site for signal in result.signals] == [site.name for site in esper.status(model).sites]
    assert all((signal.epoch, signal.step) == (3, 7) for signal in result.signals)
    assert math.isfinite(result.loss)


def test_probe_samples_are_inputs_and_output_gradients(zoo: Any) -> None:
    model, x = zoo.make("mlp")
    esper.wrap(model, example_inputs=x)
    result = probe(model, lambda: model(x).square().mean())
    output = model(x)
    assert torch.equal(result.samples["fc1"].x, x)
    torch.testing.assert_close(result.samples["fc3"].g, 2 * output.detach() / output.numel())
    assert result.samples["fc1"].g.shape == (8, 5)
    few = probe(model, lambda: model(x).square().mean(), max_samples=3)
    assert few.samples["fc2"].x.shape == (3, 5)
    assert torch.equal(few.samples["fc2"].g, result.samples["fc2"].g[:3])


def test_convolution_samples_keep_their_shape_and_rows_are_bounded(zoo: Any) -> None:
    model, _ = zoo.make("cnn")
    x = torch.randn(60, 2, 8, 8)
    esper.wrap(model, example_inputs=x)
    result = probe(model, lambda: model(x).square().mean())
    assert result.samples["conv1"].x.shape == (60, 2, 8, 8)
    assert result.samples["conv2"].g.shape == (60, 4, 4, 4)
    found = signals(result)
    assert found["conv1"].rows_seen == MAX_ROWS
    assert found["conv2"].rows_seen == 60 * 16
    assert found["conv1"].residual_gradient is not None


def test_residual_gradient_is_what_the_input_cannot_explain() -> None:
    x = torch.randn(400, 6, dtype=torch.float64)
    x[:, 5] = 0.0
    linear = x @ torch.randn(6, 3, dtype=torch.float64) + 1.0
    share, _ = residual_gradient(x, linear)
    assert share is not None and share < 1e-20
    curved = torch.relu(x[:, :1]) - 0.5 * x[:, :1]
    whole, rest = residual_gradient(x, torch.cat([linear, curved], dim=1))
    alone, alone_rest = residual_gradient(x, curved)
    assert whole is not None and alone is not None and rest is not None and alone_rest is not None
    assert alone > 0.1 > whole > 0.0
    assert math.isclose(rest, alone_rest, rel_tol=1e-9)
    assert residual_gradient(x[:10], curved[:10]) == (None, None)
    assert residual_gradient(x, torch.zeros_like(curved)) == (0.0, 0.0)


def test_saturation_is_the_share_of_directions_in_use() -> None:
    full = torch.linalg.qr(torch.randn(200, 8, dtype=torch.float64)).Q
    full = full - full.mean(0)
    assert saturation(torch.linalg.qr(full).Q) == pytest.approx(1.0, abs=0.05)
    line = torch.randn(200, 1, dtype=torch.float64) @ torch.randn(1, 8, dtype=torch.float64)
    assert saturation(line) == pytest.approx(1 / 8, abs=1e-6)
    assert saturation(torch.ones(200, 8, dtype=torch.float64)) == 0.0
    assert saturation(full[:4]) is None


class Planted(nn.Module):
    """A wide teacher squeezed through two units."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(8, 12)
        self.narrow = nn.Linear(12, 2)
        self.back = nn.Linear(2, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.narrow(torch.relu(self.wide(x))))
        return self.head(torch.relu(self.back(x)))


def test_a_narrow_layer_is_the_most_saturated() -> None:
    model, x = Planted(), torch.randn(400, 8)
    esper.wrap(model, example_inputs=x)
    found = signals(probe(model, lambda: model(x).square().mean()))
    assert max(found, key=lambda name: found[name].saturation) == "narrow"


def test_dead_units_and_newborn_gradients_are_seen(zoo: Any) -> None:
    model, _ = zoo.make("mlp")
    x = torch.randn(64, 6)
    esper.wrap(model, example_inputs=x)
    with torch.no_grad():
        model.fc1.bias[:2] = -100.0
    esper.graft(model, "fc2", "bottleneck")
    found = signals(probe(model, lambda: model(x).square().mean()))
    assert found["fc1"].dead_neuron_ratio == pytest.approx(0.4)
    assert found["fc1"].newborn_to_incumbent_gradient is None
    assert found["fc2"].newborn_to_incumbent_gradient > 0
    assert found["fc2"].gradient_to_weight > 0
    assert -1 <= found["fc2"].average_correlation <= 1


def test_unknown_is_none_and_broken_is_counted(zoo: Any) -> None:
    model, x = zoo.make("mlp")
    esper.wrap(model, example_inputs=x)
    found = signals(probe(model, lambda: model(x[:3]).square().mean()))
    assert found["fc1"].residual_gradient is None
    assert found["fc1"].saturation is None
    with torch.no_grad():
        model.fc1.bias[0] = math.inf
    broken = signals(probe(model, lambda: model(x).square().mean()))["fc1"]
    assert broken.error_count == 1
    assert broken.activation_mean is None


def test_telemetry_watches_one_step_in_many_and_reads_once(zoo: Any) -> None:
    model, _ = zoo.make("cnn")
    x = torch.randn(16, 2, 8, 8)
    esper.wrap(model, example_inputs=x)
    telemetry = Telemetry(model, every=4, rows=32)
    for step in range(9):
        model.zero_grad()
        with telemetry.step(step):
            model(x).square().mean().backward()
    found = {signal.site: signal for signal in telemetry.read(epoch=1, step=9)}
    assert set(found) == {"conv1", "conv2", "head"}
    assert found["conv1"].rows_seen == 3 * 32
    assert found["head"].rows_seen == 3 * 16
    rows = model.conv1(x[:1]).flatten(2).transpose(1, 2).reshape(-1, 4)[:32]
    assert found["conv1"].activation_variance == pytest.approx(float(rows.detach().var(correction=0)), rel=0.5)
    expected = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in model.head.parameters()]))
    assert found["head"].gradient_norm == pytest.approx(float(expected), rel=0.5)
    assert telemetry.read(epoch=1, step=9) == ()


def test_telemetry_changes_no_bit_of_training(zoo: Any) -> None:
    digests = []
    for watched in (False, True):
        model, x = zoo.make("cnn")
        esper.wrap(model, example_inputs=x)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        telemetry = Telemetry(model, every=1 if watched else 1000)
        torch.manual_seed(3)
        for step in range(1, 5):
            optimizer.zero_grad()
            with telemetry.step(step):
                model(x).square().mean().backward()
            optimizer.step()
        digests.append(esper.weights_digest(model))
    assert digests[0] == digests[1]
