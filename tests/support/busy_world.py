"""The fake world as it grows again and again: a new graft as soon as the last one is settled."""

from dataclasses import dataclass
from typing import Any

from fake_activities import SITE
from fake_activities import FakeWorld
from temporalio import activity

from esper.activities import names
from esper.contracts.enums import DecisionKind
from esper.contracts.enums import Verdict
from esper.contracts.operational import AdaptationDecision
from esper.contracts.operational import JudgeReport
from esper.contracts.orders import DecisionRequest
from esper.contracts.orders import JudgeRequest


@dataclass
class BusyWorld(FakeWorld):
    """Orders up to `grafts_wanted` adaptations; of every `keep_one_in` that are judged one is kept."""

    grafts_wanted: int = 0
    keep_one_in: int = 10
    most_seen: int = 0
    """The most adaptations that one decision was given."""

    @activity.defn(name=names.SCORE_SITES.name)
    async def score_sites(self, request: DecisionRequest) -> AdaptationDecision:
        score = request.score
        self.most_seen = max(self.most_seen, len(score.adaptations))
        ordered = score.forgotten.ordered + len(score.adaptations)
        grow = ordered < self.grafts_wanted and score.in_flight is None and score.report.held_adaptation is None
        grow = grow and all(adaptation.state.value != "training" for adaptation in score.adaptations)
        chosen: dict[str, Any] = {"site": SITE.site, "seed": 0, "blueprint": "bottleneck", "contract": SITE}
        return AdaptationDecision(
            run_id=score.run_id,
            epoch=score.report.epoch,
            policy="busy",
            kind=DecisionKind.GERMINATE if grow else DecisionKind.WAIT,
            code="grow" if grow else "hold",
            reason=f"{ordered} were ordered",
            **(chosen if grow else {}),
        )

    @activity.defn(name=names.JUDGE_SEED.name)
    async def judge_seed(self, request: JudgeRequest) -> JudgeReport:
        number = int(request.adaptation_id.rpartition("/a")[2])
        self.verdict = Verdict.KEEP if number % self.keep_one_in == 0 else Verdict.CULL
        return await super().judge_seed(request)
