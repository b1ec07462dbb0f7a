"""The real stack, and a kernel whose first step ends every trainer: two die, the third goes on without it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from local_stack import LocalStack

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.fault("A6", "I8", "I10", "I11")]

QUICK = (
    *("start-run", "--quick-start", "digits", "--json", "--run-id", "crashing"),
    *("--set", "run.max_epochs=8", "--set", "tamiyo.max_adaptations=1"),
    *("--set", "tamiyo.hold_epochs=1", "--set", "tamiyo.hold_steps=0"),
    *("--set", "tezzeret.timeout_s=400"),
)


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[LocalStack]:
    """Every trainer, also a successor, is killed when a kernel is about to take its first step."""
    local = LocalStack(tmp_path / "home", ESPER_FAILPOINTS="kernel.first_step=kill@1")
    local.ok("up")
    try:
        yield local
    finally:
        local.ok("down")


def test_run_whose_kernel_kills_its_trainer_goes_on_without_it_and_says_so(stack: LocalStack) -> None:
    document = stack.ok(*QUICK, timeout=600).document
    assert document["outcome"] == "completed"
    assert document["restarts"] == 2
    (adaptation,) = document["adaptations"]
    assert adaptation["state"] == "failed" and "quarantined" in adaptation["reason"]
    history = stack.ok("history", "crashing", "--json").out
    assert "quarantine" in history
    shown = stack.ok("show", "crashing").out
    assert "quarantined" in shown or "failed" in shown
    again = stack.ok("reproduce", "crashing", "--json", timeout=600)
    assert again.document["digest"] == document["digest"]
