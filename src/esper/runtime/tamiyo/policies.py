"""The policies: health graph in, decision out. One protocol, one registry.

A policy reads its request and the graph and nothing else: no clock, no timing, no random number. Equal
requests give equal decisions, so a replay explains every one of them.
"""

from collections.abc import Callable
from difflib import get_close_matches
from typing import Protocol
from typing import TypeVar

from esper.contracts.enums import DecisionKind
from esper.contracts.operational import AdaptationDecision
from esper.contracts.orders import ScoreRequest
from esper.errors import ConfigurationError
from esper.runtime.tamiyo.candidates import Candidate
from esper.runtime.tamiyo.candidates import candidates
from esper.runtime.tamiyo.candidates import trimmed
from esper.runtime.tamiyo.features import RUN_MEASURED
from esper.runtime.tamiyo.features import RUN_STRUCTURE
from esper.runtime.tamiyo.features import HealthView
from esper.runtime.tamiyo.gates import Wait
from esper.runtime.tamiyo.gates import first_wait
from esper.runtime.tamiyo.thresholds import THRESHOLDS


class Policy(Protocol):
    """One way to decide. `name` is set by `register_policy`."""

    name: str

    def decide(self, request: ScoreRequest, graph: HealthView) -> AdaptationDecision: ...


PolicyT = TypeVar("PolicyT", bound=Policy)
_POLICIES: dict[str, Callable[[], Policy]] = {}


def register_policy(name: str) -> Callable[[type[PolicyT]], type[PolicyT]]:
    """Class decorator: makes the class `tamiyo.policy: <name>`. The class is built without arguments.

    Raises `ConfigurationError` ESP-204 when the name is taken.
    """

    def register(policy: type[PolicyT]) -> type[PolicyT]:
        if name in _POLICIES:
            raise ConfigurationError("ESP-204", f"the policy {name!r} is registered twice", hint="choose another name")
        policy.name = name
        _POLICIES[name] = policy
        return policy

    return register


def list_policies() -> tuple[str, ...]:
    """The names that `tamiyo.policy` may take, sorted."""
    return tuple(sorted(_POLICIES))


def get_policy(name: str) -> Policy:
    """The policy of that name; `ConfigurationError` ESP-204 with the nearest names when there is none."""
    if name not in _POLICIES:
        near = get_close_matches(name, _POLICIES, n=3)
        known = ", ".join(list_policies())
        raise ConfigurationError(
            "ESP-204",
            f"tamiyo.policy: there is no policy {name!r}",
            hint=f"did you mean {' or '.join(near)}?" if near else f"known policies: {known}",
        )
    return _POLICIES[name]()


@register_policy("none")
class NeverGrow:
    """The control of every comparison: the run without growth."""

    name: str

    def decide(self, request: ScoreRequest, graph: HealthView) -> AdaptationDecision:
        return AdaptationDecision(
            run_id=request.run_id,
            epoch=request.report.epoch,
            policy=self.name,
            kind=DecisionKind.WAIT,
            code="off",
            reason="tamiyo.policy is none: nothing is ever grown",
        )


@register_policy("heuristic")
class Heuristic:
    """Grows when the host has stopped learning, where and by what the evidence is strongest.

    When: the gates of `gates`. Where and what: the scores of `candidates`, each relative to its own
    threshold. Otherwise WAIT.
    """

    name: str

    def decide(self, request: ScoreRequest, graph: HealthView) -> AdaptationDecision:
        ranked = candidates(request, graph)
        wait = first_wait(request, graph)
        if wait is not None:
            return waiting(request, graph, self.name, wait, ranked)
        best = next((candidate for candidate in ranked if candidate.convincing), None)
        if best is None:
            return waiting(request, graph, self.name, _nothing_convincing(ranked), ranked)
        return ordering(request, graph, self.name, "grow", _why(best, ranked), best, ranked)


def waiting(
    request: ScoreRequest, graph: HealthView, policy: str, wait: Wait, ranked: tuple[Candidate, ...]
) -> AdaptationDecision:
    """The decision not to grow now."""
    kept = trimmed(ranked)
    return AdaptationDecision(
        run_id=request.run_id,
        epoch=request.report.epoch,
        policy=policy,
        kind=DecisionKind.WAIT,
        code=wait.code,
        reason=wait.reason,
        alternatives=kept,
        features=_features(graph, len(ranked) - len(kept)),
        thresholds={name: entry.value for name, entry in THRESHOLDS.items()},
    )


def ordering(
    request: ScoreRequest,
    graph: HealthView,
    policy: str,
    code: str,
    reason: str,
    chosen: Candidate,
    ranked: tuple[Candidate, ...],
) -> AdaptationDecision:
    """The decision to grow `chosen`."""
    kept = trimmed(ranked)
    return AdaptationDecision(
        run_id=request.run_id,
        epoch=request.report.epoch,
        policy=policy,
        kind=DecisionKind.GERMINATE,
        code=code,
        reason=reason,
        site=chosen.alternative.site,
        seed=chosen.seed,
        blueprint=chosen.alternative.blueprint,
        hyperparameters=chosen.alternative.hyperparameters,
        contract=chosen.contract,
        alternatives=kept,
        features=_features(graph, len(ranked) - len(kept)),
        thresholds={name: entry.value for name, entry in THRESHOLDS.items()},
    )


def _features(graph: HealthView, omitted: int) -> dict[str, float]:
    """The run's features as far as they are known, and how many alternatives the record had no room for."""
    known = {name: graph.run(name) for name in (*RUN_STRUCTURE, *RUN_MEASURED)}
    return {name: value for name, value in known.items() if value is not None} | {
        "alternatives_omitted": float(omitted)
    }


def _why(best: Candidate, ranked: tuple[Candidate, ...]) -> str:
    chosen = best.alternative
    rivals = sum(candidate.convincing for candidate in ranked) - 1
    return (
        f"{chosen.blueprint} at {chosen.site}: {chosen.reason}; the strongest of {len(ranked)} pairs, "
        f"{rivals} other(s) convincing; adds {chosen.added_parameters} parameters"
    )


def _nothing_convincing(ranked: tuple[Candidate, ...]) -> Wait:
    if not ranked:
        return Wait("below_threshold", "0 pairs: no configured blueprint fits any site")
    best = ranked[0].alternative
    eligible = sum(candidate.alternative.eligible for candidate in ranked)
    reason = (
        f"none of {len(ranked)} pairs ({eligible} eligible) is convincing; "
        f"the strongest is {best.blueprint} at {best.site}: {best.reason}"
    )
    kept_out = next(
        (each.alternative for each in ranked if not each.alternative.eligible and each.strength >= 1.0), None
    )
    if kept_out is not None and kept_out is not best:
        reason += f"; {kept_out.blueprint} at {kept_out.site} would be, but {kept_out.reason}"
    return Wait("below_threshold", reason)
