"""The live view of a run: a table that moves on a terminal, one line an epoch elsewhere.

It reads Urza and nothing else, so it can be attached from anywhere and shows what is committed.
"""

import asyncio
from collections.abc import Awaitable
from collections.abc import Callable
from types import TracebackType
from typing import Protocol
from typing import Self
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from esper.commands.views.progress import Event
from esper.commands.views.progress import events_between
from esper.commands.views.progress import one_line
from esper.commands.views.progress import sentence
from esper.contracts.operational import EpochReport
from esper.runtime.run_document import RunView
from esper.runtime.run_document import seed_states

INTERVAL = 0.3
"""Seconds between two looks at Urza."""

SHOWN_EPOCHS = 12
COLORS = {"grafted": "cyan", "kept": "green", "culled": "yellow", "missed": "yellow", "failed": "red"}


class Screen(Protocol):
    """Where progress is shown."""

    def show(self, view: RunView, events: tuple[Event, ...]) -> None: ...


class Lines:
    """One `key=value` line an epoch and one an event: for logs, pipes and screen readers."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write

    def show(self, view: RunView, events: tuple[Event, ...]) -> None:
        for event in events:
            self._write(one_line(event))


class Silence:
    """Shows nothing: `--json` without a person in front."""

    def show(self, view: RunView, events: tuple[Event, ...]) -> None:
        return


class Terminal:
    """A table of the last epochs that stays in place, under the events that scroll by."""

    def __init__(self, stream: TextIO) -> None:
        self._console = Console(file=stream, highlight=False)
        self._live = Live(console=self._console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def show(self, view: RunView, events: tuple[Event, ...]) -> None:
        for event in events:
            if event.name != "epoch":
                self._console.print(escape(sentence(event)), style=COLORS.get(event.name, ""), soft_wrap=True)
        self._live.update(progress_table(view), refresh=True)


def progress_table(view: RunView) -> Table:
    """The last epochs of a run, newest at the bottom."""
    maximum = view.record.config.run.max_epochs
    extras = list(view.last.metrics.extra) if view.last is not None else []
    done = view.last.epoch if view.last is not None else 0
    title = f"{view.record.run_id}  {view.record.outcome.value}  {done}/{maximum} epochs"
    table = Table(title=title, title_justify="left")
    for name in ("epoch", "train loss", "val loss", *extras, "parameters"):
        table.add_column(name, justify="right", overflow="fold")
    table.add_column("seeds", overflow="fold")
    for report in view.reports[-SHOWN_EPOCHS:]:
        table.add_row(*_row(report, extras))
    return table


async def follow(
    look: Callable[[RunView | None], Awaitable[RunView]],
    screen: Screen,
    *,
    gone: Callable[[], Awaitable[bool]] | None = None,
    interval: float = INTERVAL,
) -> RunView:
    """Show a run until it has ended, and return its last state.

    `look` gives the present state, told the one before; `gone` says whether nobody works on the run any more
    although Urza calls it running (terminated by hand), and is asked rarely. Then the last state is returned as it is.
    """
    before: RunView | None = None
    looks = 0
    while True:
        view = await look(before)
        screen.show(view, events_between(before, view))
        if view.ended:
            return view
        looks += 1
        if gone is not None and looks % 10 == 0 and await gone():
            # The outcome is recorded before the workflow closes: one more look sees it, if there is one.
            view = await look(view)
            screen.show(view, events_between(before, view))
            return view
        before = view
        await asyncio.sleep(interval)


def _row(report: EpochReport, extras: list[str]) -> list[str]:
    metrics = report.metrics
    states = "  ".join(f"{count} {state}" for state, count in seed_states(report).items())
    return [
        str(report.epoch),
        f"{metrics.train_loss:.4f}",
        f"{metrics.val_loss:.4f}",
        *(f"{metrics.extra[name]:.4f}" if name in metrics.extra else "-" for name in extras),
        str(report.parameters),
        states,
    ]
