"""Scratch space that is full, or that there is none of: row D9 and bad input 37."""

import ctypes
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from exporting_models import make
from tolaria_world import Driver
from tolaria_world import World
from tolaria_world import make_config
from tolaria_world import silent

import esper
from esper.errors import BlueprintError
from esper.errors import EsperError
from esper.runtime.scratch import scratch_folder
from esper.runtime.tezzeret.forge_child import ForkServer
from esper.runtime.tolaria.reproduction import RecordedRun
from esper.runtime.tolaria.reproduction import reproduce
from esper.runtime.tolaria.taken_model import finished_model

pytestmark = pytest.mark.fault("D9")

MS_RDONLY, MS_REMOUNT = 1, 32
"""Flags of Linux's mount(2)."""


@pytest.fixture
def full(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """TMPDIR on a file system with some bytes left."""
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    with (small_disk / "ballast").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(b"x" * 4096)
    return small_disk


def ended(world: World, drive: Callable[..., Driver]) -> tuple[RecordedRun, Any]:
    driver = drive(make_config(run={"max_epochs": 1}))
    driver.train(1)
    finished = driver.session.finish()
    library = world.library
    heads = [(item.head, item.manifest) for item in world.call(library.heads("run"))]
    config = make_config(run={"max_epochs": 1})
    return RecordedRun(run_id="run", config=config, facts=(), heads=heads, get=world.objects.get), finished


def test_what_needs_room_for_a_moment_names_the_folder_and_leaves_nothing(
    drive: Callable[..., Driver], world: World, tmp_path: Path, full: Path
) -> None:
    recorded, finished = ended(world, drive)
    files = {name: world.objects.get(ref) for name, ref in finished.files.items()}
    grown = make("mlp")
    works: dict[str, tuple[str, Callable[[], object]]] = {
        "reproduce": ("ESP-321", lambda: reproduce(recorded, silent)),
        "export a run": ("ESP-208", lambda: finished_model(recorded.config, files)),
        "verify an export": (
            "ESP-208",
            lambda: esper.export(grown.model, tmp_path / "out", example_inputs=grown.inputs, verify=True),
        ),
        "write ONNX": (
            "ESP-208",
            lambda: esper.export(grown.model, tmp_path / "out", format="onnx", example_inputs=grown.inputs),
        ),
    }
    for name, (code, work) in works.items():
        with pytest.raises(EsperError) as caught:
            work()
        error = caught.value
        assert (error.code, error.exit_code) == (code, {"ESP-321": 3, "ESP-208": 2}[code]), name
        assert str(full) in error.message and "No space left" in error.message, name
        assert error.hint is not None and "\n" not in str(error), name
        assert [path.name for path in full.iterdir()] == ["ballast"], name
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []
    (full / "ballast").unlink()
    assert reproduce(recorded, silent).clean


def test_where_no_folder_can_be_made_its_variable_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(EsperError, match="no temporary folder") as caught, scratch_folder("test"):
        pass
    assert caught.value.code == "ESP-208" and "TMPDIR" in str(caught.value.hint)


def test_a_forge_without_a_temporary_folder_refuses_its_job_and_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The adaptation fails with these words; training goes on without it."""
    server = ForkServer("esper.runtime.tezzeret.forge_jobs")
    with monkeypatch.context() as changed:
        changed.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
        with pytest.raises(BlueprintError, match="no temporary folder") as caught:
            server._ensure()
    assert caught.value.code == "ESP-426" and "TMPDIR" in str(caught.value.hint)


def test_a_home_on_a_read_only_file_system_is_named_and_what_only_reads_goes_on(small_disk: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mount(None, str(small_disk).encode(), None, MS_REMOUNT | MS_RDONLY, None) == 0

    def call(*arguments: str) -> "subprocess.CompletedProcess[str]":
        environment = {**os.environ, "ESPER_HOME": str(small_disk / "home")}
        command = [sys.executable, "-m", "esper", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)

    begun = call("start-run", "--quick-start", "digits", "--run-id", "x")
    where = f"home folder '{small_disk / 'home'}' cannot be made: Read-only file system"
    assert (begun.returncode, begun.stdout) == (2, "")
    assert begun.stderr.startswith(f"error[ESP-208]: {where}") and "ESPER_HOME" in begun.stderr
    upgraded = call("db", "upgrade")
    assert upgraded.returncode == 3 and upgraded.stderr.startswith("error[ESP-333]")
    assert "Read-only file system" in upgraded.stderr
    assert call("list").returncode == 0
