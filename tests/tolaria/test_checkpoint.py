"""What a checkpoint refuses by name."""

import json
import random

import numpy
import pytest
import tolaria_tasks
import torch
from safetensors.torch import load
from safetensors.torch import save
from tolaria_tasks import Small
from tolaria_world import make_config
from torch import nn

from esper.contracts.assets import ArtifactRef
from esper.errors import IntegrityError
from esper.errors import TargetError
from esper.runtime.tezzeret.ir import canonical_json
from esper.runtime.tolaria.checkpoint import read_manifest
from esper.runtime.tolaria.checkpoint import restore
from esper.runtime.tolaria.checkpoint import resume
from esper.runtime.tolaria.checkpoint import snapshot
from esper.runtime.tolaria.checkpoint import write
from esper.runtime.tolaria.live.run_state import RunState
from esper.runtime.tolaria.optimizer_state import capture_optimizer
from esper.runtime.tolaria.optimizer_state import restore_optimizer
from esper.runtime.tolaria.plan import prepare
from esper.runtime.tolaria.randomness import capture_random_state
from esper.runtime.tolaria.randomness import restore_random_state
from esper.runtime.tolaria.randomness import seed_everything
from esper.runtime.tolaria.schedule import Schedule
from esper.runtime.tolaria.trainee import begin
from esper.runtime.urza.objects import FolderStore


@pytest.fixture
def store(tmp_path):
    return FolderStore(tmp_path)


def trained(config=None, steps=3):
    trainee = begin(*prepare(config or make_config()))
    for _ in range(steps):
        trainee.advance()
    return trainee


def rewritten(store, ref, **changes):
    document = json.loads(store.get(ref))
    return store.put(canonical_json(document | changes))


def test_equal_states_give_equal_bytes(store):
    refs = {write(snapshot(trained(), RunState()), store.put) for _ in range(2)}
    assert len({ref.digest for ref in refs}) == 1


def test_snapshot_is_not_touched_by_what_follows(store):
    trainee = trained()
    taken = snapshot(trainee, RunState())
    before = write(taken, store.put)
    trainee.advance()
    assert write(taken, store.put) == before
    assert write(snapshot(trainee, RunState()), store.put) != before


def test_parameters_that_do_not_train_are_stored_once(store):
    trainee = trained(make_config("tolaria_tasks:partly_frozen"))
    before = read_manifest(write(snapshot(trainee, RunState()), store.put), store.get)
    trainee.advance()
    ref = write(snapshot(trainee, RunState()), store.put)
    after = read_manifest(ref, store.get)
    assert before.frozen is not None
    assert set(load(store.get(before.frozen))) == {"first.weight", "first.bias"}
    assert after.frozen == before.frozen
    assert after.model != before.model
    again = trained(make_config("tolaria_tasks:partly_frozen"), steps=0)
    with torch.no_grad():
        again.model.first.weight.zero_()
    resume(again, restore(ref, store.get))
    assert torch.equal(again.model.first.weight, trainee.model.first.weight)
    assert torch.equal(again.model.last.weight, trainee.model.last.weight)


@pytest.mark.fault("D4", "H4")
@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"{}", b'{"schema_version": 1}', b"\xff\xfe"])
def test_bytes_that_are_no_checkpoint_are_refused(store, data):
    with pytest.raises(IntegrityError) as caught:
        restore(store.put(data), store.get)
    assert caught.value.code == "ESP-407"


def test_tensor_file_that_is_none_is_refused(store):
    ref = write(snapshot(trained(), RunState()), store.put)
    junk = store.put(b"not safetensors")
    with pytest.raises(IntegrityError, match="model file") as caught:
        restore(rewritten(store, ref, model=junk.model_dump()), store.get)
    assert caught.value.code == "ESP-407"


def test_random_states_that_are_incomplete_are_refused(store):
    ref = write(snapshot(trained(), RunState()), store.put)
    with pytest.raises(IntegrityError, match="random states"):
        restore(rewritten(store, ref, random_scalars={}), store.get)


@pytest.mark.fault("H4")
def test_checkpoint_of_a_newer_esper_is_refused_by_name(store):
    ref = write(snapshot(trained(), RunState()), store.put)
    with pytest.raises(IntegrityError, match="format 99") as caught:
        restore(rewritten(store, ref, schema_version=99, unheard_of=1), store.get)
    assert caught.value.code == "ESP-408"


def test_checkpoint_of_another_architecture_is_refused_by_name(store):
    ref = write(snapshot(trained(), RunState()), store.put)
    wider = begin(*prepare(make_config("tolaria_tasks:narrow")))
    with pytest.raises(IntegrityError, match="another architecture"):
        resume(wider, restore(ref, store.get))


def test_tensor_of_another_shape_or_name_is_refused(store):
    trainee = trained()
    ref = write(snapshot(trainee, RunState()), store.put)
    document = json.loads(store.get(ref))
    tensors = load(store.get(ArtifactRef.model_validate(document["model"])))
    changed = store.put(save(tensors | {"norm.running_mean": torch.zeros(9)}))
    fewer = store.put(save({name: tensor for name, tensor in tensors.items() if name != "norm.running_mean"}))
    for damaged, words in ((changed, r"\(9,\)"), (fewer, "in the model only")):
        with pytest.raises(IntegrityError, match=words) as caught:
            resume(trained(steps=0), restore(rewritten(store, ref, model=damaged.model_dump()), store.get))
        assert caught.value.code == "ESP-409"


def test_checkpoint_of_another_optimizer_is_refused(store):
    ref = write(snapshot(trained(), RunState()), store.put)
    other = begin(*prepare(make_config(optimizer={"name": "sgd", "momentum": 0.9})))
    with pytest.raises(IntegrityError, match="its optimizer is AdamW, the run's is SGD") as caught:
        resume(other, restore(ref, store.get))
    assert caught.value.code == "ESP-409"


def test_optimizer_groups_and_settings_survive_by_name():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))

    def made(network):
        return torch.optim.AdamW(
            [
                {"params": network[0].parameters(), "lr": 0.1, "betas": (0.5, 0.6)},
                {"params": list(network[1].parameters())},
            ],
            amsgrad=True,
        )

    optimizer = made(model)
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    taken = capture_optimizer(optimizer, model)
    copy = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    copy.load_state_dict(model.state_dict())
    again = made(copy)
    restore_optimizer(again, copy, taken)
    assert again.param_groups[0]["betas"] == (0.5, 0.6) and again.param_groups[0]["lr"] == 0.1
    for mine, theirs in zip(copy.parameters(), model.parameters(), strict=True):
        assert again.state[mine].keys() == optimizer.state[theirs].keys()
        assert all(torch.equal(again.state[mine][k], optimizer.state[theirs][k]) for k in again.state[mine])


def test_optimizer_state_that_needs_pickle_is_refused():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model.weight]["closure"] = object()
    with pytest.raises(TargetError, match="'closure'"):
        capture_optimizer(optimizer, model)


def test_generators_go_on_where_they_were():
    seed_everything(9)
    random.gauss(0, 1)
    numpy.random.standard_normal()
    state = capture_random_state()
    draws = [(random.gauss(0, 1), random.random(), numpy.random.standard_normal(), torch.rand(3).tolist())]
    restore_random_state(state)
    draws.append((random.gauss(0, 1), random.random(), numpy.random.standard_normal(), torch.rand(3).tolist()))
    assert draws[0] == draws[1]


def test_task_brings_its_own_optimizer(monkeypatch):
    def with_optimizer():
        task = tolaria_tasks.small()
        task.optimizer = lambda parameters: torch.optim.RMSprop(parameters, lr=0.002)
        return task

    monkeypatch.setattr(tolaria_tasks, "with_optimizer", with_optimizer, raising=False)
    trainee = trained(make_config("tolaria_tasks:with_optimizer", optimizer={"schedule": {"name": "linear"}}), steps=4)
    assert isinstance(trainee.optimizer, torch.optim.RMSprop)
    assert trainee.optimizer.param_groups[0]["lr"] == 0.002 * Schedule(
        trainee.plan.config.optimizer.schedule, 42
    ).factor(3)
    assert isinstance(trainee.model, Small)
