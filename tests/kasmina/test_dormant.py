import copy
import pickle
import random
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from torch import nn

import esper
from esper.runtime.kasmina.layer import state_of

NAMES = ("mlp", "cnn", "tied", "normed")


def train(model: nn.Module, x: Tensor, steps: int = 3) -> list[Tensor]:
    torch.manual_seed(5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("proven", [True, False])
def test_dormant_model_trains_to_the_same_bits(zoo: Any, name: str, proven: bool) -> None:
    plain, x = zoo.make(name)
    wrapped, _ = zoo.make(name)
    esper.wrap(wrapped, example_inputs=x if proven else None)

    assert torch.equal(torch.stack(train(plain, x)), torch.stack(train(wrapped, x)))
    assert esper.weights_digest(plain) == esper.weights_digest(wrapped)
    for ours, theirs in zip(wrapped.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    wrapped.eval(), plain.eval()
    assert torch.equal(wrapped(x), plain(x))


@pytest.mark.parametrize("name", NAMES)
def test_wrapping_keeps_names_objects_types_and_random_state(zoo: Any, name: str) -> None:
    model, x = zoo.make(name)
    before = {
        "parameters": [(n, id(p)) for n, p in model.named_parameters()],
        "buffers": [(n, id(b)) for n, b in model.named_buffers()],
        "state": list(model.state_dict()),
        "modules": [(n, id(m)) for n, m in model.named_modules()],
        "repr": repr(model),
        "type": type(model).__name__,
        "random": (torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state())),
        "digest": esper.weights_digest(model),
        "training": [m.training for m in model.modules()],
    }
    kind = type(model)
    wrapped = esper.wrap(model, example_inputs=x)
    after = {
        "parameters": [(n, id(p)) for n, p in model.named_parameters()],
        "buffers": [(n, id(b)) for n, b in model.named_buffers()],
        "state": list(model.state_dict()),
        "modules": [(n, id(m)) for n, m in model.named_modules()],
        "repr": repr(model),
        "type": type(model).__name__,
        "random": (torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state())),
        "digest": esper.weights_digest(model),
        "training": [m.training for m in model.modules()],
    }
    assert wrapped is model
    assert after == before
    assert isinstance(model, kind)
    assert isinstance(model, esper.MorphableModel)
    for site in esper.status(model).sites:
        layer = model.get_submodule(site.name)
        assert isinstance(layer, esper.KasminaLayer)
        assert isinstance(layer, nn.Linear | nn.Conv2d | nn.BatchNorm2d)
        assert site.proven


@pytest.mark.parametrize("name", ("mlp", "cnn", "tied", "normed"))
def test_copies_are_wrapped_models_of_their_own(zoo: Any, name: str) -> None:
    model, x = zoo.make(name)
    esper.wrap(model).eval()
    expected = model(x)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), expected)
    assert isinstance(twin, esper.MorphableModel)
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    assert torch.equal(twin(x), expected)
    assert len(list(twin.parameters())) == len(list(model.parameters()))


@pytest.mark.parametrize("name", ("mlp", "cnn", "tied"))
def test_pickled_models_come_back_wrapped(zoo: Any, name: str) -> None:
    model, x = zoo.make(name)
    esper.wrap(model).eval()
    back = pickle.loads(pickle.dumps(model))
    assert torch.equal(back(x), model(x))
    assert isinstance(back, esper.MorphableModel)
    assert esper.status(back) == esper.status(model)


def test_parametrized_model_refuses_pickling_as_plain_torch_does(zoo: Any) -> None:
    model, _ = zoo.make("normed")
    with pytest.raises(RuntimeError, match="parametrized"):
        pickle.dumps(esper.wrap(model))


def test_parametrizations_come_and_go_above_the_seeds(zoo: Any) -> None:
    model, x = zoo.make("normed")
    expected = model(x)
    esper.wrap(model)
    assert torch.equal(model(x), expected)
    nn.utils.parametrize.remove_parametrizations(model.fc1, "weight")
    assert isinstance(model.fc1, esper.KasminaLayer)
    torch.testing.assert_close(model(x), expected)
    nn.utils.parametrizations.weight_norm(model.fc2)
    esper.unwrap(model)
    assert type(model.fc1) is nn.Linear
    assert nn.utils.parametrize.is_parametrized(model.fc2)
    torch.testing.assert_close(model(x), expected)
    nn.utils.parametrize.remove_parametrizations(model.fc2, "weight")
    assert type(model.fc2) is nn.Linear


def test_unwrapping_a_dormant_model_gives_its_own_classes_back(zoo: Any) -> None:
    model, x = zoo.make("normed")
    classes = [type(m) for m in model.modules()]
    state = list(model.__dict__)
    expected = model(x)
    assert esper.unwrap(esper.wrap(model, example_inputs=x)) is model
    assert [t.__mro__[1:] for t in map(type, model.modules())] == [t.__mro__[1:] for t in classes]
    assert list(model.__dict__) == state
    assert not any("_kasmina" in m.__dict__ for m in model.modules())
    assert torch.equal(model(x), expected)


def test_device_dtype_and_mode_changes_keep_working(zoo: Any) -> None:
    model, x = zoo.make("mlp")
    esper.wrap(model)
    esper.graft(esper.wrap(zoo.make("mlp")[0], example_inputs=x), "fc1", "bottleneck", rank=2)
    model.double()
    assert model(x.double()).dtype == torch.float64
    model.half().float().eval()
    assert not model.fc1.training
    model.requires_grad_(False)
    assert not any(p.requires_grad for p in model.parameters())


def test_hooks_see_what_the_layer_returns(zoo: Any) -> None:
    model, x = zoo.make("mlp")
    seen: list[Tensor] = []
    model.fc1.register_forward_hook(lambda module, args, output: seen.append(output))
    esper.wrap(model)
    model(x)
    assert torch.equal(seen[0], nn.functional.linear(x, model.fc1.weight, model.fc1.bias))


def test_slices_of_a_wrapped_sequential_are_ordinary_and_stateful() -> None:
    model = esper.wrap(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)))
    part = model[:2]
    assert type(part) is nn.Sequential
    assert len(part) == 2
    assert part[0] is model[0]
    fresh = type(model[0])(4, 3)
    assert type(fresh) is nn.Linear


def test_first_forward_proves_the_sites_when_there_are_no_example_inputs(zoo: Any) -> None:
    model, x = zoo.make("mlp")
    esper.wrap(model)
    assert not any(site.proven for site in esper.status(model).sites)
    model(x)
    assert all(site.proven for site in esper.status(model).sites)
    assert all(state_of(layer).idle for layer in (model.fc1, model.fc2, model.fc3))


def test_dormant_model_compiles_and_flips_to_grown(zoo: Any) -> None:
    model, x = zoo.make("mlp")
    esper.wrap(model, example_inputs=x)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))
    esper.graft(model, "fc1", "bottleneck", rank=2)
    with torch.no_grad():
        model.fc1.kasmina["0"].up.weight.fill_(0.1)
    torch.testing.assert_close(compiled(x), model(x))
