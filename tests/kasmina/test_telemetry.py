from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch import nn

import esper
from esper.contracts.operational import HealthSignal
from esper.runtime.kasmina.health.rows import MOST_ELEMENTS
from esper.runtime.kasmina.health.rows import scattered_rows
from esper.runtime.kasmina.health.rows import some_of
from esper.runtime.kasmina.telemetry import Telemetry
from esper.runtime.kasmina.wrapping.hosts import kind_named


def by_site(found: tuple[HealthSignal, ...]) -> dict[str, HealthSignal]:
    return {signal.site: signal for signal in found}


def watch(model: nn.Module, telemetry: Telemetry, x: Tensor, steps: range, lr: float = 0.1) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for step in steps:
        optimizer.zero_grad()
        with telemetry.step(step):
            model(x).square().mean().backward()
        optimizer.step()


def test_telemetry_watches_one_step_in_many_and_reads_once(zoo: Any) -> None:
    model, _ = zoo.make("cnn")
    x = torch.randn(16, 2, 8, 8)
    esper.wrap(model, example_inputs=x)
    telemetry = Telemetry(model, every=4, rows=32)
    watch(model, telemetry, x, range(9), lr=1e-4)
    found = by_site(telemetry.read(epoch=1, step=9))
    assert set(found) == {"conv1", "norm", "conv2", "head"}
    assert found["conv1"].rows_seen == 3 * 32
    assert found["head"].rows_seen == 3 * 16
    output = model.conv1(x).detach()
    assert found["conv1"].activation_variance == pytest.approx(float(output.var(correction=0)), rel=0.3)
    expected = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in model.head.parameters()]))
    assert found["head"].gradient_norm == pytest.approx(float(expected), rel=0.5)
    assert telemetry.read(epoch=1, step=9) == ()


def test_moments_are_those_of_the_rows(zoo: Any) -> None:
    model, x = zoo.make("mlp")
    esper.wrap(model, example_inputs=x)
    telemetry = Telemetry(model, every=1)
    outputs = model.fc1(x).detach() + 100.0
    with torch.no_grad():
        model.fc1.bias.add_(100.0)
    watch(model, telemetry, x, range(1), lr=0.0)
    found = by_site(telemetry.read(epoch=1, step=1))["fc1"]
    assert found.activation_mean == pytest.approx(float(outputs.mean()), rel=1e-5)
    assert found.activation_variance == pytest.approx(float(outputs.double().var(correction=0)), rel=1e-3)


def test_a_unit_is_dead_only_if_no_watched_step_saw_it_alive(zoo: Any) -> None:
    model, x = zoo.make("mlp")
    esper.wrap(model, example_inputs=x)
    with torch.no_grad():
        model.fc1.bias.copy_(torch.tensor([-100.0, -100.0, 100.0, 100.0, 100.0]))
    telemetry = Telemetry(model, every=1)
    watch(model, telemetry, x, range(1), lr=0.0)
    with torch.no_grad():
        model.fc1.bias[:1] = 100.0
        model.fc1.bias[2:] = -100.0
    watch(model, telemetry, x, range(1, 2), lr=0.0)
    assert by_site(telemetry.read(epoch=1, step=2))["fc1"].dead_neuron_ratio == pytest.approx(1 / 5)


def test_update_to_weight_is_what_the_optimizer_step_changed(zoo: Any) -> None:
    model, x = zoo.make("mlp")
    esper.wrap(model, example_inputs=x)
    telemetry = Telemetry(model, every=64)
    before = {name: [p.detach().clone() for p in m.parameters()] for name, m in model.named_children()}
    watch(model, telemetry, x, range(2), lr=0.3)
    found = by_site(telemetry.read(epoch=1, step=2))
    watched = by_site(telemetry.read(epoch=1, step=2))
    assert watched == {}
    norm = lambda tensors: float(torch.linalg.vector_norm(torch.cat([t.flatten() for t in tensors])))  # noqa: E731
    for name, weights in before.items():
        signal = found[name]
        assert signal.update_to_weight == pytest.approx(0.3 * signal.gradient_norm / norm(weights), rel=1e-4)
        assert signal.gradient_to_weight == pytest.approx(signal.gradient_norm / norm(weights), rel=1e-4)


def test_the_last_step_of_a_window_is_measured_though_it_is_not_watched(zoo: Any) -> None:
    model, x = zoo.make("mlp")
    esper.wrap(model, example_inputs=x)
    telemetry = Telemetry(model, every=64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for step in range(4):
        optimizer.zero_grad()
        with telemetry.step(step, last=step == 3):
            model(x).square().mean().backward()
        weight, gradient = model.fc2.weight.detach().clone(), model.fc2.weight.grad.clone()
        bias, slope = model.fc2.bias.detach().clone(), model.fc2.bias.grad.clone()
        optimizer.step()
    found = by_site(telemetry.read(epoch=1, step=4))["fc2"]
    change = 0.3 * torch.hypot(gradient.norm(), slope.norm()) / torch.hypot(weight.norm(), bias.norm())
    assert found.update_to_weight == pytest.approx(float(change), rel=1e-4)
    with telemetry.step(70, last=True):
        model(x).square().mean().backward()
    assert telemetry.read(epoch=2, step=71), "a window that would be empty has its last step watched"


def test_newborn_gradients_are_seen_beside_those_of_their_host(zoo: Any) -> None:
    model, x = zoo.make("mlp")
    esper.wrap(model, example_inputs=x)
    esper.graft(model, "fc2", "bottleneck", rank=3)
    telemetry = Telemetry(model, every=1)
    watch(model, telemetry, x, range(1))
    found = by_site(telemetry.read(epoch=1, step=1))
    host, newborn = [model.fc2.weight, model.fc2.bias], list(model.fc2.kasmina.parameters())
    mean = lambda ps: float(torch.cat([p.grad.flatten() for p in ps]).square().mean().sqrt())  # noqa: E731
    assert found["fc2"].newborn_to_incumbent_gradient == pytest.approx(mean(newborn) / mean(host), rel=1e-4)
    assert found["fc1"].newborn_to_incumbent_gradient is None


def test_growth_within_a_window_begins_a_new_one(zoo: Any) -> None:
    model, x = zoo.make("mlp")
    esper.wrap(model, example_inputs=x)
    telemetry = Telemetry(model, every=1)
    watch(model, telemetry, x, range(3))
    esper.graft(model, "fc2", "bottleneck", rank=3)
    watch(model, telemetry, x, range(3, 5))
    found = by_site(telemetry.read(epoch=1, step=5))
    assert {signal.rows_seen for signal in found.values()} == {2 * 8}


def test_a_step_that_raises_counts_nothing(zoo: Any) -> None:
    model, x = zoo.make("mlp")
    esper.wrap(model, example_inputs=x)
    telemetry = Telemetry(model, every=1)
    with pytest.raises(RuntimeError), telemetry.step(0):
        model(torch.randn(3, 7))
    assert telemetry.read(epoch=1, step=0) == ()
    assert all(module.__dict__["_kasmina"].recorder is None for module in (model.fc1, model.fc2))


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
            with telemetry.step(step, last=watched):
                model(x).square().mean().backward()
            optimizer.step()
        digests.append(esper.weights_digest(model))
    assert digests[0] == digests[1]


def test_nothing_asks_the_device_before_the_window_is_read(zoo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = zoo.make("cnn")
    esper.wrap(model, example_inputs=x)
    telemetry = Telemetry(model, every=1)
    asked: list[str] = []
    for name in ("item", "tolist", "__bool__", "__float__", "cpu", "numpy"):
        real = getattr(Tensor, name)

        def noted(self: Tensor, *given: Any, real: Any = real, name: str = name, **named: Any) -> Any:
            asked.append(name)
            return real(self, *given, **named)

        monkeypatch.setattr(Tensor, name, noted)
    for step in range(3):
        with telemetry.step(step, last=True):
            loss = model(x).square().mean()
            loss.backward()
    reading = telemetry.take()
    assert asked == []
    assert reading.signals(epoch=1, step=3)
    assert asked == ["tolist"]


def test_dead_units_mean_nothing_where_no_activation_follows() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    ids = torch.randint(0, 7, (5, 9))
    esper.wrap(model, example_inputs=ids)
    telemetry = Telemetry(model, every=1, rows=32)
    watch(model, telemetry, ids, range(1))
    found = by_site(telemetry.read(epoch=1, step=1))
    assert [found[str(index)].dead_neuron_ratio is None for index in (0, 1, 2, 4)] == [True, True, False, False]
    assert all(signal.rows_seen == 32 and signal.update_to_weight > 0 for signal in found.values())


def test_frozen_sites_have_no_gradient_and_are_seen_all_the_same(zoo: Any) -> None:
    model, x = zoo.make("mlp")
    model.fc1.requires_grad_(False)
    esper.wrap(model, example_inputs=x)
    telemetry = Telemetry(model, every=1)
    watch(model, telemetry, x, range(2))
    found = by_site(telemetry.read(epoch=1, step=2))
    assert found["fc1"].gradient_norm is None and found["fc1"].update_to_weight is None
    assert found["fc1"].activation_variance > 0 and found["fc2"].update_to_weight > 0


@given(
    count=st.integers(1, 70),
    places=st.integers(1, 90),
    most=st.integers(1, 64),
    first=st.booleans(),
)
def test_scattered_rows_are_places_of_different_samples(count: int, places: int, most: int, first: bool) -> None:
    """Every entry names its own sample and place, so that it can be told where each row came from."""
    ids = torch.arange(count * places, dtype=torch.float64).reshape(count, places)
    output = torch.stack([ids, ids], 1 if first else 2)
    module = nn.Conv1d(2, 2, 1) if first else nn.LayerNorm(2)
    kind = kind_named("conv1d" if first else "layer_norm")
    rows = scattered_rows(kind, module, output, most)
    assert rows.shape == (min(most, count * places), 2)
    assert torch.equal(rows[:, 0], rows[:, 1])
    samples = (rows[:, 0] // places).long()
    assert int(torch.bincount(samples, minlength=count).max()) <= -(-min(most, count * places) // count)


def test_scattered_places_leave_no_part_of_an_image_out() -> None:
    image = torch.arange(64.0).reshape(1, 1, 8, 8).expand(32, 1, 8, 8)
    rows = scattered_rows(kind_named("conv2d"), nn.Conv2d(1, 1, 1), image, 32)
    assert len(rows.unique()) >= 24
    quarters = {(int(value) // 8 // 4, int(value) % 8 // 4) for value in rows.flatten()}
    assert len(quarters) == 4


@given(st.tuples(st.integers(1, 3000), st.integers(1, 300)))
def test_some_of_a_large_weight_is_a_bounded_view(shape: tuple[int, int]) -> None:
    whole = torch.zeros(shape)
    part = some_of(whole)
    assert part.numel() <= max(MOST_ELEMENTS, shape[1]) and part.numel() >= min(whole.numel(), MOST_ELEMENTS // 4)
    assert part.data_ptr() == whole.data_ptr()
