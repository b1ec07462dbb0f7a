"""Which heads are made, which are kept, and that nothing which is kept is ever collected: row D8, invariant I7."""

import os
from collections.abc import Callable
from typing import Any

import pytest
from tolaria_world import Driver
from tolaria_world import World
from tolaria_world import make_config
from tolaria_world import ordered
from tolaria_world import silent

from esper.commands.actions import forking
from esper.contracts.assets import ArtifactRef
from esper.contracts.enums import DecisionKind
from esper.contracts.operational import AdaptationDecision
from esper.errors import DivergenceError
from esper.runtime.tolaria.checkpoint import restore
from esper.runtime.tolaria.retraining import is_whole
from esper.runtime.tolaria.retraining import train_to
from esper.runtime.urza.collection import collect

pytestmark = pytest.mark.fault("D8", "I7")


def sparse(every: int, **sections: Any) -> Any:
    training = {"batch_size": 32, "checkpoint_every": {"epochs": every}}
    return make_config(training=training, **sections)


def steps(world: World, run_id: str = "run") -> list[int]:
    return [item.head.step for item in world.call(world.library.heads(run_id))]


def test_a_head_is_made_every_so_many_epochs_and_at_the_end(drive: Callable[..., Driver], world: World) -> None:
    dense = drive(make_config(), run_id="dense")
    expected = dense.train(1, 2, 3, 4, 5, 6)
    driver = drive(sparse(4))
    reports = driver.train(1, 2, 3, 4, 5, 6)
    assert steps(world) == [0, 28, 42]
    assert [report.metrics for report in reports] == [report.metrics for report in expected]
    assert [(report.step, report.head.step) for report in reports] == [
        (7, 0),
        (14, 0),
        (21, 0),
        (28, 28),
        (35, 28),
        (42, 42),
    ]
    assert world.call(world.library.reports("run")) == tuple(reports)
    assert driver.digest() == dense.digest()


def test_epochs_since_the_last_head_are_trained_again_and_their_reports_stand(
    drive: Callable[..., Driver], world: World
) -> None:
    config = sparse(4)
    whole = drive(config, run_id="whole")
    whole.train(1, 2, 3, 4, 5, 6)
    reports = drive(config).train(1, 2, 3)
    again = drive(config)
    assert (again.session.describe().epoch, again.session.describe().step) == (0, 0)
    assert [report.metrics for report in again.train(1, 2, 3, 4, 5, 6)[:3]] == [report.metrics for report in reports]
    assert world.call(world.library.reports("run"))[:3] == tuple(reports)
    assert world.call(world.library.run("run")).divergences == 0
    assert again.digest() == whole.digest()


def test_a_head_stands_wherever_something_may_be_decided_or_was_changed(
    drive: Callable[..., Driver], world: World
) -> None:
    driver = drive(sparse(100, tamiyo={"hold_epochs": 2, "hold_steps": 0, "keep_margin": 0.0}))
    order = ordered(1, 14)
    driver.schedule = (order,)
    (first,) = driver.train(1, expects_decision=True)
    assert driver.session.install(driver.world.deliver(first, order)).accepted
    driver.train(2, 3, 4)
    driver.session.judge("run/a1", silent)
    driver.train(5, 6)
    # 7: an order may follow on it. 14: the graft, where its twin begins. 21: the epoch with the graft. 28: the verdict.
    assert steps(world) == [0, 7, 14, 21, 28, 42]


def test_a_pause_makes_a_head(drive: Callable[..., Driver], world: World) -> None:
    driver = drive(sparse(100))
    driver.train(1)
    driver.session.checkpoint(hold=True)
    assert steps(world) == [0, 7]


def let_age(world: World) -> None:
    for path in (world.folder / "objects").rglob("*"):
        if path.is_file():
            os.utime(path, (0, 0))


def collected(world: World) -> int:
    let_age(world)
    swept = world.call(collect(world.library, world.objects, grace_s=3600.0, dry_run=False))
    assert swept.unreadable == ()
    return swept.removed


def is_there(world: World, digest: str) -> bool:
    return (world.folder / "objects" / "sha256" / digest.removeprefix("sha256:")).is_file()


def manifest_of(world: World, digest: str, run_id: str = "run") -> ArtifactRef:
    heads = world.call(world.library.heads(run_id))
    return next(item.manifest for item in heads if item.head.digest == digest)


def decide(world: World, epoch: int, kind: DecisionKind) -> None:
    decision = AdaptationDecision(run_id="run", epoch=epoch, policy="heuristic", kind=kind, code="test", reason="test")
    world.call(world.library.record_decision(decision))


def test_kept_are_the_last_two_heads_and_those_before_a_decision_that_is_not_to_wait(
    drive: Callable[..., Driver], world: World
) -> None:
    reports = drive(make_config()).train(1, 2, 3, 4, 5, 6)
    decide(world, 2, DecisionKind.GERMINATE)
    decide(world, 3, DecisionKind.WAIT)
    assert collected(world) > 0
    kept = [item.head.step for item in world.call(world.library.heads("run")) if is_there(world, item.head.digest)]
    assert kept == [14, 35, 42]
    for report in reports:
        if report.step in kept:
            restore(manifest_of(world, report.head.digest), world.objects.get)


def test_a_collected_checkpoint_is_trained_again_to_the_bit_and_put_back(
    drive: Callable[..., Driver], world: World
) -> None:
    config = make_config(tamiyo={"hold_epochs": 2, "hold_steps": 0, "keep_margin": 0.0})
    driver = drive(config)
    order = ordered(1, 14)
    driver.schedule = (order,)
    (first,) = driver.train(1, expects_decision=True)
    assert driver.session.install(driver.world.deliver(first, order)).accepted
    reports = driver.train(2, 3, 4)
    driver.session.judge("run/a1", silent)
    driver.train(5, 6)
    before = {item.head.digest: item.manifest for item in world.call(world.library.heads("run"))}
    # In probation: it needs the checkpoint that its twin begins at, too.
    third = reports[1]
    whole = world.objects.get(before[third.head.digest])
    assert collected(world) > 0 and not is_there(world, third.head.digest)
    head, manifest = train_to(world.recorded(config), third, world.objects.put, silent)
    assert head.digest == third.head.digest and world.objects.get(manifest) == whole
    assert is_whole(manifest, world.objects.get)
    restored = restore(manifest, world.objects.get)
    assert restored.manifest.state.held is not None
    # The next one begins from it, not from the start.
    began: list[int] = []
    train_to(world.recorded(config), reports[2], world.objects.put, lambda progress: began.append(progress.step))
    assert min(began, default=22) >= 21


def test_an_epoch_without_a_head_is_trained_again_too(drive: Callable[..., Driver], world: World) -> None:
    config = sparse(4)
    dense = drive(make_config(), run_id="dense")
    expected = dense.train(1, 2)[-1]
    driver = drive(config)
    reports = driver.train(1, 2, 3, 4, 5)
    head, manifest = train_to(world.recorded(config), reports[1], world.objects.put, silent)
    dense = manifest_of(world, expected.head.digest, "dense")
    ours, theirs = (restore(each, world.objects.get) for each in (manifest, dense))
    assert (head.step, head.epoch) == (14, 2)
    assert ours.manifest.model == theirs.manifest.model and ours.manifest.random == theirs.manifest.random


def test_a_checkpoint_that_does_not_become_what_it_was_is_not_put_back(
    drive: Callable[..., Driver], world: World
) -> None:
    reports = drive(make_config()).train(1, 2, 3, 4, 5, 6)
    assert collected(world) > 0
    wrong = reports[2].model_copy(update={"head": reports[2].head.model_copy(update={"digest": "sha256:" + "0" * 64})})
    objects = sorted((world.folder / "objects").rglob("*"))
    with pytest.raises(DivergenceError, match="epoch 3") as caught:
        train_to(world.recorded(make_config()), wrong, world.objects.put, silent)
    assert (caught.value.code, caught.value.exit_code) == ("ESP-409", 4)
    assert sorted((world.folder / "objects").rglob("*")) == objects


def test_fork_of_a_collected_checkpoint_trains_it_again_and_ends_as_its_parent_did(
    drive: Callable[..., Driver], world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ESPER_HOME", str(world.folder))
    monkeypatch.chdir(world.folder)
    parent = drive(make_config())
    third = parent.train(1, 2, 3, 4, 5, 6)[2]
    expected = parent.digest()
    record = world.call(world.library.run("run"))
    assert collected(world) > 0 and not is_there(world, third.head.digest)
    prepared = forking.prepare(
        "run", 3, wait=False, requested=None, values=[], run_id="child", output_folder=None, accept_drift=True
    )
    assert "trained again from the records" in capsys.readouterr().err
    assert is_there(world, third.head.digest) and prepared.accept_drift
    assert prepared.branch is not None and prepared.branch.lineage.head == third.head.digest
    world.call(world.library.enter_branch(prepared.branch, "2030-01-01T00:00:00Z"))
    assert world.call(world.library.run("run")) == record
    # Both sides of a fork point are kept from now on.
    collected(world)
    assert is_there(world, third.head.digest) and is_there(world, prepared.branch.head.digest)
    child = drive(make_config(), run_id="child")
    child.train(4, 5, 6)
    assert child.digest() == expected


def test_a_checkpoint_that_is_being_branched_is_young_again(
    drive: Callable[..., Driver], world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at it and the entry of the branch a collection may come by."""
    monkeypatch.setenv("ESPER_HOME", str(world.folder))
    monkeypatch.chdir(world.folder)
    drive(make_config()).train(1, 2, 3, 4, 5, 6)
    let_age(world)
    prepared = forking.prepare("run", 3, wait=False, requested=None, values=[], run_id="child", output_folder=None)
    world.call(collect(world.library, world.objects, grace_s=3600.0, dry_run=False))
    assert prepared.branch is not None
    world.call(world.library.enter_branch(prepared.branch, "2030-01-01T00:00:00Z"))
    assert drive(make_config(), run_id="child").session.describe().step == 21


def test_after_a_fall_a_missing_older_head_does_not_stop_the_collection(
    drive: Callable[..., Driver], world: World
) -> None:
    drive(make_config()).train(1, 2, 3)
    assert collected(world) > 0
    newest = world.call(world.library.heads("run"))[-1]
    path = world.folder / "objects" / "sha256" / newest.manifest.digest.removeprefix("sha256:")
    path.unlink()
    again = drive(make_config())
    assert again.session.describe().step == 14
    collected(world)
    again.train(3)
