"""`db rebuild` on histories that lie as objects in a home's store: what it restores, shows and refuses."""

import base64
import json
import sqlite3
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from postgres_server import tcp_postgres

from esper.runtime.urza.objects import FolderStore

pytestmark = pytest.mark.fault("E2")

HISTORIES = Path(__file__).parent.parent / "replay" / "histories"
Cli = Callable[..., Any]


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def database(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """The URL of a database that is not made yet, which the environment and the runs name; of both kinds."""
    if request.param == "sqlite":
        url = f"sqlite+aiosqlite:///{tmp_path / 'urza.db'}"
        monkeypatch.setenv("ESPER_URZA_DATABASE", url)
        yield url
    else:
        with tcp_postgres() as server:
            monkeypatch.setenv("ESPER_URZA_DATABASE", server.url())
            yield server.url()


def store(home: Path, *scenes: str, database: str = "default") -> list[str]:
    """The histories of these scenes as the historian would have stored them; gives the run ids."""
    objects, found = FolderStore(home / "objects"), []
    objects.put(b'{"events":[{"not":"a history"}]}')
    objects.put(b"\x00\x01 tensors")
    for scene in scenes:
        for path in sorted(HISTORIES.glob(f"{scene}.*.json")):
            document = json.loads(path.read_text())
            first = document["events"][0]["workflowExecutionStartedEventAttributes"]
            found.append(first["workflowId"])
            objects.put(json.dumps(configured(document, database), separators=(",", ":")).encode())
    return sorted({run for run in found if "/" not in run})


def configured(node: Any, database: str) -> Any:
    """The same with another database in every configuration."""
    if isinstance(node, dict):
        changed = {key: configured(value, database) for key, value in node.items()}
        return changed | ({"data": _data(node["data"], database)} if isinstance(node.get("data"), str) else {})
    return [configured(item, database) for item in node] if isinstance(node, list) else node


def _data(value: str, database: str) -> str:
    text = base64.b64decode(value).replace(b'"database":"default"', f'"database":{json.dumps(database)}'.encode())
    return base64.b64encode(text).decode()


def test_stored_runs_come_back_into_either_kind_of_database(cli: Cli, home: Path, database: str) -> None:
    runs = store(home, "grow_and_keep", "wait_only", "lose_pause_and_stop", database=database)
    dry = cli("db", "rebuild", "--stored-only", "--dry-run", "--json")
    assert dry.code == 0
    assert cli("db", "check").code == 3
    rebuilt = cli("db", "rebuild", "--stored-only", "--json")
    assert rebuilt.code == 0, rebuilt.err
    assert rebuilt.json == dry.json | {"dry_run": False}
    assert [run["run_id"] for run in rebuilt.json["runs"] if run["restored"]] == [
        run["run_id"] for run in rebuilt.json["runs"]
    ]
    assert sorted(run["run_id"] for run in cli("list", "--json").json) == runs
    for run in rebuilt.json["runs"]:
        shown = cli("show", run["run_id"], "--json").json
        assert (shown["outcome"], shown["epochs"]) == (run["outcome"], run["epochs"])
        assert cli("history", run["run_id"]).code == 0
        # The scenes were played without a store, so their checkpoints were never there.
        assert any("its objects are gone" in what for what in run["missing"])
    again = cli("db", "rebuild", "--stored-only", "--json")
    assert (again.code, again.error["code"]) == (5, "ESP-504")
    assert "not overwritten" in again.error["message"]
    assert "Move it away" in again.error["hint"]


def test_people_read_a_line_a_run_and_what_nothing_tells(cli: Cli, home: Path) -> None:
    (run_id,) = store(home, "grow_and_keep")
    result = cli("db", "rebuild", "--stored-only")
    assert result.code == 0
    assert result.out.split("\t")[:4] == [run_id, "completed", "6", "60"]
    assert f"{run_id}: nothing tells" in result.err


def test_a_run_that_cannot_be_read_is_named_and_the_others_are_restored(cli: Cli, home: Path) -> None:
    (good,) = store(home, "wait_only")
    broken = json.loads((HISTORIES / "grow_and_keep.run-0.json").read_text())
    answer = next(e for e in broken["events"] if "activityTaskCompletedEventAttributes" in e)
    answer["activityTaskCompletedEventAttributes"]["result"]["payloads"][0]["data"] = "e30="
    FolderStore(home / "objects").put(json.dumps(broken, separators=(",", ":")).encode())
    result = cli("db", "rebuild", "--stored-only", "--json")
    assert (result.code, result.error["code"]) == (4, "ESP-408")
    assert {run["run_id"]: run["restored"] for run in result.json["runs"]}[good] is True
    assert [run["run_id"] for run in cli("list", "--json").json] == [good]


def test_runs_of_another_database_are_left_out(cli: Cli, home: Path, tmp_path: Path) -> None:
    (mine,) = store(home, "wait_only")
    other = f"sqlite+aiosqlite:///{tmp_path / 'other.db'}"
    theirs = store(home, "grow_and_keep", database=other)
    result = cli("db", "rebuild", "--stored-only", "--json")
    assert [run["run_id"] for run in result.json["runs"]] == [mine]
    assert result.json["elsewhere"] == theirs
    assert cli("db", "rebuild", "--stored-only", "--database", other, "--json").json["elsewhere"] == [mine]


def test_without_any_history_nothing_is_made(cli: Cli, home: Path) -> None:
    result = cli("db", "rebuild", "--stored-only", "--json")
    assert (result.code, result.error["code"]) == (6, "ESP-505")
    assert not (home / "urza.db").exists()


def test_a_server_that_cannot_be_reached_is_not_passed_over(
    cli: Cli, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(home, "wait_only")
    monkeypatch.setenv("TEMPORAL_ADDRESS", "127.0.0.1:1")
    result = cli("db", "rebuild", "--json")
    assert (result.code, result.error["code"]) == (3, "ESP-301")
    assert "--stored-only" in result.error["hint"]
    assert not (home / "urza.db").exists()


def test_a_database_of_another_revision_is_refused(cli: Cli, home: Path) -> None:
    store(home, "wait_only")
    cli("db", "upgrade")
    with sqlite3.connect(home / "urza.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    result = cli("db", "rebuild", "--stored-only", "--json")
    assert (result.code, result.error["code"]) == (3, "ESP-334")


def test_a_database_with_runs_stays_as_it_is(cli: Cli, home: Path, record: Callable[..., Any]) -> None:
    record(lambda run: run.whole())
    store(home, "wait_only")
    before = (home / "urza.db").read_bytes()
    result = cli("db", "rebuild", "--stored-only", "--json")
    assert (result.code, result.error["code"]) == (5, "ESP-504")
    assert (home / "urza.db").read_bytes() == before
