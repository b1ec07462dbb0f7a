"""Commands that talk to a real Temporal server: `start-run`, `watch`, the updates, `resume`, `replay`."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from recorded_run import DIGEST
from recorded_run import WEIGHTS
from stand_in_run import stand_in_worker
from temporalio.client import Client
from temporalio.service import RPCError

from esper.runtime.temporal.plugin import EsperPlugin
from esper.runtime.urza import migration

pytestmark = pytest.mark.temporal

Cli = Callable[..., Any]


@pytest.fixture
def server(temporal_address: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address, named by the environment, and a migrated home."""
    monkeypatch.setenv("TEMPORAL_ADDRESS", temporal_address)
    home.mkdir()
    asyncio.run(migration.upgrade("default", default_file=home / "urza.db"))
    return temporal_address


@pytest.fixture
def run_id(server: str) -> Iterator[str]:
    """A run id of this test alone; whatever still runs under it is ended, so that no later worker picks it up."""
    name = f"cli-{uuid.uuid4().hex[:8]}"
    yield name

    async def end() -> None:
        client = await Client.connect(server, plugins=[EsperPlugin()])
        try:
            await client.get_workflow_handle(name).terminate()
        except RPCError:
            return

    asyncio.run(end())


@pytest.fixture
def worker(server: str, home: Path) -> Iterator[None]:
    with stand_in_worker(server, home):
        yield


def start(run_id: str, script: str, *more: str) -> list[str]:
    given = ["--quick-start", "digits", "--run-id", run_id]
    return ["start-run", *given, "--set", f"run.name={script}", "--set", "run.max_epochs=3", *more]


def test_start_run_shows_a_run_until_it_ends_and_writes_its_folder(
    cli: Cli, worker: None, run_id: str, folder: Path
) -> None:
    result = cli(*start(run_id, "finishes", "--json"))
    assert (result.code, result.err) == (0, "")
    document = result.json
    assert (document["run_id"], document["outcome"], document["epochs"]) == (run_id, "completed", 3)
    assert (document["digest"], document["output"]) == (DIGEST, f"results/{run_id}")
    assert document["adaptations"][0]["state"] == "fossilized"
    written = folder / "results" / run_id
    assert (written / "model.safetensors").read_bytes() == WEIGHTS
    assert len((written / "metrics.jsonl").read_text().splitlines()) == 3
    assert len(json.loads((written / "history.json").read_text())["decisions"]) == 3


def test_start_run_tells_a_person_what_happens_on_stderr_and_the_result_on_stdout(
    cli: Cli, worker: None, run_id: str, folder: Path
) -> None:
    result = cli(*start(run_id, "finishes", "--output", "mine"))
    assert result.code == 0
    assert f"Run {run_id} has begun. Ctrl-C leaves it running." in result.err
    assert "epoch=3 step=30" in result.err
    assert "event=kept" in result.err
    assert f"esper-cli history {run_id}" in result.err
    assert "epoch=3" not in result.out
    assert "1 adaptation, 1 of them in the model:" in result.out
    assert (folder / "mine" / "growth.json").exists()


def test_the_same_run_id_twice_is_a_conflict(cli: Cli, worker: None, run_id: str, folder: Path) -> None:
    assert cli(*start(run_id, "finishes", "--json")).code == 0
    again = cli(*start(run_id, "finishes", "--output", "other", "--json"))
    assert (again.code, again.error["code"], again.error["run_id"]) == (5, "ESP-501", run_id)
    assert not (folder / "other").exists()
    default = cli(*start(run_id, "finishes", "--json"))
    assert (default.code, default.error["code"]) == (5, "ESP-501")


def test_a_run_that_only_the_server_knows_is_a_conflict_too(cli: Cli, worker: None, run_id: str, home: Path) -> None:
    assert cli(*start(run_id, "finishes", "--json")).code == 0
    (home / "urza.db").unlink()
    asyncio.run(migration.upgrade("default", default_file=home / "urza.db"))
    again = cli(*start(run_id, "finishes", "--output", "other", "--json"))
    assert (again.code, again.error["code"]) == (5, "ESP-501")


def test_a_failed_run_ends_with_its_own_error_and_exit_code(cli: Cli, worker: None, run_id: str, folder: Path) -> None:
    result = cli(*start(run_id, "fails", "--json"))
    assert result.code == 2
    assert result.json["outcome"] == "failed"
    assert (result.error["code"], result.error["run_id"]) == ("ESP-312", run_id)
    assert list(folder.iterdir()) == []
    watched = cli("watch", run_id)
    assert watched.code == 2
    assert "event=failed" in watched.out


def test_a_run_that_died_unrecorded_is_noticed(cli: Cli, worker: None, run_id: str) -> None:
    result = cli(*start(run_id, "dies", "--json"))
    assert (result.code, result.error["code"]) == (1, "ESP-601")
    assert "resume" in result.error["hint"]


def test_without_a_worker_start_run_says_so(
    cli: Cli, run_id: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("esper.commands.actions.launch.ROW_TIMEOUT", 0.5)
    result = cli(*start(run_id, "finishes", "--json"))
    assert (result.code, result.error["code"]) == (3, "ESP-307")
    assert "no worker polls" in result.error["message"]
    assert list(folder.iterdir()) == []


def test_a_home_that_was_never_migrated_is_said_before_the_run_starts(
    cli: Cli, server: str, home: Path, run_id: str
) -> None:
    (home / "urza.db").unlink()
    result = cli(*start(run_id, "finishes", "--json"))
    assert (result.code, result.error["code"]) == (3, "ESP-334")


def test_a_detached_run_is_shown_paused_pinned_watched_and_stopped(cli: Cli, worker: None, run_id: str) -> None:
    started = cli(*start(run_id, "waits", "--detach"))
    assert (started.code, started.out) == (0, f"{run_id}\n")
    assert f"esper-cli watch {run_id}" in started.err
    assert cli("show", run_id, "--json").json["outcome"] == "running"

    paused = cli("pause", run_id, "--json")
    assert (paused.code, paused.error["code"]) == (5, "ESP-504")
    assert "already paused" in paused.error["message"]
    assert cli("pin", run_id, "layers.0").out == "layers.0 is pinned\n"
    unknown = cli("pin", run_id, "layers.9", "--json")
    assert (unknown.code, unknown.out) == (5, "")
    assert "sites: layers.0" in unknown.error["message"]

    again = cli("resume", run_id, "--json")
    assert again.json == {"run_id": run_id, "message": "training goes on", "adaptation_id": None}
    assert cli("stop", run_id, "--json").json["message"] == "stopping for esper-cli"
    watched = cli("watch", run_id)
    assert watched.code == 0
    assert watched.out.splitlines()[-1] == f"event=completed run={run_id} step=30"
    for command in ("stop", "resume"):
        ended = cli(command, run_id, "--json")
        assert ended.code == 5
        assert "completed" in ended.error["message"]


def test_detached_json_is_the_document_of_a_run_that_has_begun(cli: Cli, worker: None, run_id: str) -> None:
    document = cli(*start(run_id, "waits", "--detach", "--json")).json
    assert (document["run_id"], document["outcome"], document["output"]) == (run_id, "running", None)


def test_a_stopped_run_is_resumed_from_its_head_under_its_id(cli: Cli, worker: None, run_id: str) -> None:
    stopped = cli(*start(run_id, "resumed", "--json"))
    assert (stopped.code, stopped.json["outcome"]) == (0, "stopped")
    resumed = cli("resume", run_id)
    assert (resumed.code, resumed.out) == (0, f"{run_id} goes on from epoch 0, step 0\n")
    assert cli("watch", run_id).code == 0
    assert cli("show", run_id, "--json").json["outcome"] == "completed"


@pytest.mark.parametrize(
    "command",
    [
        ["pause", "nothing"],
        ["stop", "nothing"],
        ["resume", "nothing"],
        ["veto", "nothing", "a1"],
        ["cull", "nothing", "fc"],
        ["watch", "nothing"],
        ["adapt", "nothing", "--site", "fc", "--blueprint", "widen", "--set", "units=4"],
        ["replay", "nothing"],
    ],
)
def test_a_run_that_nobody_knows_is_exit_6(cli: Cli, server: str, command: list[str]) -> None:
    result = cli(*command, "--json")
    assert (result.code, result.error["code"]) == (6, "ESP-505")


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["veto", "r1", "r2/a1"], "ESP-209"),
        (["veto", "r1", "first"], "ESP-209"),
        (["adapt", "r1", "--site", "fc", "--blueprint", "widn"], "ESP-421"),
        (["adapt", "r1", "--site", "fc", "--blueprint", "widen", "--set", "units"], "ESP-204"),
        (["adapt", "r1", "--site", "fc", "--blueprint", "widen", "--set", "units=[1]"], "ESP-204"),
        (["adapt", "r1", "--site", "fc", "--blueprint", "widen", "--set", "units=NaN"], "ESP-204"),
    ],
)
def test_what_a_person_asks_is_checked_before_it_is_sent(cli: Cli, command: list[str], code: str) -> None:
    result = cli(*command, "--json")
    assert (result.code, result.error["code"]) == (2, code)


def test_ctrl_c_detaches_and_the_run_goes_on(cli: Cli, worker: None, run_id: str, folder: Path) -> None:
    command = [sys.executable, "-m", "esper", *start(run_id, "waits")]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ,
        # A shell starts what runs in its background with Ctrl-C ignored, and so do the tests that it runs there.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stderr is not None
        deadline = time.monotonic() + 60
        while "has begun" not in process.stderr.readline():
            assert time.monotonic() < deadline
        process.send_signal(signal.SIGINT)
        _, talk = process.communicate(timeout=30)
    assert process.returncode == 130
    assert f"esper-cli watch {run_id}" in talk
    assert "Traceback" not in talk
    assert cli("show", run_id, "--json").json["outcome"] == "running"
    assert list(folder.iterdir()) == []


def test_an_update_that_nobody_answers_is_exit_3(
    cli: Cli, server: str, home: Path, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stand_in_worker(server, home):
        cli(*start(run_id, "waits", "--detach"))
    monkeypatch.setattr("esper.commands.actions.connections.UPDATE_TIMEOUT", timedelta(seconds=1))
    result = cli("pause", run_id, "--json")
    assert (result.code, result.error["code"]) == (3, "ESP-307")
