"""`fork`: a new run from an epoch of another."""

from typing import Annotated

import typer

from esper.commands import options


def fork(
    run: options.RunArgument,
    epoch: Annotated[int, typer.Option("--epoch", metavar="N", min=1, help="Branch off where this epoch ended.")],
    decision: Annotated[
        str | None,
        typer.Option(
            "--decision", metavar="wait|SITE:BLUEPRINT", help="What is decided on that epoch; else the policy decides."
        ),
    ] = None,
    values: options.SetOption = None,
    run_id: options.RunIdOption = None,
    output_folder: options.OutputOption = None,
    accept_drift: options.AcceptDriftFlag = False,
    detach: options.DetachFlag = False,
    as_json: options.JsonFlag = False,
) -> int:
    """Start a new run from the checkpoint of an epoch of another, which stays as it is.

    A checkpoint that was collected is first trained again from the records, and must become what it was.
    """
    from esper.commands.actions import forking
    from esper.commands.actions import launch
    from esper.contracts.messages import RequestAdaptation

    chosen = None if decision is None else options.parse_decision(decision)
    wanted = None if chosen is None else RequestAdaptation(site=chosen[0], blueprint=chosen[1])
    prepared = forking.prepare(
        run,
        epoch,
        wait=decision == "wait",
        requested=wanted,
        values=values or [],
        run_id=run_id,
        output_folder=output_folder,
        accept_drift=accept_drift,
    )
    return launch.start(prepared, detach=detach, as_json=as_json)
