"""A task of the person's own, in the folder where the command is typed: the console script finds it as trainers do."""

import os
import subprocess
import sys
from collections.abc import Awaitable
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from recorded_run import STEPS
from recorded_run import RecordedRun

import esper
from esper.contracts.config import EsperConfig
from esper.contracts.operational import HeadRef
from esper.runtime.configuration import load_config
from esper.runtime.tolaria.checkpoint import snapshot
from esper.runtime.tolaria.checkpoint import write
from esper.runtime.tolaria.live.run_state import RunState
from esper.runtime.tolaria.plan import prepare
from esper.runtime.tolaria.trainee import begin

Cli = Callable[..., Any]
Record = Callable[..., Any]

MODULE = """
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
import esper

def make():
    return esper.Task(
        model=nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3)),
        train=TensorDataset(torch.ones(64, 8), torch.arange(64) % 3),
        validation=TensorDataset(torch.ones(32, 8), torch.arange(32) % 3),
        loss=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
    )
"""


@pytest.fixture
def own(folder: Path) -> Path:
    (folder / "of_mine.py").write_text(MODULE)
    (folder / "run.yaml").write_text("run: {threads: 1}\ntask: {target: 'of_mine:make'}\ntraining: {batch_size: 16}\n")
    return folder


@pytest.fixture
def config(own: Path) -> EsperConfig:
    return load_config(own / "run.yaml", environment={})


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Where a console script begins: the folder is not on `sys.path`, and nobody has imported from it."""

    def forget() -> None:
        monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", str(Path.cwd()))])
        monkeypatch.delitem(sys.modules, "of_mine", raising=False)

    forget()
    return forget


def untrained(forget: Callable[[], None]) -> Callable[[RecordedRun], Awaitable[str]]:
    """A run with one committed head after its beginning; the coroutine returns the model's digest."""

    async def scene(run: RecordedRun) -> str:
        sys.path.insert(0, str(Path.cwd()))
        trainee = begin(*prepare(run.config))
        forget()
        await run.begin()
        trainee.step, trainee.completed = STEPS, 1
        manifest = write(snapshot(trainee, RunState()), run.store.put)
        head = HeadRef(digest=manifest.digest, parent=run._head.digest, step=STEPS, epoch=1)
        await run.library.commit_head(run._lease, head=head, manifest=manifest, parent=head.parent, report=None)
        return esper.weights_digest(trainee.model)

    return scene


def test_a_dry_run_by_the_console_script(own: Path) -> None:
    script = Path(sys.executable).with_name("esper-cli")
    done = subprocess.run(
        [str(script), "start-run", "--config", "run.yaml", "--dry-run", "--json"],
        capture_output=True,
        text=True,
        timeout=120,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert '"site": "0"' in done.stdout


def test_an_export_finds_the_task(cli: Cli, record: Record, own: Path, forgotten: Callable[[], None]) -> None:
    record(untrained(forgotten))
    result = cli("export", "digits-1", "--format", "safetensors", "--output", "out", "--json")
    assert (result.code, result.err) == (0, "")
    assert (own / "out" / "plain.safetensors").exists()


def test_a_reproduction_finds_the_task(cli: Cli, record: Record, forgotten: Callable[[], None]) -> None:
    record(untrained(forgotten))
    result = cli("reproduce", "digits-1")
    # The records are made up, so that the bits differ; that they were trained again is what counts here.
    assert result.code == 4
    assert "no module" not in result.err


def test_where_the_folder_is_gone_nothing_is_reached(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from esper.commands.actions.own_code import reach_own_code

    gone = own / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    before = list(sys.path)
    reach_own_code()
    assert sys.path == before
