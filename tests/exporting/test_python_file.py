"""The generated file: torch alone, the same function, the same bytes, damage refused."""

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from exporting_models import MODELS
from exporting_models import Grown
from exporting_models import make
from torch import nn

import esper
from esper.runtime.kasmina.exporting.probe import bind
from esper.runtime.kasmina.wrapping.calls import tensors_in


def imported(folder: Path, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"exported_{folder.name}", folder / f"modeling_{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(model: nn.Module, inputs: Any, *, tensors_only: bool = False) -> list[torch.Tensor]:
    if tensors_only and isinstance(inputs, dict):
        inputs = {name: value for name, value in inputs.items() if any(True for _ in tensors_in(value))}
    args, keywords = bind(model, inputs)
    with torch.no_grad():
        return list(tensors_in(model(*args, **keywords)))


@pytest.mark.parametrize("name", MODELS)
def test_generated_file_imports_torch_only_and_computes_the_same(name: str, tmp_path: Path) -> None:
    grown = make(name)
    made = esper.export(grown.model, tmp_path, format="python", example_inputs=grown.inputs, name=name)
    source = (tmp_path / f"modeling_{name}.py").read_text()
    tree = ast.parse(source)
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert names <= {"torch", "json", "math"}
    assert {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)} <= {"torch", "torch.nn"}
    calls = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not calls & {"eval", "exec", "compile", "__import__"}
    model = imported(tmp_path, name).load_model()
    assert not any(cls.__module__.startswith("esper") for part in model.modules() for cls in type(part).__mro__)
    for expected, found in zip(
        call(grown.model.eval(), grown.inputs), call(model, grown.inputs, tensors_only=True), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert made.way == ("torch.export" if name == "branching" else "torch.fx")
    assert made.trains


@pytest.mark.parametrize("name", ["cnn", "odd", "branching"])
def test_equal_models_give_equal_bytes(name: str, tmp_path: Path) -> None:
    grown = make(name)
    first = esper.export(grown.model, tmp_path / "a", format="python", example_inputs=grown.inputs)
    second = esper.export(grown.model, tmp_path / "b", format="python", example_inputs=grown.inputs)
    assert dict(first.files) == dict(second.files)


def test_ties_shared_layers_and_frozen_weights_are_kept(tmp_path: Path) -> None:
    grown = make("odd")
    esper.export(grown.model, tmp_path, format="python", example_inputs=grown.inputs, name="odd")
    model = imported(tmp_path, "odd").load_model()
    assert model.again is model.first
    assert model.head.weight is model.first.weight
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["frozen.weight", "frozen.bias"]
    assert "steps" not in model.state_dict()


def test_exported_model_can_be_trained_further(tmp_path: Path) -> None:
    grown = make("cnn")
    esper.export(grown.model, tmp_path, format="python", example_inputs=grown.inputs, name="cnn")
    model = imported(tmp_path, "cnn").load_model()
    plain = esper.unwrap(grown.model).train()
    model.train()
    results = []
    for other in (plain, model):
        optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
        torch.manual_seed(3)
        loss = other(grown.inputs).square().mean()
        loss.backward()
        optimizer.step()
        results.append(float(loss.detach()))
    assert results[0] == pytest.approx(results[1], rel=1e-5)
    assert model.body[1].running_mean.abs().sum() > 0
    torch.testing.assert_close(model.body[1].running_var, plain.body[1].running_var)
    torch.testing.assert_close(model.conv.weight, plain.conv.weight)


class Noisy(nn.Module):
    """Another graph in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x + torch.randn_like(x)) if self.training else self.layer(x)


def test_a_graph_that_holds_in_evaluation_only_refuses_to_train(tmp_path: Path) -> None:
    made = esper.export(Noisy(), tmp_path, format="python", example_inputs=torch.randn(2, 4))
    model = imported(tmp_path, "noisy").load_model()
    assert not made.trains
    with pytest.raises(RuntimeError, match="does not hold in training mode"):
        model.train()
    assert model.eval() is model


def test_it_runs_where_esper_cannot_be_imported(tmp_path: Path) -> None:
    grown = make("odd")
    esper.export(grown.model, tmp_path, format="python", example_inputs=grown.inputs, name="odd")
    code = (
        "import sys\nsys.modules['esper'] = None\nimport torch\nfrom modeling_odd import load_model\n"
        "model = load_model().train()\n"
        "y = model({'x': torch.ones(2, 4), 'rest': (torch.zeros(2, 1),)})\ny['last'].sum().backward()\n"
        "print(y['last'].shape, sum(p.grad is not None for p in model.parameters()))"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "torch.Size([2, 4]) 8"), done.stderr


def damaged_weights(grown: Grown, folder: Path) -> tuple[Any, Path, dict[str, torch.Tensor]]:
    esper.export(grown.model, folder, format="python", example_inputs=grown.inputs)
    path = folder / "modeling_mlp.safetensors"
    return imported(folder, "mlp"), path, safetensors.torch.load(path.read_bytes())


@pytest.mark.parametrize("cut", [3, 7, 40, -1, -17])
def test_truncated_weights_are_refused_by_the_generated_reader(grown: Grown, tmp_path: Path, cut: int) -> None:
    module, path, _ = damaged_weights(grown, tmp_path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError):
        module.load_model()


def test_other_tensors_are_refused_by_the_generated_reader_by_name(grown: Grown, tmp_path: Path) -> None:
    module, path, tensors = damaged_weights(grown, tmp_path)
    cases: list[tuple[dict[str, torch.Tensor], str]] = [
        ({name: tensor for name, tensor in tensors.items() if name != "fc3.bias"}, "fc3.bias"),
        ({**tensors, "more": torch.zeros(1)}, "more"),
        ({**tensors, "fc3.bias": torch.zeros(4)}, r"'fc3.bias' is torch.float32 \(4,\)"),
        ({**tensors, "fc3.bias": tensors["fc3.bias"].double()}, "'fc3.bias' is torch.float64"),
    ]
    for stored, told in cases:
        path.write_bytes(safetensors.torch.save(stored))
        with pytest.raises(ValueError, match=told):
            module.load_model()
    path.write_bytes(safetensors.torch.save(tensors) + b"more")
    with pytest.raises(ValueError, match="4 bytes too many"):
        module.load_model()
