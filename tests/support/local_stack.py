"""The real thing: `esper-cli` in processes of its own, with a home of its own."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COMMAND = [sys.executable, "-m", "esper"]

HOMES: dict[Path, dict[str, str]] = {}
"""Every home that a stack of this process was given, with its environment: their runs are judged after each test."""


@dataclass(frozen=True)
class Ended:
    """How one command ended."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out)


class LocalStack:
    """Commands on one `ESPER_HOME`."""

    def __init__(self, home: Path, **environment: str) -> None:
        self.home = home
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("TEMPORAL_", "ESPER_"))}
        kept = {name: os.environ[name] for name in ("ESPER_TEMPORAL_CLI",) if name in os.environ}
        self.environment = {**inherited, **kept, "ESPER_HOME": str(home), **environment}
        HOMES[home] = self.environment

    def run(self, *arguments: str, timeout: float = 240, folder: Path | None = None) -> Ended:
        """One command, to its end."""
        ended = subprocess.run(
            [*COMMAND, *arguments],
            env=self.environment,
            cwd=folder or self.home.parent,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        return Ended(ended.returncode, ended.stdout, ended.stderr)

    def ok(self, *arguments: str, timeout: float = 240, folder: Path | None = None) -> Ended:
        """One command that must succeed; its words are in the failure when it does not."""
        ended = self.run(*arguments, timeout=timeout, folder=folder)
        assert ended.code == 0, f"{arguments} ended with {ended.code}\n{ended.out}\n{ended.err}\n{self.logs()}"
        return ended

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """One command, left running."""
        return subprocess.Popen(
            [*COMMAND, *arguments],
            env=self.environment,
            cwd=self.home.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def shown(self, run_id: str) -> dict[str, Any]:
        """What `show` says of a run."""
        document: dict[str, Any] = self.ok("show", run_id, "--json").document
        return document

    def until(
        self, run_id: str, true: Callable[[dict[str, Any]], object], *, seconds: float = 240, pause: float = 0.2
    ) -> dict[str, Any]:
        """Wait until what `show` says of a run makes something true; gives what it says."""
        deadline = time.monotonic() + seconds
        while not true(document := self.shown(run_id)):
            assert time.monotonic() < deadline, f"{document}\n{self.logs()}"
            time.sleep(pause)
        return document

    def until_outcome(self, run_id: str, outcome: str, *, seconds: float = 240) -> dict[str, Any]:
        return self.until(run_id, lambda shown: shown["outcome"] == outcome, seconds=seconds)

    def stack(self) -> dict[str, Any]:
        """`stack.json`."""
        document: dict[str, Any] = json.loads((self.home / "stack.json").read_text())
        return document

    def workers(self) -> list[dict[str, Any]]:
        """What every worker said last of itself."""
        return [json.loads(path.read_text()) for path in (self.home / "workers").glob("*.json")]

    def claimed_trainer(self, run_id: str) -> int | None:
        """The process that trains this run now."""
        for worker in self.workers():
            if worker["state"] == "claimed" and worker["run_id"] == run_id:
                return int(worker["pid"])
        return None

    def logs(self) -> str:
        """The ends of all logs, for the message of a failing test."""
        parts = []
        for path in sorted((self.home / "logs").glob("*")):
            lines = path.read_text(errors="replace").splitlines()[-15:]
            if lines:
                parts.append(f"--- {path.name}\n" + "\n".join(lines))
        return "\n".join(parts)
