"""The probe batch of an export: a few rows and what the model itself made of them, stored beside what was exported."""

import inspect
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from pydantic import JsonValue
from safetensors import SafetensorError
from safetensors import safe_open
from torch import Tensor
from torch import nn

from esper.errors import GrowthError
from esper.errors import IntegrityError
from esper.runtime.kasmina.wrapping.calls import tensors_in

PROBE_FILE = "probe.safetensors"
_STRUCTURE = "esper.probe"


@dataclass(frozen=True)
class Probe:
    """The arguments of one call and the tensors it returned, in the order in which they lie in the result.

    All tensors are on the CPU. `args` and `keywords` hold tensors, numbers, texts, None and lists, tuples and
    dictionaries of them.
    """

    args: tuple[Any, ...]
    keywords: Mapping[str, Any]
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True)
class Comparison:
    """How far an export is from the model. `difference` and `bound` are relative to the largest output, without unit.

    The bound is a quarter of the square root of the machine epsilon (float32: 8.6e-5): far above what another order
    of the same sums gives, far below what a missing block or a wrong weight does.
    """

    difference: float
    bound: float
    reason: str | None = None

    @property
    def passed(self) -> bool:
        return self.reason is None and self.difference <= self.bound


def bind(model: nn.Module, example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and named arguments of one call of `model`; as many as can be are named.

    `example_inputs` is a tensor, a tuple or list of positional, or a mapping of named arguments. Raises GrowthError
    ESP-438 for arguments that the model does not take.
    """
    if isinstance(example_inputs, Mapping):
        return bind_call(model, (), dict(example_inputs))
    if isinstance(example_inputs, tuple | list):
        return bind_call(model, tuple(example_inputs), {})
    return bind_call(model, (example_inputs,), {})


def bind_call(
    model: nn.Module, args: tuple[Any, ...], keywords: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of one call of `model`, named where its signature has a name for them. Raises as `bind`."""
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(*args, **keywords)
    except TypeError as error:
        raise GrowthError("ESP-438", f"the example inputs do not fit {type(model).__name__}.forward: {error}") from None
    named = {name for name, p in signature.parameters.items() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD}
    if any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in signature.parameters.values()):
        return bound.args, dict(bound.kwargs)
    positional = tuple(value for name, value in bound.arguments.items() if _positional_only(signature, name))
    rest: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            rest |= value
        elif name in named or not _positional_only(signature, name):
            rest[name] = value
    return positional, rest


def take_probe(model: nn.Module, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> Probe:
    """Call a model (on the CPU, in eval mode, without gradients) and keep what went in and came out.

    Raises GrowthError ESP-438 for arguments that cannot be stored, for a result without a tensor, and for one with
    NaN.
    """
    stored_args = tuple(_detached(value, f"argument {index}") for index, value in enumerate(args))
    stored = {name: _detached(value, f"argument '{name}'") for name, value in keywords.items()}
    with torch.no_grad():
        result = model(*_copied(stored_args), **_copied(stored))
    outputs = tuple(tensor.detach().clone() for tensor in tensors_in(result))
    if not outputs:
        raise GrowthError("ESP-438", f"{type(model).__name__} returned no tensor on the example inputs")
    for index, output in enumerate(outputs):
        if output.is_floating_point() and torch.isnan(output).any():
            raise GrowthError("ESP-438", f"output {index} of {type(model).__name__} has NaN on the example inputs")
    return Probe(stored_args, stored, outputs)


def compare(expected: tuple[Tensor, ...], found: tuple[Tensor, ...]) -> Comparison:
    """What an export gave against what the model gave. Whole numbers and truth values must be equal."""
    widest = max((_bound(tensor.dtype) for tensor in expected), default=0.0)
    if len(found) != len(expected):
        return Comparison(math.inf, widest, f"{len(found)} outputs, the model has {len(expected)}")
    worst = Comparison(0.0, widest)
    for index, (left, right) in enumerate(zip(expected, found, strict=True)):
        if left.shape != right.shape:
            return Comparison(
                math.inf, widest, f"output {index} has shape {tuple(right.shape)}, the model's {tuple(left.shape)}"
            )
        bound = _bound(left.dtype)
        difference = _difference(left.to(torch.float64), right.to(torch.float64))
        if difference > bound:
            reason = f"output {index} differs by {difference:.2g} of its largest value, allowed is {bound:.2g}"
            return Comparison(difference, bound, reason)
        if difference >= worst.difference:
            worst = Comparison(difference, bound)
    return worst


def _difference(expected: Tensor, found: Tensor) -> float:
    """The largest difference over the largest finite value that is expected. Infinity, as of a masked score, must be
    the same infinity; a NaN is never right."""
    apart = expected != found
    if not apart.any():
        return 0.0
    absolute = float((expected - found)[apart].abs().max())
    scale = float(expected[expected.isfinite()].abs().max()) if expected.isfinite().any() else 0.0
    return math.inf if math.isnan(absolute) else absolute / scale if scale else absolute


def probe_bytes(probe: Probe) -> bytes:
    """The probe as one safetensors file; the structure of the arguments is JSON in its metadata. Equal probes give
    equal bytes."""
    tensors: dict[str, Tensor] = {}
    structure = {
        "args": [_flat(value, f"args.{index}", tensors) for index, value in enumerate(probe.args)],
        "keywords": {name: _flat(value, f"keywords.{name}", tensors) for name, value in probe.keywords.items()},
        "outputs": len(probe.outputs),
    }
    tensors |= {f"outputs.{index}": tensor.contiguous() for index, tensor in enumerate(probe.outputs)}
    # Not in canonical order: an ONNX file takes its inputs in the order in which the arguments were named.
    text = json.dumps(structure, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return safetensors.torch.save(tensors, metadata={_STRUCTURE: text})


def read_probe(path: str) -> Probe:
    """Read a probe file. Raises IntegrityError ESP-407 for one that is damaged or missing."""
    try:
        with safe_open(path, framework="pt") as file:
            structure = json.loads((file.metadata() or {})[_STRUCTURE])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        return Probe(
            args=tuple(_structured(value, tensors) for value in structure["args"]),
            keywords={name: _structured(value, tensors) for name, value in structure["keywords"].items()},
            outputs=tuple(tensors[f"outputs.{index}"] for index in range(structure["outputs"])),
        )
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError("ESP-407", f"the probe batch '{path}' cannot be read: {error}") from error


def _positional_only(signature: inspect.Signature, name: str) -> bool:
    return signature.parameters[name].kind is inspect.Parameter.POSITIONAL_ONLY


def _bound(dtype: torch.dtype) -> float:
    return math.sqrt(torch.finfo(dtype).eps) / 4 if dtype.is_floating_point else 0.0


def _detached(value: Any, where: str) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu().clone().contiguous()
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _detached(item, f"{where}[{key!r}]") for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_detached(item, f"{where}[{index}]") for index, item in enumerate(value))
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise GrowthError(
        "ESP-438",
        f"{where} is a {type(value).__module__}.{type(value).__qualname__}, which cannot be stored as a probe batch",
        hint="give tensors, numbers, texts, and tuples, lists or dictionaries of them",
    )


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_copied(item) for item in value)
    return value


def _flat(value: Any, name: str, tensors: dict[str, Tensor]) -> JsonValue:
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"mapping": {key: _flat(item, f"{name}.{key}", tensors) for key, item in value.items()}}
    if isinstance(value, tuple | list):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_flat(item, f"{name}.{index}", tensors) for index, item in enumerate(value)]}
    return {"value": value}


def _structured(form: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    ((kind, content),) = form.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "mapping":
        return {key: _structured(item, tensors) for key, item in content.items()}
    if kind in ("tuple", "list"):
        items = [_structured(item, tensors) for item in content]
        return tuple(items) if kind == "tuple" else items
    return content
