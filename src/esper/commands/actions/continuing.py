"""What goes on with a run that exists: its updates, `resume`, and `recover` when the server has forgotten it."""

import asyncio

from temporalio.client import Client
from temporalio.common import WorkflowIDReusePolicy

from esper.commands.actions import connections
from esper.commands.actions import records
from esper.commands.actions.launch import ROW_INTERVAL
from esper.commands.actions.launch import ROW_TIMEOUT
from esper.commands.actions.launch import code_location
from esper.commands.actions.launch import ensure_stack
from esper.commands.actions.launch import start_workflow
from esper.contracts.config import EsperConfig
from esper.contracts.enums import Outcome
from esper.contracts.messages import Answer
from esper.contracts.messages import Payload
from esper.contracts.messages import Resume
from esper.contracts.orders import RunRecord
from esper.contracts.orders import TrainingRequest
from esper.errors import ConfigurationError
from esper.errors import RunConflict
from esper.runtime.configuration import with_values
from esper.runtime.run_document import ENDED
from esper.runtime.urza.library import Library
from esper.runtime.urza.runs import older_than_its_run

FIXED = ("run.name", "urza.")
"""Settings that a run keeps: they are its identity and say where its records are."""


def resume(run_id: str, values: list[str] | None = None, *, accept_drift: bool = False) -> dict[str, object]:
    """Continue a paused run by its update, an ended one by a new execution from its head, with the settings of
    `values` in place of its own.

    Raises `NotFoundError` (ESP-505), `ConfigurationError` (ESP-2xx), `RunConflict` (ESP-502 completed, or another
    recipe that `accept_drift` does not allow, or a database older than the run; ESP-504 neither paused nor ended).
    """
    record = asyncio.run(records.one_record(run_id))
    _refuse_completed(record, "resume")
    config = changed_config(record, values or [])
    if config != record.config and not accept_drift:
        # What decides over bits is known to the checkpoints, and they to torch, which takes seconds to load.
        from esper.runtime.tolaria.checkpoint import config_drift
        from esper.runtime.tolaria.checkpoint import require_same_recipe

        require_same_recipe(config_drift(record.config, config), run_id)
    ensure_stack(config, quiet=False)
    return asyncio.run(_resume(record, config, accept_drift=accept_drift))


async def _resume(record: RunRecord, config: EsperConfig, *, accept_drift: bool) -> dict[str, object]:
    run_id = record.run_id
    client = await connections.client(config.temporal)
    if record.outcome not in ENDED and not await connections.is_closed(client, run_id):
        if config != record.config:
            raise RunConflict(
                "ESP-504",
                f"run {run_id} is under way: its configuration cannot be changed",
                hint=f"`esper-cli stop {run_id}` ends it; then resume it with --set",
                run_id=run_id,
            )
        return await connections.execute_update(client, run_id, "resume", Resume())
    given = await connections.leases_given(client, run_id)
    if given > record.lease_gen:
        raise older_than_its_run(record, given)
    return await _begin_again(client, record, config, accept_drift=accept_drift)


def changed_config(record: RunRecord, values: list[str]) -> EsperConfig:
    """The run's configuration with some settings changed. Raises `ConfigurationError` (ESP-2xx)."""
    fixed = next((value for value in values if value.startswith(FIXED)), None)
    if fixed is not None:
        raise ConfigurationError(
            "ESP-204",
            f"--set {fixed}: a run keeps {' and '.join(name.rstrip('.') for name in FIXED)} for life",
            hint="Start another run",
        )
    return record.config if not values else with_values(record.config, values)


async def update(run_id: str, name: str, payload: Payload) -> dict[str, object]:
    """Send one update to a running run and return its answer. Raises `RunConflict` (ESP-504), `NotFoundError`."""
    record = await records.one_record(run_id)
    client = await connections.client(record.config.temporal)
    if record.outcome in ENDED or await connections.is_closed(client, run_id):
        raise RunConflict(
            "ESP-504",
            f"run {run_id} has ended ({record.outcome.value}): {name} changes nothing",
            hint=f"`esper-cli resume {run_id}` continues it" if record.outcome is not Outcome.COMPLETED else None,
            run_id=run_id,
        )
    return await connections.execute_update(client, run_id, name, payload)


def recover(run_id: str, *, accept_drift: bool = False) -> dict[str, object]:
    """Start a workflow for a run that the Temporal server no longer knows, from Urza's head and under a new lease;
    also for one whose database was restored from a copy that is older than the run.

    A trainer that the lost time left behind is fenced by that lease at its next write. Raises `NotFoundError`
    (ESP-505), `RunConflict` (ESP-502 completed, ESP-504 the server knows the run, and so does the database).
    """
    record = asyncio.run(records.one_record(run_id))
    _refuse_completed(record, "recover")
    ensure_stack(record.config, quiet=False)
    return asyncio.run(_recover(record, accept_drift=accept_drift))


async def _recover(record: RunRecord, *, accept_drift: bool) -> dict[str, object]:
    client = await connections.client(record.config.temporal)
    known, given = await connections.is_known(client, record.run_id), 0
    if known and await connections.is_closed(client, record.run_id):
        given = await connections.leases_given(client, record.run_id)
    if known and given <= record.lease_gen:
        raise RunConflict(
            "ESP-504",
            f"the server at {connections.address_of(client)} knows run {record.run_id}: there is nothing to recover",
            hint=f"`esper-cli resume {record.run_id}` continues a paused, stopped or failed run",
            run_id=record.run_id,
        )
    return await _begin_again(client, record, record.config, accept_drift=accept_drift, recovers_above=given)


async def _begin_again(
    client: Client, record: RunRecord, config: EsperConfig, *, accept_drift: bool, recovers_above: int = 0
) -> dict[str, object]:
    """A new execution under the same id, which must find the head that Urza names now."""
    request = TrainingRequest(
        run_id=record.run_id,
        config=config,
        code=code_location(),
        accept_drift=accept_drift,
        replaces_config=config != record.config,
        recovers_above=recovers_above,
        expected_head=record.head.digest if record.head is not None else None,
    )
    await start_workflow(client, request, WorkflowIDReusePolicy.ALLOW_DUPLICATE, record.lineage)
    if record.outcome in ENDED:
        async with connections.opened_library(record.config.urza) as library:
            await _until_running(client, library, record.run_id)
    answer = Answer(
        run_id=record.run_id, message=f"{record.run_id} goes on from epoch {record.epochs}, step {record.steps}"
    )
    return answer.model_dump(mode="json")


def _refuse_completed(record: RunRecord, verb: str) -> None:
    if record.outcome is Outcome.COMPLETED:
        raise RunConflict(
            "ESP-502",
            f"run {record.run_id} has completed: nothing is left to {verb}",
            hint="Start another run with a larger run.max_epochs",
            run_id=record.run_id,
        )


async def _until_running(client: Client, library: Library, run_id: str) -> None:
    """Until the resumed run is recorded as running: `watch` would else show the end of the former execution. Raises
    what ended the new one before it came to that."""
    deadline = asyncio.get_running_loop().time() + ROW_TIMEOUT
    while (await library.run(run_id)).outcome in ENDED and asyncio.get_running_loop().time() < deadline:
        if await connections.is_closed(client, run_id):
            await connections.raise_failure(client, run_id)
            return
        await asyncio.sleep(ROW_INTERVAL)
