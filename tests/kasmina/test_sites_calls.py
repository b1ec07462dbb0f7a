"""What a kernel sees of a call: which argument is `x`, which tensor is the output, and what is refused."""

from collections import OrderedDict
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from host_zoo import stirred
from torch import Tensor
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

import esper
from esper.runtime.kasmina.layer import state_of
from esper.runtime.kasmina.wrapping.calls import put_back
from esper.runtime.kasmina.wrapping.calls import taken

Pair = namedtuple("Pair", ["hidden", "other"])


@dataclass(frozen=True)
class Answer:
    steps: int
    hidden: Tensor


OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda h: h,
    "tuple": lambda h: (torch.arange(3), h, "text"),
    "list": lambda h: [None, h],
    "named tuple": lambda h: Pair(h, 3),
    "dictionary": lambda h: {"ids": torch.arange(2), "hidden": h, "rest": [1]},
    "ordered": lambda h: OrderedDict(hidden=h, other=None),
    "dataclass": lambda h: Answer(3, h),
    "model output": lambda h: BaseModelOutput(last_hidden_state=h, attentions=(h,)),
    "nested": lambda h: ((h, None), {"more": h}),
}


class Block(nn.Module):
    def __init__(self, shape: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.shape = shape

    def forward(self, x: Tensor, *, mask: Any = None, scale: float = 1.0) -> Any:
        return self.shape(x + scale * torch.tanh(self.linear(x)))


class Model(nn.Module):
    def __init__(self, block: nn.Module, **how: Any) -> None:
        super().__init__()
        self.block = block
        self.how = how

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.block(*args, **kwargs, **self.how)


def flattened(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [item for part in value.values() for item in flattened(part)]
    if isinstance(value, tuple | list):
        return [item for part in value for item in flattened(part)]
    return [value.steps, value.hidden] if isinstance(value, Answer) else [value]


@pytest.mark.parametrize("name", OUTPUTS)
def test_output_is_the_first_floating_tensor_and_all_else_is_passed_on(name: str) -> None:
    x = torch.randn(3, 4)
    model = Model(Block(OUTPUTS[name]), mask="all", scale=0.5)
    plain = model(x)
    esper.wrap(model, ["block"], example_inputs=x)
    dormant = model(x)
    assert type(dormant) is type(plain)
    esper.graft(model, "block", "bottleneck")
    stirred(model, "block")
    grown = model(x)
    delta = model.block.kasmina["0"](x)
    assert type(grown) is type(plain)
    output, place = taken(plain)
    found, same = taken(grown)
    assert place == same
    torch.testing.assert_close(found, output + delta)
    others = [(a, b) for a, b in zip(flattened(plain), flattened(grown), strict=True)][0:]
    changed = sum(not (a is b or (torch.equal(a, b) if isinstance(a, Tensor) else a == b)) for a, b in others)
    assert changed == 1


def test_putting_a_tensor_back_leaves_the_old_container_alone() -> None:
    h, other = torch.ones(2), torch.zeros(2)
    for shape in OUTPUTS.values():
        returned = shape(h)
        found = taken(returned)
        assert found is not None
        changed = put_back(returned, found[1], other)
        assert taken(returned)[0] is h
        assert taken(changed)[0] is other
    assert taken((torch.arange(3), "text", None)) is None
    assert taken(BaseModelOutput) is None


class Chooses(nn.Module):
    """Of two arguments with the output's shape the first one counts, positional before keyword."""

    def forward(self, ids: Tensor, first: Any = None, second: Any = None) -> Tensor:
        hidden = first["h"] if isinstance(first, dict) else first
        return (hidden if second is None else second) * 2.0


@pytest.mark.parametrize(
    ("args", "kwargs", "chosen"),
    [
        (lambda a, b: (torch.arange(3), a), lambda a, b: {"second": b}, 0),
        (lambda a, b: (torch.arange(3),), lambda a, b: {"second": b, "first": a}, 1),
        (lambda a, b: (torch.arange(12).reshape(3, 4), {"n": torch.ones(2), "h": a}), lambda a, b: {}, 0),
        (lambda a, b: (), lambda a, b: {"ids": torch.arange(3), "first": None, "second": b}, 1),
    ],
    ids=["positional", "keyword", "in a mapping", "after None"],
)
def test_input_of_a_block_is_the_first_argument_with_the_shape_of_its_output(
    args: Any, kwargs: Any, chosen: int
) -> None:
    tensors = (torch.randn(3, 4), torch.randn(3, 4))
    model = Model(Chooses())
    esper.wrap(model, ["block"])
    model(*args(*tensors), **kwargs(*tensors))
    plain = model(*args(*tensors), **kwargs(*tensors))
    esper.graft(model, "block", "bottleneck")
    stirred(model, "block")
    grown = model(*args(*tensors), **kwargs(*tensors))
    torch.testing.assert_close(grown, plain + model.block.kasmina["0"](tensors[chosen]))


class Summary(nn.Module):
    """A block of another shape, or of none."""

    def __init__(self, shape: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor) -> Any:
        return self.shape(x)


@pytest.mark.parametrize(
    ("shape", "told"),
    [
        (lambda x: x.mean(0), "shape of none of its inputs"),
        (lambda x: "text", "no floating tensor"),
        (lambda x: x.long(), "no floating tensor"),
        (lambda x: x.mul_(2.0), "changes its input in place"),
        (lambda x: (x.add_(1.0) * 2, None), "changes its input in place"),
    ],
    ids=["another shape", "no tensor", "whole numbers", "in place", "in place in a tuple"],
)
def test_a_module_that_is_no_block_is_refused_by_name(shape: Any, told: str) -> None:
    x = torch.randn(3, 4)
    with pytest.raises(esper.SiteError, match=f"'block' cannot be a site: .*{told}"):
        esper.wrap(Model(Summary(shape)), ["block"], example_inputs=x.clone())
    model = esper.wrap(Model(Summary(shape)), ["block"])
    model(x.clone())
    assert state_of(model.block).idle
    with pytest.raises(esper.GrowthError, match=told) as caught:
        esper.graft(model, "block", "bottleneck")
    assert caught.value.code == "ESP-432"
    assert esper.status(model).grown_parameters == 0
    assert f"cannot grow: {esper.status(model).sites[0].obstacle}" in str(esper.status(model))


def test_a_grown_block_that_is_called_otherwise_refuses_by_name() -> None:
    model = Model(Summary(lambda x: x * 2 if x.dim() == 2 else x.sum()))
    x = torch.randn(3, 4)
    esper.wrap(model, ["block"], example_inputs=x)
    other = torch.randn(2, 3, 4)
    expected = other.sum()
    assert torch.equal(model(other), expected)
    esper.graft(model, "block", "bottleneck")
    with pytest.raises(esper.GrowthError, match="'block' was called in a way"):
        model(other)
    with esper.dormant(model):
        assert torch.equal(model(other), expected)


def test_layers_take_their_argument_by_name() -> None:
    model = Model(nn.Linear(4, 4))
    x = torch.randn(3, 4)
    esper.wrap(model, example_inputs={"input": x})
    esper.graft(model, "block", "bottleneck")
    stirred(model, "block")
    assert torch.equal(model(x), model(input=x))


def test_blocks_are_sites_only_where_they_are_named() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(OUTPUTS["tuple"]) for _ in range(2)])
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)[1]
            return self.head(x)

    def sites(targets: Any) -> list[str]:
        return [s.name for s in esper.status(esper.wrap(Net(), targets, example_inputs=torch.ones(2, 4))).sites]

    assert sites("auto") == ["blocks.0.linear", "blocks.1.linear", "head"]
    assert sites([Block]) == ["blocks.0", "blocks.1"]
    assert sites(["blocks.1", nn.Linear]) == ["blocks.0.linear", "blocks.1", "blocks.1.linear", "head"]
    assert sites(["blocks.*"]) == ["blocks.0.linear", "blocks.1.linear"]
    assert sites(["blocks.?"]) == ["blocks.0", "blocks.1"]


def test_a_site_inside_a_block_that_is_a_site_grows_too() -> None:
    model = Model(Block(OUTPUTS["tuple"]))
    x = torch.randn(3, 4)
    esper.wrap(model, ["block", "block.linear"], example_inputs=x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model(x)[1]
    esper.graft(model, "block.linear", "bottleneck", optimizer=optimizer)
    esper.graft(model, "block", "depth_block", optimizer=optimizer)
    assert torch.equal(model(x)[1], before)
    assert len(optimizer.param_groups) == 1
    stirred(model, "block.linear")
    inner = model(x)[1]
    stirred(model, "block")
    assert not torch.equal(model(x)[1], inner)
    esper.cull(model, "block", optimizer=optimizer)
    assert torch.equal(model(x)[1], inner)
    esper.cull(model, "block.linear", optimizer=optimizer)
    assert torch.equal(model(x)[1], before)


class Walks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x)
        return x


class Listed(nn.ModuleDict):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.values():
            x = layer(x)
        return x


@pytest.mark.parametrize(
    ("block", "told"),
    [
        (Walks, "'block' cannot be a site: the forward of Walks uses self.children"),
        (lambda: Listed({"a": nn.Linear(4, 4)}), "'block' is a Listed"),
        (lambda: nn.Sequential(nn.LazyLinear(4)), "not initialised"),
        (lambda: torch.jit.trace(nn.Tanh(), torch.ones(2)), "scripted"),
    ],
)
@pytest.mark.filterwarnings("ignore::Warning")
def test_blocks_that_would_take_what_grows_for_their_own_are_refused(block: Any, told: str) -> None:
    model = Model(block())
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(esper.SiteError, match=told):
        esper.wrap(model, ["block"])
    assert [type(m) for m in model.modules()] == kinds


def test_a_sequential_that_grows_goes_on_being_the_sequence_of_its_own() -> None:
    x = torch.randn(3, 4)
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)), nn.Linear(4, 2))
    esper.wrap(model, ["0"], example_inputs=x)
    before, inside = model(x), list(model[0])
    esper.graft(model, "0", "bottleneck")
    assert torch.equal(model(x), before)
    stirred(model, "0")
    torch.testing.assert_close(model[0](x), model[0][2](model[0][1](model[0][0](x))) + model[0].kasmina["0"](x))
    assert list(model[0]) == inside
    assert len(model[0]) == 3
    assert model[0][-1] is inside[2]
    assert list(model[0][1:]) == inside[1:]
    assert type(model[0][1:]) is nn.Sequential
    with pytest.raises(IndexError):
        model[0][3]


@pytest.mark.parametrize("kind", [nn.ReLU, nn.Identity])
def test_a_function_without_weights_is_a_block_in_the_dtype_that_was_seen(kind: type[nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), kind(), nn.Linear(4, 2)).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    esper.wrap(model, [kind], example_inputs=x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model(x)
    esper.graft(model, "1", "bottleneck", optimizer=optimizer)
    assert torch.equal(model(x), before)
    assert {p.dtype for p in model[1].parameters()} == {torch.float64}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
