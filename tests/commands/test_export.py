"""Taking a run's model away: real records of a real grown model, exported and used where Esper is not."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from recorded_run import STEPS
from recorded_run import RecordedRun
from torch import nn

import esper
from esper.contracts.enums import Outcome
from esper.contracts.operational import HeadRef
from esper.contracts.orders import FinishedRun
from esper.runtime.kasmina.keeping.persistence import saved_files
from esper.runtime.tezzeret.artifact import digest_of
from esper.runtime.tolaria.checkpoint import snapshot
from esper.runtime.tolaria.checkpoint import write
from esper.runtime.tolaria.live.run_state import RunState
from esper.runtime.tolaria.plan import prepare
from esper.runtime.tolaria.tasks import load_task
from esper.runtime.tolaria.trainee import Trainee
from esper.runtime.tolaria.trainee import begin

Cli = Callable[..., Any]
Record = Callable[..., Any]


def grown(run: RecordedRun) -> Trainee:
    """The run's model after a few steps, with two blocks that do something."""
    trainee = begin(*prepare(run.config))
    for site, blueprint in (("layers.0", "widen"), ("layers.2", "bottleneck")):
        made = esper.graft(trainee.model, site, blueprint, optimizer=trainee.optimizer)
        for name, parameter in trainee.model.get_submodule(f"{site}.kasmina.{made.seed}").named_parameters():
            if name.startswith("up."):
                nn.init.normal_(parameter, std=0.2)
    trainee.advance()
    return trainee


async def finished(run: RecordedRun) -> str:
    """A completed run whose stored files are those of a really grown model; returns its digest."""
    await run.begin()
    await run.epoch(1)
    model = grown(run).model
    files = {name: run.store.put(data) for name, data in saved_files(model).items()}
    digest = esper.weights_digest(model)
    await run._outcome(
        Outcome.COMPLETED, finished=FinishedRun(head=run._head, digest=digest, metrics={}, parameters=1, files=files)
    )
    return digest


async def unfinished(run: RecordedRun) -> str:
    """A run that has trained one epoch, with a real checkpoint as its head; returns the model's digest."""
    await run.begin()
    trainee = grown(run)
    trainee.step, trainee.completed = STEPS, 1
    manifest = write(snapshot(trainee, RunState()), run.store.put)
    head = HeadRef(digest=manifest.digest, parent=run._head.digest, step=STEPS, epoch=1)
    await run.library.commit_head(run._lease, head=head, manifest=manifest, parent=head.parent, report=None)
    return esper.weights_digest(trainee.model)


def loaded_digest(folder: Path, run_config: Any) -> str:
    base = load_task(run_config.task, run_config.run.seed).model
    return esper.weights_digest(esper.load(folder, base))


USER = """
    import sys
    sys.modules["esper"] = None
    import torch
    from modeling_digits import load_model
    model = load_model()
    x = torch.zeros(3, 64)
    print(tuple(model(x).shape), sum(p.numel() for p in model.parameters()))
"""


def test_python_export_of_a_finished_run_works_where_esper_cannot_be_imported(
    cli: Cli, record: Record, folder: Path, config: Any
) -> None:
    digest = record(finished)
    result = cli("export", "digits-1", "--format", "python", "--output", "out", "--verify", "--json")
    assert (result.code, result.err) == (0, "")
    document = result.json
    assert (document["run_id"], document["output"], document["format"], document["step"]) == (
        *("digits-1", "out", "python"),
        STEPS,
    )
    assert 0 <= document["verified"]["max_difference"] <= document["verified"]["bound"] < 1e-4
    names = {path.name for path in (folder / "out").iterdir()}
    assert (
        names
        == set(document["files"])
        == {
            *("model.safetensors", "growth.json", "config.yaml", "metrics.jsonl", "history.json", "probe.safetensors"),
            *("modeling_digits.py", "modeling_digits.safetensors", "export.python.json"),
        }
    )
    assert loaded_digest(folder / "out", config) == digest
    code = "\n".join(line.strip() for line in USER.strip().splitlines())
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder / "out", capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("(3, 10) ")


def test_a_folder_that_holds_an_export_is_checked_again(cli: Cli, record: Record, folder: Path) -> None:
    record(finished)
    assert cli("export", "digits-1", "--format", "safetensors", "--output", "out", "--verify").code == 0
    before = {path: path.stat().st_mtime_ns for path in (folder / "out").iterdir()}
    again = cli("export", "digits-1", "--format", "safetensors", "--output", "out", "--verify", "--json")
    assert again.code == 0
    assert again.json["verified"]["max_difference"] < 1e-6
    assert {path: path.stat().st_mtime_ns for path in (folder / "out").iterdir()} == before
    assert cli("export", "digits-1", "--format", "safetensors", "--output", "out").code == 2
    weights = folder / "out" / "plain.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 4
    weights.write_bytes(bytes(data))
    damaged = cli("export", "digits-1", "--verify", "--output", "out", "--json")
    assert (damaged.code, damaged.error["code"]) == (4, "ESP-401")
    assert "plain.safetensors" in damaged.error["message"]


def test_a_wrong_export_is_exit_4(cli: Cli, record: Record, folder: Path) -> None:
    record(finished)
    assert cli("export", "digits-1", "--format", "python", "--output", "out").code == 0
    code = folder / "out" / "modeling_digits.py"
    manifest = folder / "out" / "export.python.json"
    text = code.read_text()
    wrong = text.replace("        return ", "        return 2.0 * ", 1)
    assert wrong != text
    code.write_text(wrong)
    changed = cli("export", "digits-1", "--format", "python", "--verify", "--output", "out", "--json")
    assert (changed.code, changed.error["code"]) == (4, "ESP-407")
    assert "modeling_digits.py" in changed.error["message"]
    body = json.loads(manifest.read_text())
    data = wrong.encode()
    body["files"]["modeling_digits.py"] = {"digest": digest_of(data), "size_bytes": len(data)}
    manifest.write_text(json.dumps(body))
    differs = cli("export", "digits-1", "--format", "python", "--verify", "--output", "out", "--json")
    assert (differs.code, differs.error["code"]) == (4, "ESP-406"), differs.error
    assert "differs by 1 of its largest value" in differs.error["message"]


def test_a_run_that_has_not_ended_gives_the_model_of_its_last_head(
    cli: Cli, record: Record, folder: Path, config: Any
) -> None:
    digest = record(unfinished)
    result = cli("export", "digits-1", "--output", "plain", "--json")
    assert result.code == 0
    assert (result.json["step"], result.json["format"]) == (STEPS, None)
    assert loaded_digest(folder / "plain", config) == digest
    verified = cli("export", "digits-1", "--output", "weights", "--verify")
    assert verified.code == 0
    assert "verified on the probe batch" in verified.err
    plain = load_task(config.task, config.run.seed).model
    esper.unwrap(esper.load(folder / "weights", plain))
    stored = (folder / "weights" / "plain.safetensors").read_bytes()
    tensors = safetensors.torch.load(stored)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in plain.state_dict().items())


def test_onnx_export_is_checked_by_its_own_runtime(cli: Cli, record: Record, folder: Path) -> None:
    pytest.importorskip("onnxruntime")
    record(finished)
    result = cli("export", "digits-1", "--format", "onnx", "--verify", "--json")
    assert (result.code, result.err) == (0, "")
    assert result.json["output"] == "results/digits-1-onnx"
    assert (folder / "results" / "digits-1-onnx" / "model.onnx").stat().st_size > 1000


def test_an_unknown_format_is_a_usage_error_and_writes_nothing(cli: Cli, record: Record, folder: Path) -> None:
    record(finished)
    result = cli("export", "digits-1", "--format", "pickle", "--json")
    assert (result.code, result.error["code"]) == (2, "ESP-204")
    assert "safetensors, python, onnx" in result.error["hint"]
    assert list(folder.iterdir()) == []


def test_export_without_a_format_loads_no_torch(record: Record, home: Path, folder: Path) -> None:
    record(finished)
    code = (
        "import sys\nfrom esper.cli import run\ncode = run(['export', 'digits-1', '--output', 'out'])\n"
        "print(code, 'torch' in sys.modules)\nimport os\nsys.stdout.flush()\nos._exit(0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.splitlines()[-1] == "0 False", done.stderr
