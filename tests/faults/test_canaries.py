"""Bytes that would run are planted wherever Esper reads an artifact: they are refused by name, and never run."""

import json
import pickle
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from tolaria_world import Driver
from tolaria_world import World
from tolaria_world import make_config
from tolaria_world import ordered
from torch import nn

import esper
from esper.contracts.assets import ArtifactRef
from esper.contracts.operational import KernelDelivery
from esper.errors import DataUnavailable
from esper.errors import EsperError
from esper.runtime.configuration import load_config
from esper.runtime.kasmina.cache import kernel_cache
from esper.runtime.kasmina.exporting.probe import read_probe
from esper.runtime.temporal.history_document import parse_history
from esper.runtime.tezzeret.frames import receive_message
from esper.runtime.tezzeret.samples import unpack_samples
from esper.runtime.tolaria.checkpoint import restore
from esper.runtime.tolaria.data.cifar import CIFAR10
from esper.runtime.tolaria.data.cifar import load_cifar
from esper.runtime.tolaria.live.delivery import prepare_kernel

pytestmark = pytest.mark.fault("I12", "D5")

Trained = tuple[World, ArtifactRef, KernelDelivery]

FORMS = (".pkl", ".pt", ".pt2", ".npy", ".so")


class Canary:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return _touch, (str(self._marker),)


def _touch(path: str) -> str:
    Path(path).touch()
    return path


def _library(marker: Path, folder: Path) -> bytes:
    """Machine code that leaves the marker as soon as it is loaded."""
    source = folder / "canary.c"
    source.write_text(
        "#include <fcntl.h>\n"
        f"__attribute__((constructor)) static void sing(void) {{ open({json.dumps(str(marker))}, O_CREAT, 0600); }}\n"
    )
    built = folder / "canary.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(built), str(source)], check=True, timeout=60)
    return built.read_bytes()


def _array(canary: Canary) -> bytes:
    file = BytesIO()
    holder = numpy.empty(1, dtype=object)
    holder[0] = canary
    numpy.save(file, holder, allow_pickle=True)
    return file.getvalue()


def _archive(canary: Canary) -> bytes:
    """A program of `torch.export` as an archive whose example inputs are a pickle."""
    file = BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("version", "1")
        archive.writestr("data.pkl", pickle.dumps(canary))
    return file.getvalue()


def _saved(canary: Canary) -> bytes:
    file = BytesIO()
    torch.save(canary, file)
    return file.getvalue()


@pytest.fixture(scope="module")
def marker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("marker") / "sang"


@pytest.fixture(scope="module")
def canaries(marker: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, bytes]:
    canary = Canary(marker)
    return {
        ".pkl": pickle.dumps(canary),
        ".pt": _saved(canary),
        ".pt2": _archive(canary),
        ".npy": _array(canary),
        ".so": _library(marker, tmp_path_factory.mktemp("library")),
    }


@pytest.fixture(params=FORMS)
def canary(request: pytest.FixtureRequest, canaries: Mapping[str, bytes]) -> bytes:
    return canaries[request.param]


def refused(read: Callable[[], object], marker: Path) -> EsperError:
    """What says no, and that nothing ran."""
    with pytest.raises(EsperError) as caught:
        read()
    assert not marker.exists()
    assert len(caught.value.message) > 20
    return caught.value


def test_every_canary_sings_where_it_is_loaded_as_what_it_is(
    canaries: Mapping[str, bytes], marker: Path, tmp_path: Path
) -> None:
    path = tmp_path / "canary.so"
    path.write_bytes(canaries[".so"])
    loads: Mapping[str, Callable[[], object]] = {
        ".pkl": lambda: pickle.loads(canaries[".pkl"]),
        ".pt": lambda: torch.load(BytesIO(canaries[".pt"]), weights_only=False),
        ".pt2": lambda: pickle.loads(zipfile.ZipFile(BytesIO(canaries[".pt2"])).read("data.pkl")),
        ".npy": lambda: numpy.load(BytesIO(canaries[".npy"]), allow_pickle=True),
        ".so": lambda: subprocess.run([sys.executable, "-c", f"import ctypes; ctypes.CDLL({str(path)!r})"], check=True),
    }
    assert tuple(loads) == FORMS
    for load in loads.values():
        load()
        assert marker.exists()
        marker.unlink()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    """A run of one epoch: its Urza, its last head, and a kernel that was built for it."""
    world = World(tmp_path_factory.mktemp("trained"))
    driver = Driver(world, world.open(make_config()))
    order = ordered(1, 14, blueprint="lowrank")
    driver.schedule = (order,)
    (report,) = driver.train(1, expects_decision=True)
    yield world, world.call(world.library.heads("run"))[-1].manifest, world.deliver(report, order)
    world.close()


@pytest.mark.parametrize("slot", ["manifest", "model", "optimizer", "random"])
def test_a_canary_in_a_checkpoint_is_refused(trained: Trained, canary: bytes, marker: Path, slot: str) -> None:
    world, manifest, _ = trained
    planted = world.objects.put(canary)
    if slot != "manifest":
        document = json.loads(world.objects.get(manifest))
        document[slot] = planted.model_dump(mode="json")
        planted = world.objects.put(json.dumps(document).encode())
    error = refused(lambda: restore(planted, world.objects.get), marker)
    assert error.code == "ESP-407" and "checkpoint" in error.message


def in_kernel(world: World, delivery: KernelDelivery, slot: str, canary: bytes) -> KernelDelivery:
    planted = world.objects.put(canary)
    changes: dict[str, object] = {slot: planted}
    if slot == "manifest":
        changes["kernel"] = planted.digest
    kernel_cache().clear()
    return delivery.model_copy(update=changes)


@pytest.mark.parametrize("slot", ["manifest", "weights", "certificate"])
def test_a_canary_in_a_kernel_is_refused(trained: Trained, canary: bytes, marker: Path, slot: str) -> None:
    world, _, delivery = trained
    planted = in_kernel(world, delivery, slot, canary)
    error = refused(lambda: prepare_kernel(planted, world.store, torch.device("cpu")), marker)
    assert error.code in {"ESP-401", "ESP-402", "ESP-403", "ESP-406"}


@pytest.mark.parametrize("slot", ["manifest", "weights", "certificate"])
def test_a_canary_that_is_delivered_costs_its_adaptation_and_not_the_run(
    world: World, drive: Callable[..., Driver], canaries: Mapping[str, bytes], marker: Path, slot: str
) -> None:
    driver = drive(make_config())
    order = ordered(1, 14, blueprint="lowrank")
    driver.schedule = (order,)
    (report,) = driver.train(1, expects_decision=True)
    answer = driver.session.install(in_kernel(world, world.deliver(report, order), slot, canaries[".pt"]))
    assert not answer.accepted and "rejected" in answer.reason
    driver.train(2, 3)
    assert not marker.exists()


def test_a_canary_among_the_samples_is_refused(canary: bytes, marker: Path) -> None:
    assert refused(lambda: unpack_samples(canary), marker).code == "ESP-403"


@pytest.mark.parametrize("slot", ["model.safetensors", "growth.json"])
def test_a_canary_in_a_saved_model_is_refused(canary: bytes, marker: Path, slot: str, tmp_path: Path) -> None:
    model = esper.wrap(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)))
    esper.save(model, tmp_path)
    (tmp_path / slot).write_bytes(canary)
    error = refused(lambda: esper.load(tmp_path, nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))), marker)
    assert error.code in {"ESP-401", "ESP-407"} and slot in error.message


def test_a_canary_in_an_export_is_refused(canary: bytes, marker: Path, tmp_path: Path) -> None:
    path = tmp_path / "probe.safetensors"
    path.write_bytes(canary)
    assert refused(lambda: read_probe(str(path)), marker).code == "ESP-407"


def test_a_canary_in_place_of_the_data_is_refused(canary: bytes, marker: Path, tmp_path: Path) -> None:
    for name in (*CIFAR10.train_files, CIFAR10.test_file):
        (tmp_path / name).write_bytes(canary)
    assert isinstance(refused(lambda: load_cifar(CIFAR10, tmp_path), marker), DataUnavailable)


def test_a_canary_in_place_of_a_configuration_is_refused(canary: bytes, marker: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(canary)
    refused(lambda: load_config(path, environment={}), marker)
    path.write_text(f"run: !!python/object/apply:os.mknod ['{marker}']\n")
    refused(lambda: load_config(path, environment={}), marker)


def test_a_canary_in_place_of_a_history_is_refused(canary: bytes, marker: Path) -> None:
    error = refused(lambda: parse_history(canary.decode("latin-1")), marker)
    assert error.code == "ESP-408"


def test_a_canary_on_the_channel_of_the_forge_is_no_message(canary: bytes, marker: Path) -> None:
    left, right = socket.socketpair()
    with left, right:
        left.sendall(len(canary).to_bytes(8, "big") + canary)
        left.shutdown(socket.SHUT_WR)
        with pytest.raises((ValueError, EOFError)):
            receive_message(right)
    assert not marker.exists()
