"""What a live view shows: events in their order, lines off a terminal, a table on one."""

import asyncio
import io
import re
from collections.abc import Callable
from typing import Any

import pytest
from recorded_run import RecordedRun
from rich.console import Console

from esper.commands.actions import records
from esper.commands.views.live import Lines
from esper.commands.views.live import Terminal
from esper.commands.views.live import follow
from esper.commands.views.live import progress_table
from esper.commands.views.progress import Event
from esper.commands.views.progress import events_between
from esper.commands.views.progress import one_line
from esper.contracts.enums import AdaptationState
from esper.contracts.enums import Outcome
from esper.contracts.enums import SeedState
from esper.runtime.run_document import RunView

Record = Callable[..., Any]


def views(record: Record) -> list[RunView]:
    """A run as a watcher saw it at six moments."""

    async def scene(run: RecordedRun) -> list[RunView]:
        seen: list[RunView] = []

        async def look() -> None:
            seen.append(await records.look(run.library, run.run_id, seen[-1] if seen else None))

        await run.begin()
        await look()
        await run.epoch(1)
        await run.adapt(AdaptationState.ORDERED)
        await look()
        await run.epoch(2)
        await look()
        await run.epoch(3, SeedState.TRAINING)
        await run.adapt(AdaptationState.TRAINING)
        await look()
        await run.epoch(4, SeedState.TRAINING)
        await run.adapt(AdaptationState.FOSSILIZED)
        await look()
        await run.end(Outcome.COMPLETED)
        await look()
        return seen

    seen: list[RunView] = record(scene)
    return seen


def names(events: tuple[Event, ...]) -> list[str]:
    return [event.name for event in events]


def test_every_look_tells_only_what_is_new(record: Record) -> None:
    seen = views(record)
    told = [names(events_between(before, after)) for before, after in zip([None, *seen], seen, strict=False)]
    assert told == [
        [],
        ["epoch", "ordered"],
        ["epoch"],
        ["delivered", "grafted", "epoch"],
        ["kept", "epoch"],
        ["completed"],
    ]


def test_attaching_late_tells_the_whole_story_in_order(record: Record) -> None:
    last = views(record)[-1]
    assert names(events_between(None, last)) == [
        *("epoch", "ordered", "delivered", "epoch", "grafted", "epoch", "kept", "epoch", "completed")
    ]
    assert events_between(last, last) == ()


@pytest.mark.parametrize(
    ("state", "word"),
    [
        (AdaptationState.MISSED, "missed"),
        (AdaptationState.FAILED, "failed"),
        (AdaptationState.VETOED, "vetoed"),
        (AdaptationState.STALE, "stale"),
        (AdaptationState.CULLED, "culled"),
    ],
)
def test_an_end_of_an_adaptation_is_told_with_its_reason(record: Record, state: AdaptationState, word: str) -> None:
    async def scene(run: RecordedRun) -> RunView:
        await run.begin()
        await run.epoch(1)
        await run.adapt(state)
        return await records.look(run.library, run.run_id, None)

    events = events_between(None, record(scene))
    assert events[-1].name == word
    line = one_line(events[-1])
    assert line.startswith(f"event={word} adaptation=digits-1/a1 site=layers.0 blueprint=bottleneck ")
    assert f'reason="{state.value} for a reason"' in line


def test_off_a_terminal_an_epoch_is_one_line_of_pairs(record: Record) -> None:
    lines: list[str] = []
    last = views(record)[-1]
    Lines(lines.append).show(last, events_between(None, last))
    assert lines[0] == ("epoch=1 step=10 train_loss=1 val_loss=1.5 val_accuracy=0.5 parameters=870 seeds=dormant:2")
    assert "event=grafted adaptation=digits-1/a1 site=layers.0 blueprint=bottleneck step=20" in lines
    assert lines[-1] == "event=completed run=digits-1 step=40"
    assert all("\n" not in line for line in lines)


@pytest.mark.parametrize("width", [40, 120])
def test_the_table_fits_any_terminal_and_needs_only_ascii(record: Record, width: int) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", errors="strict")
    console = Console(file=stream, width=width, force_terminal=True, no_color=True, legacy_windows=False)
    console.print(progress_table(views(record)[-1]))
    stream.flush()
    lines = re.sub(r"\x1b\[[0-9;]*m", "", raw.getvalue().decode("ascii")).splitlines()
    assert max(map(len, lines)) <= width
    assert "digits-1" in lines[0] + lines[1]


def test_a_terminal_shows_events_and_the_last_epochs(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = io.StringIO()
    stream.isatty = lambda: True  # type: ignore[method-assign]
    seen = views(record)
    with Terminal(stream) as screen:
        for before, after in zip([None, *seen], seen, strict=False):
            screen.show(after, events_between(before, after))
    shown = stream.getvalue()
    assert "grafted   digits-1/a1" in shown
    assert "(fossilized for a reason)" in shown
    assert "digits-1  completed  4/4 epochs" in shown
    assert "\x1b[36m" not in shown


def test_following_ends_with_the_run(record: Record) -> None:
    seen = views(record)
    moments = iter(seen)

    async def look(before: RunView | None) -> RunView:
        return next(moments)

    lines: list[str] = []
    last = asyncio.run(follow(look, Lines(lines.append), interval=0))
    assert last is seen[-1]
    assert [line.split()[0] for line in lines if line.startswith("epoch=")] == [f"epoch={n}" for n in range(1, 5)]


def test_following_ends_when_nobody_works_on_the_run_any_more(record: Record) -> None:
    alive = views(record)[1]
    asked = 0

    async def look(before: RunView | None) -> RunView:
        return alive

    async def gone() -> bool:
        nonlocal asked
        asked += 1
        return asked == 2

    assert asyncio.run(follow(look, Lines(lambda line: None), gone=gone, interval=0)) is alive
    assert asked == 2
