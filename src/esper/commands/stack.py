"""The local stack: `up`, `down`, `worker` (one process of it), and `doctor`, which checks all that it stands on."""

from typing import Annotated

import typer

from esper.commands import options
from esper.commands import output


def up(as_json: options.JsonFlag = False) -> int:
    """Start what is missing of the local stack. It stays up until `down`."""
    from esper.commands.actions import connections

    info = connections.stack_up(output.say)
    if as_json:
        output.write_json(info.to_json())
    else:
        output.write_pairs(
            [
                ("temporal", info.address),
                ("web UI", info.ui),
                *(("+".join(worker.roles), f"pid {worker.process.pid}, {worker.log}") for worker in info.workers),
            ]
        )
        output.say("It stays up until `esper-cli down`.")
    return 0


def down(as_json: options.JsonFlag = False) -> int:
    """End the processes of the local stack; its data stays."""
    from esper.commands.actions import connections

    ended = connections.stack_down(output.say)
    if as_json:
        output.write_json({"ended": list(ended)})
    else:
        output.write(f"ended: {', '.join(ended)}" if ended else "nothing was running")
    return 0


def worker(
    roles: Annotated[
        list[str], typer.Argument(metavar="ROLE...", help="orchestrator, trainer, tamiyo, forge; one or more.")
    ],
) -> int:
    """Run one worker process with these roles until it is told to end."""
    from esper.worker import main

    return main(roles)


def doctor(as_json: options.JsonFlag = False) -> int:
    """Check versions, database, objects, Temporal, devices and compilers. Exit 1 when something must be done."""
    import asyncio

    from esper.commands.actions import checks

    results = asyncio.run(checks.all_checks())
    if as_json:
        output.write_json([result.to_json() for result in results])
    else:
        for result in results:
            output.write(f"{result.state:<4}  {result.name}: {result.message}")
            if result.hint is not None:
                output.write(f"      {result.hint}")
    return 1 if any(result.state == "fail" for result in results) else 0
