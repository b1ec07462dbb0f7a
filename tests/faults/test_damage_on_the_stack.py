"""On the real stack, by the command line: damaged checkpoints, an accepted drift, a database from an older copy."""

import asyncio
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from local_stack import LocalStack

from esper.runtime.urza.ledger import CommittedHead
from esper.runtime.urza.library import Library

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

EPOCHS = 50
QUICK = (
    *("start-run", "--quick-start", "digits", "--json"),
    *("--set", f"run.max_epochs={EPOCHS}", "--set", "tamiyo.policy=none"),
)


@pytest.fixture(scope="module")
def expected(stack: LocalStack) -> Iterator[str]:
    """The digest of the run that nobody disturbed."""
    yield stack.ok(*QUICK, "--run-id", "undisturbed").document["digest"]


def stopped(stack: LocalStack, run_id: str) -> list[CommittedHead]:
    """A run that was stopped on its way; its heads."""
    stack.ok(*QUICK, "--run-id", run_id, "--detach")
    return stop(stack, run_id, beyond=2)


def stop(stack: LocalStack, run_id: str, *, beyond: int) -> list[CommittedHead]:
    stack.until(run_id, lambda document: document["epochs"] >= beyond)
    stack.ok("stop", run_id)
    document = stack.until(run_id, lambda document: document["outcome"] == "stopped")
    assert document["epochs"] < EPOCHS
    return heads(stack, run_id)


def heads(stack: LocalStack, run_id: str) -> list[CommittedHead]:
    async def read() -> list[CommittedHead]:
        async with await Library.open("default", default_file=stack.home / "urza.db") as library:
            return list(await library.heads(run_id))

    return asyncio.run(read())


def model_file(stack: LocalStack, head: CommittedHead) -> Path:
    folder = stack.home / "objects" / "sha256"
    manifest = json.loads((folder / head.manifest.digest.removeprefix("sha256:")).read_bytes())
    return folder / str(manifest["model"]["digest"]).removeprefix("sha256:")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o600)
    path.write_bytes(bytes(data))


@pytest.mark.fault("D4", "J", "I7", "I11")
def test_a_stopped_run_goes_on_from_the_checkpoint_before_a_damaged_one(stack: LocalStack, expected: str) -> None:
    newest = stopped(stack, "damaged")[-1]
    flip(model_file(stack, newest))
    stack.ok("resume", "damaged")
    stack.ok("watch", "damaged")
    document = stack.ok("show", "damaged", "--json").document
    assert (document["outcome"], document["digest"], document["divergences"]) == ("completed", expected, 0)
    assert any("was damaged" in warning for warning in document["warnings"])
    (rewind,) = stack.ok("history", "damaged", "--json").document["rewinds"]
    assert rewind["from_head"] == newest.head.digest
    assert len(list((stack.home / "objects" / "damaged").iterdir())) == 1


@pytest.mark.fault("D4", "J")
def test_two_damaged_checkpoints_stop_a_run_until_one_is_restored(stack: LocalStack, expected: str) -> None:
    committed = stopped(stack, "both")
    paths = [model_file(stack, head) for head in committed[-2:]]
    for path in paths:
        flip(path)
    refused = stack.run("resume", "both", "--json")
    assert (refused.code, json.loads(refused.err.splitlines()[-1])["error"]["code"]) == (4, "ESP-402")
    document = stack.ok("show", "both", "--json").document
    assert (document["outcome"], document["error"]["code"]) == ("failed", "ESP-402")
    assert [item.head for item in heads(stack, "both")] == [item.head for item in committed]
    for path in paths:
        flip(path)
    stack.ok("resume", "both")
    stack.ok("watch", "both")
    assert stack.ok("show", "both", "--json").document["digest"] == expected


def test_another_recipe_is_refused_by_its_fields_and_goes_on_when_accepted(stack: LocalStack, expected: str) -> None:
    stopped(stack, "drifting")
    refused = stack.run("resume", "drifting", "--set", "optimizer.lr=0.001", "--json")
    error = json.loads(refused.err.splitlines()[-1])["error"]
    assert (refused.code, error["code"]) == (5, "ESP-502")
    assert "optimizer.lr was 0.012, is 0.001" in error["message"]
    stack.ok("resume", "drifting", "--set", "optimizer.lr=0.001", "--accept-drift")
    stack.ok("watch", "drifting")
    document = stack.ok("show", "drifting", "--json").document
    assert (document["outcome"], document["divergences"]) == ("completed", 1)
    assert document["digest"] != expected
    assert any("optimizer.lr was 0.012, is 0.001" in warning for warning in document["warnings"])
    (drift,) = stack.ok("history", "drifting", "--json").document["drifts"]
    assert drift["fields"] == {"optimizer.lr": [0.012, 0.001]}
    assert stack.ok("reproduce", "drifting", "--json").document["clean"]


@pytest.mark.fault("E5", "I9", "I11")
def test_a_database_from_an_older_copy_is_noticed_and_recovered_from(stack: LocalStack, expected: str) -> None:
    stopped(stack, "restored")
    database, copy = stack.home / "urza.db", stack.home / "copy.db"
    with sqlite3.connect(database) as source, sqlite3.connect(copy) as target:
        source.backup(target)
    stack.ok("resume", "restored")
    stop(stack, "restored", beyond=1)
    stack.ok("down")
    for name in ("urza.db-wal", "urza.db-shm"):
        (stack.home / name).unlink(missing_ok=True)
    copy.replace(database)
    stack.ok("up")
    refused = stack.run("resume", "restored", "--json")
    error = json.loads(refused.err.splitlines()[-1])["error"]
    assert (refused.code, error["code"]) == (5, "ESP-502") and "esper-cli recover restored" in error["hint"]
    stack.ok("recover", "restored")
    stack.ok("watch", "restored")
    assert stack.ok("show", "restored", "--json").document["digest"] == expected
