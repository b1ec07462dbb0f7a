"""Decisions that a person takes in the strategist's place. No torch is imported."""

from esper.contracts.enums import DecisionKind
from esper.contracts.operational import AdaptationDecision

PERSON = "person"
"""Stands in `AdaptationDecision.policy` where a person decided."""


def wait_at_branch(parent: str, epoch: int) -> AdaptationDecision:
    """The first decision of a branch that goes on without what its parent ordered."""
    return wait_by_hand(parent, epoch, "forked", "a person branched off here with the decision to wait")


def wait_by_hand(run_id: str, epoch: int, code: str, reason: str) -> AdaptationDecision:
    """The decision to grow nothing after that epoch."""
    return AdaptationDecision(
        run_id=run_id, epoch=epoch, policy=PERSON, kind=DecisionKind.WAIT, code=code, reason=reason
    )
