"""The probe batch: stored whole, and a comparison that nothing wrong passes."""

import ast
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies
from torch import nn

import esper
from esper.runtime.kasmina.exporting.literals import Unwritable
from esper.runtime.kasmina.exporting.literals import literal
from esper.runtime.kasmina.exporting.probe import Probe
from esper.runtime.kasmina.exporting.probe import bind
from esper.runtime.kasmina.exporting.probe import compare
from esper.runtime.kasmina.exporting.probe import probe_bytes
from esper.runtime.kasmina.exporting.probe import read_probe
from esper.runtime.kasmina.exporting.python_file import identifier

tensors = strategies.builds(
    lambda shape, dtype, seed: torch.randint(
        0, 9, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int64
    ).to(dtype),
    strategies.lists(strategies.integers(0, 3), max_size=3),
    strategies.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool]),
    strategies.integers(0, 99),
)
scalars = strategies.none() | strategies.booleans() | strategies.integers(-99, 99) | strategies.text(max_size=5)
finite = strategies.floats(allow_nan=False, allow_infinity=False)
arguments = strategies.recursive(
    tensors | scalars | finite,
    lambda inner: (
        strategies.lists(inner, max_size=3)
        | strategies.lists(inner, max_size=3).map(tuple)
        | strategies.dictionaries(strategies.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, tuple | list):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


names = strategies.sampled_from(["x", "mask", "a.b"])


@given(
    args=strategies.lists(arguments, max_size=2).map(tuple),
    keywords=strategies.dictionaries(names, arguments, max_size=2),
    outputs=strategies.lists(tensors, max_size=2),
)
def test_a_probe_comes_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, args: Any, keywords: Any, outputs: Any
) -> None:
    probe = Probe(args, keywords, tuple(outputs))
    path = tmp_path_factory.getbasetemp() / "probe.safetensors"
    path.write_bytes(probe_bytes(probe))
    assert probe_bytes(probe) == path.read_bytes()
    back = read_probe(str(path))
    assert same(list(back.args), list(args))
    assert same(dict(back.keywords), dict(keywords))
    assert same(list(back.outputs), list(outputs))


def test_a_damaged_probe_is_refused(tmp_path: Any) -> None:
    path = tmp_path / "probe.safetensors"
    data = probe_bytes(Probe((torch.ones(3),), {}, (torch.ones(2),)))
    for damaged in (b"", data[:20], data[:-1], data.replace(b"esper.probe", b"esper.prob_")):
        path.write_bytes(damaged)
        with pytest.raises(esper.IntegrityError, match="probe batch") as caught:
            read_probe(str(path))
        assert caught.value.code == "ESP-407"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rounding_passes_and_a_wrong_weight_does_not(dtype: torch.dtype) -> None:
    expected = torch.linspace(-3, 7, 50).to(dtype)
    assert compare((expected,), (expected.clone(),)).difference == 0.0
    step = torch.finfo(dtype).eps
    assert compare((expected,), ((expected.double() * (1 + 2 * step)).to(dtype),)).passed
    off = expected.double().clone()
    off[3] += 0.5
    found = compare((expected,), (off.to(dtype),))
    assert not found.passed
    assert found.difference == pytest.approx(0.5 / 7, rel=0.05)


@pytest.mark.parametrize(
    ("found", "told"),
    [
        ((), "0 outputs, the model has 1"),
        ((torch.zeros(2, 2),), r"shape (2, 2)"),
        ((torch.full((4,), torch.nan),), "differs by inf"),
        ((torch.full((4,), torch.inf),), "differs by inf"),
    ],
)
def test_what_is_no_number_or_of_another_shape_never_passes(found: tuple[torch.Tensor, ...], told: str) -> None:
    comparison = compare((torch.ones(4),), found)
    assert not comparison.passed
    assert comparison.reason is not None and told in comparison.reason


def test_whole_numbers_must_be_equal() -> None:
    assert compare((torch.tensor([1, 2]),), (torch.tensor([1, 2]),)).passed
    assert not compare((torch.tensor([100000, 2]),), (torch.tensor([100001, 2]),)).passed
    assert compare((torch.zeros(3),), (torch.zeros(3),)).passed


def test_infinity_must_be_where_it_was() -> None:
    masked = torch.tensor([1.0, -torch.inf, 2.0])
    assert compare((masked,), (masked.clone(),)).passed
    for wrong in (
        torch.tensor([1.0, torch.inf, 2.0]),
        torch.tensor([1.0, -3.0, 2.0]),
        torch.tensor([1.0, torch.nan, 2]),
    ):
        assert not compare((masked,), (wrong,)).passed


class Starred(nn.Module):
    def forward(self, first: Any, /, second: Any, *rest: Any, key: Any = 1, **more: Any) -> Any:
        return first


class Named(nn.Module):
    def forward(self, first: Any, /, second: Any = 2, *, key: Any = 1, **more: Any) -> Any:
        return first


def test_arguments_are_named_where_the_model_has_names() -> None:
    assert bind(Named(), (1, 2)) == ((1,), {"second": 2})
    assert bind(nn.Linear(2, 2), 5) == ((), {"input": 5})
    assert bind(Starred(), (1, 2, 3)) == ((1, 2, 3), {})


values = strategies.recursive(
    strategies.none() | strategies.booleans() | strategies.integers() | strategies.text() | finite,
    lambda inner: (
        strategies.lists(inner, max_size=3)
        | strategies.lists(inner, max_size=3).map(tuple)
        | strategies.dictionaries(strategies.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(values)
def test_literals_are_the_values_that_they_stand_for(value: Any) -> None:
    assert repr(ast.literal_eval(literal(value))) == repr(value)


def test_what_has_no_literal_is_refused() -> None:
    with pytest.raises(Unwritable, match=r"builtins\.object"):
        literal([object()])
    assert literal((float("inf"), -float("inf"))) == '(float("inf"), float("-inf"))'
    assert literal(slice(1, None, 2)) == "slice(1, None, 2)"
    assert literal(torch.float32) == "torch.float32"
    assert literal(torch.device("cpu")) == 'torch.device("cpu")'


@pytest.mark.parametrize(
    ("name", "made"),
    [("ResNet18", "res_net18"), ("my run-1", "my_run_1"), ("a.B", "a_b"), ("---", "model"), ("GPT2", "gpt2")],
)
def test_file_names_can_be_imported(name: str, made: str) -> None:
    assert identifier(name) == made
