"""Exporting a model of one's own: the model untouched, every format checked, what cannot be done refused by name."""

import copy
import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors.torch
import torch
from exporting_models import MODELS
from exporting_models import Grown
from exporting_models import make
from torch import nn

import esper
from esper.runtime.kasmina.exporting.verify import verify_export
from esper.runtime.tezzeret.artifact import digest_of


def state_of_everything(model: nn.Module) -> tuple[Any, ...]:
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    objects = [*map(id, model.parameters()), *map(id, model.modules())]
    flags = [module.training for module in model.modules()]
    dicts = [sorted(module.__dict__) for module in model.modules()]
    return tensors, gradients, objects, flags, dicts, str(esper.status(model))


@pytest.mark.parametrize("format", ["safetensors", "python", "onnx"])
def test_the_live_model_and_every_generator_stay_as_they_are(format: Any, tmp_path: Path) -> None:
    grown = make("cnn")
    grown.model.train()
    grown.model(grown.inputs).sum().backward()
    before = state_of_everything(grown.model)
    draws = (torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy())
    esper.export(grown.model, tmp_path, format=format, example_inputs=grown.inputs)
    after = state_of_everything(grown.model)
    assert torch.equal(draws[0], torch.get_rng_state())
    assert draws[1] == random.getstate()
    assert (draws[2] == numpy.random.get_state()[1]).all()
    assert before[2:] == after[2:]
    assert all(torch.equal(tensor, after[0][name]) for name, tensor in before[0].items())
    assert all(torch.equal(left, right) for left, right in zip(before[1], after[1], strict=True))


@pytest.mark.parametrize("name", ["mlp", "odd", "normed"])
def test_safetensors_holds_what_save_writes_and_the_plain_weights(name: str, tmp_path: Path) -> None:
    grown = make(name)
    made = esper.export(grown.model, tmp_path / "a", example_inputs=grown.inputs, verify=True)
    assert made.comparison is not None and made.comparison.passed
    assert set(made.files) == {path.name for path in (tmp_path / "a").iterdir()}
    esper.save(grown.model, tmp_path / "b")
    for file in ("growth.json", "model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    plain = esper.unwrap(copy.deepcopy(grown.model))
    stored = safetensors.torch.load((tmp_path / "a" / "plain.safetensors").read_bytes())
    expected = plain.state_dict()
    assert stored.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in stored.items())
    plain.load_state_dict(stored, strict=True)


def test_a_model_that_is_not_wrapped_can_be_exported_too(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), torch.randn(3, 4)
    made = esper.export(model, tmp_path, example_inputs=x, verify=True)
    assert set(made.files) == {"plain.safetensors", "probe.safetensors", "export.safetensors.json"}
    assert esper.export(model, tmp_path, format="python", example_inputs=x, verify=True).way == "torch.fx"
    base = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    assert verify_export(tmp_path, "safetensors", base).difference == 0.0


@pytest.mark.parametrize("name", ["mlp", "cnn", "recurrent"])
def test_onnx_is_the_model_by_its_own_runtime(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    grown = make(name)
    made = esper.export(grown.model, tmp_path, format="onnx", example_inputs=grown.inputs, verify=True)
    assert made.comparison is not None
    assert 0 <= made.comparison.difference < made.comparison.bound


def test_onnx_takes_other_batch_sizes(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    grown = make("mlp")
    esper.export(grown.model, tmp_path, format="onnx", example_inputs=grown.inputs)
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    x = torch.randn(3, 6)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), grown.model.eval()(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_names_the_extra(
    grown: Grown, tmp_path: Path, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(esper.PackageMissing, match=package) as caught:
        esper.export(grown.model, tmp_path / "out", format="onnx", example_inputs=grown.inputs, verify=True)
    assert (caught.value.code, caught.value.exit_code) == ("ESP-102", 2)
    assert "esper-morphogenetic[onnx]" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) if float(x.detach().sum()) > 1e9 else self.layer(x).relu()


def test_what_cannot_be_traced_is_refused_with_both_reasons_and_the_way_out(tmp_path: Path) -> None:
    x = torch.randn(3, 4)
    model = esper.wrap(Untraceable(), example_inputs=x)
    esper.graft(model, "layer", "bottleneck")
    with pytest.raises(esper.GrowthError) as caught:
        esper.export(model, tmp_path / "out", format="python", example_inputs=x)
    assert caught.value.code == "ESP-438"
    assert "torch.fx: " in caught.value.message and "torch.export: " in caught.value.message
    assert "safetensors" in str(caught.value.hint)
    with pytest.raises(esper.GrowthError, match="cannot be written as ONNX"):
        esper.export(model, tmp_path / "out", format="onnx", example_inputs=x)
    assert not (tmp_path / "out").exists()
    assert esper.export(model, tmp_path / "out", example_inputs=x, verify=True).comparison is not None


class Lying(nn.Module):
    """Says something else to a tracer than to a caller: a graph of it would be wrong, not refused."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Any) -> torch.Tensor:
        return self.layer(x) * (1.0 if type(x) is torch.Tensor else 2.0)


def test_a_graph_that_computes_something_else_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(esper.GrowthError, match="the traced graph computes something else") as caught:
        esper.export(Lying(), tmp_path / "out", format="python", example_inputs=torch.randn(3, 4))
    assert caught.value.message.count("output 0 differs by 1 of its largest value") == 2


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"format": "pickle"}, "'pickle' is unknown"),
        ({"format": "python", "example_inputs": None}, "cannot be written without a batch"),
        ({"verify": True, "example_inputs": None}, "cannot be checked without a batch"),
        ({"example_inputs": {"y": torch.zeros(1)}}, "do not fit"),
        ({"example_inputs": {"x": object()}}, "cannot be stored"),
        ({"example_inputs": torch.full((2, 6), torch.nan)}, "has NaN"),
    ],
    ids=["format", "no batch", "nothing to check", "names", "object", "nan"],
)
def test_bad_input_is_refused_before_anything_is_written(
    grown: Grown, tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    arguments: dict[str, Any] = {"example_inputs": grown.inputs, **change}
    with pytest.raises(esper.UsageError, match=told):
        esper.export(grown.model, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_folders_place_is_refused(grown: Grown, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(esper.ConfigurationError, match="cannot export") as caught:
        esper.export(grown.model, tmp_path / "file")
    assert caught.value.code == "ESP-208"


class Uncopyable(nn.Linear):
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("no copies")


def test_a_model_that_cannot_be_copied_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(esper.GrowthError, match="no copies"):
        esper.export(nn.Sequential(Uncopyable(2, 2)), tmp_path)


def exported(name: str, folder: Path) -> None:
    grown = make(name)
    esper.export(grown.model, folder, format="python", example_inputs=grown.inputs, name=name)


@pytest.mark.parametrize("file", ["modeling_mlp.py", "modeling_mlp.safetensors", "probe.safetensors"])
def test_one_changed_bit_of_an_exported_file_is_told_by_its_name(tmp_path: Path, file: str) -> None:
    exported("mlp", tmp_path)
    path = tmp_path / file
    intact = path.read_bytes()
    path.write_bytes(intact[:-9] + bytes([intact[-9] ^ 1]) + intact[-8:])
    with pytest.raises(esper.IntegrityError, match=file) as caught:
        verify_export(tmp_path, "python")
    assert caught.value.code == "ESP-401"
    path.unlink()
    with pytest.raises(esper.IntegrityError, match="cannot be read"):
        verify_export(tmp_path, "python")


def test_a_damaged_manifest_and_a_missing_format_are_refused(tmp_path: Path) -> None:
    exported("mlp", tmp_path)
    with pytest.raises(esper.IntegrityError, match=r"export\.onnx\.json"):
        verify_export(tmp_path, "onnx")
    path = tmp_path / "export.python.json"
    body = json.loads(path.read_bytes())
    body["files"]["../outside"] = body["files"]["probe.safetensors"]
    path.write_text(json.dumps(body))
    with pytest.raises(esper.IntegrityError, match=r"outside"):
        verify_export(tmp_path, "python")


def test_generated_code_that_fails_is_told(tmp_path: Path) -> None:
    exported("mlp", tmp_path)
    code = (tmp_path / "modeling_mlp.py").read_text().replace("import json", "import json\nimport esper", 1)
    (tmp_path / "modeling_mlp.py").write_text(code)
    body = json.loads((tmp_path / "export.python.json").read_bytes())
    data = code.encode()
    body["files"]["modeling_mlp.py"] = {"digest": digest_of(data), "size_bytes": len(data)}
    (tmp_path / "export.python.json").write_text(json.dumps(body))
    with pytest.raises(esper.IntegrityError, match="where Esper cannot be imported: ModuleNotFoundError"):
        verify_export(tmp_path, "python")


def test_verify_runs_the_generated_file_outside(tmp_path: Path) -> None:
    grown = make("odd")
    made = esper.export(grown.model, tmp_path, format="python", example_inputs=grown.inputs, verify=True)
    assert made.comparison is not None and made.comparison.passed
    assert verify_export(tmp_path, "python").passed


def test_every_model_of_the_tests_is_grown(tmp_path: Path) -> None:
    for name in MODELS:
        model = make(name).model
        assert esper.status(model).grown_parameters > 0
