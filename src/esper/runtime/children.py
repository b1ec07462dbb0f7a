"""The supervisor's children: how one is started, how its end is seen, and when it may be started again."""

import subprocess
import time
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from esper.runtime.processes import Identity
from esper.runtime.processes import identify
from esper.runtime.processes import kill_group

FIRST_DELAY_S = 0.5
LONGEST_DELAY_S = 15.0


class BackOff:
    """When something that died may be started again: at once the first time, then later and later."""

    def __init__(self) -> None:
        self.failures = 0
        self._not_before = 0.0

    def due(self) -> bool:
        return time.monotonic() >= self._not_before

    def failed(self) -> float:
        """It died again; returns the delay in seconds."""
        delay: float = min(LONGEST_DELAY_S, FIRST_DELAY_S * 2**self.failures)
        self.failures += 1
        self._not_before = time.monotonic() + delay
        return delay

    def succeeded(self) -> None:
        self.failures = 0
        self._not_before = 0.0


@dataclass(frozen=True)
class Child:
    """A running child, leader of its own process group."""

    roles: tuple[str, ...]
    process: subprocess.Popen[bytes]
    identity: Identity
    output: Path

    @property
    def name(self) -> str:
        return "+".join(self.roles)

    def ended(self) -> int | None:
        """The exit code (negative: the signal) once it has ended; what it left in its group is ended too."""
        code = self.process.poll()
        if code is not None:
            kill_group(self.process.pid)
        return code


def start_child(
    roles: Sequence[str], command: Sequence[str], *, environment: Mapping[str, str], folder: Path, output: Path
) -> Child | None:
    """Start it in `folder`, apart from any terminal; what it prints is appended to `output`.

    Returns `None` when it was gone before it could be looked at.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("ab") as stream:
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            env=dict(environment),
            cwd=folder,
            start_new_session=True,
        )
    identity = identify(process.pid)
    if identity is None:
        process.wait()
        return None
    return Child(tuple(roles), process, identity, output)


def last_words(output: Path) -> str:
    """The last line that a process printed, for an error message."""
    try:
        lines = output.read_bytes()[-4000:].decode(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1].strip()[:300] if lines else ""
