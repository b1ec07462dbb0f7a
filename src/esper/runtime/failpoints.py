"""Named places at which a test may end this process, so that a crash is tried at every step that could lose something.

Each place calls `hit` with a name of `FAILPOINTS`: one comparison, unless the process was armed, by a test with `armed`
or, for worker processes, by the environment:

    ESPER_FAILPOINTS="commit.after_blobs=kill@3,fact.before_insert:graft=raise@1"

`name=action@n` acts at the n-th hit in the process. `name:detail` counts only hits with that detail (a kind of fact),
and `*` counts every hit. Actions: `kill` and `stop` send the process SIGKILL and SIGSTOP; `raise` raises `Crashed`, and
from then on every hit of the process does, on whatever thread: a dead process takes no further step.

A successor of the process would be armed as well. With `ESPER_FAILPOINTS_SPENT` naming a folder, an entry that has
acted leaves a file there, named as the entry and holding the process id, and acts in no other process.
"""

import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal
from typing import get_args

from esper.errors import ConfigurationError

VARIABLE = "ESPER_FAILPOINTS"
SPENT_VARIABLE = "ESPER_FAILPOINTS_SPENT"
ANY = "*"

Action = Literal["kill", "raise", "stop"]

FAILPOINTS: Mapping[str, str] = MappingProxyType(
    {
        "lease.before_claim": "a claim was asked for, nothing is written",
        "lease.in_claim": "the new lease is written, its transaction is open",
        "lease.after_claim": "the lease stands, whoever asked does not know yet",
        "lease.before_take_over": "the lease is held, the ledger was not read",
        "lease.after_take_over": "head, facts and reports were read",
        "lease.before_release": "the lease is about to be given back",
        "lease.in_release": "the lease is given back, its transaction is open",
        "lease.after_release": "the lease was given back, whoever asked does not know yet",
        "load.before_restore": "task and model are built, the head was not fetched",
        "load.after_restore": "the head was fetched and verified, the model is a fresh one",
        "load.after_resume": "model, optimizer and state are those of the head",
        "load.before_kernel": "a recorded graft beyond the head needs its kernel",
        "load.before_first_head": "a fresh run stands at step 0 without a head",
        "load.loaded": "the session is whole, whoever asked does not know yet",
        "commit.before_snapshot": "at a step boundary, before the run is copied",
        "commit.after_snapshot": "the run is copied, nothing is written",
        "commit.before_blob": "a tensor file is about to be stored",
        "file.before_rename": "the bytes of an object are written, its name does not exist yet",
        "commit.after_blob": "a tensor file is stored, others may not be",
        "commit.after_blobs": "all tensor files are stored, the manifest is not",
        "commit.before_manifest": "the manifest is made, not stored",
        "commit.after_manifest": "the manifest is stored, nothing names it",
        "commit.before_head": "everything is stored, the head was not moved",
        "commit.in_transaction": "the head is moved, its row and report are not written, the transaction is open",
        "commit.after_head": "the head stands, the writer does not know yet",
        "commit.before_acknowledgement": "the writer knows, whoever waits for the commit does not",
        "epoch.before_report": "an epoch is trained and measured, nothing of it is recorded",
        "epoch.before_answer": "the report is committed, the order to train is not answered",
        "delivery.received": "a delivery has come, nothing was fetched",
        "delivery.fetched": "its kernel is fetched, verified and built",
        "delivery.reserved": "its step is reserved, its fact is not recorded",
        "delivery.recorded": "its fact is recorded, whoever delivered does not know yet",
        "fact.before_insert": "a change is decided, no fact of it is recorded (detail: the kind)",
        "fact.in_transaction": "the fact is written, its transaction is open (detail: the kind)",
        "fact.after_insert": "the fact stands, its session does not know yet (detail: the kind)",
        "fact.executed": "the change was made, no head has it (detail: the kind)",
        "change.before_head": "a head is about to be made that is the first with a change",
        "graft.kernel_prepared": "the kernel of a graft is at hand at its step",
        "graft.before_surgery": "the head before the graft is copied, the model is unchanged",
        "graft.parameters_added": "the kernel is in the model, the optimizer does not know it",
        "graft.optimizer_joined": "model and optimizer have the kernel, the seed's state is not settled",
        "graft.after_surgery": "the graft is made, the head before it may not be written",
        "kernel.first_step": "the marker of a kernel's first step stands, the step is not taken",
        "judge.before_twin": "a verdict is due, its twin is not trained",
        "judge.in_twin": "an epoch of the twin is trained",
        "judge.before_verdict": "the verdict is found, not recorded",
        "judge.before_answer": "the verdict is executed, whoever asked for it does not know yet",
        "cull.before_adoption": "a graft was culled, its model still trains",
        "cull.in_adoption": "the twin's model and optimizer are the run's, its state is not",
        "cull.after_adoption": "the twin is the run",
        "keep.before_fossilization": "a graft was kept, it is still on probation",
        "keep.after_fossilization": "the graft is kept for good",
        "remove.begun": "a person's cull begins to fade the block out",
        "remove.before_excision": "the block has faded to nothing and is still there",
        "remove.after_excision": "the block is gone",
        "remove.before_answer": "a person's cull is recorded, whoever asked does not know yet",
        "collect.before_delete": "a collection is about to remove an object, and has removed those before it",
        "collect.set_aside": "a collection has laid an object aside that it may have to put back",
        "finish.before_files": "the final head stands, the final model was not measured",
        "finish.before_answer": "the final model's files are stored, whoever asked does not know yet",
    }
)
"""Every failpoint, and where it stands."""


class Crashed(BaseException):
    """Stands for the end of the process. Not an `Exception`, so that nothing mistakes it for a failure to handle."""


@dataclass(frozen=True)
class Trap:
    """One entry: `action` at the `nth` hit of `name`, which may be `ANY` or `name:detail`."""

    name: str
    action: Action
    nth: int

    def __str__(self) -> str:
        return f"{self.name}={self.action}@{self.nth}"


class Armed:
    """The traps of one process and what was hit. `fired`: the name of the failpoint that raised, if one did."""

    def __init__(self, traps: tuple[Trap, ...], spent: Path | None = None) -> None:
        self.hits: Counter[str] = Counter()
        """By name, by `name:detail`, and under `ANY` all together."""
        self.fired: str | None = None
        self._traps = traps
        self._spent = spent
        self._lock = threading.Lock()

    def hit(self, name: str, detail: str) -> None:
        """Count, and act if this is the hit that a trap waits for."""
        if name not in FAILPOINTS:
            raise ValueError(f"{name!r} is not a registered failpoint")
        keys = (ANY, name, f"{name}:{detail}") if detail else (ANY, name)
        with self._lock:
            if self.fired is not None:
                raise Crashed(f"{name}: this process ended at {self.fired}")
            self.hits.update(keys)
            due = [trap for trap in self._traps if trap.name in keys and self.hits[trap.name] == trap.nth]
            due = [trap for trap in due if self._spend(trap)]
            if any(trap.action == "raise" for trap in due):
                self.fired = keys[-1]
        for trap in due:
            _act(trap, keys[-1])

    def _spend(self, trap: Trap) -> bool:
        """Whether the trap may act: no other process has acted on it."""
        if self._spent is None:
            return True
        self._spent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(self._spent / str(trap), os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w") as file:
            file.write(str(os.getpid()))
        return True


_armed: Armed | None = None


def hit(name: str, detail: str = "") -> None:
    """This thread has come to the failpoint. Does nothing in a process that is not armed."""
    if _armed is not None:
        _armed.hit(name, detail)


def arm_process(environment: Mapping[str, str]) -> None:
    """Arm this process for good, if the environment says so. Raises `ConfigurationError` (ESP-214) for an entry that
    cannot be read or names no failpoint."""
    global _armed
    text = environment.get(VARIABLE, "")
    if text:
        spent = environment.get(SPENT_VARIABLE)
        _armed = Armed(tuple(_trap(entry) for entry in text.split(",")), Path(spent) if spent else None)


@contextmanager
def armed(name: str = ANY, action: Action = "raise", nth: int = 0) -> Iterator[Armed]:
    """Arm this process inside; with `nth` 0 hits are only counted. Not to be nested."""
    global _armed
    if _armed is not None:
        raise RuntimeError("this process is armed already")
    _check(name)
    _armed = made = Armed((Trap(name, action, nth),))
    try:
        yield made
    finally:
        _armed = None


def _trap(entry: str) -> Trap:
    name, _, rest = entry.strip().partition("=")
    action, _, nth = rest.partition("@")
    if action not in get_args(Action) or not nth.isdecimal() or int(nth) < 1:
        raise ConfigurationError(
            "ESP-214",
            f"{VARIABLE}: {entry!r} is no trap",
            hint="Write name=action@n, such as commit.after_blobs=kill@3",
        )
    _check(name)
    return Trap(name, action, int(nth))  # type: ignore[arg-type]


def _check(name: str) -> None:
    if name != ANY and name.partition(":")[0] not in FAILPOINTS:
        raise ConfigurationError("ESP-214", f"no failpoint is called {name!r}", hint="They are listed in failpoints.py")


def _act(trap: Trap, place: str) -> None:
    match trap.action:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "raise":
            raise Crashed(place)
