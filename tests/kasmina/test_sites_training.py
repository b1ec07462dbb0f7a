"""Sites in what training loops do: shared and tied modules, checkpointing, accumulation, frozen parts, copies."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from host_zoo import HOSTS
from host_zoo import Residual
from host_zoo import made
from host_zoo import stirred
from torch import Tensor
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.checkpoint import checkpoint_sequential

import esper


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


def close(left: list[Tensor], right: list[Tensor]) -> None:
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b)


class Repeated(nn.Module):
    """One block, reached by two names, called three times in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Residual()
        self.same = self.block
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)["hidden"]
        x = self.norm(self.same(x, scale=0.5)["hidden"])
        return self.norm(self.block(scale=2.0, x=x)["hidden"])


@pytest.mark.parametrize("site", ["block", "norm", "block.up"])
def test_a_shared_module_adds_its_delta_at_every_call(site: str) -> None:
    model, x = Repeated(), torch.randn(4, 8)
    esper.wrap(model, [site], example_inputs=x)
    assert [s.name for s in esper.status(model).sites] == [site]
    calls: list[Any] = []
    esper.graft(model, site, "bottleneck")
    esper.graft(model, site, "scale_shift")
    before = model(x)
    stirred(model, site)
    model.get_submodule(f"{site}.kasmina.0").register_forward_hook(lambda *_: calls.append(1))
    output = model(x)
    assert len(calls) == {"block": 3, "norm": 2, "block.up": 3}[site]
    assert not torch.allclose(output, before)
    output.square().mean().backward()
    assert all(p.grad is not None for p in model.get_submodule(f"{site}.kasmina.0").parameters())
    assert len({id(p) for p in model.parameters()}) == len(list(model.parameters()))


def test_tied_embedding_and_head_grow_apart() -> None:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(10, 8)
            self.head = nn.Linear(8, 10, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(torch.tanh(self.embedding(ids)))

    model, ids = Language(), torch.randint(10, (4, 5))
    esper.wrap(model, example_inputs=ids)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    before = model(ids)
    esper.graft(model, "embedding", "lowrank", optimizer=optimizer)
    esper.graft(model, "head", "bottleneck", optimizer=optimizer)
    assert torch.equal(model(ids), before)
    assert model.head.weight is model.embedding.weight
    loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
    loss.backward()
    optimizer.step()
    assert model.head.weight is model.embedding.weight
    twin = copy.deepcopy(model)
    assert twin.head.weight is twin.embedding.weight
    esper.cull(model, "embedding", optimizer=optimizer)
    assert len(optimizer.param_groups[0]["params"]) == 1 + 3


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm", "orthogonal"])
@pytest.mark.parametrize("site", ["linear", "conv"])
def test_parametrized_hosts_grow_and_lose_their_parametrization(norm: str, site: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            make = getattr(nn.utils.parametrizations, norm)
            self.conv = make(nn.Conv1d(4, 4, 3, padding=1))
            self.linear = make(nn.Linear(9, 6))

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(torch.relu(self.conv(x)))

    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(3, 4, 9)
    esper.wrap(model, example_inputs=x)
    before = model(x)
    esper.graft(model, site, "bottleneck")
    esper.graft(model, site, "scale_shift")
    assert torch.equal(model(x), before)
    stirred(model, site)
    grown = model(x).detach()
    nn.utils.parametrize.remove_parametrizations(model.get_submodule(site), "weight")
    torch.testing.assert_close(model(x).detach(), grown)


def test_weight_norm_of_the_old_kind_grows() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model[0])
    x = torch.randn(3, 4)
    esper.wrap(model, example_inputs=x)
    before = model(x)
    esper.graft(model, "0", "bottleneck")
    assert torch.equal(model(x), before)
    stirred(model, "0")
    model(x).sum().backward()
    assert model[0].weight_g.grad is not None


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["linear", "conv2d", "embedding", "layer_norm", "attention", "block"])
def test_checkpointed_hosts_give_the_same_gradients(name: str, reentrant: bool) -> None:
    model, x = made(name)
    esper.wrap(model, ["host"], example_inputs=x)
    esper.graft(model, "host", "lowrank" if name == "embedding" else "bottleneck")
    esper.graft(model, "host", "depth_block")
    stirred(model)
    stirred(model, slot=1)
    expected = gradients(model, model(x).square().mean())
    if x.is_floating_point():
        x.requires_grad_()
    elif reentrant:
        # Without an input that needs gradients the reentrant kind gives none, with or without anything grown.
        return
    checkpoint(model.forward, x, use_reentrant=reentrant).square().mean().backward()
    close([p.grad for p in model.parameters()], expected)


class Chain(nn.Sequential):
    def forward(self, x: Tensor, segments: int = 0, reentrant: bool = False) -> Tensor:
        if segments:
            return checkpoint_sequential(self, segments, x, use_reentrant=reentrant)
        return super().forward(x)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("segments", [1, 2, 3, 5])
def test_a_pair_survives_a_checkpoint_that_ends_between_its_layers(segments: int, reentrant: bool) -> None:
    torch.manual_seed(0)
    model = Chain(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
    x = torch.randn(3, 4, requires_grad=True)
    esper.wrap(model, example_inputs=x)
    for site, slot in (("0", 0), ("2", 0), ("0", 1)):
        esper.graft(model, site, "widen")
        stirred(model, site, slot)
    for _ in range(2):
        expected = gradients(model, model(x).square().sum())
        model.zero_grad()
        model(x, segments, reentrant).square().sum().backward()
        close([p.grad for p in model.parameters()], expected)


class Towers(nn.Module):
    """One pair in two towers, each checkpointed from between the two layers on."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 6)
        self.down = nn.Linear(6, 3)

    def forward(self, x: Tensor, y: Tensor, saving: bool = False) -> Tensor:
        a, b = self.up(x), self.up(y)
        if not saving:
            return self.down(torch.relu(a)) - 2 * self.down(torch.relu(b))
        rest = lambda h: self.down(torch.relu(h))  # noqa: E731
        return checkpoint(rest, a, use_reentrant=False) - 2 * checkpoint(rest, b, use_reentrant=False)


def test_a_pair_in_two_checkpointed_towers_is_matched_again_in_the_backward() -> None:
    torch.manual_seed(0)
    model, x, y = Towers(), torch.randn(3, 4), torch.randn(3, 4)
    esper.wrap(model, example_inputs=(x, y))
    esper.graft(model, "up", "widen")
    stirred(model, "up")
    expected = gradients(model, model(x, y).square().sum())
    close(gradients(model, model(x, y, saving=True).square().sum()), expected)


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    model, x = made("linear")
    esper.wrap(model, ["host"], example_inputs=x)
    esper.graft(model, "host", "bottleneck")
    esper.graft(model, "host", "scale_shift")
    stirred(model)
    expected = gradients(model, model(x).square().mean())
    for part in x.split(2):
        (model(part).square().mean() / 2).backward()
    close([p.grad for p in model.parameters()], expected)


def test_two_forwards_before_one_backward_keep_their_pairs_apart(zoo: Any) -> None:
    model, x = zoo.make("mlp")
    esper.wrap(model, example_inputs=x)
    esper.graft(model, "fc1", "widen")
    stirred(model, "fc1")
    left, right = x[:4], x[4:]
    expected = gradients(model, model(x).sum())
    close(gradients(model, model(left).sum() + model(right).sum()), expected)


def test_parts_without_gradients_stay_without() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = Residual()
            self.head = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.encoder(x)["hidden"]
            return self.head(x)

    model, x = Frozen(), torch.randn(3, 8)
    esper.wrap(model, ["encoder", "encoder.up", "head"], example_inputs=x)
    before = model(x)
    for site in ("encoder", "encoder.up", "head"):
        esper.graft(model, site, "bottleneck")
        stirred(model, site)
    assert not torch.equal(model(x), before)
    model(x).sum().backward()
    assert all(p.grad is None for p in model.encoder.parameters())
    assert all(p.grad is not None for p in model.head.parameters())


@pytest.mark.parametrize("name", HOSTS)
def test_inference_mode_computes_what_training_does(name: str) -> None:
    model, x = made(name)
    esper.wrap(model, ["host"], example_inputs=x)
    esper.graft(model, "host", "scale_shift")
    stirred(model)
    model.eval()
    expected = model(x).detach()
    with torch.inference_mode():
        torch.testing.assert_close(model(x), expected)


def test_growth_inside_inference_mode_can_be_trained_afterwards() -> None:
    model, x = made("linear")
    esper.wrap(model, ["host"], example_inputs=x)
    with torch.inference_mode():
        esper.graft(model, "host", "bottleneck")
        model(x)
    stirred(model)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.host.kasmina.parameters())


def test_a_sequential_is_indexed_iterated_and_sliced_as_before() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4), nn.LayerNorm(4))
    x = torch.randn(3, 4)
    modules = list(model)
    esper.wrap(model, example_inputs=x)
    esper.graft(model, "2", "bottleneck")
    stirred(model, "2")
    assert list(model) == modules
    assert model[-2] is modules[2]
    h = x
    for layer in model:
        h = layer(h)
    assert torch.equal(h, model(x))
    assert torch.equal(model[2:](model[:2](x)), model(x))


def test_state_dict_goes_through_a_file_and_back_strictly(tmp_path: Path) -> None:
    def grown() -> tuple[nn.Module, Tensor]:
        model, x = made("convolutional_block")
        esper.wrap(model, ["host", "host.norm"], example_inputs=x)
        esper.graft(model, "host", "conv_bottleneck")
        esper.graft(model, "host.norm", "se_gate")
        return model, x

    model, x = grown()
    stirred(model)
    stirred(model, "host.norm")
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other, _ = grown()
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), strict=True)
    assert torch.equal(other.eval()(x), model.eval()(x))


def test_a_model_wrapped_on_the_meta_device_grows_once_it_is_materialised() -> None:
    reference, x = made("convolutional_block")
    state = reference.state_dict()
    with torch.device("meta"):
        model, _ = made("convolutional_block")
        shape = torch.empty(x.shape)
    esper.wrap(model, ["host", "host.conv", "host.norm"], example_inputs=shape)
    assert all(site.proven for site in esper.status(model).sites)
    before = list(model.state_dict())
    with pytest.raises(esper.GrowthError, match=r"'host\.conv' is on the meta device") as caught:
        esper.graft(model, "host.conv", "bottleneck")
    assert caught.value.code == "ESP-432"
    assert list(model.state_dict()) == before
    model.to_empty(device="cpu")
    model.load_state_dict(state)
    assert torch.equal(model(x), reference(x))
    for site in ("host", "host.conv", "host.norm"):
        esper.graft(model, site, "bottleneck")
    model.eval(), reference.eval()
    assert torch.equal(model(x), reference(x))


def test_a_copy_of_a_grown_pair_opens_no_calls_of_the_first(zoo: Any) -> None:
    model, x = zoo.make("mlp")
    esper.wrap(model, example_inputs=x)
    esper.graft(model, "fc1", "widen")
    stirred(model, "fc1")
    hidden = model.fc1(x)
    twin = pickle.loads(pickle.dumps(model))
    with pytest.raises(esper.GrowthError, match="'fc2' was called on something"):
        twin.fc2(torch.relu(hidden.detach()))
    torch.testing.assert_close(twin(x), model(x))


@pytest.mark.parametrize("name", ["linear", "conv2d", "embedding", "attention_time_first", "block", "sequential_block"])
def test_a_compiled_model_computes_what_has_grown_in_one_graph(name: str) -> None:
    # The graphs of a forward are shared by all models of its class: without this the eighth test would see none left.
    torch._dynamo.reset()
    model, x = made(name)
    esper.wrap(model, ["host"], example_inputs=x)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    esper.graft(model, "host", "scale_shift")
    esper.graft(model, "host", "lowrank" if name == "embedding" else "bottleneck")
    stirred(model)
    stirred(model, slot=1)
    torch.testing.assert_close(compiled(x), model(x))
