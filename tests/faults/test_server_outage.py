"""The Temporal server, the orchestrator or the forge of a real stack is killed or away, alone or together with the
trainer: rows A1, B1, B5 and C1, and double faults of J. Every run ends in the bits of the undisturbed one."""

import asyncio
import contextlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import pytest
from local_stack import LocalStack
from temporalio.client import Client
from waiting import until

from esper.activities import names

pytestmark = [pytest.mark.temporal, pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(900)]

QUICK = (
    *("start-run", "--quick-start", "digits", "--json"),
    *("--set", "run.max_epochs=20"),
    *("--set", "tamiyo.hold_epochs=1", "--set", "tamiyo.hold_steps=0", "--set", "tamiyo.max_adaptations=3"),
)
PATIENT = ("--set", "tezzeret.timeout_s=400")
"""A run that waits for what is away must not give a kernel up: that would be another run."""
STEPS_PER_EPOCH = 141


class Observed:
    """One run of the stack, watched in Urza's own file: that works whatever is dead."""

    def __init__(self, stack: LocalStack, run_id: str, *more: str) -> None:
        self.stack = stack
        self.run_id = run_id
        self._process = stack.start(*QUICK, *more, "--run-id", run_id)

    def ask(self, query: str) -> list[tuple[Any, ...]]:
        if self._process.poll():
            known = self.stack.run("show", self.run_id, "--json")
            # Who watches a run may lose sight of it while the server is away; it must have begun.
            assert known.code == 0, f"{self.run_id} did not begin: {self._process.communicate()}"
        with contextlib.closing(sqlite3.connect(self.stack.home / "urza.db", timeout=30)) as database:
            return database.execute(query, (self.run_id,)).fetchall()

    def step(self) -> int:
        """The step of the newest head."""
        return int(self.ask("select coalesce(max(step), 0) from heads where run_id = ?")[0][0])

    def adaptations(self) -> list[str]:
        return [str(state) for (state,) in self.ask("select state from adaptations where run_id = ? order by number")]

    def trainer(self, *, other_than: int | None = None) -> int:
        """The process that trains it, once there is one."""

        def found() -> int | None:
            claimed = self.stack.claimed_trainer(self.run_id)
            return claimed if claimed != other_than else None

        return int(until(found, "a trainer"))

    def document(self) -> dict[str, Any]:
        """How it ended, as `start-run` says. It may have lost the server; then what `show` says."""
        out, _ = self._process.communicate(timeout=600)
        if self._process.returncode == 0:
            made: dict[str, Any] = json.loads(out)
            return made

        def shown() -> dict[str, Any] | None:
            ended = self.stack.run("show", self.run_id, "--json")
            return ended.document if ended.code == 0 and ended.document["outcome"] == "completed" else None

        found: dict[str, Any] = until(shown, f"the end of {self.run_id}")
        return found

    def end(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired, ValueError):
            self._process.communicate(timeout=10)


@pytest.fixture(scope="module")
def undisturbed(stack: LocalStack) -> dict[str, Any]:
    document: dict[str, Any] = stack.ok(*QUICK, *PATIENT, "--run-id", "undisturbed").document
    assert document["adaptations"], "without a graft these tests would say little"
    return document


@pytest.fixture
def observe(stack: LocalStack, undisturbed: dict[str, Any]) -> Iterator[Callable[..., Observed]]:
    made: list[Observed] = []

    def observing(run_id: str, *more: str) -> Observed:
        made.append(Observed(stack, run_id, *(more or PATIENT)))
        return made[-1]

    yield observing
    for each in made:
        each.end()


def kill(*pids: int) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def pid_of(stack: LocalStack, role: str) -> int:
    """A process of the stack that has such a role; the server is `temporal`."""
    state = stack.stack()
    if role in ("temporal", "supervisor"):
        return int(state[role]["pid"])
    return next(int(worker["pid"]) for worker in state["workers"] if role in worker["roles"])


@contextlib.contextmanager
def nobody_restarts(stack: LocalStack) -> Iterator[None]:
    """The supervisor stands still meanwhile."""
    supervisor = pid_of(stack, "supervisor")
    os.kill(supervisor, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(supervisor, signal.SIGCONT)


def stopped_with_work(stack: LocalStack, run: Observed) -> int | None:
    """The run's trainer, stopped at a moment when it was ordered more than the epoch whose end may be on its way."""

    async def ordered() -> int:
        client = await Client.connect(stack.stack()["temporal"]["address"])
        described = await client.get_workflow_handle(run.run_id).describe()
        pending = described.raw_description.pending_activities
        return sum(activity.activity_type.name == names.TRAIN_EPOCH.name for activity in pending)

    trainer = run.trainer()
    os.kill(trainer, signal.SIGSTOP)
    if asyncio.run(ordered()) >= 2:
        return trainer
    os.kill(trainer, signal.SIGCONT)
    return None


def assert_same(document: dict[str, Any], undisturbed: dict[str, Any]) -> None:
    assert document["outcome"] == "completed"
    assert document["digest"] == undisturbed["digest"]
    assert document["missed"] == document["divergences"] == 0
    kernels = [adaptation["kernel"] for adaptation in document["adaptations"]]
    assert kernels == [adaptation["kernel"] for adaptation in undisturbed["adaptations"]]
    assert [a["state"] for a in document["adaptations"]] == [a["state"] for a in undisturbed["adaptations"]]


@pytest.mark.fault("A1", "I1", "I5", "I11")
@pytest.mark.parametrize("seed", [1, 2])
def test_a_trainer_killed_at_random_steps_costs_no_bit(
    observe: Callable[..., Observed], undisturbed: dict[str, Any], seed: int
) -> None:
    steps = sorted(random.Random(seed).sample(range(STEPS_PER_EPOCH, 16 * STEPS_PER_EPOCH), 3))
    run = observe(f"random-{seed}")
    recovered = []
    for step in steps:
        until(lambda step=step: run.step() >= step, f"step {step}")  # type: ignore[misc]
        killed, stood, began = run.trainer(), run.step(), time.monotonic()
        kill(killed)
        run.trainer(other_than=killed)
        until(lambda stood=stood: run.step() > stood, "a new head")  # type: ignore[misc]
        recovered.append(round(time.monotonic() - began, 1))
    document = run.document()
    assert_same(document, undisturbed)
    assert document["restarts"] == len(steps)
    print(f"killed at {steps}, from each kill to the next head: {recovered} s")


@pytest.mark.fault("C1", "I1", "I2", "I11")
@pytest.mark.parametrize("away_s", [15.0, 2.0, 60.0])
def test_a_server_that_is_away_costs_no_bit_and_training_goes_on_meanwhile(
    stack: LocalStack, observe: Callable[..., Observed], undisturbed: dict[str, Any], away_s: float
) -> None:
    run = observe(f"away-{away_s:.0f}")
    until(lambda: run.step() >= 5 * STEPS_PER_EPOCH, "epoch 5")
    with nobody_restarts(stack):
        trainer = until(lambda: stopped_with_work(stack, run), "an epoch that is ordered and not trained")
        before = run.step()
        kill(pid_of(stack, "temporal"))
        os.kill(trainer, signal.SIGCONT)
        time.sleep(away_s)
        meanwhile = run.step()
        assert stack.run("show", run.run_id, "--json").document["outcome"] == "running", "Urza knows it all the same"
    back = time.monotonic()
    until(lambda: run.step() > meanwhile, "a head after the server came back")
    stalled = time.monotonic() - back
    document = run.document()
    assert_same(document, undisturbed)
    assert meanwhile > before, "the trainer finishes what it was ordered"
    assert document["restarts"] <= 2
    print(f"away {away_s:g} s: steps {before} to {meanwhile} meanwhile, next head {stalled:.1f} s after its return")


@pytest.mark.fault("J", "I9", "I11")
def test_the_server_is_down_while_the_run_is_taken_over(
    stack: LocalStack, observe: Callable[..., Observed], undisturbed: dict[str, Any]
) -> None:
    run = observe("down-in-takeover")
    until(lambda: run.step() >= 4 * STEPS_PER_EPOCH, "epoch 4")
    killed = run.trainer()
    kill(killed)
    run.trainer(other_than=killed)
    with nobody_restarts(stack):
        kill(pid_of(stack, "temporal"))
        time.sleep(4)
    assert_same(run.document(), undisturbed)


@pytest.mark.fault("J", "A1", "C1", "I11")
def test_trainer_orchestrator_and_server_die_together(
    stack: LocalStack, observe: Callable[..., Observed], undisturbed: dict[str, Any]
) -> None:
    run = observe("together")
    until(lambda: run.step() >= 6 * STEPS_PER_EPOCH, "epoch 6")
    kill(run.trainer(), pid_of(stack, "orchestrator"), pid_of(stack, "temporal"))
    assert_same(run.document(), undisturbed)


@pytest.mark.fault("B1", "I2", "I8", "I10", "I11")
def test_a_forge_killed_while_it_builds_delivers_one_kernel(
    stack: LocalStack, observe: Callable[..., Observed], undisturbed: dict[str, Any]
) -> None:
    run = observe("forge-killed")
    until(lambda: "ordered" in run.adaptations(), "an order")
    kill(pid_of(stack, "forge"))
    document = run.document()
    assert_same(document, undisturbed)
    assert document["restarts"] == 0, "training is none of the forge's business"
    built = run.ask("select count(*) from builds where adaptation_id like ? || '/%'")
    assert built == [(len(document["adaptations"]),)]


@pytest.mark.fault("B5", "I3", "I8", "I10")
def test_a_forge_that_stays_away_costs_its_adaptation_and_not_the_run(
    stack: LocalStack, observe: Callable[..., Observed]
) -> None:
    run = observe("forge-away", "--set", "tezzeret.timeout_s=2")
    until(lambda: "ordered" in run.adaptations(), "an order")
    forge = pid_of(stack, "forge")
    os.kill(forge, signal.SIGSTOP)
    try:
        at = run.step()
        until(lambda: set(run.adaptations()) & {"missed", "failed"}, "the end of the adaptation")
        until(lambda: run.step() > at, "training")
    finally:
        os.kill(forge, signal.SIGCONT)
    document = run.document()
    assert document["outcome"] == "completed" and document["restarts"] == 0
    assert document["steps"] == 20 * STEPS_PER_EPOCH
    first = document["adaptations"][0]
    assert first["state"] in ("missed", "failed") and first["reason"]
    assert not {a["state"] for a in document["adaptations"]} & {"ordered", "delivered", "training"}
    assert stack.ok("reproduce", "forge-away", "--json").document["digest"] == document["digest"]
