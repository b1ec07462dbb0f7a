"""Turns, pauses, ends and failures of a live session."""

import threading

import pytest
import torch
from tolaria_tasks import Small
from tolaria_tasks import small_data
from tolaria_world import make_config
from tolaria_world import ordered
from tolaria_world import silent

from esper.contracts.enums import EpochStatus
from esper.contracts.enums import FactKind
from esper.errors import ConfigurationError
from esper.errors import DatabaseUnavailable
from esper.errors import DeviceError
from esper.errors import LeaseLost
from esper.errors import RunFailed
from esper.runtime.kasmina.digest import weights_digest
from esper.runtime.kasmina.keeping.persistence import load
from esper.runtime.tezzeret.samples import unpack_samples


class Stop(Exception):
    """What a cancelled activity raises from its beat."""


@pytest.fixture
def each_step(monkeypatch):
    monkeypatch.setattr("esper.runtime.tolaria.live.turns.BEAT_SECONDS", 0.0)


def test_fresh_run_commits_its_first_head_at_step_zero(drive, world):
    loaded = drive(make_config()).session.describe()
    assert (loaded.step, loaded.epoch, loaded.steps_per_epoch) == (0, 0, 7)
    assert loaded.model_name == "Small" and loaded.device == "cpu" and loaded.threads == 1
    assert loaded.head == world.call(world.library.run("run")).head
    assert [node.contract.site for node in loaded.graph.nodes] == ["first", "norm", "second", "last"]
    assert not loaded.finished


def test_report_holds_what_was_measured_and_is_committed_with_its_head(drive, world):
    driver = drive(make_config())
    one, two = driver.train(1, 2)
    assert (one.epoch, one.step, one.samples, one.head.step, one.head.epoch) == (1, 7, 200, 7, 1)
    assert two.head.parent == one.head.digest
    assert set(one.metrics.extra) == {"accuracy"}
    assert one.learning_rate > 0 and one.busy_seconds > 0
    # Three layers, forward and backward, but no gradient of the first layer's input.
    forward = 2 * (12 * 8 + 8 * 8 + 8 * 3)
    assert one.training_flops == 200 * (3 * forward - 2 * 12 * 8)
    assert one.probe_flops == 0
    assert world.call(world.library.reports("run")) == (one, two)


def test_probe_ships_samples_of_every_site_when_a_decision_follows(drive, world):
    driver = drive(make_config())
    (with_probe,) = driver.train(1, expects_decision=True)
    samples = unpack_samples(world.objects.get(with_probe.site_samples))
    assert samples["first"].x.shape == (200, 12) and samples["last"].g.shape == (200, 3)
    assert with_probe.probe_flops > 0
    assert {signal.site for signal in with_probe.health} == {"first", "norm", "second", "last"}
    assert all(0 < signal.update_to_weight < 1 for signal in with_probe.health)
    assert all(signal.saturation is not None for signal in with_probe.health)
    (without,) = driver.train(2)
    assert without.site_samples is None and without.health


def test_nothing_is_probed_when_no_graft_could_be_judged_any_more(drive):
    driver = drive(make_config(run={"max_epochs": 2}))
    reports = driver.train(1, 2, expects_decision=True)
    assert [report.site_samples for report in reports] == [None, None]


def test_early_stop_ends_the_run_and_skips_what_was_ordered_ahead(drive):
    driver = drive(make_config(training={"early_stop": {"metric": "val_accuracy", "mode": "min", "patience": 1}}))
    epoch, report = 0, None
    while report is None or not report.stop:
        epoch += 1
        (report,) = driver.train(epoch)
    assert [fact.kind for fact in report.facts] == [FactKind.STOP]
    ahead = driver.session.train_epoch(driver.request(epoch + 1), silent)
    assert ahead.status is EpochStatus.SKIPPED and ahead.report is None
    assert driver.session.describe().finished
    again = drive(driver.session._shared.run.trainee.plan.config)
    assert again.session.describe().finished
    assert again.session.train_epoch(again.request(epoch + 1), silent).status is EpochStatus.SKIPPED
    assert again.session.finish().head == report.head


def test_unknown_early_stopping_metric_is_refused_at_load_with_the_names_there_are(drive):
    with pytest.raises(ConfigurationError, match="val_f1") as caught:
        drive(make_config(training={"early_stop": {"metric": "val_f1"}}))
    assert "val_accuracy" in caught.value.hint


def test_pause_commits_where_training_stands_and_the_next_order_goes_on(drive, each_step):
    driver = drive(make_config())
    reached = threading.Event()
    paused = threading.Event()

    def beat(progress):
        if progress.step >= 3:
            reached.set()
            assert paused.wait(20)

    results = []
    running = threading.Thread(target=lambda: results.append(driver.session.train_epoch(driver.request(1), beat)))
    ahead = threading.Thread(target=lambda: results.append(driver.session.train_epoch(driver.request(2), silent)))
    running.start()
    assert reached.wait(20)
    ahead.start()
    heads = []
    pausing = threading.Thread(target=lambda: heads.append(driver.session.checkpoint(hold=True, pauses=1)))
    pausing.start()
    ahead.join(20)
    paused.set()
    running.join(20)
    pausing.join(20)
    assert [result.status for result in results] == [EpochStatus.PAUSED] * 2
    assert heads[0].step == 3 == results[1].step
    assert driver.session.train_epoch(driver.request(1, pauses=0), silent).status is EpochStatus.PAUSED
    driver.train(1, 2, pauses=1)
    other = drive(make_config(), run_id="undisturbed")
    other.train(1, 2)
    assert driver.digest() == other.digest()


def test_checkpoint_without_hold_does_not_stop_training(drive, each_step, world):
    driver = drive(make_config())
    wanted = threading.Event()

    def beat(progress):
        if progress.step >= 2 and progress.phase == "training":
            wanted.set()

    heads = []

    def ask():
        wanted.wait(20)
        heads.append(driver.session.checkpoint(hold=False))

    thread = threading.Thread(target=ask)
    thread.start()
    driver.train(1, 2, beat=beat)
    thread.join(20)
    assert heads[0].step >= 2
    assert heads[0] in [item.head for item in world.call(world.library.heads("run"))]


def test_cancelled_epoch_keeps_its_position(drive, each_step):
    driver = drive(make_config())

    def beat(progress):
        if progress.step >= 4:
            raise Stop

    with pytest.raises(Stop):
        driver.train(1, beat=beat)
    assert driver.session.describe().step == 4
    assert driver.session.checkpoint(hold=False).step == 4
    (report,) = driver.train(1)
    assert report.samples == 200


def test_cancel_during_validation_does_not_close_the_epoch_twice(drive, each_step):
    driver = drive(make_config())

    def beat(progress):
        if progress.phase == "validating":
            raise Stop

    with pytest.raises(Stop):
        driver.train(1, beat=beat)
    head = driver.session.checkpoint(hold=False)
    assert (head.step, head.epoch) == (7, 0)
    again = drive(make_config())
    reports = again.train(1, 2)
    other = drive(make_config(), run_id="undisturbed")
    assert [r.metrics for r in other.train(1, 2)] == [r.metrics for r in reports]
    assert again.digest() == other.digest()


def test_beats_tell_where_training_is(drive, each_step):
    driver = drive(make_config())
    driver.schedule = (ordered(1, 700),)
    beats = []
    driver.train(1, beat=beats.append)
    training = [beat for beat in beats if beat.phase == "training"]
    assert [beat.step for beat in training] == [1, 2, 3, 4, 5, 6]
    assert all(beat.loss > 0 and beat.samples_per_s > 0 and beat.epoch == 1 for beat in training)
    assert training[0].seeds == {"dormant": 15, "germinated": 1}


def test_beats_are_gated_by_time(drive):
    beats = []
    drive(make_config()).train(1, beat=beats.append)
    assert len(beats) <= 2


def test_epochs_ordered_ahead_are_served_in_order(drive):
    driver = drive(make_config())
    reports = []
    threads = [threading.Thread(target=lambda n=n: reports.extend(driver.train(n))) for n in (3, 2, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(report.epoch for report in reports) == [1, 2, 3]
    assert driver.session.describe().step == 21


def test_epoch_beyond_the_last_is_skipped(drive):
    driver = drive(make_config(run={"max_epochs": 1}))
    driver.train(1)
    assert driver.session.train_epoch(driver.request(2), silent).status is EpochStatus.SKIPPED


def test_error_in_the_users_loss_fails_the_run_with_its_last_line(drive):
    driver = drive(make_config("tolaria_tasks:exploding"))
    with pytest.raises(RunFailed, match="ValueError: went away") as caught:
        driver.train(1, 2, 3)
    assert caught.value.code == "ESP-601"
    with pytest.raises(RunFailed):
        driver.train(1)


def test_loss_that_is_not_finite_fails_the_run(drive):
    driver = drive(make_config(optimizer={"name": "sgd", "lr": 1e30, "clip": None, "schedule": {"name": "constant"}}))
    with pytest.raises(RunFailed, match=r"train_loss is (nan|inf)"):
        driver.train(1, 2)


def test_commit_that_fails_ends_the_session(drive, world):
    driver = drive(make_config())
    driver.train(1)

    def unavailable(*arguments):
        raise DatabaseUnavailable("ESP-333", "the disk is full")

    world.store.commit_head = unavailable
    with pytest.raises(DatabaseUnavailable):
        driver.train(2)
    with pytest.raises(DatabaseUnavailable):
        driver.train(3)


def test_lost_lease_is_noticed_by_whoever_records_a_fact(drive, world):
    driver = drive(make_config())
    order = ordered(1, 14)
    driver.schedule = (order,)
    (first,) = driver.train(1, expects_decision=True)
    delivery = world.deliver(first, order)
    world.call(world.library.claim("run", "elsewhere"))
    with pytest.raises(LeaseLost):
        driver.session.install(delivery)
    with pytest.raises(LeaseLost):
        driver.train(2)


def test_finish_exports_what_save_writes(drive, world, tmp_path):
    driver = drive(make_config(run={"max_epochs": 2}))
    driver.train(1, 2)
    finished = driver.session.finish()
    assert set(finished.files) == {"growth.json", "model.safetensors"}
    assert {"val_loss", "val_accuracy", "test_loss", "test_accuracy"} <= set(finished.metrics)
    folder = tmp_path / "out"
    folder.mkdir()
    for name, ref in finished.files.items():
        (folder / name).write_bytes(world.objects.get(ref))
    assert weights_digest(load(folder, Small())) == finished.digest
    assert driver.session.unfinished().digest is None


def test_missing_device_is_refused_with_those_that_are_there(drive):
    with pytest.raises(DeviceError, match="cuda:7") as caught:
        drive(make_config(run={"device": "cuda:7"}))
    assert caught.value.code == "ESP-315" and "cpu" in caught.value.hint


def test_target_layers_are_class_names_and_globs(drive):
    loaded = drive(make_config(kasmina={"target_layers": ["Linear"], "exclude": ["la*"]})).session.describe()
    assert [node.contract.site for node in loaded.graph.nodes] == ["first", "second"]


def test_session_leaves_the_data_as_they_are(drive):
    before = [tensor.clone() for tensor in small_data()[0].tensors]
    drive(make_config()).train(1, expects_decision=True)
    assert all(torch.equal(a, b) for a, b in zip(before, small_data()[0].tensors, strict=True))
