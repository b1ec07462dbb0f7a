"""The tamiyo role: scoring a health graph and deciding."""

from temporalio import activity

from esper.activities.names import SCORE_SITES
from esper.contracts.operational import AdaptationDecision
from esper.contracts.orders import DecisionRequest
from esper.runtime.tamiyo.decision import decide


@activity.defn(name=SCORE_SITES.name)
def score_sites(request: DecisionRequest) -> AdaptationDecision:
    """Let the run's policy decide on its last report."""
    return decide(request)
