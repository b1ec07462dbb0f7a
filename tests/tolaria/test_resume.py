"""Whatever stops a run, it goes on bit for bit from its head, in another process too."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import tolaria_resume_child
from tolaria_world import make_config
from tolaria_world import ordered
from tolaria_world import silent

from esper.contracts.enums import EpochStatus
from esper.contracts.enums import FactKind
from esper.contracts.enums import Verdict
from esper.contracts.operational import Fact
from esper.errors import DataUnavailable
from esper.errors import IntegrityError
from esper.errors import LeaseLost
from esper.errors import RunConflict
from esper.runtime.tolaria.session import Session

HOLD = {"hold_epochs": 2, "hold_steps": 0, "keep_margin": 0.0}


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def each_step(monkeypatch):
    monkeypatch.setattr("esper.runtime.tolaria.live.turns.BEAT_SECONDS", 0.0)


def kill_at(step):
    def beat(progress):
        if progress.step >= step:
            raise Killed

    return beat


def begin_growing(driver, run_id="run"):
    order = ordered(1, 14, run_id=run_id)
    driver.schedule = (order,)
    (first,) = driver.train(1, expects_decision=True)
    assert driver.session.install(driver.world.deliver(first, order)).accepted
    return order


@pytest.mark.fault("A1", "I5", "I11")
def test_resume_in_the_middle_of_an_epoch_in_another_process_changes_no_bit(world, drive, each_step):
    configs, expected = {}, {}
    for name in ("adamw", "adam", "sgd"):
        config = make_config(optimizer={"name": name, "momentum": 0.9 if name == "sgd" else 0.0}, tamiyo=HOLD)
        driver = drive(config, run_id=f"whole-{name}")
        begin_growing(driver, f"whole-{name}")
        driver.train(2, 3, 4)
        driver.session.judge(f"whole-{name}/a1", silent)
        driver.train(5, 6)
        expected[name] = driver.digest()
        driver = drive(config, run_id=name)
        begin_growing(driver, name)
        driver.train(2, 3)
        with pytest.raises(Killed):
            driver.train(4, beat=kill_at(25))
        head = driver.session.checkpoint(hold=True)
        assert head.step == 25 and head.epoch == 3
        configs[name] = config.model_dump(mode="json")
    child = subprocess.run(
        [
            sys.executable,
            tolaria_resume_child.__file__,
            str(world.folder),
            json.dumps(configs),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert child.returncode == 0, child.stderr
    found = json.loads(child.stdout)
    assert {name: result["step"] for name, result in found.items()} == dict.fromkeys(configs, 25)
    assert {name: result["digest"] for name, result in found.items()} == expected


@pytest.mark.fault("A1", "I11")
@pytest.mark.parametrize(
    ("target", "at"),
    [("tolaria_tasks:small", 2), ("tolaria_tasks:small", 9), ("tolaria_tasks:noisy", 6), ("tolaria_tasks:noisy", 8)],
)
def test_kill_without_a_checkpoint_goes_back_to_the_head_and_ends_in_the_same_bits(drive, each_step, target, at):
    config = make_config(target, run={"max_epochs": 3}, training={"batch_size": 16})
    whole = drive(config, run_id="whole")
    reports = whole.train(1, 2, 3)
    killed = drive(config)
    with pytest.raises(Killed):
        killed.train(1, 2, 3, beat=kill_at(at))
    again = drive(config)
    begun = again.session.describe()
    spe = begun.steps_per_epoch
    assert begun.step == (at - 1) // spe * spe
    resumed = again.train(*range(begun.epoch + 1, 4))
    assert [r.metrics for r in resumed] == [r.metrics for r in reports[begun.epoch :]]
    assert again.digest() == whole.digest()


@pytest.mark.fault("A3", "F3")
@pytest.mark.parametrize("at", [15, 22, 28])
def test_recorded_graft_is_made_again_at_its_step(drive, each_step, at):
    config = make_config(tamiyo=HOLD)
    whole = drive(config, run_id="whole")
    begin_growing(whole, "whole")
    whole.train(2, 3, 4)
    verdict = whole.session.judge("whole/a1", silent)
    whole.train(5, 6)
    killed = drive(config)
    order = begin_growing(killed)
    with pytest.raises(Killed):
        killed.train(2, 3, 4, beat=kill_at(at))
        killed.session.judge("run/a1", kill_at(at - 7))
    again = drive(config)
    again.schedule = (order,)
    again.train(*range(again.session.describe().epoch + 1, 5))
    second = again.session.judge("run/a1", silent)
    assert second.verdict is verdict.verdict
    assert (second.grown_loss, second.twin_loss) == (verdict.grown_loss, verdict.twin_loss)
    again.train(5, 6)
    assert again.digest() == whole.digest()
    assert again.world.facts() == again.world.facts("whole")
    assert again.world.call(again.world.library.run("run")).divergences == 0


def test_verdict_that_was_recorded_but_not_executed_rules(drive, world):
    config = make_config(tamiyo=HOLD | {"keep_margin": 0.99})
    driver = drive(config)
    begin_growing(driver)
    driver.train(2, 3, 4)
    # The process dies between the insert of the fact and its execution.
    graft = driver.session.describe().facts[0]
    world.store.insert_fact(
        Fact(
            run_id="run",
            adaptation_id="run/a1",
            kind=FactKind.CULL,
            apply_step=28,
            seq=0,
            site=graft.site,
            seed=graft.seed,
            reason="recorded",
        )
    )
    again = drive(config)
    reports = again.train(5, 6)
    assert [fact.kind for fact in reports[0].facts] == [FactKind.CULL]
    assert again.session.judge("run/a1", silent).verdict is Verdict.CULL
    plain = drive(config, run_id="plain")
    plain.train(1, 2, 3, 4, 5, 6)
    assert again.digest() == plain.digest()


def test_stored_report_is_returned_for_an_epoch_that_is_past(drive):
    config = make_config()
    driver = drive(config)
    reports = driver.train(1, 2)
    assert driver.train(1, 2) == reports
    again = drive(config)
    assert again.train(1, 2) == reports
    assert again.session.describe().epoch == 2


def test_later_owner_fences_the_former_one(drive):
    config = make_config()
    former = drive(config)
    former.train(1)
    drive(config).train(2)
    with pytest.raises(LeaseLost):
        former.train(2)
    with pytest.raises(LeaseLost):
        former.train(3)
    with pytest.raises(LeaseLost):
        former.session.checkpoint(hold=False)


def test_resume_with_another_recipe_is_a_conflict_that_names_the_settings(drive, world):
    drive(make_config()).train(1)
    lease = world.call(world.library.claim("run", "other"))
    ledger = world.call(world.library.take_over(lease))
    with pytest.raises(RunConflict) as caught:
        Session.load(make_config(optimizer={"lr": 0.5}), ledger, world.store)
    assert caught.value.code == "ESP-502" and "optimizer.lr was 0.01, is 0.5" in caught.value.message


@pytest.mark.fault("A15")
def test_other_thread_count_is_allowed_and_told(drive):
    drive(make_config()).train(1)
    driver = drive(make_config(run={"threads": 1}))
    assert driver.session.describe().warnings == ()
    config = make_config(run={"threads": 2})
    world = driver.world
    lease = world.call(world.library.claim("run", "other"))
    ledger = world.call(world.library.take_over(lease))
    session = Session.load(config, ledger, world.store_under(lease))
    world._sessions.append(session)
    assert "threads 2" in session.describe().warnings[0]
    (drift,) = world.call(world.library.drifts("run"))
    assert (drift.step, drift.fields) == (7, {"threads": (1, 2)})


@pytest.mark.fault("J")
@pytest.mark.parametrize(
    "damage",
    [lambda data: b"", lambda data: data[:-1], lambda data: data[:-1] + bytes([data[-1] ^ 1])],
    ids=["empty", "truncated", "flipped"],
)
def test_damaged_checkpoint_is_refused_where_there_is_no_other(drive, world, damage):
    driver = drive(make_config())
    driver.train(1)
    lease = world.call(world.library.claim("run", "other"))
    ledger = replace(world.call(world.library.take_over(lease)), older=())
    document = json.loads(world.objects.get(ledger.manifest))
    for digest in (ledger.manifest.digest, *(document[part]["digest"] for part in ("model", "optimizer", "random"))):
        path = world.folder / "objects" / "sha256" / digest.removeprefix("sha256:")
        whole = path.read_bytes()
        path.chmod(0o600)
        path.write_bytes(damage(whole))
        with pytest.raises(IntegrityError) as caught:
            Session.load(make_config(), ledger, world.store_under(lease))
        assert caught.value.code == "ESP-402" and "the checkpoint is damaged" in caught.value.message
        path.write_bytes(whole)


@pytest.mark.fault("E5", "I4")
def test_missing_graft_below_the_head_is_an_integrity_stop(drive, world):
    driver = drive(make_config())
    driver.train(1, 2)
    world.store.insert_fact(
        Fact(run_id="run", adaptation_id="run/a7", kind=FactKind.GRAFT, apply_step=3, seq=0, site="first", seed=0)
    )
    lease = world.call(world.library.claim("run", "other"))
    ledger = world.call(world.library.take_over(lease))
    with pytest.raises(IntegrityError, match="run/a7"):
        Session.load(make_config(), ledger, world.store)


def test_data_that_went_away_is_said_at_load(drive):
    config = make_config()
    cifar = config.model_copy(update={"task": config.task.model_copy(update={"target": None, "name": "cifar10"})})
    with pytest.raises(DataUnavailable) as caught:
        drive(cifar)
    assert caught.value.code == "ESP-207"


def test_unordered_pause_result_carries_the_position(drive, each_step):
    driver = drive(make_config())
    with pytest.raises(Killed):
        driver.train(1, beat=kill_at(3))
    driver.session.checkpoint(hold=True, pauses=1)
    result = driver.session.train_epoch(driver.request(1, pauses=0), silent)
    assert (result.status, result.step) == (EpochStatus.PAUSED, 3)
