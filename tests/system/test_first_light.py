"""What `make run` promises, with real processes: a network grows through Temporal, and every bit is accounted for."""

import json
import os
import signal
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from local_stack import LocalStack
from safetensors.torch import load_file
from waiting import until

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]

DIGITS = ("start-run", "--quick-start", "digits", "--json")
SHORT = (
    *(*DIGITS, "--set", "run.max_epochs=20"),
    *("--set", "tamiyo.hold_epochs=1", "--set", "tamiyo.hold_steps=0", "--set", "tamiyo.max_adaptations=3"),
)


@pytest.fixture(scope="module")
def grown(stack: LocalStack) -> dict[str, Any]:
    """One whole `digits` run, as a user starts it."""
    ended = stack.ok(*DIGITS, "--run-id", "digits-1")
    assert ended.out.count("\n{") == 0
    document: dict[str, Any] = ended.document
    return document


@pytest.fixture(scope="module")
def short(stack: LocalStack) -> dict[str, Any]:
    """A run that grows within fewer epochs: replaying all of a run at every task costs the square of its length."""
    document: dict[str, Any] = stack.ok(*SHORT, "--run-id", "short-1").document
    assert [a for a in document["adaptations"] if a["state"] == "fossilized"], document["adaptations"]
    return document


def test_a_network_really_grows(grown: dict[str, Any], stack: LocalStack) -> None:
    assert grown["outcome"] == "completed"
    assert (grown["epochs"], grown["steps"]) == (60, 8460)
    kept = [a for a in grown["adaptations"] if a["state"] == "fossilized"]
    assert kept, grown["adaptations"]
    assert grown["parameters"]["end"] > grown["parameters"]["start"] == 870
    assert grown["decisions"] == 59
    assert grown["compute"]["probe_flops"] > 0
    assert grown["missed"] == grown["divergences"] == 0


def test_the_output_is_the_grown_model(grown: dict[str, Any], stack: LocalStack) -> None:
    output = stack.home.parent / grown["output"]
    assert {path.name for path in output.iterdir()} >= {
        "model.safetensors",
        "growth.json",
        "config.yaml",
        "metrics.jsonl",
        "history.json",
    }
    tensors = load_file(output / "model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == grown["parameters"]["end"]
    assert any(".kasmina." in name for name in tensors)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(1, 61))


def test_training_went_on_between_order_and_graft(grown: dict[str, Any], stack: LocalStack) -> None:
    history = stack.ok("history", "digits-1", "--json").document
    for decision in history["decisions"]:
        if decision["adaptation"] is not None:
            decided_step = decision["epoch"] * 141
            assert decision["adaptation"]["apply_step"] - decided_step == 141
    assert len(history["decisions"]) == 59
    assert all(decision["reason"] for decision in history["decisions"])


@pytest.mark.fault("H1")
def test_the_history_tells_the_story_and_replays(grown: dict[str, Any], stack: LocalStack) -> None:
    deadline = time.monotonic() + 60
    while True:
        replayed = stack.run("replay", "digits-1", "--json")
        if replayed.code == 0 or time.monotonic() > deadline:
            break
        time.sleep(1)
    assert replayed.code == 0, replayed.err


def test_two_runs_of_one_configuration_end_in_the_same_bits(short: dict[str, Any], stack: LocalStack) -> None:
    again = stack.ok(*SHORT, "--run-id", "short-2").document
    assert again["digest"] == short["digest"]
    assert [a["kernel"] for a in again["adaptations"]] == [a["kernel"] for a in short["adaptations"]]


def test_a_run_replayed_at_every_workflow_task_ends_in_the_same_bits(short: dict[str, Any], tmp_path: Path) -> None:
    forgetful = LocalStack(tmp_path / "home", ESPER_MAX_CACHED_WORKFLOWS="0")
    try:
        again = forgetful.ok(*SHORT, "--run-id", "short-1").document
    finally:
        forgetful.ok("down")
    assert again["digest"] == short["digest"]


@pytest.mark.fault("A1", "I11")
def test_a_killed_trainer_costs_no_bit(grown: dict[str, Any], stack: LocalStack) -> None:
    process = stack.start(*DIGITS, "--run-id", "digits-killed")

    def far_enough() -> bool:
        found = stack.run("show", "digits-killed", "--json")
        return found.code == 0 and found.document["epochs"] >= 20

    until(far_enough, "epoch 20", seconds=120, pause=0.2)
    trainer = stack.claimed_trainer("digits-killed")
    assert trainer is not None
    os.kill(trainer, signal.SIGKILL)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    document = json.loads(out)
    assert document["restarts"] == 1
    assert document["digest"] == grown["digest"]


@pytest.mark.slow
@pytest.mark.fault("C3", "I11")
def test_a_lost_temporal_database_costs_no_bit(grown: dict[str, Any], tmp_path: Path) -> None:
    lost = LocalStack(tmp_path / "home")
    try:
        lost.ok("start-run", "--quick-start", "digits", "--run-id", "digits-1", "--detach")
        lost.until("digits-1", lambda shown: shown["epochs"] >= 20, seconds=180)
        assert lost.run("recover", "digits-1").code == 5
        state = lost.stack()
        for pid in (state["supervisor"]["pid"], state["temporal"]["pid"], *(w["pid"] for w in state["workers"])):
            os.kill(pid, signal.SIGKILL)
        for path in lost.home.glob("temporal-*.db*"):
            path.unlink()
        assert lost.run("show", "digits-1", "--json").document["outcome"] == "running"
        lost.ok("recover", "digits-1")
        recovered = lost.until_outcome("digits-1", "completed", seconds=180)
    finally:
        lost.run("down")
    assert recovered["digest"] == grown["digest"]
    assert recovered["divergences"] == 0


def test_another_decision_is_supposed_without_training(grown: dict[str, Any], stack: LocalStack) -> None:
    epoch = next(a["epoch"] for a in grown["adaptations"])
    supposed = stack.ok("what-if", "digits-1", "--epoch", str(epoch), "--decision", "wait", "--json").document
    assert supposed["recorded"]["kind"] == "germinate" and supposed["supposed"]["kind"] == "wait"
    assert "/tezzeret/" in supposed["first_difference"]["recorded"]["what"]
    grow = stack.ok("what-if", "digits-1", "--epoch", "1", "--decision", "layers.2:bottleneck", "--json").document
    ordered = grow["first_difference"]["would_be"]
    assert ordered["argument"]["adaptation"]["site"] == "layers.2" and "/tezzeret/" in ordered["what"]
    assert stack.run("what-if", "digits-1", "--epoch", "999", "--decision", "wait").code == 6
    assert stack.run("what-if", "digits-1", "--epoch", "1", "--decision", "nowhere:bottleneck").code == 2


@pytest.mark.slow
@pytest.mark.fault("I11")
def test_a_branch_repeats_its_parent_or_goes_another_way(grown: dict[str, Any], stack: LocalStack) -> None:
    adaptation = grown["adaptations"][0]
    before = stack.ok("history", "digits-1", "--json").document
    same = stack.ok("fork", "digits-1", "--epoch", str(adaptation["epoch"] - 2), "--run-id", "same", "--json").document
    assert same["digest"] == grown["digest"]
    assert [a["kernel"] for a in same["adaptations"]] == [a["kernel"] for a in grown["adaptations"]]
    late = str(adaptation["epoch"] + 3)
    held = stack.ok("fork", "digits-1", "--epoch", late, "--run-id", "held", "--json").document
    assert held["digest"] == grown["digest"]
    assert held["lineage"]["parent"] == "digits-1" and held["lineage"]["epoch"] == int(late)
    waited = stack.ok(
        *("fork", "digits-1", "--epoch", str(adaptation["epoch"]), "--decision", "wait", "--run-id", "waited"),
        *("--set", "tamiyo.policy=none", "--json"),
    ).document
    assert waited["adaptations"] == [] and waited["digest"] != grown["digest"]
    assert stack.ok("reproduce", "waited", "--json").document["digest"] == waited["digest"]
    listed = {each["run_id"]: each["parent"] for each in stack.ok("list", "--json").document}
    assert listed["waited"] == "digits-1" and listed["digits-1"] is None
    assert stack.ok("history", "digits-1", "--json").document == before
    assert stack.run("fork", "digits-1", "--epoch", "99", "--run-id", "nothing").code == 6
    before_the_branch = stack.run("fork", "held", "--epoch", "2", "--run-id", "nothing")
    assert before_the_branch.code == 6 and "esper-cli fork digits-1 --epoch 2" in before_the_branch.err
    assert stack.run("fork", "digits-1", "--epoch", "5", "--run-id", "same").code == 5


@pytest.mark.fault("I11")
@pytest.mark.parametrize("run_id", ["digits-1", pytest.param("digits-killed", marks=pytest.mark.slow)])
def test_records_alone_reproduce_the_run_without_temporal(
    grown: dict[str, Any], stack: LocalStack, run_id: str
) -> None:
    nowhere = LocalStack(stack.home, TEMPORAL_ADDRESS="127.0.0.1:1")
    reproduced = nowhere.ok("reproduce", run_id, "--json").document
    assert reproduced["clean"]
    assert reproduced["digest"] == reproduced["recorded_digest"] == grown["digest"]
    assert len(reproduced["heads"]) >= 60 and all(head["same"] for head in reproduced["heads"])


@pytest.mark.fault("C8")
def test_the_same_run_id_twice_is_a_conflict(grown: dict[str, Any], stack: LocalStack) -> None:
    ended = stack.run("start-run", "--quick-start", "digits", "--run-id", "digits-1", "--json", "--output", "elsewhere")
    assert ended.code == 5
    assert json.loads(ended.err)["error"]["code"] == "ESP-501"
    assert ended.out == ""
    assert not (stack.home.parent / "elsewhere").exists()


def test_pause_resume_and_stop(stack: LocalStack) -> None:
    stack.ok("start-run", "--quick-start", "digits", "--run-id", "paused-1", "--detach", "--json")
    assert stack.shown("paused-1")["outcome"] in {"running", "completed"}
    stack.ok("pause", "paused-1")
    stack.until_outcome("paused-1", "paused", seconds=60)
    stack.ok("resume", "paused-1")
    stack.ok("stop", "paused-1")
    assert stack.until_outcome("paused-1", "stopped", seconds=60)["digest"] is not None
    resumed = stack.ok("resume", "paused-1")
    assert resumed.code == 0
    assert stack.until_outcome("paused-1", "completed", seconds=120)["epochs"] == 60


def test_runs_are_listed_and_logged(grown: dict[str, Any], stack: LocalStack) -> None:
    assert "digits-1" in {entry["run_id"] for entry in stack.ok("list", "--json").document}
    assert stack.ok("logs", "digits-1").out
    assert stack.ok("seeds", "digits-1", "--json").document
    assert stack.run("show", "digits-9").code == 6


TASK = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
import esper


def task(hidden=6):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(640, 5, generator=generator)
    y = (x[:, :1] * x[:, 1:2]).tanh()
    model = nn.Sequential(nn.Linear(5, hidden), nn.Tanh(), nn.Linear(hidden, 1))
    return esper.Task(
        model=model,
        train=TensorDataset(x[:512], y[:512]),
        validation=TensorDataset(x[512:], y[512:]),
        loss=lambda model, batch: nn.functional.mse_loss(model(batch[0]), batch[1]),
    )
"""

CONFIG = """
run: {name: mine, max_epochs: 3}
task: {target: "my_task:task", arguments: {hidden: 8}}
training: {batch_size: 32}
"""


def test_a_users_own_task_is_what_runs(stack: LocalStack, tmp_path: Path) -> None:
    (tmp_path / "my_task.py").write_text(TASK)
    (tmp_path / "run.yaml").write_text(CONFIG)
    document = stack.ok("start-run", "--config", "run.yaml", "--run-id", "mine-1", "--json", folder=tmp_path).document
    assert document["outcome"] == "completed"
    assert (tmp_path / document["output"] / "model.safetensors").exists()


def test_a_broken_task_fails_with_its_own_code(stack: LocalStack, tmp_path: Path) -> None:
    (tmp_path / "broken_task.py").write_text("def task():\n    raise RuntimeError('no data today')\n")
    (tmp_path / "run.yaml").write_text(CONFIG.replace("my_task", "broken_task"))
    ended = stack.run("start-run", "--config", "run.yaml", "--run-id", "broken-1", "--json", folder=tmp_path)
    assert ended.code == 2
    error = json.loads(ended.err.strip().splitlines()[-1])["error"]
    assert error["code"].startswith("ESP-31")
    assert "no data today" in error["message"] or "hidden" in error["message"]


def test_losses_fall_and_epochs_follow_each_other(grown: dict[str, Any], stack: LocalStack) -> None:
    output = stack.home.parent / grown["output"]
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert all(after["step"] - before["step"] == 141 for before, after in pairwise(lines))
    assert lines[-1]["train_loss"] < lines[0]["train_loss"] / 2
