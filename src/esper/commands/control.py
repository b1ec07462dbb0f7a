"""A person's hand in a running run: each command is one validated update, answered and kept in the history."""

from typing import Annotated
from typing import Any

import typer

from esper.commands import options
from esper.commands import output


def pause(run: options.RunArgument, as_json: options.JsonFlag = False) -> int:
    """Stop training at the next step boundary, commit, and wait for `resume`."""
    from esper.contracts.messages import Pause

    return _update(run, "pause", Pause(), as_json=as_json)


def stop(run: options.RunArgument, as_json: options.JsonFlag = False) -> int:
    """End the run at the next step boundary; its checkpoint stays, so `resume` can continue it."""
    from esper.contracts.messages import Stop

    return _update(run, "stop", Stop(), as_json=as_json)


def resume(
    run: options.RunArgument,
    values: options.SetOption = None,
    accept_drift: options.AcceptDriftFlag = False,
    as_json: options.JsonFlag = False,
) -> int:
    """Continue a paused, stopped or failed run under the same id.

    With another configuration, model or data set than before it says what differs and refuses, unless --accept-drift.
    """
    from esper.commands.actions import continuing

    return _print(continuing.resume(run, values, accept_drift=accept_drift), as_json=as_json)


def recover(
    run: options.RunArgument,
    accept_drift: options.AcceptDriftFlag = False,
    as_json: options.JsonFlag = False,
) -> int:
    """Go on from the last checkpoint in Urza with a run that the Temporal server has lost, or that is younger than
    the database, which was restored from a copy."""
    from esper.commands.actions import continuing

    return _print(continuing.recover(run, accept_drift=accept_drift), as_json=as_json)


def adapt(
    run: options.RunArgument,
    site: Annotated[str, typer.Option("--site", metavar="SITE", help="The dotted module name of the site.")],
    blueprint: Annotated[str, typer.Option("--blueprint", metavar="NAME", help="See `blueprints list`.")],
    values: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A hyperparameter, such as rank=16. May be repeated."),
    ] = None,
    as_json: options.JsonFlag = False,
) -> int:
    """Grow here: the next decision is yours instead of the policy's."""
    from esper.contracts.messages import RequestAdaptation
    from esper.runtime.tezzeret.blueprints.registry import get_blueprint

    hyperparameters = options.parse_hyperparameters(values or [])
    get_blueprint(blueprint)
    request = RequestAdaptation(site=site, blueprint=blueprint, hyperparameters=hyperparameters)
    return _update(run, "request_adaptation", request, as_json=as_json)


def veto(
    run: options.RunArgument,
    adaptation: Annotated[str, typer.Argument(metavar="ADAPTATION", help="<run id>/a<number>, or a<number>.")],
    as_json: options.JsonFlag = False,
) -> int:
    """Do not graft this adaptation."""
    from esper.contracts.messages import Veto

    return _update(run, "veto", Veto(adaptation_id=options.parse_adaptation_id(run, adaptation)), as_json=as_json)


def pin(run: options.RunArgument, site: options.SiteArgument, as_json: options.JsonFlag = False) -> int:
    """Never grow this site again in this run."""
    from esper.contracts.messages import PinSite

    return _update(run, "pin_site", PinSite(site=site), as_json=as_json)


def cull(run: options.RunArgument, site: options.SiteArgument, as_json: options.JsonFlag = False) -> int:
    """Ramp what was grown at this site to zero, then remove it."""
    from esper.contracts.messages import CullSeed

    return _update(run, "cull_seed", CullSeed(site=site), as_json=as_json)


def _update(run: str, name: str, payload: Any, *, as_json: bool) -> int:
    import asyncio

    from esper.commands.actions import continuing

    return _print(asyncio.run(continuing.update(run, name, payload)), as_json=as_json)


def _print(answer: dict[str, object], *, as_json: bool) -> int:
    if as_json:
        output.write_json(answer)
    else:
        output.write(str(answer["message"]))
    return 0
