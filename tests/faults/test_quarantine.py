"""A kernel that ends its process twice is never executed again, and the run goes on without it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tolaria_world import Driver
from tolaria_world import World
from tolaria_world import assert_reproduced
from tolaria_world import make_config
from tolaria_world import ordered
from tolaria_world import silent

from esper.contracts.assets import Kernel
from esper.contracts.enums import AdaptationState
from esper.contracts.enums import EpochStatus
from esper.contracts.enums import FactKind
from esper.contracts.enums import KernelState
from esper.contracts.enums import SeedState
from esper.contracts.enums import Verdict
from esper.contracts.operational import Adaptation
from esper.contracts.operational import Fact
from esper.contracts.operational import KernelDelivery
from esper.errors import LeaseLost
from esper.runtime import failpoints
from esper.runtime.tezzeret.manifest import KernelManifest
from esper.workflows.adaptation_book import AdaptationBook

Open = Callable[..., Driver]

GRAFT = 14

CONFIG = make_config(tamiyo={"hold_epochs": 2, "hold_steps": 0})


def begin(drive: Open) -> KernelDelivery:
    """A run with a recorded graft at step 14, two epochs in."""
    driver = drive(CONFIG)
    driver.schedule = (ordered(1, GRAFT),)
    (first,) = driver.train(1, expects_decision=True)
    delivery = driver.world.deliver(first, driver.schedule[0])
    assert driver.session.install(delivery).accepted
    driver.train(2)
    return delivery


def crash(drive: Open, place: str) -> None:
    """A new trainer takes the run over and dies at a failpoint in its third epoch."""
    driver = drive(CONFIG)
    driver.schedule = (ordered(1, GRAFT),)
    with failpoints.armed(place, "raise", 1), pytest.raises(failpoints.Crashed):
        driver.train(3)


def finish(drive: Open) -> Driver:
    driver = drive(CONFIG)
    driver.schedule = (ordered(1, GRAFT),)
    for epoch in range(driver.session.describe().epoch + 1, 7):
        if epoch == 5:
            driver.session.judge("run/a1", silent)
        driver.train(epoch)
    return driver


def undisturbed(drive: Open) -> str:
    plain = drive(CONFIG, run_id="plain")
    plain.train(1, 2, 3, 4, 5, 6)
    return plain.digest()


@pytest.mark.fault("A6", "I8", "I10", "I11")
@pytest.mark.parametrize(
    "place",
    [
        "kernel.first_step",
        pytest.param("graft.parameters_added", marks=pytest.mark.slow),
        pytest.param("graft.after_surgery", marks=pytest.mark.slow),
    ],
)
def test_second_crash_between_the_markers_quarantines_the_kernel(drive: Open, place: str) -> None:
    begin(drive)
    crash(drive, place)
    crash(drive, place)
    # A third time it would crash as well.
    with failpoints.armed(place, "raise", 1):
        driver = finish(drive)
        digest = driver.digest()
    assert driver.world.facts() == [("graft", GRAFT), ("quarantine", GRAFT)]
    facts = driver.session.describe().facts
    assert "ended 2 times" in facts[-1].reason
    assert all(seed.state is SeedState.DORMANT for node in driver.session.describe().graph.nodes for seed in node.seeds)
    verdict = driver.session.judge("run/a1", silent)
    assert verdict.verdict is Verdict.VOID and "quarantine" in verdict.reason
    assert_reproduced(driver.world, CONFIG, digest)
    assert digest == undisturbed(drive)


@pytest.mark.fault("A6")
def test_one_crash_between_the_markers_is_forgiven(drive: Open) -> None:
    begin(drive)
    crash(drive, "kernel.first_step")
    driver = finish(drive)
    kinds = [kind for kind, _ in driver.world.facts()]
    assert kinds[0] == "graft" and "quarantine" not in kinds
    assert_reproduced(driver.world, CONFIG, driver.digest())


@pytest.mark.fault("A6")
def test_crashes_outside_of_the_markers_are_no_strikes(drive: Open) -> None:
    begin(drive)
    for _ in range(3):
        crash(drive, "epoch.before_report")
    assert "quarantine" not in [kind for kind, _ in finish(drive).world.facts()]


@pytest.mark.fault("A6", "I11")
def test_kernel_that_a_head_has_already_is_quarantined_too(drive: Open) -> None:
    """The head of the graft's step was committed after the graft: its first step is taken without the kernel."""
    begin(drive)
    paused = drive(CONFIG)
    paused.session._commit_at = (GRAFT,)
    assert paused.session.train_epoch(paused.request(3), silent).status is EpochStatus.PAUSED
    assert paused.session._shared.run.state.held is not None
    crash(drive, "kernel.first_step")
    crash(drive, "kernel.first_step")
    with failpoints.armed("kernel.first_step", "raise", 1):
        driver = finish(drive)
    assert driver.world.facts() == [("graft", GRAFT), ("strike", GRAFT), ("quarantine", GRAFT + 1)]
    digest = driver.digest()
    assert_reproduced(driver.world, CONFIG, digest)
    assert digest == undisturbed(drive)


@pytest.mark.fault("A6", "I8")
def test_repeated_delivery_of_a_quarantined_kernel_is_answered_with_the_quarantine(drive: Open) -> None:
    delivery = begin(drive)
    crash(drive, "kernel.first_step")
    crash(drive, "kernel.first_step")
    answer = finish(drive).session.install(delivery)
    assert not answer.accepted and answer.fact is not None
    assert answer.fact.kind is FactKind.QUARANTINE and "quarantined" in answer.reason


@pytest.mark.fault("A6", "A4")
def test_marker_is_counted_once_and_only_if_it_was_left_open(world: World) -> None:
    world.open(CONFIG)
    library = world.library
    first = world.call(library.lease("run"))
    world.call(library.open_marker(first, "run/a1", "sha256:" + "1" * 64))
    assert world.call(library.take_over(first)).crashes == {}
    second = world.call(library.claim("run", "queue"))
    assert world.call(library.take_over(second)).crashes == {"run/a1": 1}
    assert world.call(library.take_over(second)).crashes == {"run/a1": 1}
    with pytest.raises(LeaseLost):
        world.call(library.open_marker(first, "run/a1", "sha256:" + "1" * 64))
    world.call(library.open_marker(second, "run/a1", "sha256:" + "1" * 64))
    world.call(library.close_marker(second, "run/a1"))
    third = world.call(library.claim("run", "queue"))
    assert world.call(library.take_over(third)).crashes == {"run/a1": 1}
    with pytest.raises(LeaseLost):
        world.call(library.close_marker(second, "run/a1"))


@pytest.mark.fault("A6")
def test_quarantined_kernel_is_never_grafted_again_in_whatever_run(drive: Open) -> None:
    delivery = begin(drive)
    world = drive(CONFIG, run_id="other").world
    manifest = KernelManifest.model_validate_json(world.objects.get(delivery.manifest))
    kernel = Kernel(
        digest=delivery.kernel,
        blueprint=manifest.blueprint,
        hyperparameters=manifest.hyperparameters,
        site=manifest.site,
        state=KernelState.CERTIFIED,
        manifest=delivery.manifest,
        weights=delivery.weights,
        certificate=delivery.certificate,
        parameter_count=manifest.parameter_count,
    )
    world.call(world.library.publish_kernel(kernel, "run/a1", "run"))
    crash(drive, "kernel.first_step")
    crash(drive, "kernel.first_step")
    drive(CONFIG)
    assert world.call(world.library.kernel(delivery.kernel)).state is KernelState.QUARANTINED
    other = drive(CONFIG, run_id="other")
    order = ordered(1, GRAFT, run_id="other")
    other.train(1)
    answer = other.session.install(delivery.model_copy(update={"adaptation": order}))
    assert not answer.accepted and "quarantine" in answer.reason
    assert other.world.facts("other") == [("missed", GRAFT)]


@pytest.mark.fault("A6", "I8")
@pytest.mark.parametrize("known", [(), (FactKind.GRAFT,)])
def test_quarantine_is_the_one_outcome_that_the_book_of_the_workflow_shows(known: tuple[FactKind, ...]) -> None:
    adaptation = Adaptation(
        adaptation_id="run/a1",
        number=1,
        epoch=1,
        site="first",
        seed=0,
        seed_generation=0,
        blueprint="bottleneck",
        state=AdaptationState.DELIVERED,
        apply_step=GRAFT,
        reason="grow",
    )
    book = AdaptationBook([adaptation])

    def fact(kind: FactKind) -> Fact:
        return Fact(
            run_id="run", adaptation_id="run/a1", kind=kind, apply_step=GRAFT, seq=1, judge_step=28, reason=kind.value
        )

    for kind in known:
        book.apply(fact(kind))
    ended = book.apply(fact(FactKind.QUARANTINE))
    assert ended is not None and ended.state is AdaptationState.FAILED and ended.reason == "quarantine"
    assert book.apply(fact(FactKind.QUARANTINE)) is None
    assert book.to_judge(28) is None and book.schedule() == ()


@pytest.mark.slow
@pytest.mark.fault("A6", "I10", "I11")
@pytest.mark.parametrize(
    "how, armed", [("birth", ""), ("step", ""), ("never", "kernel.first_step=kill@1")], ids=["birth", "step", "kill"]
)
def test_kernel_that_kills_its_process_costs_two_of_them(tmp_path: Path, how: str, armed: str) -> None:
    codes = []
    for _ in range(3):
        child = subprocess.run(
            [sys.executable, str(Path(__file__).parent / "quarantine_child.py"), str(tmp_path), how],
            env=os.environ | {"ESPER_FAILPOINTS": armed, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        codes.append(child.returncode)
    assert codes == [-signal.SIGKILL if armed else -signal.SIGSEGV] * 2 + [0], child.stderr[-2000:]
    told = json.loads(child.stdout)
    assert told["begun"] == GRAFT or told["begun"] == 7
    assert [tuple(fact) for fact in told["facts"]] == [("graft", GRAFT), ("quarantine", GRAFT)]
    world = World(tmp_path)
    try:
        assert_reproduced(world, CONFIG, told["digest"])
    finally:
        world.close()
