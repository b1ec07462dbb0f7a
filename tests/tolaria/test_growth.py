"""A kernel's way through a live session: delivered, grafted, judged, kept or undone, all through recorded facts."""

import threading
import time

import pytest
import torch
from tolaria_plain_loop import plain_loop
from tolaria_tasks import Small
from tolaria_tasks import small_data
from tolaria_tasks import small_loss
from tolaria_world import make_config
from tolaria_world import ordered
from tolaria_world import silent

from esper.contracts.enums import FactKind
from esper.contracts.enums import SeedState
from esper.contracts.enums import Verdict
from esper.runtime.kasmina.digest import weights_digest
from esper.runtime.tolaria.live.boundary import pass_boundary
from esper.runtime.tolaria.warm_up import warm_up


def seed_at(report, site, index=0):
    return next(n.seeds[index] for n in report.graph.nodes if n.contract.site == site)


def grow(driver, *, order=None):
    """Train to the verdict over one scheduled graft: epochs 1 to 3, apply step 14 (the start of epoch 3)."""
    order = order or ordered(1, 14)
    driver.schedule = (order,)
    (first,) = driver.train(1, expects_decision=True)
    delivery = driver.world.deliver(first, order)
    result = driver.session.install(delivery)
    assert result.accepted, result.reason
    driver.train(2)
    (third,) = driver.train(3)
    return delivery, result, first, third


def test_kept_kernel_is_grafted_trained_judged_and_fossilized(drive):
    config = make_config("tolaria_tasks:narrow", optimizer={"lr": 0.02}, run={"max_epochs": 30})
    driver = drive(config)
    spe = driver.session.describe().steps_per_epoch
    order = ordered(1, 2 * spe, site="layers.0", blueprint="widen")
    _, result, first, third = grow(driver, order=order)
    assert result.fact.apply_step == 2 * spe
    assert result.fact.judge_step == 3 * spe
    assert first.site_samples is not None and first.health
    assert third.held_adaptation == "run/a1"
    assert third.parameters > first.parameters
    assert third.training_flops > first.training_flops
    assert [fact.kind for fact in third.facts] == [FactKind.GRAFT]
    assert seed_at(third, "layers.0").state is SeedState.TRAINING
    verdict = driver.session.judge("run/a1", silent)
    assert verdict.verdict is Verdict.KEEP, verdict
    assert verdict.gain_lower_bound > verdict.margin > 0
    assert verdict.twin_flops > 0
    (fourth,) = driver.train(4)
    assert [fact.kind for fact in fourth.facts] == [FactKind.FOSSILIZE]
    assert fourth.probe_flops >= verdict.twin_flops
    assert seed_at(fourth, "layers.0").state is SeedState.FOSSILIZED
    assert driver.world.facts() == [("graft", 2 * spe), ("fossilize", 3 * spe)]


def test_graft_leaves_the_function_and_the_old_optimizer_state_unchanged(drive):
    driver = drive(make_config())
    order = ordered(1, 14)
    driver.schedule = (order,)
    (first,) = driver.train(1, expects_decision=True)
    driver.session.install(driver.world.deliver(first, order))
    driver.train(2)
    live = driver.session._shared.run.trainee
    batch = [tensor[:32] for tensor in small_data()[0].tensors]
    live.model.eval()
    before = live.model(batch[0]).detach().clone()
    live.model.train()
    state = {
        name: {key: value.clone() for key, value in live.optimizer.state[parameter].items()}
        for name, parameter in live.model.named_parameters()
    }
    shared = driver.session._shared
    with shared.turn.condition:
        assert shared.turn.claim()
    with shared.turn.taken():
        pass_boundary(shared, lambda phase: None)
    live = driver.session._shared.run.trainee
    live.model.eval()
    after = live.model(batch[0]).detach()
    live.model.train()
    assert torch.equal(before, after)
    grown = [name for name, _ in live.model.named_parameters() if ".kasmina." in name]
    assert grown and all(name.startswith("first.kasmina.0.") for name in grown)
    for name, parameter in live.model.named_parameters():
        if name in state:
            assert live.optimizer.state[parameter].keys() == state[name].keys()
            for key, value in state[name].items():
                assert torch.equal(live.optimizer.state[parameter][key], value)


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_culled_run_ends_in_the_bits_of_one_that_never_grafted(drive, optimizer):
    settings = {"name": optimizer, "momentum": 0.9 if optimizer == "sgd" else 0.0}
    config = make_config(optimizer=settings, tamiyo={"keep_margin": 0.99, "hold_epochs": 1, "hold_steps": 0})
    grown = drive(config, run_id="grown")
    grow(grown, order=ordered(1, 14, run_id="grown"))
    verdict = grown.session.judge("grown/a1", silent)
    assert verdict.verdict is Verdict.CULL
    assert verdict.twin_loss is not None and verdict.grown_loss is not None
    reports = grown.train(4, 5, 6)
    assert seed_at(reports[0], "first").generation == 1
    plain = drive(config, run_id="plain")
    expected = plain.train(1, 2, 3, 4, 5, 6)
    assert [r.metrics for r in reports] == [r.metrics for r in expected[3:]]
    assert grown.digest() == plain.digest()


def test_two_runs_with_one_adaptation_end_in_the_same_bits(drive):
    digests = []
    for name in ("one", "two"):
        driver = drive(make_config(), run_id=name)
        order = ordered(1, 14, run_id=name)
        grow(driver, order=order)
        driver.session.judge(f"{name}/a1", silent)
        driver.train(4, 5, 6)
        digests.append(driver.digest())
    assert digests[0] == digests[1]


def test_training_steps_are_taken_while_a_kernel_is_installed(drive, monkeypatch):
    driver = drive(make_config(run={"max_epochs": 60}))
    order = ordered(1, 50 * 7)
    driver.schedule = (order,)
    (first,) = driver.train(1, expects_decision=True)
    delivery = driver.world.deliver(first, order)
    objects = driver.world.store._objects
    steps = []
    inside = threading.Event()

    class SlowObjects:
        put = objects.put

        def get(self, ref):
            run = driver.session._shared.run
            begin = run.step
            inside.set()
            deadline = time.monotonic() + 20
            while run.step < begin + 5 and time.monotonic() < deadline:
                time.sleep(0.002)
            steps.append(run.step - begin)
            return objects.get(ref)

    driver.world.store._objects = SlowObjects()
    results = []
    thread = threading.Thread(target=lambda: results.append(driver.session.install(delivery)))
    thread.start()
    assert inside.wait(20)
    driver.train(*range(2, 50))
    thread.join(30)
    driver.world.store._objects = objects
    assert results[0].accepted
    assert min(steps) >= 5


def test_missed_delivery_is_recorded_and_training_goes_on(drive):
    driver = drive(make_config(tezzeret={"timeout_s": 0.3}))
    driver.schedule = (ordered(1, 7),)
    phases = []
    reports = driver.train(1, 2, 3, beat=lambda progress: phases.append(progress.phase))
    assert driver.world.facts() == [("missed", 7)]
    assert [fact.kind for fact in reports[1].facts] == [FactKind.MISSED]
    assert reports[1].stall_seconds >= 0.3
    assert reports[0].stall_seconds < 0.3
    assert "waiting for a kernel" in phases
    late = driver.session.install(driver.world.deliver(reports[0], ordered(1, 7)))
    assert not late.accepted and late.fact.kind is FactKind.MISSED
    driver.train(4, 5, 6)
    plain = drive(make_config(), run_id="plain")
    plain.train(1, 2, 3, 4, 5, 6)
    assert driver.digest() == plain.digest()


@pytest.mark.fault("F1")
def test_delivery_that_arrives_while_training_waits_for_it_is_grafted_in_time(drive):
    driver = drive(make_config())
    order = ordered(1, 7)
    driver.schedule = (order,)
    (first,) = driver.train(1, expects_decision=True)
    delivery = driver.world.deliver(first, order)
    waiting = threading.Event()

    def beat(progress):
        if progress.phase == "waiting for a kernel":
            waiting.set()

    results = []
    thread = threading.Thread(target=lambda: results.extend(driver.train(2, beat=beat)))
    thread.start()
    assert waiting.wait(20)
    assert driver.session._shared.run.step == 7
    assert driver.session.install(delivery).accepted
    thread.join(20)
    assert [fact.apply_step for fact in results[0].facts] == [7]
    assert results[0].stall_seconds > 0


@pytest.mark.fault("F1", "I2")
def test_duplicate_delivery_is_grafted_once(drive):
    driver = drive(make_config())
    delivery, result, _, third = grow(driver)
    again = driver.session.install(delivery)
    assert again == result
    assert driver.world.facts() == [("graft", 14)]
    assert sum(seed.state is not SeedState.DORMANT for node in third.graph.nodes for seed in node.seeds) == 1


@pytest.mark.fault("F2", "I3")
def test_kernel_for_an_old_seed_generation_is_never_loaded(drive):
    driver = drive(make_config(tamiyo={"keep_margin": 0.99, "hold_epochs": 1, "hold_steps": 0}))
    _, _, first, _ = grow(driver)
    assert driver.session.judge("run/a1", silent).verdict is Verdict.CULL
    stale = ordered(2, 28, generation=0)
    driver.schedule = (stale,)
    answer = driver.session.install(driver.world.deliver(first, stale, seed=2))
    assert not answer.accepted and answer.fact is None and answer.reason.startswith("stale")
    reports = driver.train(4, 5)
    assert seed_at(reports[1], "first").state is SeedState.DORMANT
    assert ("graft", 28) not in driver.world.facts()


def test_asap_delivery_is_grafted_at_a_step_beyond_the_frontier(drive):
    driver = drive(make_config(delivery={"mode": "asap", "lag_epochs": 1}))
    order = ordered(1, None)
    (first,) = driver.train(1, expects_decision=True)
    answer = driver.session.install(driver.world.deliver(first, order))
    assert answer.accepted and answer.fact.apply_step == 8
    assert answer.fact.judge_step == 21
    (second,) = driver.train(2)
    assert seed_at(second, "first").born_step == 8
    heads = driver.world.call(driver.world.library.heads("run"))
    assert [item.head.step for item in heads] == [0, 7, 8, 14]


@pytest.mark.fault("F5", "I6")
def test_second_graft_is_refused_while_one_is_on_probation(drive):
    driver = drive(make_config(tamiyo={"hold_epochs": 2, "hold_steps": 0}))
    _, _, first, _ = grow(driver)
    other = ordered(2, 21, site="second")
    answer = driver.session.install(driver.world.deliver(first, other))
    assert not answer.accepted and "run/a1" in answer.reason


def test_graft_that_could_not_be_judged_before_the_end_is_refused(drive):
    driver = drive(make_config(run={"max_epochs": 3}))
    order = ordered(1, 15)
    (first,) = driver.train(1, expects_decision=True)
    answer = driver.session.install(driver.world.deliver(first, order))
    assert not answer.accepted and "judged" in answer.reason


def test_damaged_kernel_is_rejected_and_training_goes_on(drive):
    driver = drive(make_config())
    order = ordered(1, 14)
    driver.schedule = (order,)
    (first,) = driver.train(1, expects_decision=True)
    delivery = driver.world.deliver(first, order)
    damaged = delivery.model_copy(update={"weights": delivery.certificate, "kernel": "sha256:" + "0" * 64})
    answer = driver.session.install(damaged)
    assert not answer.accepted and answer.reason.startswith("rejected")
    reports = driver.train(2, 3)
    assert driver.world.facts() == [("missed", 14)]
    assert reports[1].stall_seconds < 5


def test_abandoned_adaptation_is_not_waited_for(drive):
    driver = drive(make_config())
    order = ordered(1, 7)
    driver.schedule = (order,)
    driver.train(1)
    answer = driver.session.abandon(order, "the forge failed")
    assert answer.fact.kind is FactKind.MISSED and answer.reason == "the forge failed"
    (second,) = driver.train(2)
    assert second.stall_seconds < 5


def test_removed_block_ramps_to_zero_and_leaves_exactly_the_host(drive):
    driver = drive(make_config(run={"max_epochs": 40}, tamiyo={"hold_epochs": 20, "hold_steps": 0}))
    grow(driver)
    answer = driver.session.remove("run/a1")
    assert (answer.accepted and answer.fact.apply_step == 29) or answer.fact.apply_step > 21
    start = answer.fact.apply_step
    model = driver.session._shared.run.trainee.model
    alphas = {}
    for epoch in range(4, 15):
        (report,) = driver.train(epoch)
        alphas[report.step] = [ramp.alpha(report.step) for ramp in driver.session._shared.run.state.ramps]
    falling = [values[0] for step, values in alphas.items() if values and step > start]
    assert falling == sorted(falling, reverse=True) and 0 < falling[-1] < 1
    assert alphas[max(alphas)] == []
    assert not [name for name, _ in model.named_parameters() if ".kasmina." in name]
    groups = driver.session._shared.run.trainee.optimizer.param_groups
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert seed_at(report, "first").generation == 1
    assert driver.session.judge("run/a1", silent).verdict is Verdict.VOID
    assert driver.session.remove("run/a1").fact == answer.fact


def test_kept_block_can_be_removed_by_a_person(drive):
    driver = drive(make_config("tolaria_tasks:narrow", optimizer={"lr": 0.02}, run={"max_epochs": 30}))
    spe = driver.session.describe().steps_per_epoch
    grow(driver, order=ordered(1, 2 * spe, site="layers.0", blueprint="widen"))
    assert driver.session.judge("run/a1", silent).verdict is Verdict.KEEP
    (kept,) = driver.train(4)
    assert seed_at(kept, "layers.0").state is SeedState.FOSSILIZED
    assert driver.session.remove("run/a1").accepted
    removed = driver.train(*range(5, 30))[-1]
    assert seed_at(removed, "layers.0").state is SeedState.DORMANT


def test_unknown_adaptation_cannot_be_removed(drive):
    driver = drive(make_config())
    assert not driver.session.remove("run/a9").accepted
    assert driver.session.judge("run/a9", silent).verdict is Verdict.VOID


def test_next_epoch_waits_for_the_verdict(drive):
    driver = drive(make_config(tamiyo={"keep_margin": 0.99, "hold_epochs": 1, "hold_steps": 0}))
    grow(driver)
    queued = threading.Event()
    reports = []
    beat = lambda progress: queued.set() if progress.phase == "queued" else None  # noqa: E731
    thread = threading.Thread(target=lambda: reports.extend(driver.train(4, beat=beat)))
    thread.start()
    assert queued.wait(20)
    assert driver.session._shared.run.step == 21
    report = driver.session.judge("run/a1", silent)
    thread.join(20)
    assert reports[0].epoch == 4
    assert driver.session.judge("run/a1", silent) == report


def test_plain_loop_is_left_by_a_graft(drive):
    """The comparison above could not fail otherwise: a graft that is kept does change the weights."""
    driver = drive(make_config(tamiyo={"keep_margin": 0.0, "hold_epochs": 1, "hold_steps": 0}))
    grow(driver)
    plain = plain_loop(
        lambda: (Small(), small_data()[0], small_loss),
        lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.01),
        seed=3,
        epochs=6,
        batch_size=32,
        lr=0.01,
        schedule="cosine",
        warmup=0.1,
        clip=1.0,
        stop_after=21,
    )
    live = driver.session._shared.run.trainee.model
    names = dict(plain.named_parameters())
    assert any(not torch.equal(p, names[n]) for n, p in live.named_parameters() if n in names)
    assert weights_digest(plain) != weights_digest(live)


def test_twin_makes_the_removal_that_goes_on_beside_it(drive, monkeypatch):
    """A verdict taken while another block is on its way out: the twin follows that block's alpha too."""
    monkeypatch.setattr("esper.runtime.tolaria.live.turns.BEAT_SECONDS", 0.0)
    config = make_config(run={"max_epochs": 13}, tamiyo={"keep_margin": 0.99, "hold_epochs": 1, "hold_steps": 0})

    class Stop(Exception):
        pass

    def stop(progress):
        if progress.step >= 16:
            raise Stop

    digests = []
    for run_id, second in (("with", True), ("without", False)):
        driver = drive(config, run_id=run_id)
        orders = [ordered(1, 14, run_id=run_id), ordered(2, 28, site="second", run_id=run_id)]
        driver.schedule = (orders[0],)
        (first,) = driver.train(1, expects_decision=True)
        assert driver.session.install(driver.world.deliver(first, orders[0])).accepted
        driver.train(2)
        with pytest.raises(Stop):
            driver.train(3, beat=stop)
        assert driver.session.remove(f"{run_id}/a1").fact.apply_step == 16
        driver.train(3)
        if second:
            driver.schedule = (orders[1],)
            assert driver.session.install(driver.world.deliver(first, orders[1])).accepted
        driver.train(4, 5)
        if second:
            assert driver.session.judge(f"{run_id}/a2", silent).verdict is Verdict.CULL
        driver.train(*range(6, 14))
        digests.append(driver.digest())
    assert digests[0] == digests[1]


def test_warm_up_leaves_the_generators_alone():
    before = torch.get_rng_state()
    warm_up()
    assert torch.equal(torch.get_rng_state(), before)
