"""Installed tasks: found by name, and of a worker that serves other hosts the only ones beside the packaged."""

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from activity_bench import Bench

from esper.activities.trainer import TrainerActivities
from esper.cli import run
from esper.contracts.config import EsperConfig
from esper.contracts.config import TaskConfig
from esper.contracts.orders import ClaimRequest
from esper.contracts.orders import CodeLocation
from esper.contracts.orders import LoadRequest
from esper.contracts.orders import RecordRun
from esper.errors import ConfigurationError
from esper.errors import TargetError
from esper.runtime.tolaria.data.installed import installed_tasks
from esper.runtime.tolaria.tasks import load_task

Play = Callable[..., Any]

MODULE = """
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

import esper

Path(__file__).with_name("imported").touch()

def make(width=4):
    rows = TensorDataset(torch.ones(64, 8))
    return esper.Task(
        model=nn.Sequential(nn.Linear(8, width)),
        train=rows,
        validation=rows,
        loss=lambda model, batch: model(batch[0]).square().mean(),
    )

def raising():
    raise RuntimeError("first\\nlast: no such table")

def nothing():
    return 3
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a distribution is installed that offers tasks."""
    folder = tmp_path / "site"
    described = folder / "others_tasks-1.0.dist-info"
    described.mkdir(parents=True)
    (folder / "others_tasks.py").write_text(MODULE)
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: others-tasks\nVersion: 1.0\n")
    names = {"ours": "make", "raises": "raising", "nothing": "nothing", "gone": "gone", "digits": "raising"}
    entries = "".join(f"{name} = others_tasks:{function}\n" for name, function in names.items())
    (described / "entry_points.txt").write_text(f"[esper.tasks]\n{entries}")
    monkeypatch.setattr(sys, "path", [*sys.path, str(folder)])
    monkeypatch.delitem(sys.modules, "others_tasks", raising=False)
    return folder


def test_an_installed_task_is_found_by_its_name(site: Path) -> None:
    assert {"ours", "raises"} <= set(installed_tasks())
    assert not (site / "imported").exists()
    task = load_task(TaskConfig(name="ours", arguments={"width": 3}), seed=0)
    assert task.model[0].out_features == 3


def test_a_packaged_task_is_hidden_by_none(site: Path) -> None:
    load_task(TaskConfig(name="digits"), seed=0)
    assert not (site / "imported").exists()


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        (
            "raises",
            "ESP-313",
            "installed task 'raises' (others_tasks:raising) raised RuntimeError: last: no such table",
        ),
        ("gone", "ESP-313", "AttributeError"),
        ("nothing", "ESP-312", "installed task 'nothing' returned a builtins.int, not an esper.Task"),
    ],
)
def test_an_installed_task_that_gives_none_is_refused_by_its_cause(site: Path, name: str, code: str, said: str) -> None:
    with pytest.raises(TargetError) as refused:
        load_task(TaskConfig(name=name), seed=0)
    assert refused.value.code == code
    assert said in refused.value.message


def test_a_near_name_of_an_installed_task_is_offered(site: Path) -> None:
    with pytest.raises(ConfigurationError, match="Did you mean ours") as refused:
        load_task(TaskConfig(name="our"), seed=0)
    assert refused.value.code == "ESP-206"


async def load(bench: Bench, task: TaskConfig, run_id: str = "r1") -> str:
    """What a trainer that serves other hosts answers: a loaded model's name."""
    config: EsperConfig = bench.config().model_copy(update={"task": task})
    await bench.library.record_run(RecordRun(run_id=run_id, config=config), "2030-01-01T00:00:00+00:00")
    trainer = TrainerActivities("q1", bench.connections, asyncio.get_running_loop())
    trainer.serves_other_hosts = True
    lease = await bench.run(trainer.claim_trainer, ClaimRequest(run_id=run_id, urza=bench.urza))
    code = CodeLocation(directory=str(bench.folder), python_path=(str(bench.folder),))
    loaded = await bench.run(trainer.load_run, LoadRequest(lease=lease, config=config, code=code))
    return str(loaded.model_name)


def test_a_worker_for_other_hosts_imports_nothing_that_a_run_names(play: Play, site: Path) -> None:
    async def scene(bench: Bench) -> None:
        place, path = Path.cwd(), list(sys.path)
        for run_id, task in {"r1": TaskConfig(target="others_tasks:make"), "r2": TaskConfig(name="ours")}.items():
            with pytest.raises(TargetError) as refused:
                await load(bench, task, run_id)
            assert refused.value.code == "ESP-310"
        assert "does not allow 'ours'" in refused.value.message
        assert (Path.cwd(), list(sys.path)) == (place, path)

    play(scene)
    assert not (site / "imported").exists()


def test_a_worker_for_other_hosts_trains_what_its_list_names(
    play: Play, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ESPER_WORKER_TASKS", "theirs, ours")

    async def scene(bench: Bench) -> None:
        assert await load(bench, TaskConfig(name="ours")) == "Sequential"

    play(scene)


def test_start_run_refuses_an_import_string_for_a_server_on_another_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TEMPORAL_ADDRESS", "temporal.example.org:7233")
    (tmp_path / "run.yaml").write_text("task: {target: 'os_like:make'}\n")
    assert run(["start-run", "--config", "run.yaml"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(
        "error[ESP-310]: task.target 'os_like:make': workers of a Temporal server on another"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]
