"""Urza's database is lost, on a real stack: `db rebuild` tells every run again, ended ones are as they were, and one
that was under way ends in the bits of the run that nobody disturbed. Then the server's database is lost as well."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from local_stack import LocalStack
from temporalio.client import Client
from waiting import until

pytestmark = [pytest.mark.temporal, pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.fault("E2", "I11")]

QUICK = (
    *("start-run", "--quick-start", "digits", "--json"),
    *("--set", "run.max_epochs=16"),
    *("--set", "tamiyo.hold_epochs=1", "--set", "tamiyo.hold_steps=0", "--set", "tamiyo.max_adaptations=3"),
    *("--set", "tezzeret.timeout_s=400"),
)
"""Sixteen epochs with a graft that is culled and one that is kept."""

TRAP = "epoch.before_report=stop@8"
"""The verdict on the first graft was told, and its fact, executed since, was not: epoch 8 is the first with it."""

ENDED = ("undisturbed", "branch", "stopped", "forgotten")
TABLES = {
    "runs": "run_id, config, outcome, created, head, device, threads, parameters_start, finished, restarts, warnings, "
    "failure, lineage",
    "heads": "run_id, digest, number, parent, step, epoch, manifest_bytes, lease_gen",
    "facts": "run_id, seq, adaptation_id, kind, decides, apply_step, fact",
    "reports": "run_id, epoch, step, report",
    "decisions": "run_id, epoch, decision",
    "adaptations": "adaptation_id, run_id, number, state, adaptation",
    "judgements": "adaptation_id, run_id, verdict, report",
    "builds": "adaptation_id, run_id, kernel",
    "histories": "run_id, workflow_id, temporal_run_id, sequence, digest, size_bytes",
    "rewinds": "run_id, number, from_head, to_head, lease_gen",
    "divergences": "run_id, record, key, digest, second",
}
"""All that is kept of a run, but for who holds its lease."""


def rows(file: Path, table: str, run_id: str) -> list[tuple[Any, ...]]:
    with contextlib.closing(sqlite3.connect(f"file:{file}?mode=rw", uri=True, timeout=30)) as database:
        return sorted(database.execute(f"select {TABLES[table]} from {table} where run_id = ?", (run_id,)).fetchall())


@dataclass(frozen=True)
class Loss:
    """A home whose Urza was lost: what it had before, and what the rebuild said."""

    stack: LocalStack
    before: Path
    shown: dict[str, Any]
    """What `show --json` said of every ended run."""
    listed: Any
    dry: dict[str, Any]
    rebuilt: dict[str, Any]

    @property
    def file(self) -> Path:
        return self.stack.home / "urza.db"

    def digest(self) -> str:
        return str(self.shown["undisturbed"]["digest"])


def show(stack: LocalStack, run_id: str) -> dict[str, Any]:
    """What people see of a run, but for the address of a Web UI, which there is only while the stack is up."""
    document: dict[str, Any] = stack.ok("show", run_id, "--json").document
    return document | {"web_ui": None}


def adaptation_states(home: Path, run_id: str) -> list[str]:
    return [str(row[3]) for row in rows(home / "urza.db", "adaptations", run_id)]


def epochs(home: Path, run_id: str) -> int:
    try:
        return len(rows(home / "urza.db", "reports", run_id))
    except sqlite3.OperationalError:  # not made yet, or not yet migrated
        return 0


def all_stored(home: Path, run_id: str) -> bool:
    """Whether the historian has been through with a run: its own history comes first, then those of its decisions,
    then those of its kernels."""
    workflows = {row[1] for row in rows(home / "urza.db", "histories", run_id)}
    decided = max(row[1] for row in rows(home / "urza.db", "decisions", run_id))
    forged = {f"{run_id}/tezzeret/{row[0].rpartition('/')[2]}" for row in rows(home / "urza.db", "builds", run_id)}
    return {run_id, f"{run_id}/tamiyo/{decided}", *forged} <= workflows


def cancel(stack: LocalStack, run_id: str) -> None:
    """As in the Web UI, which means stop: a command of its own takes longer to start than these epochs last."""

    async def main() -> None:
        client = await Client.connect(stack.stack()["temporal"]["address"])
        await client.get_workflow_handle(run_id).cancel()

    asyncio.run(main())


def kill_everything(stack: LocalStack) -> None:
    state = stack.stack()
    for pid in (state["supervisor"]["pid"], state["temporal"]["pid"], *(each["pid"] for each in state["workers"])):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


def lose(home: Path) -> None:
    for file in home.glob("urza.db*"):
        file.unlink()


@pytest.fixture(scope="module")
def loss(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loss]:
    folder = tmp_path_factory.mktemp("lost")
    spent, home = folder / "spent", folder / "home"
    spent.mkdir()
    (spent / TRAP).write_text("kept from acting")
    stack = LocalStack(home, ESPER_FAILPOINTS=TRAP, ESPER_FAILPOINTS_SPENT=str(spent))
    try:
        stack.ok("up")
        stack.ok(*QUICK, "--run-id", "undisturbed", timeout=500)
        fork = ("fork", "undisturbed", "--epoch", "9", "--decision", "wait", "--run-id", "branch", "--json")
        stack.ok(*fork, timeout=500)
        for run_id in ("stopped", "forgotten"):
            stack.ok(*QUICK, "--run-id", run_id, "--detach")
            until(lambda: epochs(home, run_id) >= 6, "six epochs")  # noqa: B023
            cancel(stack, run_id)
        for run_id in ENDED:
            until(lambda: all_stored(home, run_id), f"the histories of {run_id}")  # noqa: B023
        shown = {run_id: show(stack, run_id) for run_id in ENDED}
        (spent / TRAP).unlink()
        stack.ok(*QUICK, "--run-id", "killed", "--detach")
        until(lambda: (spent / TRAP).exists(), TRAP)
        kill_everything(stack)
        assert adaptation_states(home, "killed") == ["culled"]
        listed = stack.ok("list", "--json").document
        with contextlib.closing(sqlite3.connect(home / "urza.db")) as database:
            database.execute("pragma wal_checkpoint(truncate)")
        before = folder / "before.db"
        shutil.copyfile(home / "urza.db", before)
        lose(home)
        dry = stack.ok("db", "rebuild", "--dry-run", "--json").document
        assert not (home / "urza.db").exists()
        rebuilt = stack.ok("db", "rebuild", "--json").document
        yield Loss(stack, before, shown, listed, dry, rebuilt)
    finally:
        stack.run("down")


def test_every_run_is_restored_and_a_dry_run_says_so_before(loss: Loss) -> None:
    assert {run["run_id"]: run["outcome"] for run in loss.rebuilt["runs"]} == {
        "undisturbed": "completed",
        "branch": "completed",
        "stopped": "stopped",
        "forgotten": "stopped",
        "killed": "running",
    }
    assert all(run["restored"] and not run["missing"] for run in loss.rebuilt["runs"])
    assert loss.dry == loss.rebuilt | {"dry_run": True}
    assert loss.rebuilt["elsewhere"] == loss.rebuilt["blueprints"] == []


@pytest.mark.parametrize("run_id", ENDED)
@pytest.mark.parametrize("table", TABLES)
def test_an_ended_run_has_every_row_that_it_had(loss: Loss, run_id: str, table: str) -> None:
    assert rows(loss.file, table, run_id) == rows(loss.before, table, run_id)


def test_a_verdict_whose_fact_nobody_told_is_that_fact_again(loss: Loss) -> None:
    found = rows(loss.file, "facts", "killed")
    assert [fact[3] for fact in found] == ["graft", "cull"]
    assert [fact[:6] for fact in found] == [fact[:6] for fact in rows(loss.before, "facts", "killed")]


def test_ended_runs_are_shown_and_listed_as_before(loss: Loss) -> None:
    assert {run_id: show(loss.stack, run_id) for run_id in ENDED} == loss.shown
    listed = loss.stack.ok("list", "--json").document
    assert [run for run in listed if run["run_id"] != "killed"] == [r for r in loss.listed if r["run_id"] != "killed"]
    history = loss.stack.ok("history", "undisturbed", "--json").document
    assert len(history["decisions"]) == 15 and history["workflow"]["missing"] is None


def test_no_kernel_is_lost(loss: Loss) -> None:
    stored = {kernel["digest"]: kernel for kernel in loss.stack.ok("kernels", "list", "--json").document}
    with contextlib.closing(sqlite3.connect(loss.before)) as database:
        had = dict(database.execute("select digest, state from kernels").fetchall())
    assert {digest: kernel["state"] for digest, kernel in stored.items()} == had


def test_an_ended_run_is_reproduced(loss: Loss) -> None:
    assert loss.stack.ok("reproduce", "undisturbed", "--json", timeout=500).document["digest"] == loss.digest()


def test_what_has_runs_is_never_overwritten(loss: Loss) -> None:
    before = loss.file.read_bytes()
    refused = loss.stack.run("db", "rebuild", "--json")
    assert refused.code == 5
    assert json.loads(refused.err.splitlines()[-1])["error"]["code"] == "ESP-504"
    assert loss.file.read_bytes() == before


def test_a_run_whose_processes_were_killed_goes_on_to_the_same_bits(loss: Loss) -> None:
    loss.stack.ok("up")

    def ended() -> dict[str, Any] | None:
        document: dict[str, Any] = loss.stack.ok("show", "killed", "--json").document
        return document if document["outcome"] not in ("running", "paused") else None

    document = until(ended, "the end of the killed run", seconds=500, pause=1.0)
    assert document["outcome"] == "completed"
    assert document["digest"] == loss.digest()
    states = [adaptation["state"] for adaptation in document["adaptations"]]
    assert states == [adaptation["state"] for adaptation in loss.shown["undisturbed"]["adaptations"]]
    assert document["missed"] == document["divergences"] == 0


def test_nothing_is_rebuilt_while_the_local_stack_is_up(loss: Loss) -> None:
    loss.stack.ok("up")
    elsewhere = loss.before.with_name("elsewhere.db")
    refused = loss.stack.run("db", "rebuild", "--database", f"sqlite+aiosqlite:///{elsewhere}", "--json")
    assert refused.code == 5
    error = json.loads(refused.err.splitlines()[-1])["error"]
    assert error["code"] == "ESP-504" and "esper-cli down" in error["hint"]
    assert not elsewhere.exists()


def completed(stack: LocalStack, run_id: str) -> dict[str, Any]:
    def ended() -> dict[str, Any] | None:
        document: dict[str, Any] = stack.ok("show", run_id, "--json").document
        return document if document["outcome"] == "completed" else None

    found: dict[str, Any] = until(ended, f"the end of {run_id}", seconds=500, pause=1.0)
    return found


def test_a_stopped_run_is_resumed_to_the_same_bits(loss: Loss) -> None:
    loss.stack.ok("up")
    loss.stack.ok("resume", "stopped")
    assert completed(loss.stack, "stopped")["digest"] == loss.digest()


def test_a_run_that_the_server_forgot_too_is_told_by_its_objects_and_recovered(loss: Loss) -> None:
    loss.stack.ok("up")
    home = loss.stack.home
    completed(loss.stack, "stopped")
    for run_id in (*ENDED, "killed"):
        until(lambda: all_stored(home, run_id), f"the histories of {run_id}")  # noqa: B023
    shown = {run_id: show(loss.stack, run_id) for run_id in (*ENDED, "killed")}
    loss.stack.ok("down")
    lose(home)
    for file in home.glob("temporal-*.db*"):
        file.unlink()
    rebuilt = loss.stack.ok("db", "rebuild", "--json").document
    assert {run["run_id"] for run in rebuilt["runs"] if run["restored"]} == shown.keys()
    assert {run_id: show(loss.stack, run_id) for run_id in shown} == shown
    loss.stack.ok("recover", "forgotten")
    assert completed(loss.stack, "forgotten")["digest"] == loss.digest()
