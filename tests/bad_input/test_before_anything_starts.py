"""What `start-run` refuses before it starts, writes or contacts what it need not; numbers are those of the rows."""

import asyncio
import json
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer
from recorded_run import RecordedRun

from esper.commands.actions import connections
from esper.contracts.enums import DecisionKind
from esper.contracts.enums import Outcome
from esper.runtime.configuration import load_config
from esper.runtime.urza import migration
from esper.runtime.urza.library import Library
from esper.runtime.urza.objects import FolderStore

Say = Callable[..., Any]
DIGITS = ("start-run", "--quick-start", "digits")
DOCUMENTS = {
    "row 2: syntax": (b"run: {seed: 1\n", "ESP-202"),
    "row 2: tab": (b"run:\n\tseed: 1\n", "ESP-202"),
    "row 2: utf-16": ("run: {seed: 1}\n".encode("utf-16"), "ESP-202"),
    "row 4: twice": (b"optimizer: {lr: 1, lr: 2}\n", "ESP-202"),
    "row 8: alias": (b"run: &a {seed: 1}\ntask: *a\n", "ESP-205"),
    "row 8: tag": (b"run: !!python/object:os.system {}\n", "ESP-205"),
    "row 8: deep": (b"run: " + b"[" * 10_000, "ESP-205"),
}
VALUES = {
    "row 7: epochs": ("run.max_epochs=1.5", 2, "ESP-204", "from 1 to 1000000"),
    "row 16: no colon": ("task.target=json", 2, "ESP-310", "package.module:function"),
    "row 18: no seeds": ("kasmina.seeds_per_layer=0", 2, "ESP-204", "from 1 to 64"),
    "row 18: seeds": ("kasmina.seeds_per_layer=1000000", 2, "ESP-204", "from 1 to 64"),
    "row 18: cache": ("kasmina.cache_size_mb=-1", 2, "ESP-204", "from 1 to 65536"),
    "row 18: larger than any memory": ("kasmina.cache_size_mb=100000000", 2, "ESP-204", "from 1 to 65536"),
    "row 19: unknown kind": ("run.device=tpu", 2, "ESP-315", "auto, cpu, cuda, cuda:N, mps"),
    "row 22: no bucket": ("urza.objects='s3://'", 2, "ESP-204", "no bucket name"),
    "row 22: other scheme": ("urza.objects='gs://bucket/x'", 2, "ESP-204", "no place for objects"),
    "row 22: no folder": ("urza.objects=/proc/esper", 3, "ESP-321", "/proc/esper"),
    "row 23: malformed": ("urza.database=not-a-url", 3, "ESP-331", "not a database URL"),
    "row 23: other driver": ("urza.database='mysql://me:geheim@host/x'", 3, "ESP-331", "mysql"),
    "row 23: bad port": ("urza.database='postgresql://me:geheim@host:abc/x'", 3, "ESP-331", "***@host:abc"),
    "row 23: refused": ("urza.database='postgresql://me@127.0.0.1:1/x'", 3, "ESP-333", "refused"),
    "row 23: a password": ("urza.database='postgresql://me:geheim@127.0.0.1:1/x'", 2, "ESP-204", "the password"),
    "row 23: no tables": ("urza.database='sqlite:///fresh.db'", 3, "ESP-334", "has no tables yet"),
    "row 24: port 0": ("temporal.address=127.0.0.1:0", 2, "ESP-210", "127.0.0.1:0"),
    "row 24: port 70000": ("temporal.address=127.0.0.1:70000", 2, "ESP-210", "127.0.0.1:70000"),
    "row 24: no port": ("temporal.address=127.0.0.1", 2, "ESP-210", "not host:port"),
}


@pytest.mark.parametrize(("content", "code"), DOCUMENTS.values(), ids=DOCUMENTS)
def test_a_document_that_is_no_configuration(say: Say, folder: Path, home: Path, content: bytes, code: str) -> None:
    (folder / "run.yaml").write_bytes(content)
    answer = say("start-run", "--config", "run.yaml", "--json")
    assert (answer.code, answer.error["code"], answer.out) == (2, code, "")
    assert answer.error["message"].startswith("run.yaml:")
    assert not home.exists()


@pytest.mark.parametrize(("value", "exit_code", "code", "said"), VALUES.values(), ids=VALUES)
def test_a_value_that_cannot_be_used(
    say: Say, folder: Path, home: Path, value: str, exit_code: int, code: str, said: str
) -> None:
    answer = say(*DIGITS, "--set", value, "--json")
    assert (answer.code, answer.error["code"], answer.out) == (exit_code, code, "")
    assert said in answer.error["message"]
    assert "geheim" not in answer.err
    assert not home.exists()
    assert list(folder.iterdir()) == []
    text = say(*DIGITS, "--set", value)
    assert text.err.startswith(f"error[{code}]: ")
    assert ".." not in text.err.replace("://...", "")


def test_row_18_a_number_out_of_range_is_not_told_to_be_quoted(say: Say) -> None:
    assert say(*DIGITS, "--set", "run.threads=0", "--json").error["hint"] is None


@pytest.mark.parametrize("output", ["", " ", "~no-such-user-of-esper/x", "/proc/esper"])
def test_row_12_an_output_that_is_no_folder(say: Say, folder: Path, output: str) -> None:
    answer = say(*DIGITS, "--output", output, "--dry-run", "--json")
    assert (answer.code, answer.error["code"]) == (2, "ESP-208")
    assert "disk is full" not in answer.error["message"]
    assert list(folder.iterdir()) == []


def test_row_20_settings_of_temporal_that_are_no_toml_are_one_line(
    say: Say, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "temporal.toml").write_text("profile:\n\taddress\n")
    monkeypatch.setenv("TEMPORAL_CONFIG_FILE", str(folder / "temporal.toml"))
    text = say(*DIGITS)
    assert text.code == 2
    assert text.err.count("\n") == 1
    assert text.err.startswith("error[ESP-202]: the Temporal settings cannot be read: ")
    assert "line 1" in text.err


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name, value in {"ACCESS_KEY_ID": "me", "SECRET_ACCESS_KEY": "geheim", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    monkeypatch.setenv("ESPER_S3_ENDPOINT_URL", endpoint)
    yield endpoint
    server.stop()


def test_row_22_a_missing_bucket_is_named(say: Say, home: Path, s3: str) -> None:
    answer = say(*DIGITS, "--set", "urza.objects='s3://absent/x'", "--json")
    assert (answer.code, answer.error["code"]) == (3, "ESP-322")
    assert "'absent'" in answer.error["message"]
    assert s3 in answer.error["message"]
    assert not home.exists()


def test_row_22_an_endpoint_that_refuses_is_named(say: Say, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPER_S3_ENDPOINT_URL", "http://127.0.0.1:1")
    answer = say(*DIGITS, "--set", "urza.objects='s3://absent/x'", "--json")
    assert (answer.code, answer.error["code"]) == (3, "ESP-321")
    assert "http://127.0.0.1:1" in answer.error["message"]
    assert "geheim" not in answer.err


def test_row_22_a_bucket_that_is_there_is_no_obstacle(say: Say, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = boto3.client("s3", endpoint_url=s3)
    client.create_bucket(Bucket="there")
    begun: list[object] = []

    def interrupted(*arguments: object) -> None:
        begun.append(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr("esper.runtime.stack.up", interrupted)
    assert say(*DIGITS, "--set", "urza.objects='s3://there/x'").code == 130
    assert len(begun) == 1


@pytest.mark.parametrize("content", [b"long enough to be taken for a page, and no database" * 4])
def test_row_23_a_file_that_is_no_database(say: Say, folder: Path, home: Path, content: bytes) -> None:
    (folder / "x.db").write_bytes(content)
    answer = say(*DIGITS, "--set", "urza.database='sqlite:///x.db'", "--json")
    assert (answer.code, answer.error["code"]) == (3, "ESP-333")
    assert "not a database" in answer.error["message"]
    assert (folder / "x.db").read_bytes() == content
    assert not home.exists()


@pytest.mark.parametrize(
    ("outcome", "hint"),
    [
        (None, "esper-cli watch mine"),
        (Outcome.STOPPED, "esper-cli resume mine"),
        (Outcome.FAILED, "esper-cli resume mine"),
        (Outcome.COMPLETED, "another --run-id"),
    ],
)
def test_row_14_a_run_that_exists_is_a_conflict_before_a_stack_is_started(
    say: Say, home: Path, outcome: Outcome | None, hint: str
) -> None:
    async def record() -> None:
        await migration.upgrade("default", default_file=home / "urza.db")
        async with await Library.open("default", default_file=home / "urza.db") as library:
            config = load_config(None, quick_start="digits", environment={})
            run = RecordedRun(library, FolderStore(home / "objects"), config, "mine")
            await run.begin()
            if outcome is not None:
                await run.epoch(1)
                await run.decide(1, DecisionKind.WAIT)
                await (run.fail("ESP-601", "it broke") if outcome is Outcome.FAILED else run.end(outcome))

    home.mkdir()
    asyncio.run(record())
    answer = say(*DIGITS, "--run-id", "mine", "--json")
    assert (answer.code, answer.error["code"], answer.error["run_id"]) == (5, "ESP-501", "mine")
    assert f"exists already: {(outcome or Outcome.RUNNING).value} since " in answer.error["message"]
    assert hint in answer.error["hint"]


def test_relative_places_are_those_of_the_person_not_of_the_workers(folder: Path) -> None:
    values = ["urza.database='sqlite+aiosqlite:///x.db'", "urza.objects=objects"]
    urza = connections.read_configuration("digits", None, values).urza
    assert urza.database == f"sqlite+aiosqlite:///{folder / 'x.db'}"
    assert urza.objects == str(folder / "objects")
    assert connections.read_configuration("digits", None, []).urza.database == "default"


def test_row_37_a_home_that_is_a_file_or_no_path(say: Say, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "file").touch()
    for home in (folder / "file", folder / ("x" * 300)):
        monkeypatch.setenv("ESPER_HOME", str(home))
        for arguments in (("list",), ("down",), DIGITS):
            answer = say(*arguments, "--json")
            assert (answer.code, answer.error["code"]) == (2, "ESP-208")
    assert [path.name for path in folder.iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["development", "phase1_mvp"])
def test_every_packaged_configuration_that_has_its_data_can_be_rehearsed(say: Say, home: Path, name: str) -> None:
    answer = say("start-run", "--config", name, "--dry-run", "--json")
    assert answer.code == 0
    assert json.loads(answer.out)["sites"]
    assert not home.exists()


@pytest.mark.parametrize("name", ["digits-cnn", "teacher"])
def test_every_quick_start_that_has_its_data_can_be_rehearsed(say: Say, home: Path, name: str) -> None:
    answer = say("start-run", "--quick-start", name, "--dry-run", "--json")
    assert answer.code == 0
    assert json.loads(answer.out)["sites"]
    assert not home.exists()
