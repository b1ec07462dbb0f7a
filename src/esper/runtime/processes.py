"""Processes by more than their number: a pid is soon another's, a pid with its start time is not."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterable
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Identity:
    """Who a process is: `started` is told by the system (boot and start time) and compared as it is."""

    pid: int
    started: str


def identify(pid: int) -> Identity | None:
    """The living process with that number; `None` when there is none or it has ended and only waits to be reaped."""
    if pid <= 0:
        return None
    stat = Path(f"/proc/{pid}/stat")
    if Path("/proc/self/stat").exists():
        try:
            # The name in parentheses may itself hold spaces and parentheses.
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return None
        state, start_ticks = fields[0], fields[19]
        return None if state in "ZX" else Identity(pid, f"{_boot()}/{start_ticks}")
    shown = _ps(pid, "stat=,lstart=")
    return None if not shown or shown.startswith("Z") else Identity(pid, shown.partition(" ")[2].strip())


def command_line(pid: int) -> str:
    """The command line with spaces between the words; empty when the process is gone."""
    if Path("/proc/self/stat").exists():
        try:
            return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except (FileNotFoundError, ProcessLookupError):
            return ""
    return _ps(pid, "command=")


def is_ours(identity: Identity, word: str) -> bool:
    """Whether that very process still lives and its command line holds `word`."""
    return identify(identity.pid) == identity and word in command_line(identity.pid)


def wait_gone(identities: Iterable[Identity], timeout_s: float) -> list[Identity]:
    """Wait until they have ended; returns those that have not after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    left = [identity for identity in identities if identify(identity.pid) == identity]
    while left and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        left = [identity for identity in left if identify(identity.pid) == identity]
    return left


def stop(identities: Sequence[Identity], grace_s: float) -> None:
    """End them all together: SIGTERM, then after `grace_s` SIGKILL for each one's whole process group.

    Each must lead its own group (started with `start_new_session`); the group is swept in any case, so that
    nothing that they started survives them.
    """
    for identity in identities:
        with contextlib.suppress(ProcessLookupError):
            os.kill(identity.pid, signal.SIGTERM)
    wait_gone(identities, grace_s)
    for identity in identities:
        kill_group(identity.pid)
    wait_gone(identities, grace_s)


def kill_group(pid: int) -> None:
    """SIGKILL to every process of the group that `pid` led. Nothing happens when there is none, or it is our own."""
    if pid > 1 and pid != os.getpgrp():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)


def _boot() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _ps(pid: int, fields: str) -> str:
    """For systems without /proc."""
    shown = subprocess.run(["ps", "-p", str(pid), "-o", fields], capture_output=True, text=True, check=False)
    return shown.stdout.strip()
