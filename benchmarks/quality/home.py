"""Real runs: `esper-cli` in processes of its own, on a local stack with a home of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

COMMAND = (sys.executable, "-m", "esper")
LONGEST_RUN_S = 1800


class Home:
    """Commands on one `ESPER_HOME`; one run at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("TEMPORAL_", "ESPER_"))}
        kept = {name: os.environ[name] for name in ("ESPER_TEMPORAL_CLI",) if name in os.environ}
        self._environment = {**inherited, **kept, "ESPER_HOME": str(folder / "home")}

    def start_run(self, quick_start: str, run_id: str, settings: dict[str, object]) -> dict[str, Any]:
        """Run a quick start to its end. The document of `start-run --json`, with `growth`, the grown structure.

        Raises `RuntimeError` with what the command said when it did not end well.
        """
        output = self.folder / run_id
        chosen = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
        text = self._command(
            "start-run", "--quick-start", quick_start, "--run-id", run_id, "--output", str(output), "--json", *chosen
        )
        document: dict[str, Any] = json.loads(text)
        saved = json.loads((output / "growth.json").read_text())
        history = json.loads((output / "history.json").read_text())
        return {**document, "growth": saved["growth"], "history": history}

    def down(self) -> None:
        self._command("down")

    def _command(self, *arguments: str) -> str:
        ended = subprocess.run(
            [*COMMAND, *arguments],
            env=self._environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=LONGEST_RUN_S,
            check=False,
        )
        if ended.returncode != 0:
            said = f"{ended.stdout}\n{ended.stderr}\n{self._logs()}"
            raise RuntimeError(f"{' '.join(arguments)} ended with {ended.returncode}\n{said}")
        return ended.stdout

    def _logs(self) -> str:
        """The ends of all logs: the home goes with the error."""
        found = {path.name: path.read_text(errors="replace") for path in sorted(self.folder.glob("home/logs/*"))}
        return "\n".join("\n".join([f"--- {name}", *text.splitlines()[-15:]]) for name, text in found.items() if text)


@contextmanager
def local_home() -> Iterator[Home]:
    """A home in a temporary folder; its stack is down afterwards."""
    with TemporaryDirectory(prefix="esper-benchmark-") as folder:
        home = Home(Path(folder))
        try:
            yield home
        finally:
            home.down()
