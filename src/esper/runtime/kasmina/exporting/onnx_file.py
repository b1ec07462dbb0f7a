"""A plain model as an ONNX file, and what that file computes."""

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import nn

from esper.errors import GrowthError
from esper.errors import IntegrityError
from esper.errors import PackageMissing
from esper.runtime.atomic_file import is_full
from esper.runtime.kasmina.exporting.probe import Probe
from esper.runtime.kasmina.exporting.quiet import first_line
from esper.runtime.kasmina.exporting.quiet import quietly
from esper.runtime.kasmina.exporting.traced import every_dimension
from esper.runtime.kasmina.wrapping.calls import tensors_in
from esper.runtime.scratch import scratch_folder

ONNX_FILE = "model.onnx"
_LARGEST = 2**31 - 2**20
"""Bytes of weights that fit into one file: protocol buffers end at 2 GiB."""


def onnx_bytes(model: nn.Module, probe: Probe) -> bytes:
    """A plain model (on the CPU, in eval mode) as ONNX; every dimension of the inputs that can vary does.

    Raises PackageMissing ESP-102 without `onnx` and `onnxscript`, GrowthError ESP-438 for a model that torch's
    exporter cannot translate.
    """
    require("onnx", "onnxscript")
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    if size > _LARGEST:
        raise GrowthError("ESP-438", f"the model has {size} bytes of weights, one ONNX file holds {_LARGEST}")
    with scratch_folder("onnx") as folder, quietly():
        path = folder / ONNX_FILE
        try:
            torch.onnx.export(
                model,
                probe.args,
                str(path),
                kwargs=dict(probe.keywords),
                dynamic_shapes=every_dimension(model, probe),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
        # The exporter runs the user's own forward and its own translators: it may raise anything.
        except Exception as error:
            if is_full(error):
                raise
            raise GrowthError(
                "ESP-438",
                f"{type(model).__name__} cannot be written as ONNX: {first_line(error)}",
                hint="export --format python, or safetensors with the model's own class",
            ) from error
        return path.read_bytes()


def run_onnx(path: Path, probe: Probe) -> tuple[Tensor, ...]:
    """What an ONNX file computes on the probe's arguments, by onnxruntime on the CPU.

    Raises PackageMissing ESP-102 without onnxruntime, IntegrityError ESP-407 for a file that it cannot load.
    """
    runtime: Any = require("onnxruntime")
    try:
        session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # the errors of onnxruntime have no common class
        raise IntegrityError("ESP-407", f"'{path}' cannot be loaded: {str(error).splitlines()[0]}") from error
    values = [*tensors_in(probe.args), *tensors_in(probe.keywords)]
    names = [item.name for item in session.get_inputs()]
    if len(names) != len(values):
        raise IntegrityError("ESP-407", f"'{path}' has {len(names)} inputs, the probe batch has {len(values)}")
    feeds = {name: value.numpy() for name, value in zip(names, values, strict=True)}
    try:
        found = session.run(None, feeds)
    except Exception as error:  # as above
        raise IntegrityError("ESP-407", f"'{path}' cannot be run: {str(error).splitlines()[0]}") from error
    return tuple(torch.from_numpy(array.copy()) for array in found)


def require(*names: str) -> Any:
    """The last of some packages of the extra `onnx`. Raises PackageMissing ESP-102 naming the first that is missing."""
    module: Any = None
    for name in names:
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            raise PackageMissing(
                "ESP-102",
                f"the package {name} is needed for ONNX and cannot be imported: {error}",
                hint="pip install 'esper-morphogenetic[onnx]'",
            ) from error
    return module
