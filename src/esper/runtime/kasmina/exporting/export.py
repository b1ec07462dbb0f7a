"""Taking a model away as ordinary PyTorch: its weights, one Python file that needs torch only, or ONNX."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from typing import Any
from typing import get_args

import safetensors.torch
from torch import Tensor
from torch import nn

from esper.errors import ConfigurationError
from esper.errors import GrowthError
from esper.runtime.atomic_file import write_atomically
from esper.runtime.kasmina.exporting.onnx_file import ONNX_FILE
from esper.runtime.kasmina.exporting.onnx_file import onnx_bytes
from esper.runtime.kasmina.exporting.onnx_file import require
from esper.runtime.kasmina.exporting.probe import PROBE_FILE
from esper.runtime.kasmina.exporting.probe import Comparison
from esper.runtime.kasmina.exporting.probe import bind
from esper.runtime.kasmina.exporting.probe import bind_call
from esper.runtime.kasmina.exporting.probe import probe_bytes
from esper.runtime.kasmina.exporting.probe import take_probe
from esper.runtime.kasmina.exporting.python_file import python_file
from esper.runtime.kasmina.exporting.verify import PLAIN_FILE
from esper.runtime.kasmina.exporting.verify import Format
from esper.runtime.kasmina.exporting.verify import manifest_name
from esper.runtime.kasmina.exporting.verify import manifest_of
from esper.runtime.kasmina.exporting.verify import verify_export
from esper.runtime.kasmina.keeping.persistence import saved_files
from esper.runtime.kasmina.keeping.unwrap import unwrap
from esper.runtime.kasmina.wrapping.morphable import MorphableModel
from esper.runtime.kasmina.wrapping.undisturbed import undisturbed
from esper.runtime.scratch import scratch_folder

FORMATS: tuple[Format, ...] = get_args(Format)


@dataclass(frozen=True)
class Exported:
    """What was exported. `comparison` is what checking it on the probe batch found, None where it was not asked for."""

    format: Format
    way: str
    """`torch.fx` or `torch.export`, by which the graph was found; `weights` for safetensors, `torch.onnx` for ONNX."""
    trains: bool
    """Whether what was exported can be trained further."""
    files: Mapping[str, bytes] = field(repr=False)
    """File name -> content, the manifest and the probe batch among them."""
    comparison: Comparison | None = None


def export(
    model: nn.Module,
    folder: str | Path,
    *,
    format: Format = "safetensors",
    example_inputs: Any = None,
    name: str | None = None,
    verify: bool = False,
) -> Exported:
    """Write a model, wrapped or plain, to `folder` (which is made) as plain PyTorch; the model is left as it is.

    - `safetensors`: for a wrapped model what `save` writes, and `plain.safetensors`, the `state_dict` of the unwrapped
      model. Any model can be written.
    - `python`: `modeling_<name>.py`, which imports torch only and makes the model again, with its weights beside it.
    - `onnx`: `model.onnx` (needs the extra `onnx`).

    `example_inputs` (a tensor, a tuple of positional or a mapping of named arguments) are the probe batch: they and
    what the model makes of them (in eval mode) are stored in `probe.safetensors`. With `verify` the files are loaded
    again and run on that batch before any of them is written. `name` is the class's where it is not given.

    Raises GrowthError ESP-438 (what cannot be exported so, with the way out), IntegrityError ESP-401, ESP-406, ESP-407
    (the check failed), PackageMissing ESP-102, ConfigurationError ESP-204 (an unknown format), ESP-208 (a folder that
    cannot be written).
    """
    call = None if example_inputs is None else bind(model, example_inputs)
    made = exported(model, format=format, call=call, name=name, verify=verify)
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        for file, data in made.files.items():
            write_atomically(path / file, data)
    except OSError as error:
        raise ConfigurationError("ESP-208", f"cannot export to '{path}': {error.strerror or error}") from error
    return made


Call = tuple[tuple[Any, ...], Mapping[str, Any]]
"""The positional and named arguments of one call of a model."""


def exported(
    model: nn.Module, *, format: Format, call: Call | None, name: str | None = None, verify: bool = False
) -> Exported:
    """As `export`, without writing anything: the content of the files is returned."""
    if format not in FORMATS:
        raise ConfigurationError("ESP-204", f"export format {format!r} is unknown", hint=f"give {', '.join(FORMATS)}")
    if call is None and (format != "safetensors" or verify):
        raise GrowthError(
            "ESP-438",
            f"the {format} format cannot be {'checked' if format == 'safetensors' else 'written'} without a batch",
            hint="give example_inputs= (a tensor, a tuple of positional or a mapping of named arguments)",
        )
    if format == "onnx":
        require("onnx", "onnxscript", *(("onnxruntime",) if verify else ()))
    # Drawing, for example by a dropout that is on in eval mode too, must not be seen outside.
    with undisturbed(model):
        return _exported(model, format, call, name, verify)


def _exported(model: nn.Module, format: Format, call: Call | None, name: str | None, verify: bool) -> Exported:
    grown = _copy(model)
    files: dict[str, bytes] = {}
    probe = None
    if call is not None:
        probe = take_probe(grown, *bind_call(grown, *call))
        files[PROBE_FILE] = probe_bytes(probe)
    kind = type(grown).__name__
    if format == "safetensors":
        way, trains = "weights", True
        if isinstance(grown, MorphableModel):
            files |= saved_files(grown)
        files[PLAIN_FILE] = _plain_bytes(_plain(_copy(grown)))
    else:
        assert probe is not None
        plain = _plain(grown)
        if format == "python":
            written = python_file(plain, probe, name or kind)
            files |= written.files
            way, trains = written.way, written.trains
        else:
            files[ONNX_FILE] = onnx_bytes(plain, probe)
            way, trains = "torch.onnx", False
    files[manifest_name(format)] = manifest_of(format, kind, way, trains, files)
    comparison = _verified(files, format, grown) if verify else None
    return Exported(format, way, trains, files, comparison)


def _copy(model: nn.Module) -> nn.Module:
    """A copy on the CPU, in eval mode: the model itself is neither run nor changed."""
    try:
        return copy.deepcopy(model).cpu().eval()
    except Exception as error:  # what a model holds may refuse to be copied in any way
        raise GrowthError(
            "ESP-438",
            f"{type(model).__name__} cannot be exported: copy.deepcopy of it fails: {error}",
            hint="make it copyable, or unwrap it and store its state_dict",
        ) from error


def _plain(copied: nn.Module) -> nn.Module:
    return unwrap(copied).eval() if isinstance(copied, MorphableModel) else copied


def _plain_bytes(plain: nn.Module) -> bytes:
    """All of the `state_dict`; a tensor that several names share is stored under each of them, so that a strict
    `load_state_dict` takes the file as it is. Raises GrowthError ESP-438 for extra state that is no tensor."""
    tensors = {}
    for name, value in plain.state_dict().items():
        if not isinstance(value, Tensor):
            raise GrowthError("ESP-438", f"'{name}' is extra state of type {type(value).__name__}, which is no tensor")
        tensors[name] = value.detach().contiguous().clone()
    return safetensors.torch.save(tensors)


def _verified(files: Mapping[str, bytes], format: Format, grown: nn.Module) -> Comparison:
    with scratch_folder("export") as folder:
        for file, data in files.items():
            (folder / file).write_bytes(data)
        return verify_export(folder, format, grown)
