"""Command lines run in this process, and a home with a real database and store to look at."""

import asyncio
import json
import os
from collections.abc import Awaitable
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from recorded_run import RecordedRun

from esper.cli import run
from esper.contracts.config import EsperConfig
from esper.runtime.configuration import load_config
from esper.runtime.urza import migration
from esper.runtime.urza.library import Library
from esper.runtime.urza.objects import FolderStore


@dataclass(frozen=True)
class Result:
    """What one command line did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def error(self) -> dict[str, Any]:
        """The JSON error form: one line, and the last one on stderr."""
        form: dict[str, Any] = json.loads(self.err.strip().splitlines()[-1])
        return form["error"]


Cli = Callable[..., Result]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], folder: Path) -> Cli:
    def call(*arguments: str) -> Result:
        capsys.readouterr()
        code = run(arguments)
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call


@pytest.fixture
def home() -> Path:
    return Path(os.environ["ESPER_HOME"])


@pytest.fixture
def config() -> EsperConfig:
    return load_config(None, quick_start="digits", overrides=["run.max_epochs=4"], environment={})


Recorder = Callable[[RecordedRun], Awaitable[Any]]


@pytest.fixture
def record(home: Path, config: EsperConfig) -> Callable[..., Any]:
    """`record(scene, run_id)` runs the coroutine function `scene(recorded_run)` on the home's own Urza."""
    home.mkdir()

    def play(scene: Recorder, run_id: str = "digits-1") -> Any:
        async def main() -> Any:
            await migration.upgrade("default", default_file=home / "urza.db")
            async with await Library.open("default", default_file=home / "urza.db") as library:
                return await scene(RecordedRun(library, FolderStore(home / "objects"), config, run_id))

        return asyncio.run(main())

    return play
