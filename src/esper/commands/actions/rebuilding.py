"""`db rebuild`: the runs of a lost database, told again by the histories of their workflows and by their objects."""

import asyncio
import os
from collections.abc import Iterator
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import asdict
from dataclasses import dataclass

from temporalio.client import Client

from esper.commands import output
from esper.commands.actions import connections
from esper.commands.actions.history_sources import HistorySources
from esper.commands.actions.retold_runs import Retelling
from esper.commands.actions.retold_runs import put_together
from esper.contracts.config import UrzaConfig
from esper.errors import IntegrityError
from esper.errors import NotFoundError
from esper.errors import TemporalUnavailable
from esper.runtime import stack
from esper.runtime.home import make_home
from esper.runtime.temporal.client import ServerAddress
from esper.runtime.temporal.client import connect_to
from esper.runtime.temporal.client import find_address
from esper.runtime.temporal.client import uses_local_stack
from esper.runtime.temporal.retelling import ToldRun
from esper.runtime.temporal.retelling import retell
from esper.runtime.tezzeret.blueprints.registry import list_blueprints
from esper.runtime.urza import migration
from esper.runtime.urza.engine import describe
from esper.runtime.urza.engine import parse_url
from esper.runtime.urza.retold import RetoldRun


@dataclass(frozen=True)
class RunReport:
    """What became of one run: restored with so much, or `refused` with why; `missing` is what nothing tells."""

    run_id: str
    restored: bool
    outcome: str | None = None
    epochs: int = 0
    steps: int = 0
    heads: int = 0
    reports: int = 0
    decisions: int = 0
    adaptations: int = 0
    facts: int = 0
    kernels: int = 0
    histories: int = 0
    missing: tuple[str, ...] = ()
    refused: str | None = None


@dataclass(frozen=True)
class Rebuilt:
    """What a rebuild wrote, or would write, into which database; `elsewhere` are runs whose records are kept in
    another one, `blueprints` the names of those that were submitted and are in no history."""

    database: str
    runs: tuple[RunReport, ...]
    elsewhere: tuple[str, ...]
    blueprints: tuple[str, ...]


def rebuild_database(database: str | None, *, dry_run: bool, stored_only: bool, as_json: bool) -> int:
    """Rebuild and print what became of every run. Raises as `rebuild` does, and `IntegrityError` (ESP-408) after it has
    printed when a run could not be restored at all; the others are."""
    rebuilt = rebuild(database, dry_run=dry_run, stored_only=stored_only, tell=output.say)
    if as_json:
        output.write_json({"schema": 1, "dry_run": dry_run, **asdict(rebuilt)})
    else:
        _write(rebuilt)
    refused = [run for run in rebuilt.runs if run.refused is not None]
    if refused:
        more = f" ({len(refused) - 1} more)" if len(refused) > 1 else ""
        raise IntegrityError("ESP-408", f"run {refused[0].run_id} is not restored: {refused[0].refused}{more}")
    return 0


def _write(rebuilt: Rebuilt) -> None:
    counts = ("heads", "reports", "decisions", "adaptations", "facts", "kernels", "histories")
    rows = [
        (run.run_id, run.outcome, run.epochs, run.steps, *(getattr(run, name) for name in counts), len(run.missing))
        for run in rebuilt.runs
        if run.restored
    ]
    output.write_table(("run", "outcome", "epochs", "steps", *counts, "missing"), rows)
    for run in rebuilt.runs:
        for what in run.missing:
            output.say(f"{run.run_id}: nothing tells {what}")
    for run_id in rebuilt.elsewhere:
        output.say(f"{run_id}: its records are in another database")
    if rebuilt.blueprints:
        output.say(f"Submitted blueprints are in no history. Submit again: {', '.join(rebuilt.blueprints)}")


def rebuild(database: str | None, *, dry_run: bool, stored_only: bool, tell: connections.Progress) -> Rebuilt:
    """Tell every run again and enter all of them into a database without runs, in one transaction.

    Raises `RunConflict` (ESP-504: it has runs, or the local stack is up), `TemporalUnavailable` (ESP-301..306: the
    server cannot be reached, unless `stored_only`), `NotFoundError` (ESP-505: there is no history of any run),
    `DatabaseUnavailable`, `ObjectsUnavailable`. Then nothing was written.
    """
    url = connections.database_url(database)
    asyncio.run(_require_room(url))
    with _server(tell, stored_only=stored_only) as where:
        return asyncio.run(_rebuild(url, where, tell, dry_run=dry_run))


async def _require_room(url: str) -> None:
    status = await migration.check(url)
    if status.state == "empty":
        return
    migration.require(status)
    async with connections.opened_library(UrzaConfig(database=url)) as library:
        await library.require_empty()


@contextmanager
def _server(tell: connections.Progress, *, stored_only: bool) -> Iterator[ServerAddress | None]:
    """Where the histories are asked for; `None`: nowhere."""
    temporal = connections.settings().temporal
    if stored_only:
        yield None
    elif uses_local_stack(temporal, os.environ):
        with stack.server_alone(make_home(os.environ), tell) as where:
            if where is None:
                tell("this home has no Temporal server: only the histories in the object store are read")
            yield where
    else:
        yield find_address(temporal, connections.home(), os.environ)


async def _rebuild(url: str, where: ServerAddress | None, tell: connections.Progress, *, dry_run: bool) -> Rebuilt:
    sources = HistorySources(await _connected(where) if where is not None else None)
    await sources.open()
    told: dict[str, ToldRun] = {}
    failed: list[RunReport] = []
    elsewhere: list[str] = []
    for run_id in sources.runs():
        try:
            again = retell(await sources.histories(run_id))
        except IntegrityError as error:
            failed.append(RunReport(run_id, restored=False, refused=str(error)))
            continue
        if _place(again.request.config.urza.database) != _place(url):
            elsewhere.append(run_id)
        elif again.record is None:
            failed.append(RunReport(run_id, restored=False, missing=("that it was ever recorded",)))
        else:
            told[run_id] = again
    if not told and not failed:
        raise NotFoundError(
            "ESP-505",
            "there is no history of a run of this database, on the Temporal server or in the object store",
            hint="Check TEMPORAL_ADDRESS and ESPER_URZA_OBJECTS, and that --database is that of the runs",
        )
    tell(f"{len(told)} runs are told of")
    retellings = await asyncio.to_thread(_put_together, told, sources)
    refused: Mapping[str, str] = {}
    if not dry_run:
        await migration.upgrade(url)
        async with connections.opened_library(UrzaConfig(database=url)) as library:
            refused = await library.enter_retold([retelling.run for retelling in retellings])
    reports = [_report(retelling, refused.get(retelling.run.record.run_id)) for retelling in retellings]
    return Rebuilt(
        database=(await migration.check(url)).database,
        runs=(*reports, *failed),
        elsewhere=tuple(elsewhere),
        blueprints=_submitted(retellings),
    )


def _place(database: str) -> str:
    """What tells one database from another: who reads it may give a password, a run is configured without."""
    return describe(parse_url(database, connections.home() / "urza.db").set(password=None))


async def _connected(where: ServerAddress) -> Client:
    try:
        return await connect_to(where)
    except TemporalUnavailable as error:
        hint = "Where the server is lost too, --stored-only reads the histories in the object store alone"
        raise TemporalUnavailable(error.code, str(error), hint=hint) from error


def _put_together(told: Mapping[str, ToldRun], sources: HistorySources) -> list[Retelling]:
    """By the time that they were created, which is also parents before their branches."""
    done: dict[str, Retelling] = {}

    def one(run_id: str) -> RetoldRun | None:
        again = told.get(run_id)
        if again is None or again.record is None:
            return None
        if run_id not in done:
            lineage = again.record.lineage
            parent = one(lineage.parent) if lineage is not None else None
            urza = again.request.config.urza
            done[run_id] = put_together(again, sources.remains(urza), parent, sources.stored(run_id, urza))
        return done[run_id].run

    for run_id in sorted(told, key=lambda run_id: (told[run_id].records[0].created, run_id)):
        one(run_id)
    return list(done.values())


def _report(retelling: Retelling, refused: str | None) -> RunReport:
    run = retelling.run
    present = run.present
    return RunReport(
        run_id=run.record.run_id,
        restored=refused is None,
        outcome=run.record.outcome.value,
        epochs=present.head.epoch if present is not None else 0,
        steps=present.head.step if present is not None else 0,
        heads=len(run.heads),
        reports=len(run.reports),
        decisions=len(run.decisions),
        adaptations=len({adaptation.adaptation_id for adaptation in run.adaptations}),
        facts=len(run.facts),
        kernels=len(run.kernels),
        histories=len(run.histories),
        missing=retelling.missing,
        refused=refused,
    )


def _submitted(retellings: list[Retelling]) -> tuple[str, ...]:
    """Blueprints that a run was configured with or grew, and that nobody here knows: they must be submitted again."""
    names = {name for each in retellings for name in each.run.record.config.tamiyo.blueprints}
    names |= {kernel.blueprint for each in retellings for _, kernel in each.run.kernels}
    return tuple(sorted(names - {blueprint.name for blueprint in list_blueprints()}))
