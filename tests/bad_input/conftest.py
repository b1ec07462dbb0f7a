"""A person with an empty folder, an unused home, and no local stack: nothing here may start one."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from esper.cli import run


@dataclass(frozen=True)
class Answer:
    """What one command line said and how it ended."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> dict[str, Any]:
        """The JSON error form, which is all of stderr and one line."""
        assert self.err.count("\n") == 1, self.err
        form: dict[str, Any] = json.loads(self.err)
        assert set(form["error"]) == {"code", "message", "hint", "run_id"}
        return form["error"]


Say = Callable[..., Answer]


@pytest.fixture
def home() -> Path:
    return Path(os.environ["ESPER_HOME"])


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Say:
    """Run one command line in this process; starting a stack fails the test."""

    def no_stack(*arguments: object, **options: object) -> None:
        pytest.fail("a stack was started for a command that cannot succeed")

    monkeypatch.setattr("esper.runtime.stack.up", no_stack)

    def call(*arguments: str) -> Answer:
        capsys.readouterr()
        code = run(arguments)
        captured = capsys.readouterr()
        return Answer(code, captured.out, captured.err)

    return call
