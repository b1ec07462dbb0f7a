"""`what-if`: a decision of a stored history exchanged, and the first command that would have been another."""

import asyncio
from typing import Any

from esper.commands import output
from esper.commands.actions.replaying import WORKFLOWS
from esper.commands.actions.replaying import run_histories
from esper.contracts.enums import DecisionKind
from esper.contracts.messages import RequestAdaptation
from esper.contracts.operational import AdaptationDecision
from esper.errors import ConfigurationError
from esper.errors import NotFoundError
from esper.runtime.tamiyo.by_hand import wait_by_hand
from esper.runtime.temporal.commanded import Command
from esper.runtime.temporal.what_if import Difference
from esper.runtime.temporal.what_if import RecordedDecision
from esper.runtime.temporal.what_if import first_difference
from esper.runtime.temporal.what_if import recorded_decision
from esper.runtime.temporal.what_if import with_decision


def suppose(run_id: str, epoch: int, wanted: RequestAdaptation | None, *, as_json: bool) -> int:
    """Print what the run would have ordered after epoch `epoch` had `wanted` (None: to wait) been decided.

    Raises `NotFoundError` (ESP-505: no such run, no decision on that epoch), `ConfigurationError` (ESP-209: the
    decision could not have been taken there, and why).
    """
    recorded, decision, difference = asyncio.run(_suppose(run_id, epoch, wanted))
    if as_json:
        output.write_json(
            {
                "schema": 1,
                "run_id": run_id,
                "epoch": epoch,
                "event_id": recorded.event_id,
                "recorded": recorded.decision.model_dump(mode="json"),
                "supposed": decision.model_dump(mode="json"),
                "first_difference": _form(difference),
            }
        )
        return 0
    output.write(f"recorded: {_told(recorded.decision)}")
    output.write(f"supposed: {_told(decision)}")
    if difference is None:
        output.write("nothing else would have been ordered")
        return 0
    output.write("the first command that differs:")
    output.write(f"  recorded: {_command(difference.recorded)}")
    output.write(f"  would be: {_command(difference.would_be)}")
    return 0


async def _suppose(
    run_id: str, epoch: int, wanted: RequestAdaptation | None
) -> tuple[RecordedDecision, AdaptationDecision, Difference | None]:
    missing: NotFoundError | None = None
    for history in await run_histories(run_id):
        try:
            recorded = recorded_decision(history, epoch)
        except NotFoundError as error:
            missing = missing or error
            continue
        decision = _decided(recorded, wanted)
        edited = with_decision(history, epoch, decision)
        return recorded, decision, await first_difference(history, edited, WORKFLOWS)
    raise missing or NotFoundError("ESP-505", f"run {run_id} has no history yet", run_id=run_id)


def _decided(recorded: RecordedDecision, wanted: RequestAdaptation | None) -> AdaptationDecision:
    if wanted is None:
        score = recorded.request.score
        return wait_by_hand(score.run_id, score.report.epoch, "supposed", "supposed: to wait")
    # The strategist loads torch: nobody waits for that who supposes a WAIT.
    from esper.runtime.tamiyo.decision import decide

    decision = decide(recorded.request.model_copy(update={"requested": wanted}))
    if decision.kind is DecisionKind.WAIT:
        raise ConfigurationError(
            "ESP-209", f"that could not have been decided on epoch {decision.epoch}: {decision.reason}"
        )
    return decision


def _told(decision: AdaptationDecision) -> str:
    grown = f"{decision.blueprint} at {decision.site}" if decision.kind is DecisionKind.GERMINATE else "wait"
    return f"{grown} ({decision.reason})"


def _command(command: Command | None) -> str:
    return "nothing more" if command is None else f"{command.kind} {command.what}".rstrip()


def _form(difference: Difference | None) -> dict[str, Any] | None:
    if difference is None:
        return None

    def form(command: Command | None) -> dict[str, Any] | None:
        if command is None:
            return None
        return {"kind": command.kind, "what": command.what, "argument": command.argument}

    return {"recorded": form(difference.recorded), "would_be": form(difference.would_be)}
