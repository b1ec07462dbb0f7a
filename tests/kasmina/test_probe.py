import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import nn

import esper
from esper.runtime.kasmina.health.capture import MAX_ROWS
from esper.runtime.kasmina.health.statistics import residual_gradient
from esper.runtime.kasmina.health.statistics import saturation
from esper.runtime.kasmina.health.statistics import signal_to_noise
from esper.runtime.kasmina.health.statistics import spread
from esper.runtime.kasmina.probe import capture
from esper.runtime.kasmina.probe import probe


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


def test_correlation_is_the_mean_over_pairs_of_units() -> None:
    y = torch.randn(200, 4, dtype=torch.float64) @ torch.randn(4, 5, dtype=torch.float64)
    y[:, 2] = 3.0
    varying = y[:, [0, 1, 3, 4]]
    pairs = torch.corrcoef(varying.T)[~torch.eye(4, dtype=torch.bool)]
    assert spread(y).correlation == pytest.approx(float(pairs.mean()), abs=1e-12)
    assert spread(y[:, :1]).correlation is None


def test_signal_to_noise_is_that_of_one_sample() -> None:
    """Per-sample gradients of a known mean and covariance, as x = 1 and g drawn around `mean`."""
    generator = torch.Generator().manual_seed(3)
    x = torch.ones(8000, 1, dtype=torch.float64)
    mean = torch.linspace(-0.5, 0.5, 64, dtype=torch.float64)
    for deviation in (0.5, 2.0, 6.0):
        g = mean + deviation * torch.randn(8000, 64, generator=generator, dtype=torch.float64)
        expected = float(mean.square().sum()) / (64 * deviation**2)
        assert signal_to_noise(x, g, 8000) == pytest.approx(expected, rel=0.25)
    assert signal_to_noise(x, torch.zeros(8000, 64, dtype=torch.float64), 8000) is None
    assert signal_to_noise(x[:15], g[:15], 15) is None


def test_what_was_captured_gives_the_same_signals_later_and_elsewhere(zoo: Any) -> None:
    model, x = zoo.make("cnn")
    x = torch.randn(64, 2, 8, 8)
    esper.wrap(model, example_inputs=x)
    at_once = probe(model, lambda: model(x).square().mean(), epoch=2, step=9)
    taken = capture(model, lambda: model(x).square().mean())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    esper.graft(model, "conv2", "bottleneck")
    with ThreadPoolExecutor(1) as other:
        later = other.submit(taken.signals, epoch=2, step=9).result()
        samples = other.submit(taken.samples, outputs=True).result()
    assert later == at_once.signals
    assert all(torch.equal(samples[name].x, known.x) for name, known in at_once.samples.items())
    assert samples["conv2"].y is not None and samples["conv2"].y.shape == (64, 4, 4, 4)


class Language(nn.Module):
    """Every kind of site that a language model has; sequences come first or second."""

    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.block = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, 11)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.table(ids))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(x + self.block(x))


LANGUAGE_SITES = {"table": 8, "norm": 8, "attention": 8, "block": 8, "head": 11}


@pytest.mark.parametrize("batch_first", [True, False])
def test_every_kind_of_site_is_probed_and_what_means_nothing_there_is_none(batch_first: bool) -> None:
    model = Language(batch_first=batch_first)
    ids = torch.randint(0, 11, (40, 6) if batch_first else (6, 40))
    esper.wrap(model, list(LANGUAGE_SITES), example_inputs=ids)
    result = probe(model, lambda: model(ids).square().mean())
    found = signals(result)
    assert set(found) == set(LANGUAGE_SITES)
    assert all(signal.rows_seen == 240 for signal in found.values())
    assert all(0 <= signal.residual_gradient <= 1 for signal in found.values())
    assert all(signal.gradient_to_weight > 0 and signal.saturation > 0 for signal in found.values())
    assert {name for name, signal in found.items() if signal.dead_neuron_ratio is not None} == {"head"}
    known = {name for name, signal in found.items() if signal.gradient_signal_to_noise is not None}
    assert known == ({"table", "head"} if batch_first else set())
    assert not result.samples["table"].x.is_floating_point()
    assert result.samples["attention"].g.shape == (40, 6, 8)
