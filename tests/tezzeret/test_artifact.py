import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from esper.contracts.assets import ArtifactRef
from esper.contracts.assets import SiteContract
from esper.errors import IntegrityError
from esper.runtime.tezzeret.artifact import KernelFiles
from esper.runtime.tezzeret.artifact import digest_of
from esper.runtime.tezzeret.artifact import manifest_bytes
from esper.runtime.tezzeret.artifact import verify
from esper.runtime.tezzeret.artifact import weights_bytes
from esper.runtime.tezzeret.build import build_kernel
from esper.runtime.tezzeret.build import load_kernel
from esper.runtime.tezzeret.ir import canonical_json

SITE = SiteContract(site="fc1", output_site="fc1", kind="linear", input_shape=(5,), output_shape=(3,), dtype="float32")
FILES = build_kernel("bottleneck", SITE, {"rank": 4}, seed=0, samples=None, max_parameters=1000)
TENSORS = safetensors.torch.load(FILES.weights)


def refused(files: KernelFiles, expected: str | None = None) -> IntegrityError:
    with pytest.raises(IntegrityError) as caught:
        verify(files, expected if expected is not None else files.digest)
    with pytest.raises(IntegrityError):
        load_kernel(files, expected if expected is not None else files.digest)
    assert caught.value.exit_code == 4
    return caught.value


def with_weights(weights: bytes) -> KernelFiles:
    """A manifest that names these weights, so that only what they hold can be wrong."""
    manifest = verify(FILES, FILES.digest)
    named = manifest.model_copy(update={"weights": ArtifactRef(digest=digest_of(weights), size_bytes=len(weights))})
    return KernelFiles(manifest_bytes(named), weights)


def with_manifest(**changes) -> KernelFiles:
    document = json.loads(FILES.manifest) | changes
    return KernelFiles(canonical_json(document), FILES.weights)


def test_a_built_kernel_verifies_and_its_digest_is_that_of_its_manifest():
    manifest = verify(FILES, FILES.digest)
    assert FILES.digest == digest_of(FILES.manifest)
    assert manifest.weights.digest == digest_of(FILES.weights)
    assert manifest.site == SITE
    assert manifest.hyperparameters == {"rank": 4, "activation": "relu"}
    assert [spec.name for spec in manifest.tensors] == ["down.bias", "down.weight", "up.weight"]
    assert FILES.size_bytes == len(FILES.manifest) + len(FILES.weights)


def test_another_digest_is_refused():
    other = build_kernel("bottleneck", SITE, {"rank": 4}, seed=1, samples=None, max_parameters=1000)
    error = refused(FILES, other.digest)
    assert error.code == "ESP-401"
    assert other.digest[:19] in error.message


@pytest.mark.fault("D5")
def test_weights_of_another_kernel_are_refused():
    other = build_kernel("bottleneck", SITE, {"rank": 4}, seed=1, samples=None, max_parameters=1000)
    error = refused(replace(FILES, weights=other.weights))
    assert error.code == "ESP-401"
    assert "weights digest" in error.message


@pytest.mark.fault("D4")
@settings(max_examples=80, deadline=None)
@given(st.integers(0, 8 * FILES.size_bytes - 1))
def test_any_flipped_bit_is_refused(bit):
    data = bytearray(FILES.manifest + FILES.weights)
    data[bit // 8] ^= 1 << bit % 8
    files = KernelFiles(bytes(data[: len(FILES.manifest)]), bytes(data[len(FILES.manifest) :]))
    assert refused(files, FILES.digest).code == "ESP-401"


@pytest.mark.parametrize("length", [0, 1, 8, len(FILES.weights) - 1, len(FILES.weights) + 1])
def test_truncated_and_oversized_weights_are_refused(length):
    weights = (FILES.weights + b"\0")[:length]
    assert refused(replace(FILES, weights=weights)).code == "ESP-402"
    assert refused(with_weights(weights)).code == "ESP-403"


def test_an_oversized_manifest_or_weights_beyond_the_graph_are_refused():
    assert refused(replace(FILES, manifest=b" " * 300_000)).code == "ESP-402"
    error = refused(with_weights(FILES.weights + b"\0" * 100_000))
    assert error.code == "ESP-402"
    assert "needs at most" in error.message


def test_a_truncated_manifest_is_refused():
    for length in (0, 1, len(FILES.manifest) // 2):
        assert refused(replace(FILES, manifest=FILES.manifest[:length])).code == "ESP-403"


@pytest.mark.fault("A8")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value):
    damaged = {name: tensor.clone() for name, tensor in TENSORS.items()}
    damaged["down.weight"][1, 2] = value
    error = refused(with_weights(weights_bytes(damaged)))
    assert error.code == "ESP-405"
    assert "'down.weight'" in error.message


def test_tensors_that_are_not_the_graph_s_are_refused_by_name():
    cases = [
        ({**TENSORS, "down.weight": TENSORS["down.weight"].T.contiguous()}, "'down.weight'"),
        ({**TENSORS, "up.weight": TENSORS["up.weight"].double()}, "torch.float64"),
        ({**TENSORS, "extra": torch.zeros(1)}, "'extra'"),
        ({name: TENSORS[name] for name in ("down.weight", "up.weight")}, "down.bias"),
    ]
    for tensors, part in cases:
        error = refused(with_weights(weights_bytes(tensors)))
        assert error.code == "ESP-404"
        assert part in error.message


def test_a_manifest_that_is_not_of_the_schema_is_refused():
    assert refused(with_manifest(code="import os")).code == "ESP-403"
    assert refused(with_manifest(schema_version=2)).code == "ESP-403"
    assert refused(with_manifest(parameter_count=float(3))).code == "ESP-403"
    spaced = json.dumps(json.loads(FILES.manifest)).encode()
    assert "canonical" in refused(replace(FILES, manifest=spaced)).message
    assert refused(replace(FILES, manifest=b"[]")).code == "ESP-403"


def test_a_manifest_that_contradicts_its_graph_is_refused():
    document = json.loads(FILES.manifest)
    graph, site = document["graph"], document["site"]
    bad_graph = json.loads(json.dumps(graph))
    bad_graph["nodes"][0]["op"] = "os.system"
    cases = {
        "unknown operation": with_manifest(graph=bad_graph),
        "graph reads": with_manifest(site=site | {"input_shape": [6]}),
        "graph gives": with_manifest(site=site | {"output_shape": [4]}),
        "dtype": with_manifest(site=site | {"dtype": "int8"}),
        "parameters named": with_manifest(parameter_count=7),
        "tensors are": with_manifest(tensors=document["tensors"][1:]),
    }
    for part, files in cases.items():
        error = refused(files)
        assert error.code == "ESP-404"
        assert part in error.message


class Canary:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mknod, (str(self.path),)


@pytest.mark.fault("I12")
def test_a_pickle_in_place_of_a_kernel_is_never_executed(tmp_path):
    marker = tmp_path / "executed"
    pickled = pickle.dumps(Canary(marker))
    torch.save(Canary(marker), tmp_path / "kernel.pt")
    saved = (tmp_path / "kernel.pt").read_bytes()
    for payload in (pickled, saved):
        refused(KernelFiles(FILES.manifest, payload))
        refused(KernelFiles(payload, FILES.weights))
        refused(with_weights(payload))
    assert not marker.exists()
    pickle.loads(pickled)
    assert marker.exists()
