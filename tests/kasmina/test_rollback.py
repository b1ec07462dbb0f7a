"""Any graft can be undone exactly, with all training since."""

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from torch import nn
from torch import optim

import esper
from esper.runtime.kasmina import growth
from esper.runtime.kasmina.layer import state_of
from esper.runtime.kasmina.wrapping.morphable import sites_of


class Trainer:
    """A loop with everything that has a state of its own: dropout, noise, a schedule, scaled gradients, an average."""

    def __init__(self, zoo: Any, make: Callable[[Any], optim.Optimizer]) -> None:
        self.model, self.x = zoo.make("cnn")
        esper.wrap(self.model, example_inputs=self.x)
        self.optimizer = make(self.model.parameters())
        self.scheduler = optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 50)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3)
        self.average = esper.AveragedModel(self.model, multi_avg_fn=optim.swa_utils.get_ema_multi_avg_fn(0.9))
        self.generator = torch.Generator().manual_seed(1)
        self.number = 0

    def train(self, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            noise = torch.randn(self.x.shape, generator=self.generator) + random.random() + numpy.random.rand()
            loss = (self.model(self.x + 0.1 * noise.float()) - 1.0).square().mean()
            self.optimizer.zero_grad()
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.scheduler.step()
            self.average.update_parameters(self.model)
            losses.append(float(loss.detach()))
        return losses

    def others(self) -> list[Any]:
        return [self.optimizer, self.scheduler, self.scaler, self.average, self.generator]


def known(trainer: Trainer) -> dict[str, Any]:
    """Everything that has a state, by name, copied."""
    model, optimizer = trainer.model, trainer.optimizer
    names = {id(p): n for n, p in model.named_parameters()}
    return copy.deepcopy(
        {
            "model": model.state_dict(),
            "objects": {n: id(p) for n, p in model.named_parameters()},
            "gradients": {n: p.grad for n, p in model.named_parameters()},
            "average": trainer.average.state_dict(),
            "optimizer": {names[id(p)]: dict(s) for p, s in optimizer.state.items()},
            "groups": [
                {k: v if k != "params" else [names[id(p)] for p in v] for k, v in g.items()}
                for g in optimizer.param_groups
            ],
            "scheduler": trainer.scheduler.state_dict(),
            "scaler": trainer.scaler.state_dict(),
            "generator": trainer.generator.get_state(),
            "torch": torch.get_rng_state(),
            "numpy": numpy.random.get_state()[1],
            "python": random.getstate(),
            "seeds": [site.seeds for site in esper.status(model).sites],
            "shapes": [(state_of(m).input_shape, state_of(m).output_shape) for m in sites_of(model).values()],
        }
    )


def differences(left: Any, right: Any, path: str = "") -> list[str]:
    if isinstance(left, Tensor | numpy.ndarray):
        return [] if bool((torch.as_tensor(left) == torch.as_tensor(right)).all()) else [path]
    if isinstance(left, dict):
        if left.keys() != right.keys():
            return [f"{path}: {sorted(map(str, left.keys() ^ right.keys()))}"]
        return [found for key in left for found in differences(left[key], right[key], f"{path}/{key}")]
    if isinstance(left, list | tuple) and len(left) == len(right):
        pairs = enumerate(zip(left, right, strict=True))
        return [found for i, (a, b) in pairs for found in differences(a, b, f"{path}/{i}")]
    return [] if left == right else [f"{path}: {left!r} is {right!r}"]


OPTIMIZERS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "sgd": lambda p: optim.SGD(p, lr=0.02, momentum=0.9),
    "adamw": lambda p: optim.AdamW(p, lr=0.01),
    "adamw fused": lambda p: optim.AdamW(p, lr=0.01, fused=True),
    "adamw, a tensor as rate": lambda p: optim.AdamW(p, lr=torch.tensor(0.01)),
    "nadam": lambda p: optim.NAdam(p, lr=0.01),
    "adafactor": lambda p: optim.Adafactor(p, lr=0.01),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_graft_and_the_training_since_are_undone_to_the_bit(zoo: Any, kind: str) -> None:
    trainer = Trainer(zoo, OPTIMIZERS[kind])
    trainer.train(3)
    before = known(trainer)
    snapshot = esper.snapshot(trainer.model, trainer.others())
    assert not differences(before, known(trainer))
    expected = trainer.train(6)
    after = known(trainer)
    for _ in range(2):
        esper.rollback(snapshot)
        assert differences(before, known(trainer)) == []
        # Twice, and growth in between: what was grown leaves no trace in what comes after.
        esper.graft(trainer.model, "conv2", "bottleneck", optimizer=trainer.optimizer)
        grown = trainer.train(6)
        assert grown[1:] != expected[1:]
    esper.rollback(snapshot)
    assert trainer.train(6) == expected
    assert differences(after, known(trainer)) == []
    assert not any(".kasmina" in name for name, _ in trainer.average.named_parameters())


def test_culled_and_folded_blocks_come_back(zoo: Any) -> None:
    model, x = zoo.make("mlp")
    esper.wrap(model, example_inputs=x)
    optimizer = optim.AdamW(model.named_parameters(), lr=0.01)

    def train(steps: int) -> Tensor:
        for _ in range(steps):
            optimizer.zero_grad()
            (model(x) - 1.0).square().mean().backward()
            optimizer.step()
        return model(x).detach()

    esper.graft(model, "fc2", "bottleneck", optimizer=optimizer)
    esper.graft(model, "fc1", "widen", optimizer=optimizer, units=3)
    esper.graft(model, "fc3", "lowrank", optimizer=optimizer)
    growth.set_alpha(model, "fc3", 0, 0.5)
    train(3)
    names = {n: (id(p), p.detach().clone()) for n, p in model.named_parameters()}
    records = [site.seeds for site in esper.status(model).sites]
    snapshot = esper.snapshot(model, optimizer)
    expected = train(3)
    generation = esper.status(model).generation
    esper.rollback(snapshot)
    esper.cull(model, "fc2", optimizer=optimizer)
    esper.fossilize(model, optimizer=optimizer)
    assert model.fc1.out_features == 8
    esper.graft(model, "fc2", "lowrank", optimizer=optimizer, seed=0)
    train(2)
    esper.rollback(snapshot)
    assert model.fc1.out_features == model.fc2.in_features == 5
    assert [site.seeds for site in esper.status(model).sites] == records
    assert {n: id(p) for n, p in model.named_parameters()} == {n: known[0] for n, known in names.items()}
    assert all(torch.equal(p, names[n][1]) for n, p in model.named_parameters())
    assert esper.status(model).generation > generation
    assert optimizer.param_groups[0]["param_names"] == [
        next(n for n, p in model.named_parameters() if p is q) for q in optimizer.param_groups[0]["params"]
    ]
    assert torch.equal(train(3), expected)
    esper.cull(model, "fc1", optimizer=optimizer)
    assert not model._forward_hooks


def test_nothing_of_a_rolled_back_graft_is_held(zoo: Any) -> None:
    model, x = zoo.make("mlp")
    esper.wrap(model, example_inputs=x)
    optimizer = optim.AdamW(model.parameters(), lr=0.01)
    snapshot = esper.snapshot(model, optimizer)
    for _ in range(5):
        esper.graft(model, "fc1", "widen", optimizer=optimizer)
        model(x).sum().backward()
        optimizer.step()
        esper.rollback(snapshot)
        assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters())) == 6
        assert not optimizer.state
        assert not model._forward_hooks and not model._forward_pre_hooks
        assert "kasmina" not in model.fc1._modules
        assert all(p.grad is None for p in model.parameters())


def test_the_cost_is_stated_and_true(zoo: Any) -> None:
    model, x = zoo.make("mlp")
    esper.wrap(model, example_inputs=x)
    optimizer = optim.AdamW(model.parameters(), lr=0.01)
    weights = sum(p.numel() * 4 for p in model.parameters())
    assert esper.snapshot(model).nbytes == weights
    model(x).sum().backward()
    optimizer.step()
    steps = 4 * len(optimizer.state)
    assert esper.snapshot(model, optimizer).nbytes == 4 * weights + steps
    optimizer.zero_grad()
    assert esper.snapshot(model, optimizer).nbytes == 3 * weights + steps


def test_pending_gradients_and_training_mode_go_back(zoo: Any) -> None:
    model, x = zoo.make("cnn")
    esper.wrap(model, example_inputs=x)
    model(x).sum().backward()
    pending = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.conv1.requires_grad_(False)
    snapshot = esper.snapshot(model)
    model.requires_grad_(True).eval()
    model(x).sum().backward()
    esper.rollback(snapshot)
    assert model.training
    assert not model.conv1.weight.requires_grad
    assert all(torch.equal(p.grad, pending[n]) for n, p in model.named_parameters())


def test_what_cannot_be_taken_back_is_refused(zoo: Any) -> None:
    model, x = zoo.make("mlp")
    with pytest.raises(esper.SiteError, match="not a wrapped model"):
        esper.snapshot(model)
    esper.wrap(model, example_inputs=x)
    with pytest.raises(esper.GrowthError, match="a int cannot be taken back") as caught:
        esper.snapshot(model, 3)
    assert caught.value.code == "ESP-437"
    snapshot = esper.snapshot(model)
    weights = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.fc1.weight.add_(1.0)
    esper.unwrap(model)
    with pytest.raises(esper.GrowthError, match="unwrapped since"):
        esper.rollback(snapshot)
    with pytest.raises(esper.GrowthError, match="a int is no snapshot"):
        esper.rollback(3)
    assert torch.equal(model.fc1.weight, weights["fc1.weight"] + 1.0)


def test_snapshot_draws_no_random_number_and_rollback_sets_the_global_generators_back(zoo: Any) -> None:
    model, x = zoo.make("mlp")
    esper.wrap(model, example_inputs=x)
    before = torch.get_rng_state()
    snapshot = esper.snapshot(model)
    assert torch.equal(torch.get_rng_state(), before)
    drawn = (torch.rand(3), random.random(), numpy.random.rand())
    esper.rollback(snapshot)
    assert torch.equal(torch.rand(3), drawn[0])
    assert (random.random(), numpy.random.rand()) == drawn[1:]


def test_rollback_beside_weight_norm_and_tied_weights(zoo: Any) -> None:
    for name in ("normed", "tied"):
        model, x = zoo.make(name)
        esper.wrap(model, example_inputs=x)
        optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        expected = model(x)
        weights = copy.deepcopy(model.state_dict())
        snapshot = esper.snapshot(model, optimizer)
        esper.graft(model, esper.status(model).sites[0].name, "lowrank", optimizer=optimizer)
        for _ in range(3):
            model(x).square().sum().backward()
            optimizer.step()
        assert not torch.equal(model(x), expected)
        esper.rollback(snapshot)
        assert torch.equal(model(x), expected)
        assert list(model.state_dict()) == list(weights)
        assert isinstance(model, nn.Module)
