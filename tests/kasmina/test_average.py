"""Averages of weights (EMA, SWA) over a graft."""

from typing import Any

import pytest
import torch
from torch import nn
from torch import optim
from torch.optim import swa_utils

import esper
from esper.runtime.kasmina import growth

DECAY = 0.9


class Loop:
    def __init__(self, zoo: Any, **given: Any) -> None:
        self.model, self.x = zoo.make("mlp")
        esper.wrap(self.model, example_inputs=self.x)
        self.optimizer = optim.AdamW(self.model.parameters(), lr=0.01)
        given = given or {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(DECAY)}
        self.average = esper.AveragedModel(self.model, **given)

    def train(self, steps: int = 1) -> None:
        for _ in range(steps):
            self.optimizer.zero_grad()
            (self.model(self.x) - 1.0).square().mean().backward()
            self.optimizer.step()
            self.average.update_parameters(self.model)

    def averages(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.average.module.named_parameters()}


def test_average_grows_with_its_model(zoo: Any) -> None:
    loop = Loop(zoo)
    loop.train(3)
    esper.graft(loop.model, "fc1", "bottleneck", optimizer=loop.optimizer)
    esper.graft(loop.model, "fc1", "widen", optimizer=loop.optimizer)
    before = loop.averages()
    loop.train(1)
    after, weights = loop.averages(), dict(loop.model.named_parameters())
    assert list(after) == list(weights)
    for name, value in after.items():
        start = before.get(name, weights[name])
        torch.testing.assert_close(value, start * DECAY + weights[name].detach() * (1 - DECAY))
    loop.train(4)
    assert all(not torch.equal(value, weights[name]) for name, value in loop.averages().items())
    assert esper.status(loop.average.module).sites[0].seeds == esper.status(loop.model).sites[0].seeds
    assert isinstance(loop.average, swa_utils.AveragedModel)


def test_culled_blocks_leave_the_average_and_its_host_goes_on(zoo: Any) -> None:
    loop = Loop(zoo)
    esper.graft(loop.model, "fc1", "bottleneck", optimizer=loop.optimizer)
    loop.train(3)
    esper.cull(loop.model, "fc1", optimizer=loop.optimizer)
    esper.graft(loop.model, "fc1", "lowrank", optimizer=loop.optimizer)
    before = loop.averages()
    loop.train(1)
    after, weights = loop.averages(), dict(loop.model.named_parameters())
    assert list(after) == list(weights)
    torch.testing.assert_close(after["fc1.weight"], before["fc1.weight"] * DECAY + weights["fc1.weight"] * (1 - DECAY))
    assert torch.equal(after["fc1.kasmina.0.up.weight"], weights["fc1.kasmina.0.up.weight"])


def test_folded_blocks_are_folded_by_their_own_averages(zoo: Any) -> None:
    loop = Loop(zoo)
    esper.graft(loop.model, "fc1", "widen", optimizer=loop.optimizer, units=2)
    esper.graft(loop.model, "fc3", "lowrank", optimizer=loop.optimizer)
    loop.train(5)
    kernel = loop.average.module.fc1.kasmina["0"].down.weight.detach().clone()
    before = loop.average.module(loop.x)
    esper.fossilize(loop.model, optimizer=loop.optimizer)
    loop.average.multi_avg_fn = lambda averages, weights, number: None
    loop.average.update_parameters(loop.model)
    torch.testing.assert_close(loop.average.module(loop.x), before)
    assert torch.equal(loop.average.module.fc1.weight[-2:], kernel)
    assert [p.shape for p in loop.average.module.parameters()] == [p.shape for p in loop.model.parameters()]


def test_alpha_and_state_follow_and_the_average_keeps_its_weights(zoo: Any) -> None:
    loop = Loop(zoo)
    esper.graft(loop.model, "fc1", "bottleneck", optimizer=loop.optimizer)
    loop.train(3)
    growth.set_alpha(loop.model, "fc1", 0, 0.25)
    esper.fossilize(loop.model, "fc1", optimizer=loop.optimizer)
    before = loop.averages()
    loop.average.multi_avg_fn = lambda averages, weights, number: None
    loop.average.update_parameters(loop.model)
    assert all(torch.equal(value, before[name]) for name, value in loop.averages().items())
    assert esper.status(loop.average.module).sites[0].seeds == esper.status(loop.model).sites[0].seeds


@pytest.mark.parametrize("given", [{}, {"use_buffers": True}], ids=["swa", "with buffers"])
def test_plain_averages_and_buffers(zoo: Any, given: dict[str, Any]) -> None:
    model, x = zoo.make("cnn")
    esper.wrap(model, example_inputs=x)
    average = esper.AveragedModel(model, **given)
    optimizer = optim.SGD(model.parameters(), lr=0.05)
    seen = []
    for number in range(4):
        if number == 2:
            esper.graft(model, "conv2", "bottleneck", optimizer=optimizer)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        seen.append(model.conv1.weight.detach().clone())
    torch.testing.assert_close(average.module.conv1.weight, torch.stack(seen).mean(0))
    assert len(list(average.module.parameters())) == len(list(model.parameters()))


def test_an_average_that_was_never_called_folds_too(zoo: Any) -> None:
    model, x = zoo.make("mlp")
    esper.wrap(model)
    average = esper.AveragedModel(model)
    optimizer = optim.AdamW(model.parameters(), lr=0.01)
    for number in range(4):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        if number == 0:
            esper.graft(model, "fc1", "widen", optimizer=optimizer, units=2)
        if number == 2:
            esper.fossilize(model, optimizer=optimizer)
    assert average.module.fc1.weight.shape == model.fc1.weight.shape == (7, 6)


def test_a_model_that_is_not_wrapped_is_averaged_as_torch_does_it() -> None:
    model = nn.Linear(3, 2)
    average, theirs = esper.AveragedModel(model), swa_utils.AveragedModel(model)
    for each in (average, theirs):
        each.update_parameters(model)
    with torch.no_grad():
        model.weight.add_(1.0)
    for each in (average, theirs):
        each.update_parameters(model)
    assert torch.equal(average.module.weight, theirs.module.weight)


def test_torchs_own_average_loses_its_place_after_a_graft(zoo: Any) -> None:
    """Why esper has one: this is what torch's does, and the reason of the warning in the docs."""
    model, x = zoo.make("mlp")
    esper.wrap(model, example_inputs=x)
    average = swa_utils.AveragedModel(model)
    esper.graft(model, "fc1", "bottleneck")
    pairs = zip(average.parameters(), model.parameters(), strict=False)
    assert any(mine.shape != theirs.shape for mine, theirs in pairs)


def test_an_average_that_cannot_follow_is_refused_by_name(zoo: Any) -> None:
    loop = Loop(zoo)
    loop.train(1)
    esper.unwrap(loop.model)
    before = loop.averages()
    with pytest.raises(esper.GrowthError, match="one of the two is wrapped") as caught:
        loop.average.update_parameters(loop.model)
    assert caught.value.code == "ESP-437"
    other, _ = zoo.make("cnn")
    esper.wrap(other)
    with pytest.raises(esper.GrowthError, match="other sites"):
        loop.average.update_parameters(other)
    assert all(torch.equal(value, before[name]) for name, value in loop.averages().items())
