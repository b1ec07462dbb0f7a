"""A person's own task and own choice of layers, rehearsed: the cause is named and nothing is written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Say = Callable[..., Any]

MODULE = """
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
import esper

def data(rows=64, labels=3):
    return TensorDataset(torch.randn(rows, 8), torch.arange(rows) % labels)

def make(train=None, model=None, loss=None):
    model = model or nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3))
    loss = loss or (lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]))
    return esper.Task(model=model, train=data() if train is None else train, validation=data(32), loss=loss)

def raising():
    raise RuntimeError("first\\nlast: no such table")

def exiting():
    raise SystemExit(7)

def no_task():
    return nn.Linear(2, 2)

def no_parameters():
    return make(model=nn.Sequential(nn.ReLU(), nn.Flatten()))

def no_linear():
    return make(model=nn.Sequential(nn.PReLU()))

def spoiled():
    train = data()
    train.tensors[0][5, 2] = float("nan")
    return make(train=train)

def too_many_labels():
    return make(train=data(labels=9))

class Sizeless:
    def __init__(self, data, error):
        self.data, self.error = data, error
    def __len__(self):
        raise self.error
    def __getitem__(self, index):
        return self.data[index]

class Broken:
    def __init__(self, data, row):
        self.data, self.row = data, row
    def __len__(self):
        return len(self.data)
    def __getitem__(self, index):
        if index == self.row:
            raise OSError(5, "Input/output error", "/data/rows.bin")
        return self.data[index]

def no_size():
    return make(train=Sizeless(data(), FileNotFoundError(2, "No such file", "/data/rows.bin")))

def exiting_size():
    return make(train=Sizeless(data(), SystemExit("no licence")))

def broken_row():
    return make(train=Broken(data(), 41))

def unseeded():
    import numpy
    drawn = torch.from_numpy(numpy.random.default_rng().random((64, 8), dtype="float32"))
    return make(train=TensorDataset(drawn, torch.arange(64) % 3))

def unseeded_but_named():
    task = unseeded()
    task.data_digest = "version 3"
    return task

def empty():
    return make(train=data(0))

def ragged():
    return make(train=[(torch.zeros(8 + (index == 40)), 0) for index in range(64)])
"""

TARGETS = {
    "row 16: no module": ("nowhere:make", "ESP-310", "no module 'nowhere'"),
    "row 16: no name": ("mine:mkae", "ESP-311", "has no 'mkae'"),
    "row 16: not callable": ("mine:MODULE", "ESP-311", "not callable"),
    "row 16: raises": ("mine:raising", "ESP-313", "RuntimeError: last: no such table"),
    "row 16: exits": ("mine:exiting", "ESP-313", "SystemExit: 7"),
    "row 16: no task": ("mine:no_task", "ESP-312", "not an esper.Task"),
    "row 16: nothing to train": ("mine:no_parameters", "ESP-312", "task."),
    "row 17: no layer to grow at": ("mine:no_linear", "ESP-314", "no supported layer"),
    "row 16: a size that raises": ("mine:no_size", "ESP-313", "size of train raised FileNotFoundError: [Errno 2]"),
    "row 16: a size that exits": ("mine:exiting_size", "ESP-313", "size of train raised SystemExit: no licence"),
    "row 16: a row that raises": ("mine:broken_row", "ESP-313", "train[41] raised OSError: [Errno 5]"),
    "row 15: other data every time": ("mine:unseeded", "ESP-346", "other data every time"),
    "row 40: NaN": ("mine:spoiled", "ESP-343", "train row 5"),
    "row 40: label": ("mine:too_many_labels", "ESP-342", "train row 3: label 3"),
    "row 40: empty": ("mine:empty", "ESP-340", "train is empty"),
    "row 40: ragged": ("mine:ragged", "ESP-345", "train row 40"),
}

LAYERS = {
    "row 17: no such target": ("kasmina.target_layers=[encodr]", "the model has: Linear, ReLU", "candidates: 0, 1, 2"),
    "row 17: no such class": ("kasmina.target_layers=[Lineer]", "the model has: Linear, ReLU", "candidates: 0, 1, 2"),
    "row 17: all excluded": ("kasmina.exclude=['*']", "no supported layer is left", "supported: Linear"),
    "row 17: a slip in exclude": ("kasmina.exclude=[encodr]", "exclude 'encodr' matches no layer", "candidates: 0, 2"),
}


@pytest.fixture
def rehearse(say: Say, folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """`rehearse(setting)` of a configuration whose task is a module in the current folder."""
    (folder / "mine.py").write_text(f"{MODULE}\nMODULE = 1\n")
    (folder / "run.yaml").write_text("training: {batch_size: 16}\ntask: {target: 'mine:make'}\n")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(__import__("sys").modules, "mine", raising=False)
    before = {"mine.py", "run.yaml"}

    def call(setting: str) -> Any:
        answer = say("start-run", "--config", "run.yaml", "--dry-run", "--json", "--set", setting)
        assert {path.name for path in folder.iterdir()} - {"__pycache__"} == before
        assert not home.exists()
        return answer

    return call


@pytest.mark.parametrize(("target", "code", "said"), TARGETS.values(), ids=TARGETS)
def test_a_target_that_cannot_be_trained(rehearse: Callable[[str], Any], target: str, code: str, said: str) -> None:
    answer = rehearse(f"task.target='{target}'")
    assert (answer.code, answer.error["code"], answer.out) == (2, code, "")
    assert said in answer.error["message"]


@pytest.mark.parametrize(("setting", "said", "hint"), LAYERS.values(), ids=LAYERS)
def test_layers_that_are_not_there(rehearse: Callable[[str], Any], setting: str, said: str, hint: str) -> None:
    answer = rehearse(setting)
    assert (answer.code, answer.error["code"]) == (2, "ESP-314")
    assert said in answer.error["message"]
    assert answer.error["hint"].startswith(hint)


def test_row_17_layers_may_be_named_by_class_as_in_a_run(rehearse: Callable[[str], Any]) -> None:
    assert rehearse("kasmina.target_layers=[Linear]").code == 0
    assert rehearse("kasmina.exclude=[ReLU]").code == 0


def test_row_15_data_that_say_which_they_are_may_be_drawn_anew(rehearse: Callable[[str], Any]) -> None:
    assert rehearse("task.target='mine:unseeded_but_named'").code == 0


def test_row_40_a_batch_larger_than_the_data(rehearse: Callable[[str], Any]) -> None:
    answer = rehearse("training.batch_size=65")
    assert (answer.code, answer.error["code"]) == (2, "ESP-344")
