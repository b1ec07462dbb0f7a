"""A run trained again from its records alone ends in the same bits; records that are wrong are found."""

from dataclasses import replace

import pytest
from tolaria_world import make_config
from tolaria_world import ordered
from tolaria_world import silent

from esper.contracts.enums import FactKind
from esper.contracts.enums import Verdict
from esper.errors import IntegrityError
from esper.runtime.kasmina.cache import kernel_cache
from esper.runtime.tolaria.reproduction import reproduce


def grown_run(driver, spe, *, blueprint="widen", site="layers.0", epochs=5):
    order = ordered(1, 2 * spe, site=site, blueprint=blueprint)
    driver.schedule = (order,)
    (first,) = driver.train(1, expects_decision=True)
    assert driver.session.install(driver.world.deliver(first, order)).accepted
    driver.train(2, 3)
    verdict = driver.session.judge("run/a1", silent)
    driver.train(*range(4, epochs + 1))
    return verdict


def test_kept_graft_is_reproduced_to_the_bit(drive):
    config = make_config("tolaria_tasks:narrow", optimizer={"lr": 0.02}, run={"max_epochs": 30})
    driver = drive(config)
    spe = driver.session.describe().steps_per_epoch
    assert grown_run(driver, spe).verdict is Verdict.KEEP
    digest = driver.digest()
    outcome = reproduce(driver.world.recorded(config), silent)
    assert outcome.clean, outcome
    assert outcome.digest == digest
    assert [head.same for head in outcome.heads] == [True] * len(outcome.heads)
    assert len(outcome.heads) >= 6


def test_culled_graft_is_reproduced_to_the_bit(drive):
    config = make_config(run={"max_epochs": 6})
    driver = drive(config)
    assert grown_run(driver, 7, blueprint="lowrank", site="first").verdict is Verdict.CULL
    digest = driver.digest()
    outcome = reproduce(driver.world.recorded(config), silent)
    assert outcome.clean, outcome
    assert outcome.digest == digest


class Stop(Exception):
    """What a caller raises to cancel."""


def test_head_in_the_middle_of_an_epoch_is_compared_too(drive, monkeypatch):
    monkeypatch.setattr("esper.runtime.tolaria.live.turns.BEAT_SECONDS", 0.0)
    config = make_config(run={"max_epochs": 6})
    driver = drive(config)
    driver.train(1)

    def stop_at_ten(progress):
        if progress.step >= 10:
            raise Stop

    with pytest.raises(Stop):
        driver.train(2, beat=stop_at_ten)
    head = driver.session.checkpoint(hold=True)
    assert head.step % 7
    outcome = reproduce(driver.world.recorded(config), silent)
    assert outcome.clean and all(each.same for each in outcome.heads), outcome
    assert outcome.heads[-1].step == head.step


def test_records_of_another_graft_step_do_not_reproduce(drive):
    config = make_config("tolaria_tasks:narrow", optimizer={"lr": 0.02}, run={"max_epochs": 30})
    driver = drive(config)
    spe = driver.session.describe().steps_per_epoch
    grown_run(driver, spe)
    facts = driver.world.call(driver.world.library.facts("run"))
    moved = [
        fact.model_copy(update={"apply_step": fact.apply_step + 1}) if fact.kind is FactKind.GRAFT else fact
        for fact in facts
    ]
    outcome = reproduce(replace(driver.world.recorded(config), facts=moved), silent)
    assert not outcome.clean
    assert not outcome.heads[-1].same


def test_kernel_that_is_gone_is_an_integrity_error(drive):
    config = make_config("tolaria_tasks:narrow", optimizer={"lr": 0.02}, run={"max_epochs": 30})
    driver = drive(config)
    spe = driver.session.describe().steps_per_epoch
    grown_run(driver, spe)
    (graft,) = [f for f in driver.world.call(driver.world.library.facts("run")) if f.kind is FactKind.GRAFT]
    driver.world.objects.delete(graft.delivery.manifest)
    kernel_cache().clear()
    with pytest.raises(IntegrityError):
        reproduce(driver.world.recorded(config), silent)
