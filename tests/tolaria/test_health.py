"""What a report says of the sites' health, and what watching costs a run: nothing that decides over its bits."""

import threading
import time

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolaria_world import Driver
from tolaria_world import make_config
from tolaria_world import ordered

from esper.activities.trainer_store import UrzaStore
from esper.runtime.tezzeret.samples import unpack_samples
from esper.runtime.tolaria.loss_sum import TOGETHER
from esper.runtime.tolaria.loss_sum import LossSum


class Killed(BaseException):
    pass


@pytest.fixture
def each_step(monkeypatch):
    monkeypatch.setattr("esper.runtime.tolaria.live.turns.BEAT_SECONDS", 0.0)


def test_a_probed_report_is_the_same_after_a_resume_within_its_epoch(drive, each_step):
    whole = drive(make_config(), run_id="whole")
    expected = whole.train(1, 2, expects_decision=True)[1]

    def stop(progress):
        if progress.step >= 10:
            raise Killed

    broken = drive(make_config())
    broken.train(1, expects_decision=True)
    with pytest.raises(Killed):
        broken.train(2, beat=stop, expects_decision=True)
    assert broken.session.checkpoint(hold=True).step == 10
    again = drive(make_config())
    assert again.session.describe().step == 10
    (resumed,) = again.train(2, expects_decision=True)
    assert resumed.health == expected.health
    assert resumed.metrics == expected.metrics
    assert resumed.site_samples == expected.site_samples
    assert all(signal.update_to_weight is not None for signal in resumed.health)


def test_an_epoch_without_a_probe_tells_what_telemetry_saw(drive):
    driver = drive(make_config(run={"max_epochs": 12}))
    reports = driver.train(*range(1, 12))
    assert all({signal.site for signal in report.health} == {"first", "norm", "second", "last"} for report in reports)
    for report in reports:
        assert all(signal.step == report.step and signal.epoch == report.epoch for signal in report.health)
        assert all(signal.update_to_weight > 0 and signal.gradient_norm > 0 for signal in report.health)
        assert all(signal.saturation is None for signal in report.health)


def test_outputs_are_shipped_only_where_a_blueprint_may_read_them(drive):
    for run_id, blueprints, shipped in (("a", ["bottleneck"], False), ("b", ["scale_shift"], True)):
        driver = drive(make_config(tamiyo={"blueprints": blueprints}), run_id=run_id)
        (report,) = driver.train(1, expects_decision=True)
        samples = unpack_samples(driver.world.objects.get(report.site_samples))
        assert {(each.y is not None) for each in samples.values()} == {shipped}


class SlowLedger(UrzaStore):
    """Recording a fact lasts until training has taken another step, or some seconds if it does not."""

    session = None
    began = None
    ended = None
    recording = threading.Event()

    def insert_fact(self, fact):
        kind = type(self)
        kind.began = kind.session._shared.run.step
        kind.recording.set()
        until = time.monotonic() + 10
        while kind.session._shared.run.step == kind.began and time.monotonic() < until:
            time.sleep(0.001)
        kind.ended = kind.session._shared.run.step
        return super().insert_fact(fact)


def test_training_goes_on_while_a_graft_is_recorded(world, each_step):
    session = world.open(make_config(delivery={"mode": "asap"}, training={"batch_size": 10}), store_kind=SlowLedger)
    SlowLedger.session, SlowLedger.recording = session, threading.Event()
    driver = Driver(world, session)
    (first,) = driver.train(1, expects_decision=True)
    delivery = world.deliver(first, ordered(1, None))
    ordering = []

    def beat(progress):
        # A pace at which some steps are taken while a fact is recorded.
        time.sleep(0.01)
        if progress.step == first.step + 4 and progress.phase == "training":
            thread = threading.Thread(target=lambda: ordering.append(session.install(delivery)))
            thread.start()
            assert SlowLedger.recording.wait(20)

    reports = driver.train(2, beat=beat)
    assert ordering and ordering[0].accepted
    fact = ordering[0].fact
    assert SlowLedger.began < SlowLedger.ended < fact.apply_step
    assert fact in reports[0].facts


@given(
    st.lists(st.tuples(st.floats(-1e3, 1e3, width=32), st.integers(1, 512)), max_size=30),
    st.sets(st.integers(0, 30)),
    st.integers(1, 5),
)
def test_losses_are_added_in_order_however_often_they_are_read(steps, reads, repeat):
    found = LossSum()
    expected = 0.0
    for number, (loss, rows) in enumerate(steps * repeat):
        if number in reads:
            assert float(found) == expected
        found.add(torch.tensor(loss), rows)
        expected += float(numpy.float32(loss) * numpy.float32(rows))
    assert float(found) == expected
    resumed = LossSum()
    resumed.fill_(expected)
    resumed.add(torch.tensor(1.0), 3)
    assert float(resumed) == expected + 3.0
    found.zero_()
    assert float(found) == 0.0


def test_many_losses_are_kept_in_few_tensors():
    found = LossSum()
    for _ in range(3 * TOGETHER + 1):
        found.add(torch.tensor(0.5), 2)
    assert len(found._stacked) == 3 and len(found._losses) == 1
    assert float(found) == 3 * TOGETHER + 1
