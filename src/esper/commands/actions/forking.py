"""`fork`: from the records of a run to a prepared new one with its past."""

import asyncio
import tempfile
from pathlib import Path

from esper.commands.actions import connections
from esper.commands.actions import launch
from esper.commands.actions import records
from esper.contracts.config import EsperConfig
from esper.contracts.enums import DecisionKind
from esper.contracts.messages import RequestAdaptation
from esper.contracts.operational import AdaptationDecision
from esper.contracts.orders import RunRecord
from esper.errors import ConfigurationError
from esper.errors import IntegrityError
from esper.errors import NotFoundError
from esper.runtime.configuration import check_run_id
from esper.runtime.configuration import dump_config
from esper.runtime.configuration import load_config
from esper.runtime.tolaria.branching import ParentRecords
from esper.runtime.tolaria.branching import branch_off

FIXED = ("run.name", "task.", "kasmina.", "urza.")
"""Settings that a branch shares with its parent: they make the model, or say where the records are."""


def prepare(
    parent: str,
    epoch: int,
    *,
    wait: bool,
    requested: RequestAdaptation | None,
    values: list[str],
    run_id: str | None,
    output_folder: str | None,
) -> launch.Prepared:
    """Read the parent's records and make the branch's. Only its checkpoint's manifest is written, under its digest.

    Raises `NotFoundError` (ESP-505 no such run or epoch), `ConfigurationError` (ESP-2xx), `IntegrityError` (ESP-407
    the checkpoint of that epoch is damaged or was collected).
    """
    record, known = asyncio.run(_read(parent, epoch))
    config = _config(record, values)
    chosen = check_run_id(run_id) if run_id is not None else launch.new_run_id(config.run.name)
    named, folder = launch.checked_folder(config, chosen, output_folder)
    report = next(report for report in known.reports if report.epoch == epoch)
    sites = {node.contract.site for node in report.graph.nodes}
    if requested is not None and requested.site not in sites:
        raise ConfigurationError(
            "ESP-209", f"--decision: there is no site {requested.site!r}", hint=f"Sites: {', '.join(sorted(sites))}"
        )
    store = connections.store(config.urza)
    try:
        branch = branch_off(
            known,
            epoch,
            chosen,
            config,
            decision=_waiting(parent, epoch) if wait else None,
            get=store.get,
            put=store.put,
        )
    except IntegrityError as error:
        raise IntegrityError(
            error.code,
            f"run {parent} cannot be branched after epoch {epoch}: {error.message}",
            hint="Checkpoints between those that are kept may have been collected; `esper-cli history` shows decisions",
            run_id=parent,
        ) from error
    return launch.Prepared(config, chosen, named, folder, launch.code_location(), branch=branch, requested=requested)


async def _read(run_id: str, epoch: int) -> tuple[RunRecord, ParentRecords]:
    async with connections.library() as library:
        known = records.require(library, run_id)
        record = await known.run(run_id)
        reports = await known.reports(run_id)
        report = next((report for report in reports if report.epoch == epoch), None)
        if report is None:
            last = reports[-1].epoch if reports else 0
            raise NotFoundError("ESP-505", f"run {run_id} has no epoch {epoch}, it has 1 to {last}", run_id=run_id)
        heads = {item.head.digest: item for item in await known.heads(run_id)}
        committed = heads[report.head.digest]
        decisions, adaptations = await known.decisions(run_id), await known.adaptations(run_id)
    parent = ParentRecords(run_id, committed.head, committed.manifest, reports, decisions, adaptations)
    return record, parent


def _config(record: RunRecord, values: list[str]) -> EsperConfig:
    fixed = next((value for value in values if value.startswith(FIXED)), None)
    if fixed is not None:
        raise ConfigurationError(
            "ESP-204",
            f"--set {fixed}: a branch shares this with the run that it comes from",
            hint=f"Start another run, or change other settings than {', '.join(name.rstrip('.') for name in FIXED)}",
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(dump_config(record.config), encoding="utf-8")
        return load_config(path, overrides=values, environment={})


def _waiting(run_id: str, epoch: int) -> AdaptationDecision:
    return AdaptationDecision(
        run_id=run_id,
        epoch=epoch,
        policy="person",
        kind=DecisionKind.WAIT,
        code="forked",
        reason="a person branched off here with the decision to wait",
    )
