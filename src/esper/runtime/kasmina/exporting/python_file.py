"""A plain model as one Python file that imports torch (and the standard library's `json`) only, and its weights."""

import keyword
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass

import safetensors.torch
import torch
from torch import Tensor
from torch import nn

from esper.errors import GrowthError
from esper.runtime.kasmina.exporting.code import RESERVED
from esper.runtime.kasmina.exporting.code import forward_lines
from esper.runtime.kasmina.exporting.code import uses
from esper.runtime.kasmina.exporting.construction import Construction
from esper.runtime.kasmina.exporting.literals import Unwritable
from esper.runtime.kasmina.exporting.literals import literal
from esper.runtime.kasmina.exporting.probe import Probe
from esper.runtime.kasmina.exporting.traced import Traced
from esper.runtime.kasmina.exporting.traced import trace

_CONSTANT = "traced_constant_{index}"

_HEAD = '''\
"""{title}: a grown network as plain PyTorch. Nothing but torch is needed.

    model = load_model()  # in evaluation mode, with the weights of {weights}
    output = model({call})

{note}
"""

import json
{math}
import torch
from torch import nn
{functional}

class {name}(nn.Module):
    def __init__(self):
        super().__init__()
{construction}

    def forward(self, {parameters}):
{forward}
'''

_NO_TRAINING = """
    def train(self, mode=True):
        if mode:
            raise RuntimeError("this graph was traced in evaluation mode and does not hold in training mode")
        return super().train(mode)
"""

_LOADER = '''

DTYPES = {{
{dtypes}
}}


def read_safetensors(path):
    """The tensors of a safetensors file by name. Raises ValueError for a file that is damaged."""
    with open(path, "rb") as file:
        data = bytearray(file.read())
    start = 8 + int.from_bytes(data[:8], "little")
    if len(data) < start:
        raise ValueError(f"{{path}} is truncated")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    tensors, end = {{}}, start
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
        first, last = (start + offset for offset in entry["data_offsets"])
        count = torch.Size(shape).numel()
        if first != end or last - first != count * torch.empty((), dtype=dtype).element_size() or last > len(data):
            raise ValueError(f"{{path}} is truncated or damaged at {{name!r}}")
        if count:
            tensors[name] = torch.frombuffer(data, dtype=dtype, count=count, offset=first).reshape(shape)
        else:
            tensors[name] = torch.empty(shape, dtype=dtype)
        end = last
    if end != len(data):
        raise ValueError(f"{{path}} has {{len(data) - end}} bytes too many")
    return tensors


def load_model(path=None):
    """The model in evaluation mode, on the CPU, with the weights of `path` ({weights} beside this file).

    Raises ValueError for weights that are damaged or not those of this model.
    """
    with torch.random.fork_rng(devices=[]):
        model = {name}()
    stored = read_safetensors(path or __file__.removesuffix(".py") + ".safetensors")
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    if own.keys() != stored.keys():
        raise ValueError(f"missing or extra tensors: {{sorted(own.keys() ^ stored.keys())}}")
    for name, tensor in own.items():
        if tensor.shape != stored[name].shape or tensor.dtype != stored[name].dtype:
            found = f"{{stored[name].dtype}} {{tuple(stored[name].shape)}}"
            raise ValueError(f"{{name!r}} is {{found}}, the model needs {{tensor.dtype}} {{tuple(tensor.shape)}}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(stored[name])
    return model.eval()
'''

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class PythonFile:
    """`modeling_<name>.py` and `modeling_<name>.safetensors`, as text and bytes."""

    name: str
    source: str
    weights: bytes
    way: str
    trains: bool

    @property
    def files(self) -> dict[str, bytes]:
        return {f"{self.name}.py": self.source.encode(), f"{self.name}.safetensors": self.weights}


def python_file(model: nn.Module, probe: Probe, name: str) -> PythonFile:
    """Write a plain model (on the CPU, in eval mode) as Python. Equal models give equal bytes.

    Raises GrowthError ESP-438 for a model that cannot be written with torch alone.
    """
    traced = trace(model, probe)
    stem = f"modeling_{identifier(name)}"
    try:
        source, tensors = _source(model, traced, stem)
    except Unwritable as error:
        raise GrowthError(
            "ESP-438",
            f"{type(model).__name__} cannot be written with torch alone: it needs {error}",
            hint="export --format safetensors and load it with the model's own class and esper.load",
        ) from error
    return PythonFile(stem, source, safetensors.torch.save(tensors), traced.way, traced.trains)


def identifier(name: str) -> str:
    """A text as part of a file's name that can be imported: lower case letters, digits and underscores."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    return re.sub(r"[^a-z0-9]+", "_", spaced.lower()).strip("_") or "model"


def _source(model: nn.Module, traced: Traced, stem: str) -> tuple[str, dict[str, Tensor]]:
    made = Construction(model)
    constants = {name: _CONSTANT.format(index=index) for index, name in enumerate(sorted(traced.constants))}
    lines, paths, tensors = list(made.lines), dict(made.paths), _tensors(model)
    for target, own in constants.items():
        value = traced.constants[target].detach().cpu().contiguous()
        lines.append(f"self.register_buffer({literal(own)}, torch.zeros({tuple(value.shape)!r}, dtype={value.dtype}))")
        paths[target], tensors[own] = f"self.{own}", value
    body = forward_lines(traced.graph, paths, traced.inputs, traced.result)
    name = _class_name(model)
    used = uses(body)
    head = _HEAD.format(
        title=name,
        weights=f"{stem}.safetensors",
        call=", ".join(traced.arguments),
        note=_note(traced),
        math="import math\n" if "math" in used else "",
        functional="from torch.nn import functional as F\n" if "F" in used else "",
        name=name,
        construction=textwrap.indent("\n".join(lines), " " * 8) if lines else "        pass",
        parameters=_parameters(traced),
        forward=textwrap.indent("\n".join(body), " " * 8),
    )
    unknown = [name for name, tensor in tensors.items() if tensor.dtype not in _NAMES]
    if unknown:
        raise Unwritable(f"'{unknown[0]}', a tensor of {tensors[unknown[0]].dtype}")
    rows = "\n".join(f'    "{kind}": {dtype},' for dtype, kind in _NAMES.items())
    loader = _LOADER.format(dtypes=rows, weights=f"{stem}.safetensors", name=name)
    return head + ("" if traced.trains else _NO_TRAINING) + loader, tensors


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor once, by the name that `load_model` finds it under, also those no `state_dict` has."""
    own: Mapping[str, Tensor] = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in own.items()}


def _parameters(traced: Traced) -> str:
    indexed = any(place.startswith("arguments[") for place in traced.inputs.values())
    return ", ".join([*(["*arguments"] if indexed else []), *traced.arguments])


def _note(traced: Traced) -> str:
    mode = "It can be trained further." if traced.trains else "Traced in evaluation mode: it cannot be trained further."
    return f"Written from the graph that {traced.way} found. {mode}"


def _class_name(model: nn.Module) -> str:
    name = re.sub(r"\W", "_", type(model).__name__)
    plain = name.isidentifier() and not keyword.iskeyword(name) and name not in RESERVED | {"DTYPES"}
    return name if plain else f"Model_{name}"
