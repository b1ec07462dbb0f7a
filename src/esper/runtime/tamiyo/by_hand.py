"""Decisions that a person takes in the strategist's place. No torch is imported."""

from esper.contracts.enums import DecisionKind
from esper.contracts.operational import AdaptationDecision

PERSON = "person"
"""Stands in `AdaptationDecision.policy` where a person decided."""


def wait_by_hand(run_id: str, epoch: int, code: str, reason: str) -> AdaptationDecision:
    """The decision to grow nothing after that epoch."""
    return AdaptationDecision(
        run_id=run_id, epoch=epoch, policy=PERSON, kind=DecisionKind.WAIT, code=code, reason=reason
    )
