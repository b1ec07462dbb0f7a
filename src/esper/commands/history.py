"""What a run decided and why (`history`), whether its workflow still replays (`replay`) and its training too
(`reproduce`), and what another decision would have ordered (`what-if`)."""

from typing import Annotated

import typer

from esper.commands import options
from esper.commands import output


def history(run: options.RunArgument, as_json: options.JsonFlag = False) -> int:
    """Every decision, also WAIT, with its evidence, delivery, apply step and outcome; and what its workflow tells of
    trainers, messages and executions."""
    import asyncio

    from esper.commands.actions import chronicling
    from esper.commands.actions import records
    from esper.commands.views import summary
    from esper.runtime.run_document import history_document

    document = history_document(asyncio.run(records.one_run(run)))
    document["workflow"] = asyncio.run(chronicling.workflow_document(run))
    if as_json:
        output.write_json(document)
    elif document["decisions"] or document["rewinds"] or document["drifts"]:
        summary.write_history(document)
    else:
        output.say(f"Run {run} has not decided anything yet.")
    if not as_json:
        summary.write_chronicle(document["workflow"])
    return 0


def replay(
    target: Annotated[str, typer.Argument(metavar="RUN|FILE", help="A run id, or a workflow history as JSON.")],
    as_json: options.JsonFlag = False,
) -> int:
    """Replay stored workflow history on the present code: clean, or the first divergence by event (exit 4)."""
    import asyncio

    from esper.commands.actions import replaying

    return replaying.write_reports(asyncio.run(replaying.replay(target)), as_json=as_json)


def reproduce(run: options.RunArgument, as_json: options.JsonFlag = False) -> int:
    """Train a run again from its records alone, without Temporal, and compare every head to the bit (exit 4)."""
    from esper.commands.actions import reproducing

    return reproducing.reproduce_run(run, as_json=as_json)


def what_if(
    run: options.RunArgument,
    epoch: options.EpochOption,
    decision: options.DecisionOption,
    as_json: options.JsonFlag = False,
) -> int:
    """Exchange one decision in the run's history and print the first command that would have been another."""
    from esper.commands.actions import supposing
    from esper.contracts.messages import RequestAdaptation

    chosen = options.parse_decision(decision)
    wanted = None if chosen is None else RequestAdaptation(site=chosen[0], blueprint=chosen[1])
    return supposing.suppose(run, epoch, wanted, as_json=as_json)
