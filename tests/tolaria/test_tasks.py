"""Packaged tasks, the user's own, and data that cannot be trained on."""

import numpy
import pytest
import tolaria_tasks
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

from esper.contracts.config import TaskConfig
from esper.errors import ConfigurationError
from esper.errors import DatasetError
from esper.errors import DataUnavailable
from esper.errors import TargetError
from esper.runtime.tolaria.data.data_checks import check_task
from esper.runtime.tolaria.data.digits import load_digits_splits
from esper.runtime.tolaria.randomness import capture_random_state
from esper.runtime.tolaria.tasks import Task
from esper.runtime.tolaria.tasks import fresh_model
from esper.runtime.tolaria.tasks import load_task

PARAMETERS = {"digits": 870, "digits-cnn": 312, "teacher": 318}


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_packaged_task_can_be_trained_and_is_the_same_for_one_seed(name):
    task = load_task(TaskConfig(name=name), 7)
    check_task(task, 64)
    assert sum(p.numel() for p in task.model.parameters()) == PARAMETERS[name]
    again = load_task(TaskConfig(name=name), 7).model
    assert all(torch.equal(a, b) for a, b in zip(task.model.parameters(), again.parameters(), strict=True))


def test_model_is_the_first_that_is_drawn_after_seeding():
    task = load_task(TaskConfig(name="digits"), 11)
    torch.manual_seed(11)
    plain = nn.Linear(64, 10)
    assert torch.equal(task.model.layers[0].weight, plain.weight)
    assert [name for name, module in task.model.named_modules() if isinstance(module, nn.Linear)] == [
        "layers.0",
        "layers.2",
        "layers.4",
    ]


def test_fresh_model_leaves_the_generators_alone():
    torch.manual_seed(1)
    before = capture_random_state()
    fresh_model(TaskConfig(name="teacher"), 5)
    after = capture_random_state()
    assert all(torch.equal(before.tensors[name], after.tensors[name]) for name in before.tensors)


def test_digits_are_scikit_learns_split_without_overlap():
    images, _ = load_digits(return_X_y=True)
    (train, labels), (validation, _), (test, _) = load_digits_splits()
    assert [len(train), len(validation), len(test)] == [9000, 500, 297]
    originals = train[4000:5000]
    rows = torch.cat([originals, validation, test]).flatten(1).mul(16).round().to(torch.int64)
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, images.astype(int).tolist()))
    assert torch.equal(train[:1000, :, 1:, 1:], originals[:, :, :-1, :-1])
    assert not train[:1000, :, 0].any() and len(labels) == 9000


def test_teacher_plants_a_layer_of_width_two_and_follows_the_run_seed():
    one, other = (load_task(TaskConfig(name="teacher"), seed) for seed in (0, 1))
    assert one.model.layers[2].out_features == 2
    assert not torch.equal(one.train.tensors[0], other.train.tensors[0])
    fixed = [load_task(TaskConfig(name="teacher", arguments={"teacher_seed": 4}), seed) for seed in (0, 1)]
    assert torch.equal(fixed[0].train.tensors[1], fixed[1].train.tensors[1])


def test_unknown_task_names_the_near_one():
    with pytest.raises(ConfigurationError, match="digit") as caught:
        load_task(TaskConfig(name="digit"), 0)
    assert caught.value.code == "ESP-206" and "Did you mean digits?" in caught.value.hint


def test_unknown_argument_of_a_packaged_task_is_named():
    with pytest.raises(ConfigurationError, match="depth") as caught:
        load_task(TaskConfig(name="digits", arguments={"depth": 3}), 0)
    assert caught.value.code == "ESP-204"


def write_cifar10(folder, *, label=3, rows=10_000):
    folder.mkdir(parents=True, exist_ok=True)
    table = numpy.zeros((rows, 3073), dtype=numpy.uint8)
    table[:, 0] = label
    for name in [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]:
        table.tofile(folder / name)


def test_cifar_without_a_folder_says_where_to_get_it(tmp_path):
    for path in (None, str(tmp_path / "nowhere"), str(tmp_path)):
        with pytest.raises(DataUnavailable) as caught:
            load_task(TaskConfig(name="cifar10", path=path), 0)
        assert caught.value.code == "ESP-207" and caught.value.exit_code == 3
        assert "cifar-10-binary.tar.gz" in caught.value.hint
    assert "data_batch_1.bin" in caught.value.message


def test_cifar_is_read_in_its_binary_version(tmp_path):
    write_cifar10(tmp_path / "cifar-10-batches-bin")
    task = load_task(TaskConfig(name="cifar10", path=str(tmp_path)), 0)
    assert [len(task.train), len(task.validation), len(task.test)] == [45_000, 5_000, 10_000]
    x, y = task.train[:2]
    assert x.dtype is torch.uint8 and x.shape == (2, 3, 32, 32) and y.tolist() == [3, 3]
    assert task.model(x).shape == (2, 10)


@pytest.mark.parametrize(("changes", "words"), [({"label": 10}, "row 0 has class 10"), ({"rows": 5}, "15365 bytes")])
def test_cifar_of_another_form_is_refused(tmp_path, changes, words):
    write_cifar10(tmp_path, **changes)
    with pytest.raises(DataUnavailable, match=words):
        load_task(TaskConfig(name="cifar10", path=str(tmp_path)), 0)


@pytest.mark.parametrize(
    ("target", "code", "words"),
    [
        ("nopkg:build", "ESP-310", "no module 'nopkg'"),
        ("os:system", "ESP-310", "belongs to Python"),
        ("json.decoder:JSONDecoder", "ESP-310", "belongs to Python"),
        ("builtins:eval", "ESP-310", "belongs to Python"),
        ("tolaria_tasks:smal", "ESP-311", "no 'smal'"),
        ("tolaria_tasks:constant", "ESP-311", "not callable"),
        ("tolaria_tasks:wrong", "ESP-312", "not an esper.Task"),
        ("tolaria_tasks:not_a_dataset", "ESP-312", "loss is a builtins.str"),
        ("tolaria_tasks:raising", "ESP-313", "RuntimeError: no such table"),
    ],
)
def test_target_that_gives_no_task_is_refused_by_its_cause(target, code, words):
    with pytest.raises(TargetError, match=words) as caught:
        load_task(TaskConfig(target=target), 0)
    assert caught.value.code == code and caught.value.exit_code == 2


def test_standard_library_reached_through_the_users_module_is_refused(monkeypatch):
    import os

    monkeypatch.setattr(tolaria_tasks, "leak", os, raising=False)
    with pytest.raises(TargetError, match="own and is refused"):
        load_task(TaskConfig(target="tolaria_tasks:leak.system", arguments={"command": "true"}), 0)


def test_arguments_reach_the_users_factory():
    assert len(load_task(TaskConfig(target="tolaria_tasks:small", arguments={"rows": 40}), 0).train) == 40


def made(train=None, validation=None, test=None, **changes):
    task = tolaria_tasks.small()
    data = {"train": train, "validation": validation, "test": test}
    fields = {name: value for name, value in data.items() if value is not None} | changes
    for name, value in fields.items():
        setattr(task, name, value)
    return task


def data(rows=40, labels=None, x=None):
    x = torch.randn(rows, 12) if x is None else x
    return TensorDataset(x, torch.zeros(len(x), dtype=torch.int64) if labels is None else labels)


def spoiled(row, value):
    x = torch.zeros(40, 12)
    x[row, 5] = value
    return x


class Ragged(list):
    """A map-style dataset of rows as they are."""


@pytest.mark.parametrize(
    ("task", "code", "words"),
    [
        (lambda: made(train=data(0)), "ESP-340", "train is empty"),
        (lambda: made(test=data(0)), "ESP-340", "test is empty"),
        (lambda: made(train=data(1)), "ESP-341", "train has a single row"),
        (lambda: made(validation=data(1)), "ESP-341", "validation has a single row"),
        (lambda: made(train=data(labels=torch.tensor([0] * 17 + [9] * 23))), "ESP-342", "train row 17: label 9"),
        (lambda: made(validation=data(labels=torch.tensor([0] * 39 + [-1]))), "ESP-342", "row 39: label -1"),
        (lambda: made(train=data(x=spoiled(11, float("nan")))), "ESP-343", "train row 11"),
        (lambda: made(train=data(x=spoiled(12, float("inf")))), "ESP-343", "train row 12"),
        (lambda: made(train=data(20)), "ESP-344", "batch_size is 32, but train has 20 rows"),
        (
            lambda: made(train=Ragged([(torch.zeros(12 + (index == 33)), 0) for index in range(40)])),
            "ESP-345",
            "train row 33",
        ),
        (
            lambda: made(
                train=Ragged([(torch.full((12,), torch.nan if index == 21 else 0.0), 0) for index in range(40)])
            ),
            "ESP-343",
            "train row 21",
        ),
    ],
)
def test_data_that_cannot_be_trained_on_is_named_by_its_first_row(task, code, words):
    with pytest.raises(DatasetError, match=words) as caught:
        check_task(task(), 32)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda model, batch: model(batch[0]), "not one scalar"),
        (lambda model, batch: 3.0, "a float"),
        (lambda model, batch: model(batch[0]).sum().detach(), "without a gradient"),
        (lambda model, batch: torch.ones((), requires_grad=True) * 1, "does not depend on task.model"),
        (lambda model, batch: model(batch[0][:, :3]).sum(), "cannot be multiplied"),
    ],
)
def test_loss_that_cannot_be_trained_on_is_refused(loss, words):
    with pytest.raises(TargetError, match=words):
        check_task(made(loss=loss), 32)


def test_row_that_raises_is_named():
    class Broken(Ragged):
        def __getitem__(self, index):
            if index == 3:
                raise OSError("disk gone")
            return torch.zeros(12), 0

    with pytest.raises(TargetError, match=r"train\[3\] raised OSError: disk gone"):
        check_task(made(train=Broken([0] * 40)), 32)


def test_check_leaves_the_model_and_its_gradients_as_they_were():
    task = tolaria_tasks.small()
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    check_task(task, 32)
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.model.state_dict().items())
    assert all(parameter.grad is None for parameter in task.model.parameters())
    assert task.model.training
    assert isinstance(task, Task)
