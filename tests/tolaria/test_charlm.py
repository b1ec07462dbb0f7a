"""`charlm`: which text it is, how it is split and encoded, and that its small GPT learns it in a run."""

import hashlib
import json
import math
import sysconfig
from pathlib import Path

import pytest
import torch
from torch.nn import functional

import esper
from esper.contracts.config import EsperConfig
from esper.contracts.config import TaskConfig
from esper.contracts.enums import Outcome
from esper.contracts.orders import RunRecord
from esper.errors import DataUnavailable
from esper.errors import RunConflict
from esper.runtime.configuration import list_quick_starts
from esper.runtime.configuration import load_config
from esper.runtime.run_document import RunView
from esper.runtime.run_document import run_document
from esper.runtime.tolaria.data.data_checks import check_task
from esper.runtime.tolaria.data.small_gpt import SmallGPT
from esper.runtime.tolaria.data.source_text import CHARACTERS_OF_EACH
from esper.runtime.tolaria.data.source_text import MODULES
from esper.runtime.tolaria.data.source_text import VOCABULARY
from esper.runtime.tolaria.data.source_text import encode
from esper.runtime.tolaria.data.source_text import read_source_text
from esper.runtime.tolaria.data.source_text import windows
from esper.runtime.tolaria.tasks import load_task

LINE = "def f(x):\n    return x + 1  # \N{GREEK SMALL LETTER ALPHA}\ttab\n"


@pytest.fixture
def library(tmp_path):
    """A standard library of the user's own: every module, short enough that a run takes a second."""
    folder = tmp_path / "Lib"
    folder.mkdir()
    for name in MODULES:
        (folder / f"{name}.py").write_text(f"# {name}\n" + LINE * 20, encoding="utf-8")
    return folder


def config(folder):
    document = {
        "run": {"max_epochs": 2, "device": "cpu", "threads": 1},
        "task": {"name": "charlm", "path": str(folder), "arguments": {"width": 16, "heads": 2, "context": 16}},
        "optimizer": {"name": "adamw", "lr": 0.01},
    }
    return EsperConfig.model_validate_json(json.dumps(document))


def test_text_is_the_same_on_every_read_and_its_digest_says_so():
    one, other = read_source_text(), read_source_text()
    assert one == other and one.digest == other.digest
    every = {**one.train, **one.validation, **one.test}
    assert tuple(sorted(every)) == MODULES == tuple(sorted(MODULES))
    content = b"".join(name.encode() + b"\0" + every[name].encode() + b"\0" for name in sorted(every))
    assert one.digest == f"sha256:{hashlib.sha256(content).hexdigest()}"


def test_text_is_the_beginning_of_the_running_librarys_own_files():
    text = read_source_text()
    for name, beginning in text.validation.items():
        source = (Path(sysconfig.get_paths()["stdlib"]) / f"{name}.py").read_text(encoding="utf-8")
        assert source.startswith(beginning) and len(beginning) == min(len(source), CHARACTERS_OF_EACH)


def test_splits_share_no_module():
    text = read_source_text()
    parts = [set(text.train), set(text.validation), set(text.test)]
    assert [len(part) for part in parts] == [32, 8, 8]
    assert len(set().union(*parts)) == len(MODULES)


def test_rows_follow_each_other_without_overlap_and_stay_in_their_text():
    x, y = windows(["abcdefghij", "ABCDEFG", "no"], 3)
    assert torch.equal(x.flatten(), encode("abcdefghiABCDEF"))
    assert torch.equal(y.flatten(), encode("bcdefghijBCDEFG"))
    assert x.shape == y.shape == (5, 3) and x.dtype is torch.int64


def test_symbols_are_of_a_fixed_alphabet():
    symbols = encode("\n" + "".join(map(chr, range(32, 127))) + "\t\r\x7f\N{GREEK SMALL LETTER ALPHA}")
    assert symbols.tolist() == [*range(1, VOCABULARY), 0, 0, 0, 0]


@pytest.mark.parametrize("damage", ["missing", "empty", "compiled"])
def test_python_without_source_is_refused_and_nothing_takes_its_place(library, damage, monkeypatch):
    file = library / "gzip.py"
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(b"" if damage == "empty" else b"\xff\xfe\x00\x80")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    with pytest.raises(DataUnavailable, match=r"gzip\.py") as caught:
        load_task(TaskConfig(name="charlm"), 0)
    assert caught.value.code == "ESP-207" and caught.value.exit_code == 3
    assert "task.path" in caught.value.hint


def test_zipped_library_is_refused(tmp_path, monkeypatch):
    archive = tmp_path / "python311.zip"
    archive.write_bytes(b"PK")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(archive)})
    with pytest.raises(DataUnavailable, match=r"argparse\.py"):
        load_task(TaskConfig(name="charlm"), 0)


def test_packaged_task_can_be_trained_and_begins_like_any_symbol():
    task = load_task(TaskConfig(name="charlm"), 7)
    check_task(task, 32)
    batch = [tensor[:64] for tensor in task.validation.tensors]
    assert float(task.loss(task.model, batch).detach()) == pytest.approx(math.log(VOCABULARY), rel=0.1)
    again = load_task(TaskConfig(name="charlm"), 7).model
    assert all(torch.equal(a, b) for a, b in zip(task.model.parameters(), again.parameters(), strict=True))


def test_metrics_are_the_loss_in_bits_and_the_share_of_right_symbols(library):
    task = load_task(config(library).task, 0)
    x, y = (tensor[:5] for tensor in task.test.tensors)
    found = {name: value.detach() for name, value in task.metrics(task.model, [x, y]).items()}
    logits = task.model(x).detach()
    each = [functional.cross_entropy(row, truth).item() / math.log(2.0) for row, truth in zip(logits, y, strict=True)]
    assert found["bits_per_character"].tolist() == pytest.approx(each, rel=1e-5)
    assert torch.equal(found["accuracy"], (logits.argmax(-1) == y).float().mean(1))
    mean_bits = float(found["bits_per_character"].mean())
    assert float(task.loss(task.model, [x, y]).detach()) / math.log(2.0) == pytest.approx(mean_bits, rel=1e-5)


def test_no_place_reads_what_comes_after_it():
    torch.manual_seed(0)
    model = SmallGPT(vocabulary=VOCABULARY, context=12, width=16, heads=4, layers=2, hidden=3)
    x = torch.randint(VOCABULARY, (2, 12))
    changed = x.clone()
    changed[:, 7:] = (x[:, 7:] + 1) % VOCABULARY
    before, after = model(x), model(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.isclose(before[:, 7:], after[:, 7:]).all()


def test_quick_start_names_no_site_and_no_epoch():
    assert "charlm" in list_quick_starts()
    quick = load_config(None, quick_start="charlm", environment={})
    assert quick.task == TaskConfig(name="charlm")
    assert (quick.kasmina.target_layers, quick.kasmina.exclude) == ("auto", ())
    plain = EsperConfig(task=quick.task)
    assert quick.kasmina == plain.kasmina and quick.delivery == plain.delivery
    differing = {name for name, value in quick.tamiyo if value != getattr(plain.tamiyo, name)}
    assert differing == {"hold_epochs", "keep_margin"}


def test_tiny_version_learns_in_a_session_and_its_record_says_on_which_text(library, drive):
    tiny = config(library)
    driver = drive(tiny)
    first, second = driver.train(1, 2)
    assert second.metrics.train_loss < first.metrics.train_loss < math.log(VOCABULARY)
    assert set(second.metrics.extra) == {"bits_per_character", "accuracy"}
    finished = driver.session.finish()
    digest = read_source_text(library).digest
    assert finished.data_digest == digest
    record = RunRecord(
        run_id="run", name="run", config=tiny, outcome=Outcome.COMPLETED, created="2030-01-01", finished=finished
    )
    assert run_document(RunView(record), web_ui=None, output=None).data_digest == digest


def test_run_does_not_go_on_with_another_text(library, drive):
    driver = drive(config(library))
    driver.train(1)
    driver.session.close()
    drive(config(library))
    with (library / "gzip.py").open("a", encoding="utf-8") as file:
        file.write("# patched\n")
    with pytest.raises(RunConflict, match=r"data was .*sha256:") as caught:
        drive(config(library))
    assert caught.value.code == "ESP-502"


def test_tiny_version_grows_at_the_narrow_perceptron_and_keeps_its_function(library):
    model = esper.wrap(load_task(config(library).task, 0).model)
    x = torch.randint(VOCABULARY, (4, 16))
    before = model(x)
    esper.graft(model, "blocks.0.mlp.0", "widen")
    assert torch.equal(model(x), before)
