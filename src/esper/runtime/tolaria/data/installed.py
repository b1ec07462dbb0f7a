"""Tasks that installed distributions offer by name, and which of them a worker trains for people on other hosts.

Whoever may start a run may have any code run that its worker can import. A worker of a server on this host takes
`module:function` from the person who started it. One of a server on another host imports nothing that a run names: only
entry points of installed distributions that its own allow-list names.
"""

import difflib
from collections.abc import Mapping
from collections.abc import Sequence
from importlib.metadata import EntryPoint
from importlib.metadata import entry_points
from typing import Any

from esper.contracts.config import TaskConfig
from esper.errors import ConfigurationError
from esper.errors import TargetError
from esper.errors import last_line

ENTRY_POINTS = "esper.tasks"
ALLOWED = "ESPER_WORKER_TASKS"
"""The environment variable of a worker with the names that it may train, separated by commas."""


def installed_tasks() -> dict[str, EntryPoint]:
    """What installed distributions name in the group `esper.tasks`, by name. Nothing is imported."""
    return {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}


def unknown_task(name: object, known: Sequence[str]) -> ConfigurationError:
    """ESP-206, with the nearest of the known names."""
    near = difflib.get_close_matches(str(name), known, n=1)
    guess = f"Did you mean {near[0]}? " if near else ""
    return ConfigurationError(
        "ESP-206",
        f"task.name: there is no packaged or installed task {name!r}",
        hint=f"{guess}Known are: {', '.join(known)}",
    )


def call_installed(entry: EntryPoint, arguments: Mapping[str, Any]) -> object:
    """What the entry point's function returns for `arguments`. Raises `TargetError` (ESP-313) with the cause."""
    try:
        return entry.load()(**arguments)
    except (Exception, SystemExit) as error:  # a stranger's code may raise anything
        raise TargetError(
            "ESP-313",
            f"installed task '{entry.name}' ({entry.value}) raised {last_line(error)}",
            hint="It is the code of that distribution that raised; run it by itself",
        ) from error


def refuse_unlisted(config: TaskConfig, environment: Mapping[str, str], packaged: Mapping[str, object]) -> None:
    """Refuse what a worker of a server on another host does not train; nothing is imported.

    Raises `TargetError` (ESP-310) for `task.target`, and for an installed task that `ESPER_WORKER_TASKS` does not name.
    """
    if config.target is not None:
        raise target_refused(config.target)
    allowed = [name.strip() for name in environment.get(ALLOWED, "").split(",") if name.strip()]
    if config.name not in packaged and config.name not in allowed:
        raise TargetError(
            "ESP-310",
            f"task.name: this worker serves other hosts, and does not allow {config.name!r}",
            hint=f"It allows {', '.join([*packaged, *allowed])}; set {ALLOWED} where it is started",
        )


def target_refused(target: str) -> TargetError:
    """ESP-310, for an import string where the Temporal server is on another host."""
    return TargetError(
        "ESP-310",
        f"task.target {target!r}: workers of a Temporal server on another host import nothing that a run names",
        hint=f"Install it there as an entry point of the group '{ENTRY_POINTS}', allow it with {ALLOWED}, and give its "
        "name as task.name",
    )
