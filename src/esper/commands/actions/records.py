"""Reading runs: from Urza, and from the logs folder."""

import asyncio
import json
import time
from pathlib import Path
from typing import Any

from esper.commands import output
from esper.commands.actions import connections
from esper.contracts.orders import RunRecord
from esper.errors import NotFoundError
from esper.runtime.logs import read_logs
from esper.runtime.run_document import RunView
from esper.runtime.run_document import check_output_folder
from esper.runtime.run_document import own_files
from esper.runtime.run_document import write_output_folder
from esper.runtime.urza.library import Library
from esper.runtime.urza.objects import ObjectStore

LOG_INTERVAL = 0.5
"""Seconds between two looks at the log files under `logs --follow`."""


async def all_runs(limit: int) -> tuple[RunRecord, ...]:
    """The newest runs, newest first; none when there is no database yet."""
    async with connections.library() as library:
        return () if library is None else await library.runs(limit)


async def one_record(run_id: str) -> RunRecord:
    """The run's own row. Raises `NotFoundError` (ESP-505)."""
    async with connections.library() as library:
        return await require(library, run_id).run(run_id)


async def one_run(run_id: str) -> RunView:
    """Everything of one run. Raises `NotFoundError` (ESP-505)."""
    async with connections.library() as library:
        return await look(require(library, run_id), run_id, None)


def require(library: Library | None, run_id: str) -> Library:
    """The library, when there is one: without a database there is no run either."""
    if library is None:
        raise NotFoundError(
            "ESP-505",
            f"there is no run {run_id!r}: nothing has run in {connections.home()} yet",
            hint="`esper-cli start-run --quick-start digits` starts one",
            run_id=run_id,
        )
    return library


async def look(library: Library, run_id: str, before: RunView | None) -> RunView:
    """The run as it stands now; of the reports only those that `before` lacks are read.

    The record is read first and again last when it has ended: an ended run then comes with all that belongs to it.
    """
    record = await library.run(run_id)
    known = before.reports if before is not None else ()
    return RunView(
        record=record,
        reports=known + await library.reports(run_id, known[-1].epoch if known else 0),
        decisions=await library.decisions(run_id),
        adaptations=await library.adaptations(run_id),
        facts=await library.facts(run_id),
        rewinds=await library.rewinds(run_id),
        drifts=await library.drifts(run_id),
    )


async def output_files(library: Library, store: ObjectStore, view: RunView) -> dict[str, bytes]:
    """The files of the output folder: those that the trainer stored, and those that Urza's rows give."""
    stored = view.record.finished.files if view.record.finished is not None else {}
    files = own_files(view)
    for name, reference in stored.items():
        files[Path(name).name] = await asyncio.to_thread(store.get, reference)
    return files


async def export(run_id: str, folder: str | None) -> str | None:
    """Write the output folder of a run that has a final model; returns its path as it was named, None for a run
    that has none. Raises `ConfigurationError` (ESP-208) for a folder that cannot be written."""
    named = folder or f"results/{run_id}"
    async with connections.library() as library:
        known = require(library, run_id)
        view = await look(known, run_id, None)
        if view.record.finished is None:
            return None
        path = check_output_folder(named)
        write_output_folder(path, await output_files(known, connections.store(), view))
    return named


def print_logs(run_id: str, *, follow: bool, as_json: bool) -> int:
    """The structured log lines of a run; under `--json` one array, or one object a line with `--follow`."""
    home = connections.home()
    lines = list(read_logs(home, run_id))
    if not lines:
        asyncio.run(one_run(run_id))
    if as_json and not follow:
        output.write_json(lines)
        return 0
    shown = 0
    while True:
        for line in lines[shown:]:
            output.write(json.dumps(line) if as_json else _log_line(line))
        shown = len(lines)
        if not follow:
            return 0
        time.sleep(LOG_INTERVAL)
        lines = list(read_logs(home, run_id))


def _log_line(line: dict[str, Any]) -> str:
    text = f"{line.get('time')} {line.get('level')!s:<7} {line.get('role')} {line.get('message')}"
    return f"{text}\n{line['exception'].rstrip()}" if "exception" in line else text
