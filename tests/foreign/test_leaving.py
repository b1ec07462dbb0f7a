"""Models that others wrote, grown and trained, taken away: fossilised, saved, unwrapped, exported."""

import copy
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_models import FOREIGN
from foreign_world import Trained
from foreign_world import evaluated
from foreign_world import lines_of_esper
from foreign_world import seeded
from foreign_world import train
from foreign_world import trained
from torch import nn

import esper
from esper.runtime.kasmina.wrapping.calls import tensors_in


@cache
def _trained(name: str) -> Trained:
    return trained(FOREIGN[name])


def grown(name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A copy of a model that is trained once for all tests."""
    made = _trained(name)
    model, optimizer = copy.deepcopy((made.model, made.optimizer))
    return model, optimizer


@pytest.mark.parametrize("name", FOREIGN)
def test_saved_model_comes_back_to_the_bit_before_and_after_it_is_fossilised(name: str, tmp_path: Path) -> None:
    foreign = FOREIGN[name]
    model, optimizer = grown(name)
    for stage in ("grown", "fossilised"):
        esper.save(model, tmp_path / stage)
        again = esper.load(tmp_path / stage, seeded(foreign, seed=1))
        assert esper.weights_digest(again) == esper.weights_digest(model)
        for left, right in zip(evaluated(model, foreign), evaluated(again, foreign), strict=True):
            assert torch.equal(left, right)
        esper.fossilize(model, optimizer=optimizer)


@pytest.mark.parametrize("name", FOREIGN)
def test_fossilised_model_folds_what_it_can_and_ends_as_plain_torch(name: str) -> None:
    foreign = FOREIGN[name]
    model, optimizer = grown(name)
    before = evaluated(model, foreign)
    esper.fossilize(model, optimizer=optimizer)
    folded = {site.name: seed.folded for site in esper.status(model).sites for seed in site.seeds if seed.blueprint}
    assert folded == {growth.site: growth.folds for growth in foreign.grows}
    for left, right in zip(before, evaluated(model, foreign), strict=True):
        torch.testing.assert_close(right, left, rtol=1e-5, atol=1e-5)
    assert lines_of_esper(lambda: evaluated(model, foreign))
    assert esper.unwrap(model) is model
    for left, right in zip(before, evaluated(model, foreign), strict=True):
        torch.testing.assert_close(right, left, rtol=1e-5, atol=1e-5)
    weights = {key: value.clone() for key, value in model.named_parameters()}
    assert lines_of_esper(lambda: train(model, foreign, optimizer, steps=1)) == set()
    moved = {key for key, value in model.named_parameters() if not torch.equal(value, weights[key])}
    assert moved == {key for key, value in model.named_parameters() if value.grad is not None}
    assert any("kasmina" in key for key in moved)


@pytest.mark.parametrize("name", FOREIGN)
def test_weights_of_every_model_are_exported_and_checked(name: str, tmp_path: Path) -> None:
    model, _ = grown(name)
    made = esper.export(model, tmp_path, example_inputs=FOREIGN[name].batch(), verify=True)
    assert made.comparison is not None and made.comparison.passed


def without_cache(name: str) -> dict[str, Any]:
    """A call that returns tensors only."""
    return FOREIGN[name].batch() | ({"use_cache": False} if name == "gpt2" else {})


# BERT and torch's encoder are written in tests/exporting.
@pytest.mark.parametrize("name", ["gpt2", "vit", "resnet", "unet", "lstm", "mixture"])
def test_models_are_written_as_one_file_of_torch(name: str, tmp_path: Path) -> None:
    model, _ = grown(name)
    given = without_cache(name)
    esper.export(model, tmp_path, format="python", example_inputs=given, name="foreign")
    spec = importlib.util.spec_from_file_location(f"exported_{name}", tmp_path / "modeling_foreign.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tensors = {key: value for key, value in given.items() if any(True for _ in tensors_in(value))}
    again = module.load_model()
    with torch.no_grad():
        expected, found = list(tensors_in(model.eval()(**given))), list(tensors_in(again(**tensors)))
    for left, right in zip(expected, found, strict=True):
        torch.testing.assert_close(right, left, rtol=1e-4, atol=1e-5)
    with pytest.raises(AssertionError), torch.no_grad(), esper.dormant(model):
        torch.testing.assert_close(found, list(tensors_in(model(**given))), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "resnet", "lstm"])
def test_models_are_written_as_onnx(name: str, tmp_path: Path) -> None:
    model, _ = grown(name)
    made = esper.export(model, tmp_path, format="onnx", example_inputs=FOREIGN[name].batch(), verify=True)
    assert made.comparison is not None and made.comparison.passed


def test_a_result_that_is_no_tensor_is_refused_with_the_way_out(tmp_path: Path) -> None:
    model, _ = grown("gpt2")
    with pytest.raises(esper.GrowthError, match="DynamicCache") as caught:
        esper.export(model, tmp_path, format="python", example_inputs=FOREIGN["gpt2"].batch())
    assert caught.value.code == "ESP-438"
    assert caught.value.hint is not None and "returns tensors only" in caught.value.hint
    model, _ = grown("mixture")
    with pytest.raises(esper.GrowthError, match="Mixture cannot be written as ONNX") as caught:
        esper.export(model, tmp_path, format="onnx", example_inputs=FOREIGN["mixture"].batch())
    assert caught.value.hint is not None and "safetensors" in caught.value.hint
    assert list(tmp_path.iterdir()) == []
