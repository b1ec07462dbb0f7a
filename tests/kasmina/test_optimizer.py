"""Growth beside every optimizer of torch, and beside those that others write."""

import copy
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import nn
from torch import optim

import esper

Make = Callable[[Any], optim.Optimizer]

KINDS: dict[str, Make] = {
    "sgd": lambda p: optim.SGD(p, lr=0.05),
    "sgd momentum": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, dampening=0.1, weight_decay=0.01),
    "sgd nesterov": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "sgd foreach": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, foreach=True),
    "sgd fused": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "sgd fused dampened": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, dampening=0.5, fused=True),
    "adam": lambda p: optim.Adam(p, lr=0.01, weight_decay=0.01),
    "adam foreach": lambda p: optim.Adam(p, lr=0.01, foreach=True),
    "adam fused": lambda p: optim.Adam(p, lr=0.01, fused=True),
    "adam amsgrad": lambda p: optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: optim.AdamW(p, lr=0.01),
    "adamw foreach": lambda p: optim.AdamW(p, lr=0.01, foreach=True),
    "adamw fused amsgrad": lambda p: optim.AdamW(p, lr=0.01, fused=True, amsgrad=True),
    "nadam": lambda p: optim.NAdam(p, lr=0.01),
    "nadam foreach": lambda p: optim.NAdam(p, lr=0.01, foreach=True),
    "radam": lambda p: optim.RAdam(p, lr=0.01),
    "radam foreach": lambda p: optim.RAdam(p, lr=0.01, foreach=True),
    "rmsprop": lambda p: optim.RMSprop(p, lr=0.01),
    "rmsprop centered momentum": lambda p: optim.RMSprop(p, lr=0.01, centered=True, momentum=0.9),
    "rmsprop foreach": lambda p: optim.RMSprop(p, lr=0.01, centered=True, momentum=0.9, foreach=True),
    "adagrad": lambda p: optim.Adagrad(p, lr=0.05, initial_accumulator_value=0.1, lr_decay=0.01),
    "adagrad foreach": lambda p: optim.Adagrad(p, lr=0.05, foreach=True),
    "adagrad fused": lambda p: optim.Adagrad(p, lr=0.05, fused=True),
    "adadelta": lambda p: optim.Adadelta(p),
    "adadelta foreach": lambda p: optim.Adadelta(p, foreach=True),
    "adamax": lambda p: optim.Adamax(p, lr=0.01),
    "adamax foreach": lambda p: optim.Adamax(p, lr=0.01, foreach=True),
    "asgd": lambda p: optim.ASGD(p, lr=0.05, t0=4.0),
    "asgd foreach": lambda p: optim.ASGD(p, lr=0.05, t0=4.0, foreach=True),
    "rprop": lambda p: optim.Rprop(p, lr=0.01),
    "rprop foreach": lambda p: optim.Rprop(p, lr=0.01, foreach=True),
    "adafactor": lambda p: optim.Adafactor(p, lr=0.01),
    "adafactor foreach": lambda p: optim.Adafactor(p, lr=0.01, foreach=True),
}
CAPTURABLE: dict[str, Make] = {
    name: lambda p, make=make: make(p, lr=0.01, capturable=True)
    for name, make in {
        "adam": optim.Adam,
        "adamw": optim.AdamW,
        "nadam": optim.NAdam,
        "radam": optim.RAdam,
        "rmsprop": optim.RMSprop,
        "adadelta": optim.Adadelta,
        "adamax": optim.Adamax,
        "asgd": optim.ASGD,
        "rprop": optim.Rprop,
    }.items()
}
COVERED = {type(make([nn.Parameter(torch.zeros(1))])) for make in KINDS.values()}
ELSEWHERE = {optim.Muon, optim.LBFGS, optim.SparseAdam, optim.Optimizer}


class Lion(optim.Optimizer):
    """An optimizer as others write them: state made at the first step of each parameter (Chen et al., Lion)."""

    def __init__(self, params: Any, lr: float = 0.01, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["calls"] = 0
                state["calls"] += 1
                mean = state["exp_avg"]
                update = mean.lerp(parameter.grad, 1 - group["betas"][0]).sign_()
                parameter.add_(update, alpha=-group["lr"])
                mean.lerp_(parameter.grad, 1 - group["betas"][1])


KINDS["a user's own"] = Lion


def test_every_optimizer_of_torch_is_covered() -> None:
    found = {kind for kind in vars(optim).values() if isinstance(kind, type) and issubclass(kind, optim.Optimizer)}
    assert found == COVERED | ELSEWHERE


def pair(zoo: Any) -> tuple[nn.Module, nn.Module]:
    model, x = zoo.make("mlp")
    esper.wrap(model, example_inputs=x)
    return model, copy.deepcopy(model)


def drive(model: nn.Module, optimizers: Sequence[optim.Optimizer], number: int) -> None:
    """One step with gradients that depend on the parameter's name and the step only."""
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(sum(name.encode()) + 1000 * number)
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.device)
    for optimizer in optimizers:
        optimizer.step()


def state(optimizer: optim.Optimizer, parameter: Tensor) -> dict[str, Any]:
    return dict(optimizer.state.get(parameter, {}))


def same(left: Any, right: Any) -> bool:
    return torch.equal(left, right) if isinstance(left, Tensor) else bool(left == right)


def check_growth(model: nn.Module, twin: nn.Module, make: Make, device: str = "cpu") -> None:
    """Old parameters and their state as in the twin, which never grew; newborns as in an optimizer of their own."""
    optimizer, other = make(model.parameters()), make(twin.parameters())
    old = dict(model.named_parameters())
    for number in range(4):
        drive(model, [optimizer], number)
        drive(twin, [other], number)
    before = {name: state(optimizer, p) for name, p in old.items()}
    values = copy.deepcopy(before)
    made = esper.graft(model, "fc1", "bottleneck", optimizer=optimizer, rank=3)
    newborn = {name: p for name, p in model.named_parameters() if name in made.parameter_names}
    assert all(not state(optimizer, p).get("step") for p in newborn.values())
    for name, parameter in old.items():
        after = state(optimizer, parameter)
        assert after.keys() == before[name].keys()
        assert all(after[key] is before[name][key] and same(after[key], values[name][key]) for key in after)
    alone = {name: nn.Parameter(p.detach().clone()) for name, p in newborn.items()}
    fresh = make(list(alone.values()))
    for number in range(4, 10):
        drive(model, [optimizer], number)
        drive(twin, [other], number)
        for name, parameter in alone.items():
            grad = newborn[name].grad
            assert grad is not None
            parameter.grad = grad.clone()
        fresh.step()
    for name, parameter in twin.named_parameters():
        assert torch.equal(old[name], parameter), name
        theirs = state(other, parameter)
        assert all(same(value, theirs[key]) for key, value in state(optimizer, old[name]).items())
    for name, parameter in alone.items():
        assert torch.equal(newborn[name], parameter), name
        theirs = state(fresh, parameter)
        assert all(same(value, theirs[key]) for key, value in state(optimizer, newborn[name]).items())
    esper.cull(model, "fc1", optimizer=optimizer)
    kept = {id(p) for p in old.values()}
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == kept
    assert {id(p) for p in optimizer.state} <= kept
    assert len(optimizer.param_groups) == len(other.param_groups)
    assert [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups] == [
        {k: v for k, v in g.items() if k != "params"} for g in other.param_groups
    ]
    drive(model, [optimizer], 10)
    drive(twin, [other], 10)
    assert all(torch.equal(old[name], parameter) for name, parameter in twin.named_parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_old_parameters_are_undisturbed_and_newborns_begin_their_own_count(zoo: Any, kind: str) -> None:
    check_growth(*pair(zoo), KINDS[kind])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="capturable optimizers need CUDA")
@pytest.mark.parametrize("kind", CAPTURABLE)
def test_capturable_optimizers_grow(zoo: Any, kind: str) -> None:
    model, twin = pair(zoo)
    check_growth(model.cuda(), twin.cuda(), CAPTURABLE[kind])


def muon_and_partner(model: nn.Module) -> list[optim.Optimizer]:
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() != 2]
    return [optim.Muon(matrices, lr=0.02), optim.AdamW(vectors, lr=0.01)]


def holders(optimizers: Sequence[optim.Optimizer], parameter: Tensor) -> list[int]:
    groups = [(i, g) for i, o in enumerate(optimizers) for g in o.param_groups]
    return [i for i, g in groups if any(p is parameter for p in g["params"])]


def test_muon_takes_matrices_and_its_partner_the_rest(zoo: Any) -> None:
    model, twin = pair(zoo)
    optimizers, others = muon_and_partner(model), muon_and_partner(twin)
    for number in range(3):
        drive(model, optimizers, number)
        drive(twin, others, number)
    esper.graft(model, "fc1", "bottleneck", optimizer=optimizers, rank=3)
    grown = dict(model.fc1.kasmina.named_parameters())
    assert {name: holders(optimizers, p) for name, p in grown.items()} == {
        "0.down.weight": [0],
        "0.down.bias": [1],
        "0.up.weight": [0],
    }
    for number in range(3, 6):
        drive(model, optimizers, number)
        drive(twin, others, number)
    old = dict(model.named_parameters())
    assert all(torch.equal(old[name], p) for name, p in twin.named_parameters())
    assert all(bool(optimizers[holders(optimizers, p)[0]].state[p]) for p in grown.values())
    esper.cull(model, "fc1", optimizer=optimizers)
    assert all(not holders(optimizers, p) for p in grown.values())
    assert all(p not in optimizer.state for optimizer in optimizers for p in grown.values())


def test_widen_folds_with_muon_and_partner(zoo: Any) -> None:
    model, x = zoo.make("mlp")
    esper.wrap(model, example_inputs=x)
    optimizers = muon_and_partner(model)
    drive(model, optimizers, 0)
    esper.graft(model, "fc1", "widen", optimizer=optimizers, units=2)
    for number in range(1, 4):
        drive(model, optimizers, number)
    momenta = [
        optimizers[0].state[p]["momentum_buffer"] for p in (model.fc1.weight, model.fc1.kasmina["0"].down.weight)
    ]
    before = model(x)
    esper.fossilize(model, optimizer=optimizers)
    torch.testing.assert_close(model(x), before)
    assert model.fc1.weight.shape == (7, 6)
    assert torch.equal(optimizers[0].state[model.fc1.weight]["momentum_buffer"], torch.cat(momenta))
    assert holders(optimizers, model.fc1.weight) == holders(optimizers, model.fc2.weight) == [0]
    assert holders(optimizers, model.fc1.bias) == [1]
    assert sum(len(g["params"]) for o in optimizers for g in o.param_groups) == len(list(model.parameters()))
    drive(model, optimizers, 4)


def test_muon_alone_takes_a_kernel_of_matrices_and_refuses_a_bias_by_name() -> None:
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.ReLU(), nn.Linear(5, 3, bias=False))
    esper.wrap(model, example_inputs=torch.randn(4, 6))
    optimizer = optim.Muon(model.parameters(), lr=0.02)
    esper.graft(model, "0", "lowrank", optimizer=optimizer)
    assert len(optimizer.param_groups[0]["params"]) == 4
    before = list(model.state_dict())
    with pytest.raises(esper.GrowthError, match=r"no optimizer can take 0\.kasmina\.1\.down\.bias.*Muon") as caught:
        esper.graft(model, "0", "bottleneck", optimizer=optimizer)
    assert caught.value.code == "ESP-433"
    assert "optimizer=[first, second]" in str(caught.value.hint)
    assert list(model.state_dict()) == before
    assert len(optimizer.param_groups[0]["params"]) == 4


def test_weights_and_biases_keep_to_the_groups_of_the_hosts_own(zoo: Any) -> None:
    model, x = zoo.make("mlp")
    esper.wrap(model, example_inputs=x)
    named = dict(model.named_parameters())
    groups: Any = [
        {"params": [(n, p) for n, p in named.items() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [(n, p) for n, p in named.items() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = optim.AdamW(groups)
    esper.graft(model, "fc2", "bottleneck", optimizer=optimizer)
    esper.graft(model, "fc1", "widen", optimizer=optimizer)
    for group in optimizer.param_groups:
        assert all((p.dim() > 1) == (group["weight_decay"] > 0) for p in group["params"])
        known = {id(p): name for name, p in model.named_parameters()}
        assert group["param_names"] == [known[id(p)] for p in group["params"]]
    esper.cull(model, "fc2", optimizer=optimizer)
    esper.fossilize(model, optimizer=optimizer)
    assert [name for g in optimizer.param_groups for name in g["param_names"]] == [
        name for dim in (2, 1) for name, p in model.named_parameters() if p.dim() == dim
    ]


def test_names_keep_the_prefix_that_the_optimizer_knows_them_by(zoo: Any) -> None:
    model, x = zoo.make("mlp")
    esper.wrap(model, example_inputs=x)
    whole = nn.ModuleDict({"net": model, "head": nn.Linear(3, 2)})
    optimizer = optim.AdamW(whole.named_parameters())
    esper.graft(model, "fc1", "lowrank", optimizer=optimizer)
    assert optimizer.param_groups[0]["param_names"][-1] == "net.fc1.kasmina.0.up.weight"
    assert optimizer.state_dict()["param_groups"][0]["param_names"][-1] == "net.fc1.kasmina.0.up.weight"


class Remembering(optim.SGD):
    """Keeps its parameters in a list of its own, as LBFGS does."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        self.known = list(self.param_groups[0]["params"])


class Told(Lion):
    """Wants to be told of new parameters."""

    def add_param_group(self, param_group: Any) -> None:
        super().add_param_group(param_group)


class Wrapper(optim.Optimizer):
    """Around another optimizer, whose groups it shares."""

    def __init__(self, inner: optim.Optimizer) -> None:
        self.inner = inner

    param_groups = property(lambda self: self.inner.param_groups)  # type: ignore[assignment]
    state = property(lambda self: self.inner.state)  # type: ignore[assignment]

    def add_param_group(self, param_group: Any) -> None:
        self.inner.add_param_group(param_group)


REFUSED: dict[str, tuple[Make, str]] = {
    "lbfgs": (lambda p: optim.LBFGS(p), "LBFGS would accept and silently ignore"),
    "sparse": (lambda p: optim.SparseAdam(p), "SparseAdam takes sparse gradients only"),
    "own list": (Remembering, r"Remembering keeps a list of its parameters of its own \('known'\)"),
    "told": (Told, "Told overrides add_param_group"),
    "wrapped": (lambda p: Wrapper(Remembering(p)), "Remembering keeps a list"),
    "none": (lambda p: [], "empty list"),
    "no optimizer": (lambda p: nn.ReLU(), r"ReLU is no torch\.optim\.Optimizer"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_take_newborns_is_refused_by_name_and_nothing_changes(zoo: Any, kind: str) -> None:
    model, x = zoo.make("mlp")
    esper.wrap(model, example_inputs=x)
    make, why = REFUSED[kind]
    optimizer = make(list(model.parameters()))
    names = list(model.state_dict())
    with pytest.raises(esper.GrowthError, match=why) as caught:
        esper.graft(model, "fc1", "bottleneck", optimizer=optimizer)
    assert caught.value.code == "ESP-433"
    assert caught.value.hint or kind == "no optimizer"
    assert list(model.state_dict()) == names
    assert esper.status(model).generation == 0
    if isinstance(optimizer, optim.Optimizer):
        assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)


def test_a_wrapper_that_shares_the_groups_is_looked_through(zoo: Any) -> None:
    model, x = zoo.make("mlp")
    esper.wrap(model, example_inputs=x)
    inner = optim.AdamW(model.parameters())
    esper.graft(model, "fc1", "bottleneck", optimizer=Wrapper(inner))
    assert len(inner.param_groups[0]["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("groups", [1, 2])
def test_a_frozen_host_grows_in_the_only_group_or_in_one_of_its_own(zoo: Any, groups: int) -> None:
    model, x = zoo.make("mlp")
    esper.wrap(model, example_inputs=x)
    model.fc1.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    given: Any = [{"params": trained[:2]}, {"params": trained[2:], "lr": 0.5}][:groups] if groups == 2 else trained
    optimizer = optim.AdamW(given, lr=0.01)
    esper.graft(model, "fc1", "bottleneck", optimizer=optimizer)
    assert len(optimizer.param_groups) == (1 if groups == 1 else 3)
    assert len(optimizer.param_groups[-1]["params"]) == (len(trained) + 3 if groups == 1 else 3)
    assert optimizer.param_groups[-1]["lr"] == 0.01
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    if groups == 2:
        with pytest.raises(esper.GrowthError, match="a parameter group of its own") as caught:
            esper.graft(model, "fc1", "bottleneck", optimizer=optimizer)
        assert "frozen ones get no updates" in str(caught.value.hint)
    # A group that a scheduler counts stays, empty; the optimizer steps over it.
    esper.cull(model, "fc1", optimizer=optimizer)
    assert [len(group["params"]) for group in optimizer.param_groups] == ([4] if groups == 1 else [2, 2, 0])
    model(x).sum().backward()
    optimizer.step()


def test_a_block_at_a_frozen_host_is_not_folded_into_it(zoo: Any) -> None:
    model, x = zoo.make("mlp")
    esper.wrap(model, example_inputs=x)
    model.requires_grad_(False)
    optimizer = optim.AdamW(model.fc3.requires_grad_(True).parameters())
    esper.graft(model, "fc1", "widen", optimizer=optimizer, units=2)
    for _ in range(2):
        model(x).square().sum().backward()
        optimizer.step()
    (kept,) = esper.fossilize(model, "fc1", optimizer=optimizer)
    assert kept.state == "fossilized"
    assert model.fc1.weight.shape == (5, 6)
    up = model.fc1.kasmina["0"].up.weight
    before = up.detach().clone()
    model(x).square().sum().backward()
    optimizer.step()
    assert not torch.equal(up, before)


def test_gradient_scaler_and_accumulation_go_on_over_a_graft(zoo: Any) -> None:
    ends = []
    for grow in (False, True):
        model, x = zoo.make("mlp")
        esper.wrap(model, example_inputs=x)
        optimizer = optim.AdamW(model.parameters(), lr=0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)
        for number in range(4):
            for micro in range(2):
                if grow and (number, micro) == (2, 1):
                    pending = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
                    esper.graft(model, "fc1", "bottleneck", optimizer=optimizer)
                    assert all(torch.equal(g, model.get_parameter(n).grad) for n, g in pending.items())
                    assert all(p.grad is None for p in model.fc1.kasmina.parameters())
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = (model(x * (1 + micro)) - 1.0).float().square().mean() / 2
                scaler.scale(loss).backward()
            if number == 2:
                ends.append({n: p.grad.clone() for n, p in model.named_parameters() if ".kasmina." not in n})
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert scaler.get_scale() == 2.0**10
        if grow:
            assert all(bool(optimizer.state[p]) for p in model.fc1.kasmina.parameters())
            # The birth lies between the two halves of a batch: it counts from the second on.
            assert all(float(optimizer.state[p]["step"]) == 2.0 for p in [model.fc1.kasmina["0"].up.weight])
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_overflow_skips_the_step_of_old_and_new_alike(zoo: Any) -> None:
    model, x = zoo.make("mlp")
    esper.wrap(model, example_inputs=x)
    optimizer = optim.AdamW(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    esper.graft(model, "fc1", "bottleneck", optimizer=optimizer)
    scaler.scale(model(x).sum()).backward()
    model.fc1.kasmina["0"].up.weight.grad.fill_(float("inf"))
    before = copy.deepcopy(model.state_dict())
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**7
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not optimizer.state
