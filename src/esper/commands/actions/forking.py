"""`fork`: from the records of a run to a prepared new one with its past."""

import asyncio
import tempfile
from dataclasses import replace
from pathlib import Path

from esper.commands.actions import connections
from esper.commands.actions import launch
from esper.commands.actions import records
from esper.contracts.config import EsperConfig
from esper.contracts.messages import RequestAdaptation
from esper.contracts.orders import RunRecord
from esper.errors import ConfigurationError
from esper.errors import IntegrityError
from esper.errors import NotFoundError
from esper.runtime.configuration import dump_config
from esper.runtime.configuration import load_config
from esper.runtime.run_document import RunView
from esper.runtime.tamiyo.by_hand import wait_by_hand
from esper.runtime.tolaria.branching import ParentRecords
from esper.runtime.tolaria.branching import branch_off
from esper.runtime.urza.ledger import CommittedHead

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
    view, head = asyncio.run(_read(parent, epoch))
    prepared = launch.checked(_config(view.record, values), run_id, output_folder)
    sites = {node.contract.site for node in view.reports[epoch - 1].graph.nodes}
    if requested is not None and requested.site not in sites:
        raise ConfigurationError(
            "ESP-209", f"--decision: there is no site {requested.site!r}", hint=f"Sites: {', '.join(sorted(sites))}"
        )
    decision = wait_by_hand(parent, epoch, "forked", "a person branched off here with the decision to wait")
    store = connections.store(prepared.config.urza)
    try:
        branch = branch_off(
            ParentRecords(parent, head.head, head.manifest, view.reports, view.decisions, view.adaptations),
            epoch,
            prepared.run_id,
            prepared.config,
            decision=decision if wait else None,
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
    return replace(prepared, branch=branch, requested=requested)


async def _read(run_id: str, epoch: int) -> tuple[RunView, CommittedHead]:
    """The run, and the head that its epoch ended with."""
    async with connections.library() as library:
        known = records.require(library, run_id)
        view = await records.look(known, run_id, None)
        heads = {item.head.digest: item for item in await known.heads(run_id)}
    if not 1 <= epoch <= len(view.reports):
        raise NotFoundError(
            "ESP-505", f"run {run_id} has no epoch {epoch}, it has 1 to {len(view.reports)}", run_id=run_id
        )
    lineage, head = view.record.lineage, heads.get(view.reports[epoch - 1].head.digest)
    if head is None and lineage is not None:
        raise NotFoundError(
            "ESP-505",
            f"epoch {epoch} of run {run_id} lies before it branched off {lineage.parent} after epoch {lineage.epoch}",
            hint=f"`esper-cli fork {lineage.parent} --epoch {epoch}` branches off there",
            run_id=run_id,
        )
    if head is None:
        raise IntegrityError("ESP-407", f"run {run_id} has no head for the end of epoch {epoch}", run_id=run_id)
    return view, head


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
