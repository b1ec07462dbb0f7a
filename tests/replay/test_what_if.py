"""A decision exchanged in a stored history: the first command that would have been another."""

import asyncio
from pathlib import Path

import pytest

from esper.contracts.enums import DecisionKind
from esper.errors import NotFoundError
from esper.runtime.temporal.what_if import first_difference
from esper.runtime.temporal.what_if import recorded_decision
from esper.runtime.temporal.what_if import with_decision
from esper.workflows.tamiyo_decision import TamiyoDecision
from esper.workflows.tezzeret_compile import TezzeretCompile
from esper.workflows.training_run import TrainingRun

WORKFLOWS = (TrainingRun, TamiyoDecision, TezzeretCompile)
HISTORY = (Path(__file__).parent / "histories" / "grow_and_keep.run-0.json").read_text()


def test_grown_decision_turned_into_wait_orders_no_kernel():
    recorded = recorded_decision(HISTORY, 1)
    assert recorded.decision.kind is DecisionKind.GERMINATE
    wait = recorded.decision.model_copy(
        update={"kind": DecisionKind.WAIT, "code": "what_if", "site": None, "seed": None, "contract": None}
    )
    difference = asyncio.run(first_difference(HISTORY, with_decision(HISTORY, 1, wait), WORKFLOWS))
    assert difference is not None and difference.recorded is not None
    assert difference.recorded.kind == "child workflow" and "/tezzeret/" in difference.recorded.what
    assert difference.would_be is None or "/tezzeret/" not in difference.would_be.what


def test_other_hyperparameters_order_another_kernel_under_the_same_name():
    recorded = recorded_decision(HISTORY, 1)
    other = recorded.decision.model_copy(update={"site": "elsewhere"})
    difference = asyncio.run(first_difference(HISTORY, with_decision(HISTORY, 1, other), WORKFLOWS))
    assert difference is not None and difference.would_be is not None
    assert difference.would_be.argument["adaptation"]["site"] == "elsewhere"


def test_the_recorded_decision_itself_changes_nothing():
    recorded = recorded_decision(HISTORY, 1)
    again = with_decision(HISTORY, 1, recorded.decision)
    assert asyncio.run(first_difference(HISTORY, again, WORKFLOWS)) is None


def test_an_epoch_without_a_decision_is_not_found():
    with pytest.raises(NotFoundError, match="epoch 99"):
        recorded_decision(HISTORY, 99)
