"""The state of two parameters of different age and scale, joined into that of one."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import nn
from torch import optim

import esper
from esper.runtime.kasmina.growing.optimizer import joined_state
from esper.runtime.kasmina.growing.optimizer_state import StateRefused

Make = Callable[[Any], optim.Optimizer]

CORRECTED: dict[str, Make] = {
    "adam": lambda p: optim.Adam(p, lr=0.01),
    "adam amsgrad": lambda p: optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw fused": lambda p: optim.AdamW(p, lr=0.01, weight_decay=0.0, fused=True),
    "nadam": lambda p: optim.NAdam(p, lr=0.01),
    "radam": lambda p: optim.RAdam(p, lr=0.01),
    "adamax": lambda p: optim.Adamax(p, lr=0.01),
}
"""Optimizers that divide means by 1 - beta^t."""

AGELESS: dict[str, Make] = {
    "sgd": lambda p: optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "rmsprop": lambda p: optim.RMSprop(p, lr=0.01, centered=True, momentum=0.9),
    "adagrad": lambda p: optim.Adagrad(p, lr=0.01, initial_accumulator_value=0.1),
    "adadelta": lambda p: optim.Adadelta(p),
    "rprop": lambda p: optim.Rprop(p, lr=0.01),
    "asgd": lambda p: optim.ASGD(p, lr=0.01, lambd=0.0, t0=0.0),
}
"""Optimizers whose update of a weight does not depend on how old it is, but through what they keep of it."""

FACTORED = {"adafactor": lambda p: optim.Adafactor(p, lr=0.01)}

DIM = pytest.mark.parametrize("dim", [0, 1])
SHAPES = {0: ((4, 3), (2, 3)), 1: ((3, 4), (3, 2))}


def two(dim: int) -> tuple[nn.Parameter, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    host, grown = (nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES[dim])
    return host, grown


def gradient(parameter: Tensor, number: int) -> Tensor:
    return torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel() * 100 + number))


def step(optimizer: optim.Optimizer, pairs: list[tuple[nn.Parameter, Tensor]]) -> None:
    for parameter, grad in pairs:
        parameter.grad = grad.clone()
    optimizer.step()
    optimizer.zero_grad()


def continued(make: Make, joined: dict[str, Any], host: Tensor, grown: Tensor, dim: int) -> Any:
    """An optimizer with the joined parameter only, and that parameter."""
    whole = nn.Parameter(torch.cat([host.detach(), grown.detach()], dim=dim))
    optimizer = make([whole])
    optimizer.state[whole] = joined
    return optimizer, whole


@DIM
@pytest.mark.parametrize("kind", CORRECTED)
def test_the_younger_part_moves_as_the_older_with_the_same_estimates(kind: str, dim: int) -> None:
    make = CORRECTED[kind]
    host, grown = two(dim)
    optimizer = make([host, grown])
    constant = 0.3
    for number in range(60):
        pairs = [(host, torch.full_like(host, constant))]
        # Both have seen nothing but one constant gradient: their estimates agree, their ages do not.
        step(optimizer, pairs if number < 57 else [*pairs, (grown, torch.full_like(grown, constant))])
    joined = joined_state(optimizer, host, grown, dim, 1.0)
    assert joined is not None
    after, whole = continued(make, joined, host, grown, dim)
    for _ in range(20):
        before = whole.detach().clone()
        step(after, [(whole, torch.full_like(whole, constant))])
        moved = (whole.detach() - before).split([SHAPES[dim][0][dim], SHAPES[dim][1][dim]], dim=dim)
        # Differences of weights carry the rounding of the weights themselves.
        torch.testing.assert_close(moved[1].mean(), moved[0].mean(), rtol=1e-3, atol=1e-7)
        assert float(moved[0].abs().mean()) > 0.001


def test_plain_concatenation_would_make_the_first_updates_too_large() -> None:
    host, grown = two(0)
    optimizer = optim.Adam([host, grown], lr=0.01)
    for number in range(60):
        pairs = [(host, torch.ones_like(host))]
        step(optimizer, pairs if number < 57 else [*pairs, (grown, torch.ones_like(grown))])
    states = [optimizer.state[p] for p in (host, grown)]
    joined: dict[str, Any] = {"step": states[0]["step"]}
    joined |= {key: torch.cat([s[key] for s in states]) for key in ("exp_avg", "exp_avg_sq")}
    after, whole = continued(lambda p: optim.Adam(p, lr=0.01), joined, host, grown, 0)
    before = whole.detach().clone()
    step(after, [(whole, torch.ones_like(whole))])
    moved = (before - whole.detach()) / 0.01
    assert 0.999 < float(moved[:4].mean()) < 1.001
    assert float(moved[4:].mean()) > 1.2


@DIM
@pytest.mark.parametrize("kind", AGELESS)
def test_without_bias_correction_the_joined_parameter_moves_as_its_parts_would(kind: str, dim: int) -> None:
    make = AGELESS[kind]
    host, grown = two(dim)
    optimizer = make([host, grown])
    for number in range(6):
        pairs = [(host, gradient(host, number))]
        step(optimizer, pairs if number < 3 else [*pairs, (grown, gradient(grown, number))])
    joined = joined_state(optimizer, host, grown, dim, 1.0)
    assert joined is not None
    after, whole = continued(make, copy.deepcopy(joined), host, grown, dim)
    for number in range(6, 10):
        gradients = gradient(host, number), gradient(grown, number)
        step(optimizer, list(zip((host, grown), gradients, strict=True)))
        step(after, [(whole, torch.cat(gradients, dim=dim))])
        torch.testing.assert_close(whole, torch.cat([host, grown], dim=dim), rtol=1e-6, atol=1e-7)


@DIM
@pytest.mark.parametrize("kind", FACTORED)
def test_factored_means_are_those_of_the_whole_matrix(kind: str, dim: int) -> None:
    make = FACTORED[kind]
    host, grown = two(dim)
    optimizer = make([host, grown])
    whole = nn.Parameter(torch.cat([host.detach(), grown.detach()], dim=dim))
    reference = make([whole])
    for number in range(5):
        gradients = gradient(host, number), gradient(grown, number)
        step(optimizer, list(zip((host, grown), gradients, strict=True)))
        step(reference, [(whole, torch.cat(gradients, dim=dim))])
    joined = joined_state(optimizer, host, grown, dim, 1.0)
    assert joined is not None
    assert joined.keys() == reference.state[whole].keys() == {"step", "row_var", "col_var"}
    for key, value in reference.state[whole].items():
        torch.testing.assert_close(joined[key], value)


@pytest.mark.parametrize("dim", [0, 1])
def test_factored_means_of_a_convolution_lie_over_its_last_two_dimensions(dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 3, 3, 5), (2, 3, 3, 5)] if dim == 0 else [(4, 3, 3, 5), (4, 1, 3, 5)]
    host, grown = (nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes)
    whole = nn.Parameter(torch.cat([host.detach(), grown.detach()], dim=dim))
    optimizer, reference = optim.Adafactor([host, grown]), optim.Adafactor([whole])
    for number in range(3):
        gradients = gradient(host, number), gradient(grown, number)
        step(optimizer, list(zip((host, grown), gradients, strict=True)))
        step(reference, [(whole, torch.cat(gradients, dim=dim))])
    joined = joined_state(optimizer, host, grown, dim, 1.0)
    assert joined is not None
    for key, value in reference.state[whole].items():
        torch.testing.assert_close(joined[key], value)


OF_GRADIENTS = {
    "sgd": ["momentum_buffer"],
    "rmsprop": ["square_avg", "grad_avg", "momentum_buffer"],
    "adadelta": ["square_avg"],
    "rprop": ["prev"],
    "adam": ["exp_avg", "exp_avg_sq"],
    "adam amsgrad": ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"],
    "nadam": ["exp_avg", "exp_avg_sq"],
    "radam": ["exp_avg", "exp_avg_sq"],
    "adamax": ["exp_avg", "exp_inf"],
    "adafactor": ["row_var", "col_var"],
    "muon": ["momentum_buffer"],
}


@pytest.mark.parametrize("kind", OF_GRADIENTS)
def test_a_scaled_block_brings_the_state_of_its_scaled_gradients(kind: str) -> None:
    make = ({"muon": lambda p: optim.Muon(p)} | CORRECTED | AGELESS | FACTORED)[kind]
    scale = 0.5
    host, grown = two(0)
    scaled = nn.Parameter(grown.detach() * scale)
    optimizer, reference = make([host, grown]), make([host, scaled])
    for number in range(5):
        gradients = gradient(host, number), gradient(grown, number)
        step(optimizer, list(zip((host, grown), gradients, strict=True)))
        step(reference, [(host, gradients[0]), (scaled, gradients[1] / scale)])
    joined = joined_state(optimizer, host, grown, 0, scale)
    # What a parameter that always was the scaled one has. RMSprop's buffer has its epsilon in another place.
    expected = joined_state(reference, host, scaled, 0, 1.0)
    assert joined is not None and expected is not None
    for key in OF_GRADIENTS[kind]:
        torch.testing.assert_close(joined[key][-2:], expected[key][-2:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", CORRECTED | AGELESS | FACTORED)
@pytest.mark.parametrize("stepped", ["host", "grown"])
def test_a_part_that_never_took_a_step_does_not_jump(kind: str, stepped: str) -> None:
    make = (CORRECTED | AGELESS | FACTORED)[kind]
    host, grown = two(0)
    optimizer = make([host, grown])
    for _ in range(40):
        step(
            optimizer,
            [(host if stepped == "host" else grown, torch.full_like(host if stepped == "host" else grown, 0.3))],
        )
    joined = joined_state(optimizer, host, grown, 0, 1.0)
    assert joined is not None
    after, whole = continued(make, joined, host, grown, 0)
    largest = 0.0
    for _ in range(30):
        before = whole.detach().clone()
        step(after, [(whole, torch.full_like(whole, 0.3))])
        moved = (whole.detach() - before).abs()
        old, new = (moved[:4], moved[4:]) if stepped == "host" else (moved[4:], moved[:4])
        fresh = float(new.max()) / float(old.mean())
        largest = max(largest, fresh)
    # Adadelta and Adagrad give every new parameter larger steps, in torch alone as well.
    assert largest < (40.0 if kind in ("adagrad", "adadelta") else 1.5)


def test_nothing_known_of_either_is_nothing() -> None:
    host, grown = two(0)
    assert joined_state(optim.AdamW([host, grown]), host, grown, 0, 1.0) is None
    assert joined_state(optim.AdamW([nn.Parameter(torch.ones(1))]), host, grown, 0, 1.0) is None


class Own(optim.Optimizer):
    """A user's optimizer that keeps `value` under `key`, and a count."""

    def __init__(self, params: Any, key: str, value: Callable[[Tensor], Any]) -> None:
        super().__init__(params, {"lr": 0.1, "betas": (0.9, 0.99)})
        self.key, self.value = key, value

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    state["step"] = state.get("step", 0) + 1
                    state[self.key] = self.value(p)


REFUSALS: list[tuple[str, Callable[[Tensor], Any], int, float, str]] = [
    ("kronecker", lambda p: p.new_zeros(p.shape[0], p.shape[0]), 1, 1.0, "'kronecker' is not kept by element"),
    ("slow", lambda p: p.detach().clone(), 3, 1.0, "'slow' of Own means for parts of another age"),
    ("slow", lambda p: p.detach().clone(), 1, 0.5, "'slow' of Own means for parts of another scale"),
    ("blocks", lambda p: [1, 2], 1, 1.0, "'blocks' is not kept by element"),
    ("trust", lambda p: float(p.numel()), 1, 1.0, "'trust' is 12 for one part and 6 for the other"),
]


@pytest.mark.parametrize(("key", "value", "age", "scale", "why"), REFUSALS)
def test_state_of_unknown_meaning_is_refused_by_name(key: str, value: Any, age: int, scale: float, why: str) -> None:
    host, grown = two(0)
    optimizer = Own([host, grown], key, value)
    for number in range(age):
        step(
            optimizer, [(host, host.detach())] if number + 1 < age else [(host, host.detach()), (grown, grown.detach())]
        )
    with pytest.raises(StateRefused, match=why):
        joined_state(optimizer, host, grown, 0, scale)


def test_state_by_element_of_equal_age_is_appended() -> None:
    host, grown = two(0)
    optimizer = Own([host, grown], "slow", lambda p: p.detach().clone())
    step(optimizer, [(host, host.detach()), (grown, grown.detach())])
    joined = joined_state(optimizer, host, grown, 0, 1.0)
    assert joined is not None
    assert torch.equal(joined["slow"], torch.cat([host, grown]))
    assert joined["step"] == 1


def test_parameters_of_two_optimizers_are_not_joined() -> None:
    host, grown = two(0)
    with pytest.raises(StateRefused, match="two optimizers"):
        joined_state([optim.SGD([host]), optim.AdamW([grown])], host, grown, 0, 1.0)


def test_what_cannot_be_joined_stays_a_block_and_goes_on_learning(zoo: Any) -> None:
    model, x = zoo.make("mlp")
    esper.wrap(model, example_inputs=x)
    optimizer = Own(model.parameters(), "kronecker", lambda p: p.new_zeros(p.shape[0], p.shape[0]))
    esper.graft(model, "fc1", "widen", optimizer=optimizer, units=2)
    model(x).sum().backward()
    optimizer.step()
    before = model(x)
    (seed,) = esper.fossilize(model, "fc1", optimizer=optimizer)
    assert seed.state == "fossilized"
    assert model.fc1.weight.shape == (5, 6)
    assert torch.equal(model(x), before)
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("kind", CORRECTED | AGELESS | FACTORED)
def test_folding_widen_takes_the_optimizer_along(zoo: Any, kind: str) -> None:
    model, x = zoo.make("mlp")
    esper.wrap(model, example_inputs=x)
    optimizer = (CORRECTED | AGELESS | FACTORED)[kind](model.parameters())

    def train() -> None:
        optimizer.zero_grad()
        (model(x) - 1.0).square().mean().backward()
        optimizer.step()

    for _ in range(3):
        train()
    esper.graft(model, "fc1", "widen", optimizer=optimizer, units=2)
    for _ in range(3):
        train()
    before, untouched = model(x), {p: dict(optimizer.state[p]) for p in (model.fc2.bias, model.fc3.weight)}
    esper.fossilize(model, optimizer=optimizer)
    torch.testing.assert_close(model(x), before)
    assert model.fc1.weight.shape == (7, 6) and model.fc2.weight.shape == (5, 7)
    owned = {id(p) for p in model.parameters()}
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == owned
    assert {id(p) for p in optimizer.state} == owned
    for parameter, known in untouched.items():
        assert all(optimizer.state[parameter][key] is value for key, value in known.items())
    weights = copy.deepcopy(model.state_dict())
    train()
    moved = {n: float((p - weights[n]).abs().max()) for n, p in model.state_dict().items()}
    assert all(0.0 < distance < 0.2 for distance in moved.values()), moved
