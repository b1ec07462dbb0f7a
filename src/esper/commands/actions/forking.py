"""`fork`: from the records of a run to a prepared new one with its past."""

import asyncio
from dataclasses import replace

from esper.commands import output
from esper.commands.actions import connections
from esper.commands.actions import launch
from esper.commands.actions import records
from esper.commands.actions import reproducing
from esper.commands.actions.own_code import reach_own_code
from esper.contracts.assets import ArtifactRef
from esper.contracts.config import EsperConfig
from esper.contracts.messages import RequestAdaptation
from esper.contracts.operational import EpochReport
from esper.contracts.operational import HeadRef
from esper.contracts.orders import RunRecord
from esper.errors import ConfigurationError
from esper.errors import NotFoundError
from esper.runtime.configuration import with_values
from esper.runtime.run_document import RunView
from esper.runtime.tamiyo.by_hand import wait_at_branch
from esper.runtime.tolaria.branching import ParentRecords
from esper.runtime.tolaria.branching import branch_off
from esper.runtime.tolaria.retraining import files_of
from esper.runtime.tolaria.retraining import is_whole
from esper.runtime.tolaria.retraining import train_to
from esper.runtime.urza.ledger import CommittedHead
from esper.runtime.urza.objects import ObjectStore

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
    accept_drift: bool = False,
) -> launch.Prepared:
    """Read the parent's records and make the branch's. Only checkpoints are written, under their digests: that of the
    branch, and before it the parent's where it was collected, or is damaged, and had to be trained again.

    Raises `NotFoundError` (ESP-505 no such run or epoch), `ConfigurationError` (ESP-2xx), and where the checkpoint had
    to be trained again what `train_to` raises (`DivergenceError` ESP-409: it did not become what it was).
    """
    view, known = asyncio.run(_read(parent, epoch))
    prepared = launch.checked(_config(view.record, values), run_id, output_folder)
    sites = {node.contract.site for node in view.reports[epoch - 1].graph.nodes}
    if requested is not None and requested.site not in sites:
        raise ConfigurationError(
            "ESP-209", f"--decision: there is no site {requested.site!r}", hint=f"Sites: {', '.join(sorted(sites))}"
        )
    decision = wait_at_branch(parent, epoch)
    store = connections.store(prepared.config.urza)
    if known is not None and is_whole(known.manifest, store.get):
        head, manifest = known.head, known.manifest
        for ref in files_of(manifest, store.get):
            # Young again: garbage collection leaves it alone until the branch has been entered.
            store.put(store.get(ref))
    else:
        head, manifest = _train_again(view.reports[epoch - 1], store)
    branch = branch_off(
        ParentRecords(parent, head, manifest, view.reports, view.decisions, view.adaptations),
        epoch,
        prepared.run_id,
        prepared.config,
        decision=decision if wait else None,
        get=store.get,
        put=store.put,
    )
    return replace(prepared, branch=branch, requested=requested, accept_drift=accept_drift)


def _train_again(report: EpochReport, store: ObjectStore) -> tuple[HeadRef, ArtifactRef]:
    """The checkpoint of an epoch that lies between those that are kept."""
    _, recorded = asyncio.run(reproducing.recorded_run(report.run_id))
    reach_own_code()
    output.say(f"The checkpoint of epoch {report.epoch} is not there: it is trained again from the records.")
    return train_to(recorded, report, store.put, reproducing.tell_epochs())


async def _read(run_id: str, epoch: int) -> tuple[RunView, CommittedHead | None]:
    """The run, and the head that its epoch ended with; `None` when it had none of its own."""
    async with connections.library() as library:
        known = records.require(library, run_id)
        view = await records.look(known, run_id, None)
        heads = {item.head.digest: item for item in await known.heads(run_id)}
    if not 1 <= epoch <= len(view.reports):
        raise NotFoundError(
            "ESP-505", f"run {run_id} has no epoch {epoch}, it has 1 to {len(view.reports)}", run_id=run_id
        )
    lineage, report = view.record.lineage, view.reports[epoch - 1]
    head = heads.get(report.head.digest)
    if lineage is not None and (head is None or epoch < lineage.epoch):
        raise NotFoundError(
            "ESP-505",
            f"epoch {epoch} of run {run_id} lies before it branched off {lineage.parent} after epoch {lineage.epoch}",
            hint=f"`esper-cli fork {lineage.parent} --epoch {epoch}` branches off there",
            run_id=run_id,
        )
    return view, head if report.head.step == report.step else None


def _config(record: RunRecord, values: list[str]) -> EsperConfig:
    fixed = next((value for value in values if value.startswith(FIXED)), None)
    if fixed is not None:
        raise ConfigurationError(
            "ESP-204",
            f"--set {fixed}: a branch shares this with the run that it comes from",
            hint=f"Start another run, or change other settings than {', '.join(name.rstrip('.') for name in FIXED)}",
        )
    return with_values(record.config, values)
