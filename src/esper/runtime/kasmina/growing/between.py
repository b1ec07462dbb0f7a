"""Pairs of layers between which units can be added: what may stand between the two, and what a pair is as data.

Only what works channel by channel may stand there (an activation, a BatchNorm, a pool, dropout): each hidden unit
then goes its own way to the second layer, and a new one changes nothing for those that are there. A LayerNorm or a
GroupNorm mixes the units, so that a new one would change the old.
"""

from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import JsonValue
from torch import nn

from esper.contracts.assets import SiteContract
from esper.contracts.operational import SiteNode
from esper.runtime.kasmina.layer import state_of
from esper.runtime.kasmina.wrapping.hosts import kind_named

ACTIVATION_FUNCTIONS: Mapping[str, str] = {
    "relu": "relu",
    "relu_": "relu",
    "gelu": "gelu",
    "tanh": "tanh",
    "tanh_": "tanh",
    "silu": "silu",
    "silu_": "silu",
    "sigmoid": "sigmoid",
    "sigmoid_": "sigmoid",
}
"""Names of torch's functions and the activations of the kernel IR that they are."""

SILENT_FUNCTIONS = ("dropout", "dropout1d", "dropout2d", "dropout3d", "clone", "contiguous")
"""What may stand between two layers and is no part of a kernel. New units are not dropped before they are folded."""

MIXING_FUNCTIONS: Mapping[str, str] = {
    "layer_norm": "a LayerNorm",
    "rms_norm": "an RMSNorm",
    "group_norm": "a GroupNorm",
    "local_response_norm": "a LocalResponseNorm",
    "softmax": "a softmax",
    "log_softmax": "a softmax",
    "normalize": "a normalisation",
    "glu": "a gated linear unit",
}

FORMS = ("linear", "conv1d", "conv2d")
"""The forms of layer that a pair may begin and end with."""

MAX_PARTS = 6
"""The most parts between two layers: with the two of its own a kernel stays within the nodes of the IR."""


@dataclass(frozen=True)
class Step:
    """One operation that was seen between two layers: torch's function by its name, with what it was called with
    besides the tensor. `norm` is the name of the BatchNorm that called it."""

    function: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None
    norm: str | None = None


@dataclass(frozen=True)
class Pair:
    """Two layers and what stands between them.

    `between` are operations of the kernel IR with their attributes, in order, for example
    `{"op": "batch_norm", "eps": 1e-5, ...}, {"op": "activation", "name": "relu"}`; `norms` are the names of the
    BatchNorms among them in the model, in the same order.
    """

    second: str
    between: tuple[Mapping[str, JsonValue], ...]
    norms: tuple[str, ...] = ()

    @property
    def activation(self) -> str:
        """The one activation between the two layers."""
        return next(str(part["name"]) for part in self.between if part["op"] == "activation")


@dataclass(frozen=True)
class PairsFound:
    """What was found in a model: the pairs by their first layer, and for other layers why they begin none."""

    pairs: Mapping[str, Pair]
    refusals: Mapping[str, str]


def pair_between(
    steps: Sequence[Step],
    first: nn.Module,
    second: nn.Module,
    hidden_dims: int,
    modules: Mapping[str, nn.Module],
) -> Pair | str:
    """The pair that two sites are with these steps between them, or why they are none.

    `hidden_dims` is the number of dimensions of one sample of what the first layer returns.
    """
    head, tail = state_of(first), state_of(second)
    form = kind_named(head.kind).form
    if kind_named(tail.kind).form != form:
        return f"'{tail.name}' is no {kind_named(head.kind).title} as '{head.name}' is"
    between: list[Mapping[str, JsonValue]] = []
    norms: list[str] = []
    for step in steps:
        if step.function in SILENT_FUNCTIONS:
            continue
        part = _part(step, form, hidden_dims, modules)
        if isinstance(part, str):
            return f"{part} stands between it and '{tail.name}'"
        between.append(part)
        if step.norm is not None:
            norms.append(step.norm)
    if len(between) > MAX_PARTS:
        return f"more than {MAX_PARTS} operations stand between it and '{tail.name}'"
    count = sum(part["op"] == "activation" for part in between)
    if count != 1:
        what = f"{count} activations stand" if count else "no activation stands"
        return f"{what} between it and '{tail.name}', there must be one"
    if len(set(norms)) != len(norms):
        return f"'{norms[0]}' is called twice between it and '{tail.name}'"
    return Pair(tail.name, tuple(between), tuple(norms))


def _part(step: Step, form: str, hidden_dims: int, modules: Mapping[str, nn.Module]) -> Mapping[str, JsonValue] | str:
    """One step as an operation of the kernel IR, or what it is that cannot stand there."""
    name = step.function
    if name in MIXING_FUNCTIONS:
        return f"{MIXING_FUNCTIONS[name]}, which couples the units with each other,"
    if name in ACTIVATION_FUNCTIONS:
        if (step.kwargs or {}).get("approximate", "none") != "none":
            return "a GELU in its tanh approximation, which no kernel has,"
        return {"op": "activation", "name": ACTIVATION_FUNCTIONS[name]}
    if name == "batch_norm":
        norm = modules.get(step.norm or "")
        if not isinstance(norm, nn.modules.batchnorm._BatchNorm):
            return "a batch norm that is no module of the model"
        if form == "linear" and hidden_dims != 1:
            return f"'{step.norm}', which normalises another axis than that of the units,"
        return {
            "op": "batch_norm",
            "eps": norm.eps,
            "momentum": norm.momentum,
            "affine": norm.affine,
            "track_running_stats": norm.track_running_stats,
        }
    if name in ("max_pool2d", "avg_pool2d"):
        return _pool(step, form)
    return f"'{name}'"


_POOL_ARGUMENTS = {
    "max_pool2d": ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
    "avg_pool2d": ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
}


def _pool(step: Step, form: str) -> Mapping[str, JsonValue] | str:
    if form != "conv2d":
        return f"'{step.function}', which pools over the units,"
    names = _POOL_ARGUMENTS[step.function]
    given = {**dict(zip(names, step.args, strict=False)), **(step.kwargs or {})}
    if given.get("return_indices") or given.get("divisor_override") is not None or "kernel_size" not in given:
        return f"'{step.function}' with settings that no kernel has"
    stride = given.get("stride")
    size = _two(given["kernel_size"])
    part: dict[str, JsonValue] = {
        "op": step.function,
        "kernel_size": size,
        "stride": size if stride is None or stride == () or stride == [] else _two(stride),
        "padding": _two(given.get("padding", 0)),
        "ceil_mode": bool(given.get("ceil_mode", False)),
    }
    if step.function == "max_pool2d":
        return part | {"dilation": _two(given.get("dilation", 1))}
    return part | {"count_include_pad": bool(given.get("count_include_pad", True))}


def _two(value: Any) -> JsonValue:
    numbers = [int(item) for item in value] if isinstance(value, Iterable) else [int(value)]
    return [numbers[0], numbers[0]] if len(numbers) == 1 else [*numbers]


def with_pair(contract: SiteContract, pair: Pair) -> SiteContract:
    """The contract of the first layer of a pair: `pair_activation`, `pair_between` and `pair_norms` say what stands
    between the two."""
    return contract.model_copy(
        update={
            "attributes": {
                **contract.attributes,
                "pair_activation": pair.activation,
                "pair_between": [dict(part) for part in pair.between],
                "pair_norms": list(pair.norms),
            }
        }
    )


def pair_norms(contract: SiteContract) -> tuple[str, ...]:
    """The names of the BatchNorms between the two layers of a kernel's pair."""
    names = contract.attributes.get("pair_norms")
    return tuple(str(name) for name in names) if isinstance(names, list) else ()


def pair_of(node: SiteNode) -> Pair | None:
    """The pair that begins at a node of the layer graph, if one does."""
    between = node.contract.attributes.get("pair_between")
    if node.widen_output is None or not isinstance(between, list):
        return None
    parts = tuple(part for part in between if isinstance(part, dict))
    return Pair(node.widen_output, parts, pair_norms(node.contract))
