"""Looking at runs and kernels in a real database and a real store."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from recorded_run import DIGEST
from recorded_run import GROWTH
from recorded_run import WEIGHTS
from recorded_run import RecordedRun

from esper.contracts.assets import Kernel
from esper.contracts.enums import DecisionKind
from esper.contracts.enums import Outcome
from esper.runtime.logs import configure_logging
from esper.runtime.logs import run_context

Cli = Callable[..., Any]
Record = Callable[..., Any]

DOCUMENT_KEYS = {
    *("schema", "run_id", "workflow_id", "outcome", "epochs", "steps", "device", "threads", "restarts", "metrics"),
    *("parameters", "compute", "adaptations", "decisions", "missed", "stall_s", "divergences", "digest", "web_ui"),
    *("output", "warnings", "error", "data_digest", "lineage"),
}


async def whole(run: RecordedRun) -> Kernel:
    return await run.whole()


async def begun(run: RecordedRun) -> None:
    await run.begin()


def test_an_empty_home_has_no_runs_and_no_kernels(cli: Cli, home: Path) -> None:
    for command in (["list"], ["kernels", "list"], ["kernels", "verify"]):
        result = cli(*command, "--json")
        assert (result.code, result.json, result.err) == (0, [], "")
        assert cli(*command).code == 0
    assert not home.exists()


def test_show_prints_the_document_of_a_completed_run(cli: Cli, record: Record) -> None:
    kernel = record(whole)
    result = cli("show", "digits-1", "--json")
    assert result.code == 0
    document = result.json
    assert set(document) == DOCUMENT_KEYS
    assert document["schema"] == 1
    assert (document["run_id"], document["workflow_id"], document["outcome"]) == ("digits-1", "digits-1", "completed")
    assert (document["epochs"], document["steps"], document["device"], document["threads"]) == (4, 40, "cpu", 1)
    assert document["metrics"] == {
        "train_loss": 0.25,
        "val_loss": 0.375,
        "val_accuracy": 0.875,
        "test_accuracy": 0.91,
        "best_epoch": 4,
    }
    assert document["parameters"] == {"start": 870, "end": 886}
    assert document["compute"] == {"training_flops": 4e6, "probe_flops": 4e5}
    assert (document["decisions"], document["missed"], document["stall_s"]) == (4, 1, 1.0)
    assert (document["digest"], document["divergences"], document["restarts"]) == (DIGEST, 0, 0)
    assert document["warnings"] == ["one warning"]
    first = document["adaptations"][0]
    assert first["adaptation_id"] == "digits-1/a1"
    assert (first["epoch"], first["site"], first["seed"], first["blueprint"]) == (1, "layers.0", 0, "bottleneck")
    assert (first["kernel"], first["apply_step"], first["state"]) == (kernel.digest, 20, "fossilized")


def test_show_of_a_run_that_has_only_begun_has_no_result_yet(cli: Cli, record: Record) -> None:
    record(begun)
    document = cli("show", "digits-1", "--json").json
    assert set(document) == DOCUMENT_KEYS
    assert (document["outcome"], document["epochs"], document["digest"], document["output"]) == (
        "running",
        0,
        None,
        None,
    )
    assert document["metrics"] == {"train_loss": None, "val_loss": None, "best_epoch": None}
    assert document["parameters"] == {"start": 870, "end": 870}


def test_show_is_readable(cli: Cli, record: Record) -> None:
    record(whole)
    result = cli("show", "digits-1")
    assert result.code == 0
    assert "completed" in result.out
    assert "4 of 4, 40 steps" in result.out
    assert "2 adaptations, 1 of them in the model:" in result.out
    assert "warning: one warning" in result.err


def test_list_has_the_newest_first_and_respects_its_limit(cli: Cli, record: Record) -> None:
    async def two(run: RecordedRun) -> None:
        await run.begin()
        await RecordedRun(run.library, run.store, run.config, "digits-2").begin()

    record(two)
    entries = cli("list", "--json").json
    assert [entry["run_id"] for entry in entries] == ["digits-2", "digits-1"]
    assert entries[0]["outcome"] == "running"
    assert (entries[0]["epochs"], entries[0]["max_epochs"]) == (0, 4)
    assert [entry["run_id"] for entry in cli("list", "--json", "--limit", "1").json] == ["digits-2"]


def test_tables_are_tab_separated_without_headings_off_the_terminal(cli: Cli, record: Record) -> None:
    record(whole)
    assert cli("list").out.splitlines()[0].split("\t")[:4] == ["digits-1", "completed", "4/4", "40"]


def test_a_near_run_id_is_suggested(cli: Cli, record: Record) -> None:
    record(begun)
    result = cli("show", "digts-1", "--json")
    assert result.code == 6
    assert "digits-1" in result.error["hint"]


def test_seeds_are_those_of_the_last_report(cli: Cli, record: Record) -> None:
    record(whole)
    rows = cli("seeds", "digits-1", "--json").json
    assert [(row["site"], row["index"], row["state"]) for row in rows] == [
        ("layers.0", 0, "training"),
        ("layers.0", 1, "dormant"),
    ]
    assert cli("seeds", "digits-1").out.splitlines()[0].split("\t")[:4] == ["layers.0", "linear", "0", "training"]


def test_history_holds_every_decision_with_what_came_of_it(cli: Cli, record: Record) -> None:
    record(whole)
    document = cli("history", "digits-1", "--json").json
    assert [decision["kind"] for decision in document["decisions"]] == ["germinate", "wait", "germinate", "wait"]
    grown, waited, missed, _ = document["decisions"]
    assert waited["adaptation"] is None
    assert waited["alternatives"][0]["threshold"] == 0.1
    assert grown["adaptation"]["adaptation_id"] == "digits-1/a1"
    assert grown["adaptation"]["judge"]["gain"] == 0.1
    assert [fact["kind"] for fact in grown["adaptation"]["facts"]] == ["graft"]
    assert missed["adaptation"]["state"] == "missed"
    text = cli("history", "digits-1").out
    assert "epoch    2  wait      below_threshold" in text
    assert "digits-1/a1  apply step 20  fossilized  gain 0.1, lower bound 0.08" in text


def test_history_of_a_run_without_decisions_is_empty(cli: Cli, record: Record) -> None:
    record(begun)
    assert cli("history", "digits-1", "--json").json["decisions"] == []
    assert "has not decided" in cli("history", "digits-1").err


def test_export_writes_every_file_once(cli: Cli, record: Record, folder: Path) -> None:
    record(whole)
    result = cli("export", "digits-1", "--output", "out", "--json")
    assert result.json == {"run_id": "digits-1", "output": "out"}
    assert {path.name for path in (folder / "out").iterdir()} == {
        "model.safetensors",
        "growth.json",
        "config.yaml",
        "metrics.jsonl",
        "history.json",
    }
    assert (folder / "out" / "model.safetensors").read_bytes() == WEIGHTS
    assert (folder / "out" / "growth.json").read_bytes() == GROWTH
    lines = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["epoch"], line["val_accuracy"]) for line in lines] == [
        (1, 0.5),
        (2, 0.75),
        (3, 1 - 0.5 / 3),
        (4, 0.875),
    ]
    assert len(json.loads((folder / "out" / "history.json").read_text())["decisions"]) == 4
    again = cli("export", "digits-1", "--output", "out", "--json")
    assert (again.code, again.error["code"]) == (2, "ESP-208")


def test_show_names_the_default_output_folder_once_it_is_there(cli: Cli, record: Record) -> None:
    record(whole)
    assert cli("show", "digits-1", "--json").json["output"] is None
    assert cli("export", "digits-1").out == "results/digits-1\n"
    assert cli("show", "digits-1", "--json").json["output"] == "results/digits-1"


def test_a_run_without_a_final_model_cannot_be_exported(cli: Cli, record: Record, folder: Path) -> None:
    record(begun)
    result = cli("export", "digits-1", "--json")
    assert (result.code, result.error["code"]) == (5, "ESP-504")
    assert list(folder.iterdir()) == []


def test_export_of_a_damaged_object_is_an_integrity_error(cli: Cli, record: Record, home: Path, folder: Path) -> None:
    record(whole)
    path = home / "objects" / "sha256" / DIGEST.removeprefix("sha256:")
    path.chmod(0o600)
    path.write_bytes(b"X" + WEIGHTS[1:])
    result = cli("export", "digits-1", "--json")
    assert (result.code, result.error["code"]) == (4, "ESP-401")
    assert list(folder.iterdir()) == []


def test_logs_are_those_of_the_run(cli: Cli, record: Record, home: Path) -> None:
    record(begun)
    assert cli("logs", "digits-1", "--json").json == []
    assert cli("logs", "nothing").code == 6
    root, before = logging.getLogger(), list(logging.getLogger().handlers)
    level = root.level
    configure_logging(home, "trainer")
    try:
        with run_context("digits-1"):
            logging.getLogger("esper.test").warning("a line of this run")
        logging.getLogger("esper.test").warning("a line of no run")
    finally:
        for handler in root.handlers:
            handler.close()
        root.handlers = before
        root.setLevel(level)
    lines = cli("logs", "digits-1", "--json").json
    assert [line["message"] for line in lines] == ["a line of this run"]
    assert "warning trainer a line of this run" in cli("logs", "digits-1").out


def test_kernels_are_listed_shown_and_verified(cli: Cli, record: Record) -> None:
    kernel = record(whole)
    assert [entry["digest"] for entry in cli("kernels", "list", "--json").json] == [kernel.digest]
    assert kernel.digest in cli("kernels", "list").out
    short = kernel.digest[7:15]
    shown = cli("kernels", "show", short, "--json").json
    assert shown["digest"] == kernel.digest
    assert shown["certificate"]["passed"] is True
    assert "certificate.birth_difference" in cli("kernels", "show", kernel.digest).out
    verified = cli("kernels", "verify", "--json")
    assert (verified.code, verified.json) == (0, [{"kernel": kernel.digest, "valid": True, "error": None}])


@pytest.mark.parametrize("part", ["manifest", "weights", "certificate"])
def test_a_damaged_kernel_is_exit_4(cli: Cli, record: Record, home: Path, part: str) -> None:
    kernel = record(whole)
    path = home / "objects" / "sha256" / getattr(kernel, part).digest.removeprefix("sha256:")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o600)
    path.write_bytes(bytes(data))
    result = cli("kernels", "verify", "--json")
    assert result.code == 4
    assert result.json[0]["valid"] is False
    assert result.error["code"] == "ESP-401"
    assert "DAMAGED" in cli("kernels", "verify").out


@pytest.mark.parametrize(
    ("name", "code"), [("sha256:" + "0" * 64, 6), ("0123", 6), ("not-hex", 2), ("", 2), ("a" * 65, 2)]
)
def test_a_kernel_that_is_not_there(cli: Cli, record: Record, name: str, code: int) -> None:
    record(whole)
    result = cli("kernels", "show", name, "--json")
    assert (result.code, result.error["code"]) == (code, "ESP-430")


def test_blueprints_are_listed_and_shown(cli: Cli) -> None:
    names = [entry["name"] for entry in cli("blueprints", "list", "--json").json]
    assert names == sorted(names) and {"attention", "bottleneck", "lowrank", "noop", "se_gate", "widen"} <= set(names)
    assert cli("blueprints", "list").out.count("\n") == len(names)
    assert cli("blueprints", "show", "widen", "--json").json["formula"].startswith("y2 += B ")
    wrong = cli("blueprints", "show", "wden", "--json")
    assert wrong.code == 2
    assert "widen" in wrong.error["hint"]


def test_an_unfinished_run_has_no_seeds_to_show(cli: Cli, record: Record) -> None:
    record(begun)
    assert cli("seeds", "digits-1", "--json").json == []
    assert cli("seeds", "digits-1").code == 0


def test_a_failed_run_shows_its_error(cli: Cli, record: Record) -> None:
    async def failed(run: RecordedRun) -> None:
        await run.begin()
        await run.decide(1, DecisionKind.WAIT)
        await run.fail("ESP-312", "task.target returned None")

    record(failed)
    result = cli("show", "digits-1")
    assert result.code == 0
    assert "failed" in result.out
    assert "error[ESP-312]: task.target returned None" in result.err
    document = cli("show", "digits-1", "--json").json
    assert document["outcome"] == Outcome.FAILED.value
    assert document["error"]["code"] == "ESP-312"
