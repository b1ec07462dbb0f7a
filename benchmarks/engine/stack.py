"""A real local stack (server, orchestrator, trainer, forge, strategist) in a home of its own, and commands on it."""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from collections.abc import Coroutine
from pathlib import Path
from typing import Any
from typing import NoReturn

from temporalio.api.enums.v1 import EventType
from temporalio.api.history.v1 import HistoryEvent
from temporalio.client import Client

from esper.runtime.worker_files import read_all

REPOSITORY = Path(__file__).resolve().parents[2]
QUIET_SECONDS = 120.0


class Stack:
    """`esper-cli` on one `ESPER_HOME`."""

    def __init__(self, home: Path) -> None:
        self.home = home
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("TEMPORAL_", "ESPER_"))}
        if "ESPER_TEMPORAL_CLI" in os.environ:
            kept["ESPER_TEMPORAL_CLI"] = os.environ["ESPER_TEMPORAL_CLI"]
        self.environment = kept | {"ESPER_HOME": str(home), "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}

    def command(self, *arguments: str) -> str:
        """What one command prints; its own words when it fails."""
        return self.python("esper", *arguments)

    def wait_until_quiet(self) -> None:
        """Until a trainer is warm and none serves a run: nothing starts or ends then."""
        deadline = time.monotonic() + QUIET_SECONDS
        while time.monotonic() < deadline:
            states = [worker.state for worker in read_all(self.home).values() if "trainer" in worker.roles]
            if states == ["idle"]:
                return
            time.sleep(0.2)
        raise RuntimeError(f"no trainer became warm within {QUIET_SECONDS:g} s")

    def address(self) -> str:
        return str(json.loads((self.home / "stack.json").read_text())["temporal"]["address"])

    def python(self, module: str, *arguments: str) -> str:
        ended = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            env=self.environment,
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=False,
        )
        if ended.returncode:
            raise RuntimeError(f"{module} {' '.join(arguments)}: exit {ended.returncode}\n{ended.stdout}{ended.stderr}")
        return ended.stdout

    def trainer_of(self, run_id: str) -> int | None:
        """The process that trains this run now."""
        reports = read_all(self.home).values()
        return next((each.pid for each in reports if each.state == "claimed" and each.run_id == run_id), None)


async def histories(client: Client, run_id: str) -> list[list[HistoryEvent]]:
    """The events of a run, one list for each execution that it was continued in."""
    following: str | None = (await client.get_workflow_handle(run_id).describe()).raw_info.first_run_id
    found: list[list[HistoryEvent]] = []
    while following:
        handle = client.get_workflow_handle(run_id, run_id=following)
        events = [event async for event in handle.fetch_history_events()]
        found.append(events)
        last = events[-1]
        continued = last.event_type == EventType.EVENT_TYPE_WORKFLOW_EXECUTION_CONTINUED_AS_NEW
        following = (
            last.workflow_execution_continued_as_new_event_attributes.new_execution_run_id if continued else None
        )
    return found


def run_and_exit(measure: Callable[[Path], Coroutine[Any, Any, None]], home: Path | None = None) -> NoReturn:
    """Measure on a stack in `home` (default: a temporary one), then end this process: 0, or 1 and the traceback."""
    code = 0
    try:
        if home is not None:
            asyncio.run(measure(home.absolute()))
        else:
            with tempfile.TemporaryDirectory(prefix="esper-benchmark-") as folder:
                asyncio.run(measure(Path(folder) / "home"))
    except Exception:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # As every process that used a Temporal client: its ordinary end was seen to crash or hang.
    os._exit(code)
