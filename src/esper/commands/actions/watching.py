"""Showing a run until it ends: the part that `start-run` and `watch` share."""

import asyncio
import sys
from collections.abc import Awaitable
from collections.abc import Callable
from contextlib import ExitStack

from temporalio.client import Client

from esper.commands import output
from esper.commands.actions import connections
from esper.commands.actions import records
from esper.commands.views import summary
from esper.commands.views.live import Lines
from esper.commands.views.live import Screen
from esper.commands.views.live import Silence
from esper.commands.views.live import Terminal
from esper.commands.views.live import follow
from esper.contracts.enums import Outcome
from esper.errors import EsperError
from esper.errors import RunFailed
from esper.errors import by_code
from esper.runtime.run_document import RunView
from esper.runtime.run_document import document_json
from esper.runtime.urza.library import Library


def watch(run_id: str, *, as_json: bool) -> int:
    """`watch RUN`: live on stdout; under `--json` nothing but the document at the end."""
    with ExitStack() as stack:
        screen = _watch_screen(stack, as_json=as_json)
        try:
            view = asyncio.run(_watch(run_id, screen))
        except KeyboardInterrupt:
            say_detached(run_id)
            raise
    if as_json:
        output.write_json(document_json(summary.document(view)))
    raise_failure(view)
    return 0


async def _watch(run_id: str, screen: Screen) -> RunView:
    async with connections.library() as library:
        return await until_end(records.require(library, run_id), run_id, screen)


async def until_end(library: Library, run_id: str, screen: Screen) -> RunView:
    """Show the run until it has ended; its last state."""

    async def look(before: RunView | None) -> RunView:
        return await records.look(library, run_id, before)

    return await follow(look, screen, gone=_gone(run_id))


def progress_screen(stack: ExitStack, *, quiet: bool) -> Screen:
    """Where `start-run` talks: stderr."""
    if quiet:
        return Silence()
    return stack.enter_context(Terminal(sys.stderr)) if sys.stderr.isatty() else Lines(output.say)


def raise_failure(view: RunView) -> None:
    """A failed run ends the command with the run's own error, and with that error's own exit code."""
    error = failure_of(view)
    if error is not None:
        raise error


def failure_of(view: RunView) -> EsperError | None:
    """The error of a run that failed, or that ended without saying how; `None` for any other."""
    run_id, form = view.record.run_id, view.record.failure
    if view.record.outcome is Outcome.FAILED and form is not None:
        hint = form.get("hint")
        code = str(form.get("code"))
        return by_code(code)(code, str(form.get("message")), hint=str(hint) if hint else None, run_id=run_id)
    if view.record.outcome is Outcome.FAILED or not view.ended:
        return RunFailed(
            "ESP-601",
            f"run {run_id} ended without a result: its workflow was terminated or timed out",
            hint=f"`esper-cli resume {run_id}` continues it from its last checkpoint",
            run_id=run_id,
        )
    return None


def say_detached(run_id: str) -> None:
    """What a person must know who pressed Ctrl-C."""
    output.say(f"Detached: run {run_id} goes on. Look again with `esper-cli watch {run_id}`,")
    output.say(f"stop it with `esper-cli stop {run_id}`.")


def _watch_screen(stack: ExitStack, *, as_json: bool) -> Screen:
    if as_json:
        return Silence()
    if sys.stdout.isatty():
        return stack.enter_context(Terminal(sys.stdout))
    return Lines(output.write)


def _gone(run_id: str) -> Callable[[], Awaitable[bool]]:
    """Whether the run's workflow has closed. As long as nobody can be asked, the run is taken to go on."""
    clients: list[Client] = []

    async def gone() -> bool:
        try:
            if not clients:
                clients.append(await connections.client())
            return await connections.is_closed(clients[0], run_id)
        except EsperError:
            return False

    return gone
