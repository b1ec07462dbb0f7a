"""Garbage collection beside live runs: what a record needs stays, what nothing needs goes."""

import os
import threading
from pathlib import Path

import pytest
from tolaria_world import make_config
from tolaria_world import ordered
from tolaria_world import silent

from esper.errors import IntegrityError
from esper.runtime.kasmina.cache import kernel_cache
from esper.runtime.tolaria.reproduction import reproduce
from esper.runtime.urza.collection import collect
from esper.runtime.urza.objects import FolderStore

HOUR = 3600.0


def let_age(world, hours=48):
    for path in (world.folder / "objects").rglob("*"):
        if path.is_file():
            past = path.stat().st_mtime - hours * HOUR
            os.utime(path, (past, past))


def sweep(world, **changes):
    given = {"grace_s": 24 * HOUR, "dry_run": False} | changes
    return world.call(collect(world.library, world.objects, **given))


def grow(driver, spe, until):
    order = ordered(1, 2 * spe, site="layers.0", blueprint="widen")
    driver.schedule = (order,)
    (first,) = driver.train(1, expects_decision=True)
    assert driver.session.install(driver.world.deliver(first, order)).accepted
    driver.train(2, *range(3, until + 1))


@pytest.fixture
def narrow():
    return make_config("tolaria_tasks:narrow", optimizer={"lr": 0.02}, run={"max_epochs": 30})


@pytest.mark.fault("D8", "I7", "I11")
def test_collected_run_goes_on_judges_and_ends_in_the_same_bits(world, drive, narrow):
    undisturbed = drive(narrow, run_id="other")
    spe = undisturbed.session.describe().steps_per_epoch
    order = ordered(1, 2 * spe, site="layers.0", blueprint="widen", run_id="other")
    undisturbed.schedule = (order,)
    (first,) = undisturbed.train(1, expects_decision=True)
    undisturbed.session.install(world.deliver(first, order))
    undisturbed.train(2, 3)
    undisturbed.session.judge("other/a1", silent)
    undisturbed.train(4, 5, 6)
    expected = undisturbed.digest()

    driver = drive(narrow)
    grow(driver, spe, until=3)
    let_age(world)
    assert sweep(world).removed > 0
    driver.session.judge("run/a1", silent)
    driver.train(4, 5)
    let_age(world)
    assert sweep(world).removed > 0
    kernel_cache().clear()
    resumed = drive(narrow)
    resumed.train(6)
    assert resumed.digest() == expected


def test_collected_heads_are_said_to_be_gone_and_the_others_reproduce(world, drive, narrow):
    driver = drive(narrow)
    grow(driver, driver.session.describe().steps_per_epoch, until=3)
    driver.session.judge("run/a1", silent)
    driver.train(4, 5, 6)
    digest = driver.digest()
    let_age(world)
    sweep(world)
    outcome = reproduce(world.recorded(narrow), silent)
    assert outcome.clean and outcome.digest == digest
    assert any(head.obstacle for head in outcome.heads) and outcome.heads[-1].same


def test_dry_run_and_young_objects_remove_nothing(world, drive, narrow):
    driver = drive(narrow)
    driver.train(1, 2, 3, 4)
    before = sorted((world.folder / "objects").rglob("*"))
    young = sweep(world)
    assert (young.removed, young.removed_bytes) == (0, 0) and young.young > 0
    let_age(world)
    planned = sweep(world, dry_run=True)
    assert sorted((world.folder / "objects").rglob("*")) == before
    done = sweep(world)
    assert (done.removed, done.removed_bytes) == (planned.removed, planned.removed_bytes)
    assert done.removed > 0
    again = sweep(world)
    assert again.removed == 0 and again.kept == done.kept


@pytest.mark.fault("D8")
def test_unreadable_checkpoint_stops_the_sweep(world, drive, narrow):
    driver = drive(narrow)
    driver.train(1, 2, 3, 4)
    head = world.call(world.library.heads("run"))[-1]
    path = world.folder / "objects" / "sha256" / head.manifest.digest.removeprefix("sha256:")
    path.write_bytes(b"x" * head.manifest.size_bytes)
    let_age(world)
    before = len(list((world.folder / "objects").rglob("*")))
    swept = sweep(world)
    assert swept.unreadable == (head.head.digest,) and swept.removed == 0
    assert len(list((world.folder / "objects").rglob("*"))) == before


@pytest.mark.fault("D8", "I7")
def test_object_put_again_while_it_is_collected_is_never_lost(tmp_path: Path):
    store = FolderStore(tmp_path / "objects")
    data = b"a checkpoint"
    path = tmp_path / "objects" / "sha256" / store.put(data).digest.removeprefix("sha256:")
    stop = threading.Event()
    ref = store.put(data)

    def collecting() -> None:
        while not stop.is_set():
            store.delete_older(ref, 24 * HOUR)

    thread = threading.Thread(target=collecting)
    thread.start()
    lost = 0
    try:
        for _ in range(400):
            try:
                os.utime(path, (0, 0))
            except FileNotFoundError:
                lost += 1
            store.put(data)
            assert store.get(ref) == data
    finally:
        stop.set()
        thread.join()
    assert lost < 400


def test_object_that_was_removed_is_missing_by_name(tmp_path: Path):
    store = FolderStore(tmp_path)
    ref = store.put(b"x")
    assert store.delete_older(ref, 0.0)
    with pytest.raises(IntegrityError, match="missing"):
        store.get(ref)
    assert not store.delete_older(ref, 0.0)
