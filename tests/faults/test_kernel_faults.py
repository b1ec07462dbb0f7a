"""A kernel on probation that fails costs a step its kernel, or the kernel its place, and never the training."""

import functools
from collections.abc import Callable
from collections.abc import Collection

import pytest
import torch
from failing_kernels import failing
from failing_kernels import gives_endless_gradients
from failing_kernels import gives_nan
from failing_kernels import is_slow
from failing_kernels import raises
from failing_kernels import raises_backward
from failing_kernels import runs_out_of_memory
from tolaria_world import Driver
from tolaria_world import assert_reproduced
from tolaria_world import make_config
from tolaria_world import ordered
from tolaria_world import silent

from esper.contracts.config import EsperConfig
from esper.contracts.enums import FactKind
from esper.contracts.enums import SeedState
from esper.contracts.enums import Verdict
from esper.contracts.operational import EpochReport
from esper.errors import RunFailed
from esper.runtime import failpoints
from esper.runtime.tolaria.checkpoint import restore
from esper.runtime.tolaria.live.kernel_faults import guard
from esper.runtime.tolaria.live.kernel_faults import pace

Open = Callable[..., Driver]

GRAFT = 14
"""Seven steps an epoch: the graft is made at the beginning of the third, and judged at step 28 in `LONG`."""

LONG = {"hold_epochs": 2, "hold_steps": 0, "keep_margin": 0.99}


def config(**sections: dict[str, object]) -> EsperConfig:
    return make_config(**{"tamiyo": LONG, **sections})


def grafted(driver: Driver, run_id: str = "run") -> EpochReport:
    """Epochs 1 and 2; a kernel is there for step 14."""
    driver.schedule = (ordered(1, GRAFT, run_id=run_id),)
    (first,) = driver.train(1, expects_decision=True)
    assert driver.session.install(driver.world.deliver(first, driver.schedule[0])).accepted
    driver.train(2)
    return first


def step_of(driver: Driver) -> int:
    return driver.session._shared.run.step


def train_failing(
    driver: Driver, fault: Callable[..., torch.Tensor], steps: Collection[int], *epochs: int, evaluating: bool = False
) -> list[EpochReport]:
    with failing(fault, steps, functools.partial(step_of, driver), evaluating=evaluating):
        return driver.train(*epochs)


def plain_digest(drive: Open, settings: EsperConfig, epochs: int = 6) -> str:
    plain = drive(settings, run_id="plain")
    plain.train(*range(1, epochs + 1))
    return plain.digest()


def seed_of(report: EpochReport) -> SeedState:
    node = next(node for node in report.graph.nodes if node.contract.site == "first")
    return node.seeds[0].state


SLOW = pytest.mark.slow

FAULTS = [
    raises_backward,
    gives_nan,
    pytest.param(raises, marks=SLOW),
    pytest.param(gives_endless_gradients, marks=SLOW),
]


@pytest.mark.fault("A8", "A9", "I5", "I10", "I11")
@pytest.mark.parametrize("fault", FAULTS)
def test_failed_step_is_taken_without_the_kernel_and_reproduced(
    drive: Open, fault: Callable[..., torch.Tensor]
) -> None:
    settings = config()
    driver = drive(settings)
    grafted(driver)
    (third,) = train_failing(driver, fault, [GRAFT + 2], 3)
    assert [(fact.kind, fact.apply_step) for fact in third.facts] == [
        (FactKind.GRAFT, GRAFT),
        (FactKind.STRIKE, GRAFT + 2),
    ]
    assert third.step == 21 and third.samples == 200
    assert seed_of(third) is SeedState.TRAINING
    assert next(signal for signal in third.health if signal.site == "first").error_count == 1
    driver.train(4)
    assert driver.session.judge("run/a1", silent).verdict is Verdict.CULL
    driver.train(5, 6)
    assert_reproduced(driver.world, settings, driver.digest())


@pytest.mark.fault("A9", "I6", "I8", "I10", "I11")
@pytest.mark.parametrize("fault", FAULTS)
def test_three_strikes_open_the_breaker_and_leave_what_never_had_the_kernel(
    drive: Open, fault: Callable[..., torch.Tensor]
) -> None:
    settings = config()
    driver = drive(settings)
    grafted(driver)
    (third, fourth) = train_failing(driver, fault, range(GRAFT, 100), 3, 4)
    assert [(fact.kind, fact.apply_step) for fact in third.facts[1:]] == [
        (FactKind.STRIKE, GRAFT),
        (FactKind.STRIKE, GRAFT + 1),
        (FactKind.STRIKE, GRAFT + 2),
        (FactKind.BREAKER, GRAFT + 3),
    ]
    assert "3 steps in a row" in third.facts[-1].reason
    assert third.held_adaptation is None and fourth.facts == ()
    assert seed_of(third) is SeedState.DORMANT
    verdict = driver.session.judge("run/a1", silent)
    assert verdict.verdict is Verdict.VOID and "breaker" in verdict.reason
    driver.train(5, 6)
    assert_reproduced(driver.world, settings, driver.digest())
    assert driver.digest() == plain_digest(drive, settings)


@pytest.mark.fault("A9")
def test_buffers_of_the_host_move_once_in_a_step_that_is_tried_again(drive: Open) -> None:
    settings = config()
    driver = drive(settings)
    grafted(driver)
    train_failing(driver, raises_backward, range(GRAFT, 100), 3)
    plain = drive(settings, run_id="plain")
    plain.train(1, 2, 3)
    for ours, theirs in zip(
        driver.session._shared.run.trainee.model.named_buffers(),
        plain.session._shared.run.trainee.model.named_buffers(),
        strict=True,
    ):
        assert ours[0] == theirs[0] and torch.equal(ours[1], theirs[1])


@pytest.mark.fault("A9")
def test_failure_now_and_then_does_not_open_the_breaker(drive: Open) -> None:
    settings = config()
    driver = drive(settings)
    grafted(driver)
    reports = train_failing(driver, raises, range(GRAFT, 100, 5), 3, 4)
    strikes = [fact.apply_step for report in reports for fact in report.facts if fact.kind is FactKind.STRIKE]
    assert strikes == [14, 19, 24]
    assert reports[-1].held_adaptation == "run/a1"
    driver.session.judge("run/a1", silent)
    driver.train(5, 6)
    assert_reproduced(driver.world, settings, driver.digest())


@pytest.mark.fault("A9")
def test_kernel_that_goes_on_failing_now_and_then_is_removed_in_the_end(
    drive: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("esper.runtime.tolaria.live.kernel_faults.strikes.ALL_STRIKES", 1)
    driver = drive(config())
    grafted(driver)
    reports = train_failing(driver, raises, range(GRAFT, 100, 3), 3)
    assert reports[0].facts[-1].kind is FactKind.BREAKER and reports[0].facts[-1].apply_step == 21


@pytest.mark.fault("A9", "I6", "I11")
def test_strikes_survive_a_restart(drive: Open) -> None:
    settings = config()
    driver = drive(settings)
    grafted(driver)
    seen: list[dict[str, int]] = []

    def stop(progress):
        seen.append(progress.seeds)
        if progress.step == GRAFT + 2:
            raise InterruptedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("esper.runtime.tolaria.live.turns.BEAT_SECONDS", 0.0)
        with failing(raises, range(GRAFT, 100), functools.partial(step_of, driver)), pytest.raises(InterruptedError):
            driver.train(3, beat=stop)
    assert seen[-1]["error_recovery"] == 1
    driver.session.checkpoint(hold=True)
    again = drive(settings)
    again.schedule = driver.schedule
    assert again.session._shared.run.state.held.strikes == 2
    (third,) = train_failing(again, raises, range(GRAFT, 100), 3)
    assert (third.facts[-1].kind, third.facts[-1].apply_step) == (FactKind.BREAKER, GRAFT + 3)
    again.train(4, 5, 6)
    assert_reproduced(again.world, settings, again.digest())
    assert again.digest() == plain_digest(drive, settings)


@pytest.mark.fault("A9", "I11")
@pytest.mark.parametrize(
    "place",
    [
        "fact.after_insert:strike",
        pytest.param("fact.before_insert:strike", marks=SLOW),
        pytest.param("fact.executed:strike", marks=SLOW),
    ],
)
def test_recorded_strike_rules_after_a_crash_around_it(drive: Open, place: str) -> None:
    settings = config()
    driver = drive(settings)
    grafted(driver)
    with failpoints.armed(place, "raise", 1), pytest.raises(failpoints.Crashed):
        train_failing(driver, raises, [GRAFT + 1], 3)
    again = drive(settings)
    again.schedule = driver.schedule
    # The kernel is well now: whether the step is taken without it, the records tell.
    (third,) = again.train(3)
    strikes = [fact.apply_step for fact in third.facts if fact.kind is FactKind.STRIKE]
    assert strikes == ([] if "before" in place else [GRAFT + 1])
    again.train(4)
    again.session.judge("run/a1", silent)
    again.train(5, 6)
    assert_reproduced(again.world, settings, again.digest())


@pytest.mark.fault("A7", "I5", "I10", "I11")
def test_kernel_that_runs_out_of_memory_is_removed_at_once_and_the_batch_taken_without_it(drive: Open) -> None:
    settings = config()
    driver = drive(settings)
    grafted(driver)
    (third,) = train_failing(driver, runs_out_of_memory, [GRAFT], 3)
    assert [(fact.kind, fact.apply_step) for fact in third.facts] == [
        (FactKind.GRAFT, GRAFT),
        (FactKind.STRIKE, GRAFT),
        (FactKind.BREAKER, GRAFT + 1),
    ]
    assert "out of memory" in third.facts[-1].reason
    assert third.step == 21 and third.samples == 200
    driver.train(4, 5, 6)
    assert_reproduced(driver.world, settings, driver.digest())
    assert driver.digest() == plain_digest(drive, settings)


@pytest.mark.fault("A7", "A9")
@pytest.mark.parametrize("fault", [raises, pytest.param(runs_out_of_memory, marks=SLOW)])
def test_kernel_that_fails_at_its_birth_is_culled(drive: Open, fault: Callable[..., torch.Tensor]) -> None:
    settings = config()
    driver = drive(settings)
    grafted(driver)
    (third,) = train_failing(driver, fault, [GRAFT], 3, evaluating=True)
    assert [fact.kind for fact in third.facts] == [FactKind.GRAFT, FactKind.CULL]
    assert "rejected" in third.facts[-1].reason
    driver.train(4, 5, 6)
    assert_reproduced(driver.world, settings, driver.digest())
    assert driver.digest() == plain_digest(drive, settings)


@pytest.mark.fault("A8", "A9", "I10", "I11")
@pytest.mark.parametrize(
    ("fault", "epoch"),
    [
        (raises, 4),
        (gives_nan, 3),
        pytest.param(raises, 3, marks=SLOW),
        pytest.param(gives_nan, 4, marks=SLOW),
    ],
)
def test_kernel_that_fails_only_in_evaluation_is_removed_there(
    drive: Open, fault: Callable[..., torch.Tensor], epoch: int
) -> None:
    """Epoch 4 ends at the step of the verdict."""
    settings = config()
    driver = drive(settings)
    grafted(driver)
    report = train_failing(driver, fault, [7 * epoch], *range(3, epoch + 1), evaluating=True)[-1]
    assert (report.facts[-1].kind, report.facts[-1].apply_step) == (FactKind.BREAKER, 7 * epoch)
    assert report.held_adaptation is None
    driver.session.judge("run/a1", silent)
    driver.train(*range(epoch + 1, 7))
    assert_reproduced(driver.world, settings, driver.digest())


@pytest.mark.fault("A9")
def test_cancelling_an_evaluation_is_no_fault_of_the_kernel(drive: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("esper.runtime.tolaria.live.turns.BEAT_SECONDS", 0.0)
    driver = drive(config())
    grafted(driver)

    def cancel(progress):
        if progress.phase == "validating":
            raise InterruptedError

    with pytest.raises(InterruptedError):
        driver.train(3, beat=cancel)
    (third,) = driver.train(3)
    assert [fact.kind for fact in third.facts] == [FactKind.GRAFT]


@pytest.mark.fault("A8", "I11")
def test_nan_never_reaches_a_committed_head(drive: Open) -> None:
    driver = drive(config())
    grafted(driver)
    train_failing(driver, gives_nan, [15, 18, 22], 3, 4)
    driver.digest()
    heads = driver.world.call(driver.world.library.heads("run"))
    assert max(item.head.step for item in heads) == 28
    for item in heads:
        tensors = restore(item.manifest, driver.world.objects.get).model.values()
        assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


@pytest.mark.fault("A8")
def test_sleeping_kernel_is_not_executed(drive: Open) -> None:
    """0 * NaN is NaN: a struck step must not compute the kernel and throw it away."""
    driver = drive(config())
    grafted(driver)
    executed = []

    def note(output: torch.Tensor) -> torch.Tensor:
        executed.append(step_of(driver))
        return output + float("nan") if step_of(driver) == GRAFT + 1 else output

    train_failing(driver, note, range(GRAFT, 21), 3)
    assert executed == list(range(GRAFT, 21))


@pytest.mark.fault("A9", "I10")
def test_failure_of_the_task_itself_is_no_strike(drive: Open) -> None:
    driver = drive(make_config("tolaria_tasks:small", tamiyo=LONG))
    grafted(driver)
    plan = driver.session._shared.run.trainee.plan

    loss = plan.loss

    def failing_loss(model, batch):
        if not torch.is_grad_enabled():
            return loss(model, batch)
        raise ValueError("the data\nwent away")

    object.__setattr__(plan, "loss", failing_loss)
    with pytest.raises(RunFailed) as failed:
        driver.train(3)
    assert failed.value.code == "ESP-601" and "went away" in str(failed.value)
    assert driver.world.facts() == [("graft", GRAFT)]


@pytest.mark.fault("A8", "I10")
def test_nan_of_the_task_itself_is_no_strike(drive: Open) -> None:
    driver = drive(make_config("tolaria_tasks:small", tamiyo=LONG))
    grafted(driver)
    plan = driver.session._shared.run.trainee.plan
    loss = plan.loss

    def endless_loss(model, batch):
        return loss(model, batch) * float("inf")

    object.__setattr__(plan, "loss", endless_loss)
    with pytest.raises(RunFailed, match="after epoch 3") as failed:
        driver.train(3)
    assert failed.value.code == "ESP-601"
    assert driver.world.facts() == [("graft", GRAFT)]


@pytest.mark.fault("A9")
def test_nothing_is_captured_without_a_kernel_on_probation(drive: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    captured = []
    start = guard._StepStart

    def note(model):
        captured.append(1)
        return start(model)

    monkeypatch.setattr(guard, "_StepStart", note)
    driver = drive(make_config(tamiyo={**LONG, "hold_epochs": 1}))
    grafted(driver)
    assert captured == []
    driver.train(3)
    assert len(captured) == 7
    driver.session.judge("run/a1", silent)
    driver.train(4, 5, 6)
    assert len(captured) == 7


@pytest.mark.fault("A10", "I11")
def test_slow_kernel_is_removed_and_reproduced_as_recorded(drive: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "WINDOW", 3)
    monkeypatch.setattr(pace, "FEWEST", 3)
    monkeypatch.setattr(pace, "FLOOR_SECONDS", 0.0)
    monkeypatch.setattr(pace, "FACTOR", 2.0)
    settings = config()
    driver = drive(settings)
    grafted(driver)
    usual = driver.session._shared.pace
    usual._usual.clear()
    usual._usual.extend([0.001] * 10)
    reports = train_failing(driver, is_slow, range(GRAFT, 100), 3, 4)
    opened = [fact for report in reports for fact in report.facts if fact.kind is FactKind.BREAKER]
    # The first step counts for nothing, then three windows of three steps.
    assert [fact.apply_step for fact in opened] == [GRAFT + 10]
    assert "with its kernel" in opened[0].reason
    driver.train(5, 6)
    assert_reproduced(driver.world, settings, driver.digest())
