"""How a worker process tells its supervisor where it stands: one small file each, `ESPER_HOME/workers/<pid>.json`.

A file and not a message, because it must be readable while the server is away and after the worker is dead:
what it was doing when it died decides whom the supervisor tells.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from typing import get_args

from esper.runtime.home import workers_folder

WorkerState = Literal["starting", "idle", "claimed", "draining"]
"""`idle`: polling and warm; `claimed`: a trainer that serves a run; `draining`: about to end."""


@dataclass(frozen=True)
class WorkerReport:
    """Where one worker process stands. `run_id` and `task_queue` are those of a claimed trainer."""

    pid: int
    roles: tuple[str, ...]
    state: WorkerState
    run_id: str | None = None
    task_queue: str | None = None


def report(
    home: Path, state: WorkerState, *, roles: Sequence[str], run_id: str | None = None, task_queue: str | None = None
) -> None:
    """Say where this process stands; what it said before is replaced at once."""
    line = WorkerReport(os.getpid(), tuple(roles), state, run_id, task_queue)
    write_json(workers_folder(home) / f"{line.pid}.json", asdict(line))


def read_all(home: Path) -> dict[int, WorkerReport]:
    """What every worker said last, by pid; also workers that are dead and have not been forgotten yet."""
    reports = {}
    for path in workers_folder(home).glob("*.json"):
        found = _read(path)
        if found is not None:
            reports[found.pid] = found
    return reports


def forget(home: Path, pid: int) -> None:
    """Remove what a worker said; it is dead."""
    (workers_folder(home) / f"{pid}.json").unlink(missing_ok=True)


def write_json(path: Path, document: object) -> None:
    """Replace the file as a whole: a reader sees the old or the new document, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    fresh.write_text(json.dumps(document, indent=1))
    fresh.replace(path)


def _read(path: Path) -> WorkerReport | None:
    try:
        line = json.loads(path.read_bytes())
        if line["state"] not in get_args(WorkerState):
            return None
        return WorkerReport(int(line["pid"]), tuple(line["roles"]), line["state"], line["run_id"], line["task_queue"])
    except (OSError, ValueError, KeyError, TypeError):
        # Forgotten between listing and reading, or nothing that a worker wrote.
        return None
