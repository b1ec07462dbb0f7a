"""`stack.json`: what of a local stack runs, as its supervisor last wrote it and everybody else reads it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esper.runtime.home import stack_file
from esper.runtime.processes import Identity
from esper.runtime.worker_files import write_json


@dataclass(frozen=True)
class StackWorker:
    """One worker process and the file that it logs to."""

    roles: tuple[str, ...]
    process: Identity
    log: str


@dataclass(frozen=True)
class StackInfo:
    """A local stack. `server` is `None` while it is being started.

    `ready`: the server answers and every role has a worker. `failures` says, a line each, what ended again
    and again.
    """

    address: str
    ui: str
    server_version: str
    server: Identity | None
    supervisor: Identity
    workers: tuple[StackWorker, ...] = ()
    ready: bool = False
    failures: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The document of `interface.md` section 4, with start times and health added."""
        return {
            "temporal": {
                "address": self.address,
                "ui": self.ui,
                "pid": self.server.pid if self.server else None,
                "started": self.server.started if self.server else None,
                "version": self.server_version,
            },
            "supervisor": {"pid": self.supervisor.pid, "started": self.supervisor.started},
            "workers": [
                {
                    "roles": list(worker.roles),
                    "pid": worker.process.pid,
                    "log": worker.log,
                    "started": worker.process.started,
                }
                for worker in self.workers
            ],
            "ready": self.ready,
            "failures": list(self.failures),
        }


def write_stack(home: Path, info: StackInfo) -> None:
    """Replace `stack.json` as a whole."""
    write_json(stack_file(home), info.to_json())


def read_stack(home: Path) -> StackInfo | None:
    """What `stack.json` says; `None` without one, or when it is not one that a supervisor wrote.

    That a process is named does not mean that it lives: see `processes.is_ours`.
    """
    try:
        found = json.loads(stack_file(home).read_bytes())
        temporal, supervisor = found["temporal"], found["supervisor"]
        return StackInfo(
            address=str(temporal["address"]),
            ui=str(temporal["ui"]),
            server_version=str(temporal["version"]),
            server=Identity(int(temporal["pid"]), str(temporal["started"])) if temporal["pid"] else None,
            supervisor=Identity(int(supervisor["pid"]), str(supervisor["started"])),
            workers=tuple(
                StackWorker(
                    tuple(worker["roles"]), Identity(int(worker["pid"]), str(worker["started"])), str(worker["log"])
                )
                for worker in found["workers"]
            ),
            ready=bool(found["ready"]),
            failures=tuple(found["failures"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
