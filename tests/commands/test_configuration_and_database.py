"""`config`, `db`, the output folder, and everything that `start-run` refuses before it does anything."""

import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from esper.errors import ConfigurationError
from esper.runtime.run_document import check_output_folder
from esper.runtime.run_document import write_output_folder

Cli = Callable[..., Any]


def test_config_init_writes_a_file_that_validates(cli: Cli, folder: Path) -> None:
    assert cli("config", "init").out == "esper.yaml\n"
    assert cli("config", "validate", "esper.yaml").code in (0, 2)
    text = (folder / "esper.yaml").read_text()
    again = cli("config", "init", "--json")
    assert again.code == 2
    other = cli("config", "init")
    assert (other.code, other.err.split(":")[0]) == (2, "error[ESP-208]")
    assert (folder / "esper.yaml").read_text() == text
    assert cli("config", "init", "missing/esper.yaml").code == 2


def test_config_show_resolves_every_key(cli: Cli) -> None:
    result = cli("config", "show", "--quick-start", "digits", "--set", "optimizer.lr=1e-3", "--json")
    assert result.json["optimizer"]["lr"] == 0.001
    assert result.json["tamiyo"]["hold_epochs"] == 6
    text = cli("config", "show", "--quick-start", "digits", "--set", "optimizer.lr=1e-3").out
    assert YAML(typ="safe").load(text) == result.json


def test_config_show_needs_a_source_and_lists_them(cli: Cli) -> None:
    result = cli("config", "show", "--json")
    assert (result.code, result.error["code"]) == (2, "ESP-206")
    assert "digits-cnn" in result.error["hint"]
    assert "phase1_mvp" in result.error["hint"]


def test_config_validate_says_all_errors_at_once(cli: Cli, folder: Path) -> None:
    (folder / "bad.yaml").write_text("task: {name: digits}\ntraining: {learning_rat: 1}\nrun: {max_epochs: 0}\n")
    result = cli("config", "validate", "bad.yaml")
    assert result.code == 2
    assert "learning_rat" in result.err
    assert "max_epochs" in result.err
    (folder / "good.yaml").write_text("task: {name: digits}\n")
    assert cli("config", "validate", "good.yaml", "--json").json == {"file": "good.yaml", "valid": True}
    assert cli("config", "validate", "good.yaml").out == "good.yaml: valid\n"


def test_config_schema_is_a_json_schema(cli: Cli) -> None:
    assert {"run", "task", "tamiyo"} <= cli("config", "schema").json["properties"].keys()


def test_db_is_checked_upgraded_and_checked(cli: Cli, home: Path) -> None:
    before = cli("db", "check", "--json")
    assert (before.code, before.error["code"]) == (3, "ESP-334")
    assert not home.exists()
    assert cli("db", "upgrade", "--json").json["state"] == "current"
    assert cli("db", "upgrade").code == 0
    assert cli("db", "check", "--json").json["state"] == "current"
    assert "as it should be" in cli("db", "check").out


def test_db_takes_another_database_and_masks_its_password(cli: Cli, folder: Path) -> None:
    url = f"sqlite+aiosqlite:///{folder / 'other.db'}"
    assert cli("db", "upgrade", "--database", url).code == 0
    assert (folder / "other.db").exists()
    wrong = cli("db", "check", "--database", "mysql://me:geheim@host/x", "--json")
    assert (wrong.code, wrong.error["code"]) == (3, "ESP-331")
    assert "geheim" not in wrong.err


def test_db_newer_than_this_esper_is_refused(cli: Cli, home: Path) -> None:

    cli("db", "upgrade")
    with sqlite3.connect(home / "urza.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    for command in (["db", "check"], ["list"]):
        result = cli(*command, "--json")
        assert (result.code, result.error["code"]) == (3, "ESP-334")
        assert "newer" in result.error["message"]


@pytest.mark.parametrize("text", ["", " ", "a\0b", "../x", "a/../../x"])
def test_what_is_no_output_folder(folder: Path, text: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        check_output_folder(text)
    assert refused.value.code == "ESP-208"


def test_an_output_folder_is_new_or_empty_and_not_made_by_the_check(folder: Path) -> None:
    (folder / "file").write_text("")
    (folder / "empty").mkdir()
    (folder / "full").mkdir()
    (folder / "full" / "x").write_text("")
    (folder / "loop").symlink_to(folder / "loop")
    assert check_output_folder("new/deep") == folder / "new" / "deep"
    assert check_output_folder("empty") == folder / "empty"
    assert check_output_folder("a/../b") == folder / "b"
    assert check_output_folder(str(folder.parent / "elsewhere")) == folder.parent / "elsewhere"
    for bad in ("file", "file/below", "full", "loop", "x" * 300):
        with pytest.raises(ConfigurationError) as refused:
            check_output_folder(bad)
        assert refused.value.code == "ESP-208"
    assert sorted(path.name for path in folder.iterdir()) == ["empty", "file", "full", "loop"]


def test_an_output_folder_appears_whole_or_not_at_all(folder: Path) -> None:
    write_output_folder(folder / "a" / "out", {"x": b"1", "y": b"2"})
    assert (folder / "a" / "out" / "y").read_bytes() == b"2"
    (folder / "empty").mkdir()
    write_output_folder(folder / "empty", {"x": b"1"})
    with pytest.raises(ConfigurationError) as refused:
        write_output_folder(folder / "b", {"x": b"1", "no/such": b"2"})
    assert refused.value.code == "ESP-208"
    assert sorted(path.name for path in folder.iterdir()) == ["a", "empty"]


REFUSED = [
    ([], 2, "ESP-206"),
    (["--quick-start", "cifar99"], 2, "ESP-206"),
    (["--quick-start", "digits", "--config", "x.yaml"], 2, "ESP-206"),
    (["--config", "nothing.yaml"], 2, "ESP-201"),
    (["--quick-start", "digits", "--set", "training.learning_rat=1"], 2, "ESP-203"),
    (["--quick-start", "digits", "--set", "optimizer.lr=.nan"], 2, "ESP-204"),
    (["--quick-start", "digits", "--run-id", "../../etc"], 2, "ESP-209"),
    (["--quick-start", "digits", "--run-id", "x" * 300], 2, "ESP-209"),
    (["--quick-start", "digits", "--output", "../out"], 2, "ESP-208"),
    (["--quick-start", "digits", "--set", "tamiyo.blueprints=[widn]"], 2, "ESP-204"),
    (["--quick-start", "digits", "--set", "tamiyo.policy=cleverest"], 2, "ESP-204"),
    (["--quick-start", "digits", "--set", "task.name=digts"], 2, "ESP-206"),
    (["--quick-start", "digits", "--set", "run.device=cuda:7"], 2, "ESP-315"),
    (["--quick-start", "cifar10"], 3, "ESP-207"),
    (["--quick-start", "digits", "--set", "temporal.address=127.0.0.1:1"], 3, "ESP-301"),
    (["--quick-start", "digits", "--set", "temporal.address=127.0.0.1:99999"], 2, "ESP-210"),
    (["--quick-start", "digits", "--set", "temporal.address=temporal.example.com:7233"], 2, "ESP-204"),
]


@pytest.mark.parametrize(("arguments", "exit_code", "code"), REFUSED)
def test_start_run_refuses_before_anything_is_written(
    cli: Cli, home: Path, folder: Path, arguments: list[str], exit_code: int, code: str
) -> None:
    result = cli("start-run", *arguments, "--json")
    assert (result.code, result.error["code"], result.out) == (exit_code, code, "")
    assert result.err.count("\n") == 1
    assert not home.exists()
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("target", ["nopkg:build", "json:loads", "os:system", "builtins:eval", "sys:exit"])
def test_a_target_is_looked_for_but_never_imported(cli: Cli, folder: Path, home: Path, target: str) -> None:
    (folder / "run.yaml").write_text(f"task: {{target: '{target}'}}\n")
    result = cli("start-run", "--config", "run.yaml", "--json")
    assert (result.code, result.error["code"]) == (2, "ESP-310")
    assert not home.exists()


def test_an_empty_variable_is_named(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPER_URZA_DATABASE", "")
    result = cli("list", "--json")
    assert (result.code, result.error["code"]) == (2, "ESP-211")
    assert "ESPER_URZA_DATABASE" in result.error["message"]


def test_an_old_or_missing_torch_is_said_at_once(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"torch": "2.1.0+cpu", "temporalio": "1.35.0"}
    monkeypatch.setattr("esper.commands.actions.versions.installed", found.get)
    result = cli("start-run", "--quick-start", "digits", "--json")
    assert (result.code, result.error["code"]) == (2, "ESP-101")
    assert "2.1.0" in result.error["message"]
    assert "2.10" in result.error["message"]


def test_a_dry_run_builds_the_task_and_contacts_nothing(cli: Cli, home: Path, folder: Path) -> None:
    result = cli("start-run", "--quick-start", "digits", "--dry-run", "--run-id", "dry", "--json")
    assert result.code == 0
    document = result.json
    assert document["run_id"] == "dry"
    assert document["config"]["task"]["name"] == "digits"
    assert document["cost"]["parameters"] == 870
    assert document["cost"]["steps"] == document["cost"]["steps_per_epoch"] * 60
    assert [site["site"] for site in document["sites"]] == ["layers.0", "layers.2", "layers.4"]
    assert document["sites"][0]["blueprints"].keys() == {"bottleneck", "widen"}
    assert not home.exists()
    assert list(folder.iterdir()) == []
    text = cli("start-run", "--quick-start", "digits", "--dry-run").out
    assert "steps_per_epoch" in text
    assert "layers.0\tlinear\t650" in text


def test_a_dry_run_checks_a_users_own_task(cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "no_task_of_mine.py").write_text("def make():\n    return 5\n")
    (folder / "run.yaml").write_text("task: {target: 'no_task_of_mine:make'}\n")
    monkeypatch.syspath_prepend(str(folder))
    result = cli("start-run", "--config", "run.yaml", "--dry-run", "--json")
    assert (result.code, result.error["code"]) == (2, "ESP-312")


def test_doctor_says_of_everything_how_it_is(cli: Cli, home: Path) -> None:
    result = cli("doctor", "--json")
    checks = {check["name"]: check for check in result.json}
    assert set(checks) == {
        *("python", "esper", "torch", "temporalio", "home", "sqlite", "database", "objects", "temporal"),
        *("temporal program", "devices", "compiler", "go"),
    }
    assert {check["state"] for check in result.json} <= {"ok", "warn"}
    assert "cpu" in checks["devices"]["message"]
    assert result.code == 0
    assert not home.exists()


def test_doctor_finds_what_is_wrong_and_probes_the_store(
    cli: Cli, folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ESPER_URZA_DATABASE", "oracle://me:geheim@host/x")
    monkeypatch.setenv("ESPER_URZA_OBJECTS", str(folder / "objects"))
    monkeypatch.setenv("TEMPORAL_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("ESPER_TEMPORAL_CLI", "/nowhere/temporal")
    result = cli("doctor")
    assert result.code == 1
    assert "geheim" not in result.out
    lines = result.out.splitlines()
    assert any(line.startswith("fail  database: [ESP-331]") for line in lines)
    assert any(line.startswith("fail  temporal: [ESP-301]") for line in lines)
    assert any(line.startswith("fail  temporal program: [ESP-306]") for line in lines)
    assert any(line.startswith("ok    objects:") and "put again" in line for line in lines)
    assert [path for path in (folder / "objects").rglob("*") if path.is_file()] == []


def test_down_without_a_stack_says_so_and_makes_nothing(cli: Cli, home: Path) -> None:
    assert cli("down").out == "nothing was running\n"
    assert cli("down", "--json").json == {"ended": []}
    assert not home.exists()


def test_a_worker_role_that_does_not_exist_is_exit_2(folder: Path) -> None:
    command = [sys.executable, "-m", "esper", "worker", "wizard"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error[ESP-")
    assert "orchestrator" in done.stderr
