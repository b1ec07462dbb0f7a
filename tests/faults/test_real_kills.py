"""Real processes, really killed, at chosen moments of a run that grows, keeps and culls: it ends in the bits of the run
that nobody disturbed, every adaptation happened once, and nothing was missed."""

import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from local_stack import LocalStack

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.fault("A1", "A2", "A3", "I1", "I2", "I10", "I11")]

QUICK = (
    *("start-run", "--quick-start", "digits", "--json"),
    *("--set", "run.max_epochs=16"),
    *("--set", "tamiyo.hold_epochs=1", "--set", "tamiyo.hold_steps=0", "--set", "tamiyo.max_adaptations=3"),
    # A run that waits for what was killed must not give a kernel up: that would be another run.
    *("--set", "tezzeret.timeout_s=400"),
)
"""Sixteen epochs with a graft that is culled and one that is kept."""

MOMENTS = {
    "in a blob write": "file.before_rename=kill@12",
    "between two blobs": "commit.after_blob=kill@5",
    "before the head is moved": "commit.before_head=kill@3",
    "while the head is being moved": "commit.in_transaction=kill@4",
    "after the head was moved, before anyone knows": "commit.after_head=kill@5",
    "before an epoch is answered": "epoch.before_answer=kill@3",
    "in install_kernel, before its fact": "fact.before_insert:graft=kill@1",
    "in install_kernel, while its fact is written": "fact.in_transaction:graft=kill@2",
    "in install_kernel, after its fact": "fact.after_insert:graft=kill@1",
    "in the graft": "graft.parameters_added=kill@1",
    "after the graft, before a head has it": "graft.after_surgery=kill@2",
    "while the twin is trained": "judge.in_twin=kill@1",
    "before the verdict is recorded": "fact.before_insert:cull=kill@1",
    "between the verdict and the adoption of the twin": "cull.in_adoption=kill@1",
    "after a graft was kept, before a head has it": "keep.after_fossilization=kill@1",
    "when the lease was given out": "lease.after_claim=kill@1",
    "when the model was measured and stored": "finish.before_answer=kill@1",
}
FIRST = "commit.after_head=kill@7"
AGAIN = {
    "before the head is read": "lease.after_take_over=kill@1",
    "in the middle of a resume": "load.after_resume=kill@1",
    "when the first report after a resume is due": "epoch.before_report=kill@1",
}
BESIDE = {
    "forge": "delivery.received=kill@1",
    "orchestrator": "delivery.fetched=kill@2",
    "temporal": "commit.after_snapshot=kill@8",
}
TO_REPRODUCE = "graft.optimizer_joined=kill@2"
TRAPS = (TO_REPRODUCE, *MOMENTS.values(), FIRST, *AGAIN.values(), *BESIDE.values())


@dataclass(frozen=True)
class Trapped:
    """One stack whose processes know every trap; a trap acts only while its file is not among the spent ones."""

    stack: LocalStack
    spent: Path
    oracle: dict[str, Any]
    names: "count[int]"

    def run(self, *traps: str, beside: str | None = None) -> dict[str, Any]:
        """One run in which these traps act, once each; `beside` names what is killed together with the first."""
        for trap in TRAPS:
            self.marker(trap).write_text("kept from acting")
        for trap in traps:
            self.marker(trap).unlink()
        process = self.stack.start(*QUICK, "--run-id", f"killed-{next(self.names)}")
        try:
            if beside is not None:
                self._kill_with(traps[0], beside, process.poll)
            out, err = process.communicate(timeout=500)
        finally:
            process.kill()
        assert process.returncode == 0, f"{err}\n{self.stack.logs()}"
        document: dict[str, Any] = json.loads(out)
        return document

    def marker(self, trap: str) -> Path:
        return self.spent / trap

    def _kill_with(self, trap: str, beside: str, ended: Any) -> None:
        state = self.stack.stack()
        if beside == "temporal":
            pid = state["temporal"]["pid"]
        else:
            pid = next(worker["pid"] for worker in state["workers"] if beside in worker["roles"])
        while not self.marker(trap).exists():
            assert ended() is None, f"the run ended before {trap}"
            time.sleep(0.02)
        os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def trapped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trapped]:
    folder = tmp_path_factory.mktemp("kills")
    spent = folder / "spent"
    spent.mkdir()
    for trap in TRAPS:
        (spent / trap).write_text("kept from acting")
    environment = {"ESPER_FAILPOINTS": ",".join(TRAPS), "ESPER_FAILPOINTS_SPENT": str(spent)}
    local = LocalStack(folder / "home", **environment)
    local.ok("up")
    try:
        oracle = local.ok(*QUICK, "--run-id", "undisturbed", timeout=500).document
        yield Trapped(local, spent, oracle, count(1))
    finally:
        local.ok("down")


def told(document: dict[str, Any]) -> dict[str, Any]:
    """What must not depend on how often anything was killed."""
    keys = ("outcome", "digest", "epochs", "steps", "decisions", "missed", "divergences", "parameters", "adaptations")
    told: dict[str, Any] = json.loads(
        json.dumps({key: document[key] for key in keys}).replace(document["run_id"], "run")
    )
    return told


def test_the_undisturbed_run_grows_and_culls(trapped: Trapped) -> None:
    document = trapped.oracle
    assert document["outcome"] == "completed"
    assert {"fossilized", "culled"} <= {adaptation["state"] for adaptation in document["adaptations"]}
    assert document["restarts"] == document["missed"] == document["divergences"] == 0


@pytest.mark.fault("F3", "I4")
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_trainer_killed_costs_no_bit(trapped: Trapped, moment: str) -> None:
    trap = MOMENTS[moment]
    document = trapped.run(trap)
    assert trapped.marker(trap).read_text().isdecimal(), "nothing was killed"
    assert told(document) == told(trapped.oracle)
    assert document["restarts"] <= 1


@pytest.mark.fault("J")
@pytest.mark.parametrize("moment", AGAIN)
def test_a_successor_killed_too_costs_no_bit(trapped: Trapped, moment: str) -> None:
    traps = (FIRST, AGAIN[moment])
    document = trapped.run(*traps)
    victims = {trapped.marker(trap).read_text() for trap in traps}
    assert len(victims) == 2 and all(victim.isdecimal() for victim in victims)
    assert told(document) == told(trapped.oracle)


@pytest.mark.fault("J")
@pytest.mark.parametrize("beside", BESIDE)
def test_a_trainer_killed_together_with_another_process_costs_no_bit(trapped: Trapped, beside: str) -> None:
    document = trapped.run(BESIDE[beside], beside=beside)
    assert told(document) == told(trapped.oracle)


def test_a_killed_run_is_reproduced_from_its_records(trapped: Trapped) -> None:
    document = trapped.run(TO_REPRODUCE)
    ended = trapped.stack.ok("reproduce", document["run_id"], "--json", timeout=500)
    assert ended.document["digest"] == trapped.oracle["digest"]
