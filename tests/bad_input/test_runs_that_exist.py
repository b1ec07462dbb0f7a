"""What is asked of a run that is there, or of what it stored, and cannot be had: rows 15, 28, 29, 36, 37 and 39."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Awaitable
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from recorded_run import RecordedRun

from esper.contracts.enums import DecisionKind
from esper.contracts.enums import Outcome
from esper.contracts.operational import HeadRef
from esper.runtime.configuration import load_config
from esper.runtime.tolaria.checkpoint import SCHEMA_VERSION
from esper.runtime.urza import migration
from esper.runtime.urza.library import Library
from esper.runtime.urza.objects import FolderStore

Say = Callable[..., Any]


@pytest.fixture
def stopped(home: Path) -> Path:
    """A home with the run `mine`, which was stopped after one epoch."""
    home.mkdir()

    async def tell(run: RecordedRun) -> None:
        await run.begin()
        await run.epoch(1)
        await run.decide(1, DecisionKind.WAIT)
        await run.end(Outcome.STOPPED)

    asyncio.run(recorded(home, tell))
    return home


@pytest.fixture
def running(home: Path) -> Path:
    """A home with the run `mine`, which has trained one epoch and has no final model."""
    home.mkdir()

    async def tell(run: RecordedRun) -> None:
        await run.begin()
        await run.epoch(1)

    asyncio.run(recorded(home, tell))
    return home


async def recorded(home: Path, tell: Callable[[RecordedRun], Awaitable[Any]]) -> None:
    await migration.upgrade("default", default_file=home / "urza.db")
    async with await Library.open("default", default_file=home / "urza.db") as library:
        config = load_config(None, quick_start="digits", environment={})
        await tell(RecordedRun(library, FolderStore(home / "objects"), config, "mine"))


def test_row_15_another_configuration_is_shown_by_its_fields_before_anything_is_contacted(
    say: Say, stopped: Path
) -> None:
    answer = say("resume", "mine", "--set", "optimizer.lr=0.5", "--set", "training.batch_size=16", "--json")
    assert (answer.code, answer.error["code"], answer.error["run_id"]) == (5, "ESP-502", "mine")
    assert "optimizer.lr was 0.012, is 0.5; training.batch_size was 64, is 16" in answer.error["message"]
    assert "--accept-drift" in answer.error["hint"]
    assert say("show", "mine").code == 0


@pytest.mark.parametrize("value", ["urza.objects=/elsewhere", "run.name=other"])
def test_row_15_what_a_run_keeps_for_life_cannot_be_changed_at_all(say: Say, stopped: Path, value: str) -> None:
    answer = say("resume", "mine", "--set", value, "--accept-drift", "--json")
    assert (answer.code, answer.error["code"]) == (2, "ESP-204")


@pytest.mark.parametrize("value", ["optimizer.lr=fast", "optimizer.learning_rat=1", "optimizer"])
def test_row_15_a_wrong_setting_is_named(say: Say, stopped: Path, value: str) -> None:
    answer = say("resume", "mine", "--set", value, "--json")
    assert answer.code == 2 and "optimizer" in answer.error["message"]


@pytest.mark.parametrize("command", ["resume", "recover"])
def test_row_15_a_run_that_is_not_there_is_exit_6_with_a_near_name(say: Say, stopped: Path, command: str) -> None:
    answer = say(command, "mime", "--accept-drift", "--json")
    assert (answer.code, answer.error["code"]) == (6, "ESP-505") and "mine" in answer.error["hint"]


def test_row_28_a_kernel_is_asked_for_by_its_digest(say: Say, stopped: Path) -> None:
    for name, code in (("sha256:" + "0" * 64, 6), ("../../etc/passwd", 2), ("x" * 64, 2), ("0" * 65, 2)):
        answer = say("kernels", "show", name, "--json")
        assert (answer.code, answer.error["code"]) == (code, "ESP-430")


def test_row_36_a_variable_that_says_nothing_or_something_else_is_named(
    say: Say, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("ESPER_URZA_DATABASE", ""), ("ESPER_URZA_OBJECTS", "ftp://x")):
        with monkeypatch.context() as changed:
            changed.setenv(name, value)
            answer = say("gc", "--dry-run", "--json")
            assert answer.code == 2
            assert name in answer.error["message"] or "urza.objects" in answer.error["message"]


def test_row_36_a_bucket_without_credentials_says_which_are_missing(
    say: Say, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("ESPER_S3_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("ESPER_URZA_OBJECTS", "s3://bucket/prefix")
    answer = say("gc", "--dry-run", "--json")
    assert (answer.code, answer.error["code"]) == (3, "ESP-323") and "AWS_ACCESS_KEY_ID" in answer.error["hint"]


def test_row_37_without_a_temporary_folder_its_variable_is_named(say: Say, stopped: Path) -> None:
    """In a process of its own: Python asks for the folder once."""
    code = (
        "import tempfile; tempfile.tempdir = '/nonexistent'\n"
        "from esper.runtime.scratch import scratch_folder\n"
        "from esper.errors import EsperError\n"
        "try:\n    scratch_folder('test').__enter__()\n"
        "except EsperError as error:\n    print(error.code, error)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert found.stdout.startswith("ESP-208 no temporary folder can be made") and "TMPDIR" in found.stdout


def test_row_37_a_narrow_umask_is_no_obstacle(say: Say, home: Path) -> None:
    before = os.umask(0o077)
    try:
        assert say("db", "upgrade").code == 0
        assert say("list").code == 0
    finally:
        os.umask(before)
    assert (home / "urza.db").stat().st_mode & 0o077 == 0


def _put_head(home: Path, data: bytes) -> None:
    """The run's newest head becomes these bytes."""

    async def tell() -> None:
        async with await Library.open("default", default_file=home / "urza.db") as library:
            before = (await library.run("mine")).head
            assert before is not None
            manifest = FolderStore(home / "objects").put(data)
            lease = await library.claim("mine", "queue")
            head = HeadRef(digest=manifest.digest, parent=before.digest, step=20, epoch=2)
            await library.commit_head(lease, head=head, manifest=manifest, parent=before.digest)

    asyncio.run(tell())


@pytest.mark.unchecked("I5", "I7")
def test_row_39_a_checkpoint_of_a_newer_esper_is_refused_by_name(say: Say, running: Path, folder: Path) -> None:
    _put_head(running, json.dumps({"schema_version": SCHEMA_VERSION + 1}).encode())
    answer = say("export", "mine", "--format", "safetensors", "--json")
    assert (answer.code, answer.error["code"]) == (4, "ESP-408")
    assert f"format {SCHEMA_VERSION + 1}" in answer.error["message"]


@pytest.mark.unchecked("I5", "I7")
@pytest.mark.parametrize("data", [b"", b'{"schema_version": 1', b"\x80\x04\x95"])
def test_row_39_what_is_no_checkpoint_is_refused_by_name(say: Say, running: Path, folder: Path, data: bytes) -> None:
    _put_head(running, data)
    answer = say("export", "mine", "--format", "safetensors", "--json")
    assert (answer.code, answer.error["code"]) == (4, "ESP-407")
