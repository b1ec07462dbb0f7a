"""Widening: a pair of layers computes as one longer hidden layer, however the model calls them."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import nn

import esper
from esper.runtime.kasmina.layer import state_of


def test_widen_computes_a_longer_hidden_layer(zoo: Any) -> None:
    model, x = zoo.make("mlp")
    esper.wrap(model, example_inputs=x)
    made = esper.graft(model, "fc1", "widen", units=7)
    assert (made.site, made.output_site) == ("fc1", "fc2")
    kernel = model.fc1.kasmina["0"]
    nn.init.normal_(kernel.up.weight)
    hidden = torch.relu(model.fc1(x)), torch.relu(kernel.down(x))
    expected = model.fc3(
        torch.relu(nn.functional.linear(hidden[0], model.fc2.weight, model.fc2.bias) + kernel.up(hidden[1]))
    )
    for tap in state_of(model.fc1).outbound:
        tap.clear()
    torch.testing.assert_close(model(x), expected)
    with torch.no_grad():
        assert torch.equal(model(x), model(x))
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))
    esper.cull(twin, "fc1")
    assert not twin._forward_hooks
    assert not torch.equal(twin(x), model(x))


class Towers(nn.Module):
    """One pair of layers in two towers, both opened before either is closed."""

    def __init__(self, fail: bool = False) -> None:
        super().__init__()
        self.fc1 = nn.Linear(4, 3)
        self.fc2 = nn.Linear(3, 2)
        self.fail = fail

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        left, right = self.fc1(a), self.fc1(b)
        if self.fail:
            raise ValueError("broken off")
        return self.fc2(torch.relu(left)) - 2 * self.fc2(torch.relu(right))


@pytest.mark.parametrize("gradients", [True, False])
def test_widen_matches_interleaved_calls_and_leaks_nothing(gradients: bool) -> None:
    a, b = torch.randn(5, 4), torch.randn(5, 4)
    model = esper.wrap(Towers(), example_inputs=(a, b))
    esper.graft(model, "fc1", "widen")
    nn.init.normal_(model.fc1.kasmina["0"].up.weight)
    with torch.set_grad_enabled(gradients):
        single = [model.fc2(torch.relu(model.fc1(t))) for t in (a, b)]
        torch.testing.assert_close(model(a, b), single[0] - 2 * single[1])
    tap = state_of(model.fc1).outbound[0]
    assert not tap._pending
    model.fail = True
    with pytest.raises(ValueError, match="broken off"):
        model(a, b)
    assert not tap._pending
    with pytest.raises(esper.GrowthError, match="did not compute") as caught:
        model.fc2(torch.randn(1, 3))
    assert caught.value.code == "ESP-439"


def test_pair_is_found_by_tracing_when_no_example_was_given(zoo: Any) -> None:
    model, x = zoo.make("mlp")
    esper.wrap(model)
    model(x)
    assert esper.graft(model, "fc1", "widen").output_site == "fc2"
    assert esper.graft(model, "fc2", "widen").output_site == "fc3"
    with pytest.raises(esper.GrowthError, match="does not fit 'fc3'"):
        esper.graft(model, "fc3", "widen")


@pytest.mark.parametrize("reentrant", [True, False])
def test_widen_survives_activation_checkpointing(zoo: Any, reentrant: bool) -> None:
    model, x = zoo.make("mlp")
    esper.wrap(model, example_inputs=x)
    esper.graft(model, "fc1", "widen")
    nn.init.normal_(model.fc1.kasmina["0"].up.weight)
    x.requires_grad_()
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    body: Callable[..., Any] = model.forward
    output = torch.utils.checkpoint.checkpoint(body, x, use_reentrant=reentrant)
    output.square().sum().backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient)
    assert not state_of(model.fc1).outbound[0]._pending


def test_in_place_activations_are_matched_by_their_storage() -> None:
    class InPlace(Towers):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            left, right = self.fc1(a), self.fc1(b)
            return self.fc2(right.tanh_()) + 3 * self.fc2(left.tanh_())

    a, b = torch.randn(5, 4), torch.randn(5, 4)
    model = esper.wrap(InPlace(), example_inputs=(a, b))
    esper.graft(model, "fc1", "widen")
    nn.init.normal_(model.fc1.kasmina["0"].up.weight)
    with torch.no_grad():
        single = [model.fc2(torch.tanh(model.fc1(t))) for t in (b, a)]
        torch.testing.assert_close(model(a, b), single[0] + 3 * single[1])
