"""Checking an export: its files by their digests, and what they compute by the stored probe batch."""

import copy
import subprocess
import sys
from collections.abc import Iterator
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor
from torch import nn

from esper.contracts.assets import ArtifactRef
from esper.contracts.base import Contract
from esper.errors import GrowthError
from esper.errors import IntegrityError
from esper.runtime.kasmina.exporting.onnx_file import ONNX_FILE
from esper.runtime.kasmina.exporting.onnx_file import run_onnx
from esper.runtime.kasmina.exporting.probe import PROBE_FILE
from esper.runtime.kasmina.exporting.probe import Comparison
from esper.runtime.kasmina.exporting.probe import Probe
from esper.runtime.kasmina.exporting.probe import compare
from esper.runtime.kasmina.exporting.probe import read_probe
from esper.runtime.kasmina.exporting.probe import take_probe
from esper.runtime.kasmina.keeping.persistence import GROWTH_FILE
from esper.runtime.kasmina.keeping.persistence import load
from esper.runtime.kasmina.keeping.persistence import read_saved
from esper.runtime.kasmina.keeping.unwrap import unwrap
from esper.runtime.kasmina.wrapping.morphable import MorphableModel
from esper.runtime.scratch import scratch_folder
from esper.runtime.tezzeret.artifact import digest_of
from esper.runtime.tezzeret.ir import canonical_json

Format = Literal["safetensors", "python", "onnx"]

PLAIN_FILE = "plain.safetensors"
"""The `state_dict` of the unwrapped model."""

TIMEOUT = 300
"""Seconds that a generated file may take to run on the probe batch, the import of torch among them."""


class ExportManifest(Contract):
    """`export.<format>.json`: the files of one export and what their bytes are."""

    schema_version: Literal[1] = 1
    format: Format
    model: str
    """The name of the exported model's class."""
    way: str
    """How the graph was found: `torch.fx`, `torch.export`, or `weights` where there is no graph."""
    trains: bool
    """Whether what was exported can be trained further."""
    files: dict[str, ArtifactRef]


def manifest_name(format: Format) -> str:
    """The name of the manifest's file."""
    return f"export.{format}.json"


def manifest_of(format: Format, model: str, way: str, trains: bool, files: dict[str, bytes]) -> bytes:
    """The manifest of these files, as canonical JSON."""
    refs = {name: ArtifactRef(digest=digest_of(data), size_bytes=len(data)) for name, data in sorted(files.items())}
    manifest = ExportManifest(format=format, model=model, way=way, trains=trains, files=refs)
    return canonical_json(manifest.model_dump(mode="json"))


def verify_export(folder: str | Path, format: Format, model: nn.Module | None = None) -> Comparison:
    """Check the files of an export by their digests, then run it on its probe batch and compare.

    `safetensors` needs a `model` to load the weights into: with the same structure, any weights, itself left alone.
    Raises IntegrityError ESP-401 (a file is not what was written), ESP-406 (it computes something else than the model
    did), ESP-407 (missing, truncated, cannot be run), PackageMissing ESP-102 (ONNX without onnxruntime).
    """
    path = Path(folder).absolute()
    manifest = _checked(path, format)
    probe = read_probe(str(path / PROBE_FILE))
    if format == "python":
        results = iter([_run_python(path / next(name for name in manifest.files if name.endswith(".py")), probe)])
    elif format == "onnx":
        results = iter([run_onnx(path / ONNX_FILE, probe)])
    elif model is not None:
        results = _run_weights(path, model, probe)
    else:
        raise GrowthError("ESP-438", "the safetensors format is checked with a model to load the weights into")
    worst = None
    for found in results:
        comparison = compare(probe.outputs, found)
        if not comparison.passed:
            raise IntegrityError("ESP-406", f"the {format} export is not the model: {comparison.reason}")
        if worst is None or comparison.difference > worst.difference:
            worst = comparison
    assert worst is not None
    return worst


def _checked(path: Path, format: Format) -> ExportManifest:
    place = path / manifest_name(format)
    manifest = None
    try:
        manifest = ExportManifest.model_validate_json(_read(place))
    except ValidationError as error:
        raise IntegrityError("ESP-407", f"'{place}' is damaged: {error.errors()[0]['msg']}") from error
    for name, ref in manifest.files.items():
        data = _read(path / name)
        if len(data) != ref.size_bytes:
            raise IntegrityError("ESP-407", f"'{path / name}' has {len(data)} bytes, must have {ref.size_bytes}")
        if digest_of(data) != ref.digest:
            raise IntegrityError("ESP-401", f"'{path / name}' is damaged or was changed: its digest is another")
    return manifest


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise IntegrityError("ESP-407", f"'{path}' cannot be read: {error.strerror or error}") from error


def _run_python(modeling: Path, probe: Probe) -> tuple[Tensor, ...]:
    program = Path(__file__).with_name("outside.py")
    with scratch_folder("verify") as folder:
        result = folder / "result.safetensors"
        command = [sys.executable, "-P", str(program), str(modeling), str(modeling.with_name(PROBE_FILE)), str(result)]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT, check=False)
        except subprocess.TimeoutExpired as error:
            raise IntegrityError("ESP-407", f"'{modeling}' did not finish within {TIMEOUT} s") from error
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
            raise IntegrityError("ESP-407", f"'{modeling}' cannot be run where Esper cannot be imported: {last}")
        tensors = safetensors.torch.load(result.read_bytes())
    return tuple(tensors[str(index)] for index in range(len(tensors)))


def _run_weights(path: Path, model: nn.Module, probe: Probe) -> Iterator[tuple[Tensor, ...]]:
    """What the stored weights compute in a copy of `model`: as a grown model, then as a plain one."""
    again = copy.deepcopy(model).cpu()
    if (path / GROWTH_FILE).exists():
        if isinstance(again, MorphableModel):
            _overwrite(again, read_saved(path)[1])
        else:
            again = load(path, again)
        yield take_probe(again.eval(), probe.args, probe.keywords).outputs
        again = unwrap(again)
    if (path / PLAIN_FILE).exists():
        try:
            stored = safetensors.torch.load(_read(path / PLAIN_FILE))
        except SafetensorError as error:
            raise IntegrityError("ESP-407", f"'{path / PLAIN_FILE}' is no safetensors file: {error}") from error
        _overwrite(again, stored)
        yield take_probe(again.eval(), probe.args, probe.keywords).outputs


def _overwrite(model: nn.Module, stored: Mapping[str, Tensor]) -> None:
    """Give a model stored weights; its own are wiped first, so that none of them can stand in for a stored one."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if isinstance(tensor, Tensor):
                tensor.zero_()
    try:
        model.load_state_dict(dict(stored), strict=True)
    except RuntimeError as error:
        raise IntegrityError("ESP-408", f"the stored weights are not those of this model: {error}") from error
