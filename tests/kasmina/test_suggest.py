import random
from itertools import pairwise
from typing import Any

import numpy
import pytest
import torch
from plain_report import plain_report
from torch import Tensor
from torch import nn
from torch.nn import functional

import esper
from esper.contracts.config import TamiyoConfig
from esper.contracts.enums import SeedState
from esper.contracts.operational import HeadRef
from esper.contracts.orders import ScoreRequest
from esper.errors import BlueprintError
from esper.errors import GrowthError
from esper.errors import SiteError
from esper.errors import TargetError
from esper.runtime.kasmina.lineage import layer_graph
from esper.runtime.kasmina.probe import probe
from esper.runtime.kasmina.suggest import Suggestion
from esper.runtime.tamiyo.candidates import candidates
from esper.runtime.tamiyo.features import describe

Batch = tuple[Tensor, Tensor]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return functional.mse_loss(model(batch[0]), batch[1])


def squares(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def planted() -> tuple[nn.Module, Batch]:
    """A student whose second layer is far too narrow, trained a little; it is what `widen` repairs."""
    torch.manual_seed(0)
    x = torch.randn(512, 16)
    y = torch.tanh(x @ torch.randn(16, 4))
    sizes = (16, 12, 2, 12, 4)
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        loss(model, (x, y)).backward()
        optimizer.step()
    return esper.wrap(model), (x, y)


def test_the_narrow_layer_is_suggested_first_and_can_be_grown_at_once() -> None:
    model, batch = planted()
    found = esper.suggest(model, loss, batch)
    best = found[0]
    assert (best.site, best.blueprint) == ("2", "widen") and best.convincing
    assert best.score >= best.threshold and "pair_saturation" in best.reason
    before = loss(model, batch)
    made = esper.graft(model, best.site, best.blueprint, **best.hyperparameters)
    assert made.parameters == best.parameters
    assert made.certificate is not None and made.certificate.flops_per_sample == best.flops_per_sample
    assert torch.equal(loss(model, batch), before)
    again = {(each.site, each.blueprint): each for each in esper.suggest(model, loss, batch)}
    assert not again["2", "widen"].convincing


def test_suggestions_are_those_of_a_runs_strategist() -> None:
    model, batch = planted()
    found = esper.suggest(model, loss, batch)
    result = probe(model, lambda: loss(model, batch), epoch=8, step=800)
    head = HeadRef(digest="sha256:" + "0" * 64, parent=None, step=800, epoch=8)
    graph = layer_graph(model, lambda: loss(model, batch))
    report = plain_report("run", head, graph=graph, health=result.signals)
    request = ScoreRequest(
        run_id="run",
        report=report,
        history=(),
        adaptations=(),
        max_epochs=30,
        steps_per_epoch=100,
        hold_window_steps=100,
        lag_epochs=1,
        tamiyo=TamiyoConfig(),
    )
    ranked = [each.alternative for each in candidates(request, describe(request))]
    assert [(each.site, each.blueprint) for each in found] == [(each.site, each.blueprint) for each in ranked]
    assert [each.score or 0.0 for each in found] == pytest.approx([each.score for each in ranked])
    assert [each.parameters for each in found] == [each.added_parameters for each in ranked]


@pytest.mark.parametrize("name", ["mlp", "cnn", "tied", "normed"])
def test_nothing_in_the_model_changes_by_a_bit(zoo: Any, name: str) -> None:
    model, x = zoo.make(name)
    x = x.repeat(8, *([1] * (x.dim() - 1)))
    esper.wrap(model, example_inputs=x)
    squares(model, x).backward()
    model.eval()
    next(model.children()).train()
    buffers = {key: value.clone() for key, value in model.named_buffers()}
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    objects = [id(p) for p in model.parameters()], [id(p.grad) for p in model.parameters()]
    flags = [module.training for module in model.modules()]
    sites = [dict(m.__dict__["_kasmina"].__dict__) for m in model.modules() if "_kasmina" in m.__dict__]
    digest, status = esper.weights_digest(model), esper.status(model)
    states = torch.get_rng_state(), numpy.random.get_state()[1].copy(), random.getstate()
    assert esper.suggest(model, squares, x)
    assert esper.weights_digest(model) == digest and esper.status(model) == status
    assert all(torch.equal(buffers[key], value) for key, value in model.named_buffers())
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert gradient is parameter.grad or torch.equal(parameter.grad, gradient)
    assert ([id(p) for p in model.parameters()], [id(p.grad) for p in model.parameters()]) == objects
    assert [module.training for module in model.modules()] == flags
    assert [dict(m.__dict__["_kasmina"].__dict__) for m in model.modules() if "_kasmina" in m.__dict__] == sites
    assert torch.equal(torch.get_rng_state(), states[0])
    assert numpy.array_equal(numpy.random.get_state()[1], states[1]) and random.getstate() == states[2]


def test_blueprints_that_fit_are_costed_and_controls_are_told(zoo: Any) -> None:
    model, _ = zoo.make("cnn")
    x = torch.randn(40, 2, 8, 8)
    esper.wrap(model, example_inputs=x)
    found = {(each.site, each.blueprint): each for each in esper.suggest(model, squares, x, blueprints=["lowrank"])}
    assert ("conv1", "lowrank") in found and ("norm", "lowrank") not in found
    assert not any(each.convincing for each in found.values())
    control = found["conv1", "lowrank"]
    assert control.reason == "a control: it adds no capacity" and control.parameters > 0
    assert esper.suggest(model, squares, x, blueprints=[]) == ()


def test_what_a_small_batch_cannot_tell_is_said(zoo: Any) -> None:
    model, x = zoo.make("mlp")
    esper.wrap(model, example_inputs=x)
    found = {(each.site, each.blueprint): each for each in esper.suggest(model, squares, x[:3])}
    unknown = found["fc1", "bottleneck"]
    assert unknown.score is None and not unknown.possible
    assert unknown.reason == "residual_pull is not known from the 3 rows of this batch"


def test_a_site_without_a_dormant_seed_is_not_to_be_grown(zoo: Any) -> None:
    model, _ = zoo.make("mlp")
    x = torch.randn(64, 6)
    esper.wrap(model, example_inputs=x, seeds_per_layer=1)
    esper.graft(model, "fc2", "bottleneck")
    assert esper.status(model).sites[1].seeds[0].state is SeedState.TRAINING
    found = {(each.site, each.blueprint): each for each in esper.suggest(model, squares, x)}
    assert found["fc2", "bottleneck"].reason == "no seed of this site is dormant"
    assert not found["fc2", "bottleneck"].convincing
    assert found["fc1", "bottleneck"].possible


def test_printed_it_is_a_table() -> None:
    model, batch = planted()
    found = esper.suggest(model, loss, batch)
    lines = str(found).splitlines()
    assert lines[0].split() == ["site", "blueprint", "score", "parameters", "FLOPs/sample", "why"]
    assert lines[2].split()[:3] == ["*", "2", "widen"]
    assert len(lines) == len(found) + 3 and lines[-1].endswith("convincing (*)")
    assert isinstance(found, tuple) and all(isinstance(each, Suggestion) for each in found)
    assert str(esper.suggest(model, loss, batch, blueprints=[])) == "no blueprint fits a site of this model"


def test_refusals_say_what_is_wrong(zoo: Any) -> None:
    model, x = zoo.make("mlp")
    with pytest.raises(SiteError, match="not a wrapped model"):
        esper.suggest(model, squares, x)
    esper.wrap(model)
    with pytest.raises(BlueprintError) as unknown:
        esper.suggest(model, squares, x, blueprints=["bottelneck"])
    assert unknown.value.code == "ESP-421" and "bottleneck" in str(unknown.value.hint)
    with pytest.raises(TargetError, match="not one scalar"):
        esper.suggest(model, lambda m, b: m(b), x)
    with pytest.raises(TargetError, match="without a gradient"):
        esper.suggest(model, lambda m, b: m(b).mean().detach(), x)
    with pytest.raises(GrowthError, match="nothing can be scored"):
        esper.suggest(model, lambda m, b: m(b).mean() * float("nan"), x)
    with pytest.raises(
        GrowthError, match="gradients of the weights of this batch are not finite at fc1, fc2"
    ) as broken:
        esper.suggest(model, lambda m, b: (m(b).mean() * 0.0).sqrt(), x)
    assert broken.value.code == "ESP-435"
    assert all(module.__dict__["_kasmina"].recorder is None for module in (model.fc1, model.fc2))
