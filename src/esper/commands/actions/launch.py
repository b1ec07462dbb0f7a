"""`start-run`, from the checks to the output folder: a stack, the workflow, the live view, what was grown."""

import asyncio
import importlib.util
import os
import secrets
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC
from datetime import datetime
from pathlib import Path

from temporalio.client import Client
from temporalio.common import SearchAttributePair
from temporalio.common import TypedSearchAttributes
from temporalio.common import WorkflowIDReusePolicy
from temporalio.exceptions import WorkflowAlreadyStartedError

from esper.commands import output
from esper.commands.actions import connections
from esper.commands.actions import records
from esper.commands.actions import watching
from esper.commands.actions.versions import LEAST
from esper.commands.actions.versions import check_version
from esper.commands.views import summary
from esper.contracts.config import EsperConfig
from esper.contracts.enums import Outcome
from esper.contracts.messages import RequestAdaptation
from esper.contracts.orders import CodeLocation
from esper.contracts.orders import Lineage
from esper.contracts.orders import RunRecord
from esper.contracts.orders import TrainingRequest
from esper.errors import ConfigurationError
from esper.errors import NotFoundError
from esper.errors import RunConflict
from esper.runtime.configuration import check_current_folder
from esper.runtime.configuration import check_run_id
from esper.runtime.configuration import list_quick_starts
from esper.runtime.configuration import load_config
from esper.runtime.run_document import RunView
from esper.runtime.run_document import check_output_folder
from esper.runtime.run_document import document_json
from esper.runtime.run_document import write_output_folder
from esper.runtime.temporal import queues
from esper.runtime.temporal.workflow_types import TRAINING_RUN
from esper.runtime.tolaria.data.installed import installed_tasks
from esper.runtime.tolaria.data.installed import unknown_task
from esper.runtime.tolaria.data.targets import no_such_module
from esper.runtime.tolaria.data.targets import refuse_standard
from esper.runtime.urza.branches import Branch
from esper.runtime.urza.library import Library
from esper.workflows import presentation

ROW_TIMEOUT = 30.0
"""Seconds in which a worker must have recorded a new run, or nobody polls the queue."""

ROW_INTERVAL = 0.1

FOLDER_TASKS = {"cifar10": "CIFAR10", "cifar100": "CIFAR100"}
"""Tasks whose data is a folder that the user names, and its form in `runtime.tolaria.data.cifar`."""


@dataclass(frozen=True)
class Prepared:
    """A run that has passed every check that needs no other process."""

    config: EsperConfig
    run_id: str
    named_folder: str
    folder: Path
    code: CodeLocation
    branch: Branch | None = None
    """The past of a run that branches off another: entered before its workflow is started."""
    requested: RequestAdaptation | None = None
    accept_drift: bool = False


def prepare(
    *, quick_start: str | None, config: str | None, values: list[str], run_id: str | None, output_folder: str | None
) -> Prepared:
    """Check configuration, names, paths and the run id. Writes nothing and contacts nothing.

    Raises `ConfigurationError` (ESP-201..212), `TargetError` (ESP-310), `DeviceError`, `DataUnavailable`,
    `DatabaseUnavailable` (ESP-331).
    """
    for name in LEAST:
        check_version(name)
    check_current_folder()
    return checked(connections.read_configuration(quick_start, config, values), run_id, output_folder)


def checked(resolved: EsperConfig, run_id: str | None, output_folder: str | None) -> Prepared:
    """A run of that configuration, if paths, run id and machine allow it. Raises as `prepare`, and `RunConflict`
    (ESP-501)."""
    chosen = check_run_id(run_id) if run_id is not None else new_run_id(resolved.run.name)
    named = output_folder if output_folder is not None else f"results/{chosen}"
    try:
        folder = check_output_folder(named)
    except ConfigurationError:
        if output_folder is None:
            # The default folder is most likely full because that very run wrote it: then this is a conflict of ids.
            asyncio.run(_refuse_recorded(resolved, chosen))
        raise
    connections.check_remote(resolved)
    if resolved.urza.objects != "default":
        connections.store(resolved.urza)
    if connections.is_local(resolved):
        check_on_this_machine(resolved)
    return Prepared(resolved, chosen, named, folder, code_location())


def new_run_id(name: str) -> str:
    """`<name>-<UTC time>-<4 hex digits>`."""
    return f"{name}-{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(2)}"


def code_location() -> CodeLocation:
    """The caller's folder and `PYTHONPATH`, which travel with a local run."""
    try:
        directory = str(Path.cwd())
    except FileNotFoundError:
        directory = ""  # `resume` needs no folder
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return CodeLocation(directory=directory, python_path=tuple(str(Path(path).absolute()) for path in paths if path))


def check_on_this_machine(config: EsperConfig) -> None:
    """What a local worker would find wrong, as far as it can be known without building a model.

    Raises `ConfigurationError` (ESP-206 unknown task), `TargetError` (ESP-310), `DeviceError` (ESP-315),
    `DataUnavailable` (ESP-207).
    """
    if config.task.target is not None:
        check_target(config.task.target)
    else:
        check_task_name(config.task.name or "")
    if config.run.device not in {"auto", "cpu"}:
        # Only torch knows the devices, and it takes seconds to load: nobody waits for it in vain.
        from esper.runtime.tolaria.device import choose_device

        choose_device(config.run.device)
    if config.task.name in FOLDER_TASKS:
        from esper.runtime.tolaria.data import cifar

        form = getattr(cifar, FOLDER_TASKS[config.task.name])
        cifar.load_cifar(form, Path(config.task.path) if config.task.path is not None else None)


def check_task_name(name: str) -> None:
    """Every packaged task has a quick start and every installed one an entry point, so no task is loaded for its name.

    Raises `ConfigurationError` (ESP-206).
    """
    packaged = {load_config(None, quick_start=start, environment={}).task.name or "" for start in list_quick_starts()}
    known = sorted(packaged | set(installed_tasks()))
    if name not in known:
        raise unknown_task(name, known)


def check_target(target: str) -> None:
    """Whether the module of `task.target` can be found, without importing it; what only an import shows, the
    worker says with the same codes. Raises `TargetError` (ESP-310)."""
    refuse_standard(target)
    top = target.partition(":")[0].partition(".")[0]
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        found = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        found = None
    finally:
        sys.path.remove(here)
    if found is None:
        raise no_such_module(target, top)


def start(prepared: Prepared, *, detach: bool, as_json: bool) -> int:
    """Start the run and stay until it ends, or until Ctrl-C, which leaves it running."""
    quiet = as_json and not sys.stderr.isatty()
    asyncio.run(_check_places(prepared))
    ensure_stack(prepared.config, quiet=quiet)
    begun = asyncio.Event()
    with ExitStack() as stack:
        try:
            view = asyncio.run(_start(prepared, stack, begun, detach=detach, quiet=quiet))
        except KeyboardInterrupt:
            stack.close()
            if begun.is_set():
                watching.say_detached(prepared.run_id)
            raise
    written = prepared.named_folder if view.record.finished is not None and not detach else None
    document = summary.document(view, written=written)
    if as_json:
        output.write_json(document_json(document))
    elif detach:
        output.write(prepared.run_id)
    else:
        summary.write_summary(view, document)
    if not as_json:
        local = connections.is_local(prepared.config)
        summary.say_useful_commands(prepared.run_id, ended=view.ended, local_stack=local)
    if not detach:
        watching.raise_failure(view)
    return 0


async def _start(prepared: Prepared, stack: ExitStack, begun: asyncio.Event, *, detach: bool, quiet: bool) -> RunView:
    run_id = prepared.run_id
    client = await connections.client(prepared.config.temporal)
    async with connections.opened_library(prepared.config.urza) as library:
        await _refuse_existing(library, run_id)
        if prepared.branch is not None:
            await library.enter_branch(prepared.branch, datetime.now(UTC).isoformat(timespec="seconds"))
        request = TrainingRequest(
            run_id=run_id,
            config=prepared.config,
            code=prepared.code,
            requested=prepared.requested,
            accept_drift=prepared.accept_drift,
        )
        lineage = None if prepared.branch is None else prepared.branch.lineage
        await start_workflow(client, request, WorkflowIDReusePolicy.REJECT_DUPLICATE, lineage)
        begun.set()
        await wait_for_row(client, library, run_id)
        if detach:
            return await records.look(library, run_id, None)
        if not quiet:
            output.say(f"Run {run_id} has begun. Ctrl-C leaves it running.")
        view = await watching.until_end(library, run_id, watching.progress_screen(stack, quiet=quiet))
        if view.record.finished is not None:
            store = connections.store(prepared.config.urza)
            write_output_folder(prepared.folder, await records.output_files(library, store, view))
        return view


def ensure_stack(config: EsperConfig, *, quiet: bool) -> None:
    """The local stack is started when nobody names a server; not in an event loop, so that Ctrl-C ends it."""
    if not connections.is_local(config):
        return
    try:
        connections.stack_up((lambda text: None) if quiet else output.say)
    except KeyboardInterrupt:
        output.say("No run has begun. What has started of the local stack goes on; `esper-cli down` ends it.")
        raise


async def start_workflow(
    client: Client, request: TrainingRequest, policy: WorkflowIDReusePolicy, lineage: Lineage | None = None
) -> None:
    """Start `TrainingRun` under the run id. Raises `RunConflict` (ESP-501) when it is there already."""
    memo: dict[str, object] = {} if lineage is None else {"parent": lineage.parent, "branched_at": lineage.epoch}
    config, model = request.config, request.config.task.name or request.config.task.target or ""
    attributes = TypedSearchAttributes(
        [
            SearchAttributePair(presentation.EXPERIMENT, config.run.name),
            SearchAttributePair(presentation.PHASE, "starting"),
            SearchAttributePair(presentation.MODEL, model),
            *([] if lineage is None else [SearchAttributePair(presentation.PARENT, lineage.parent)]),
        ]
    )
    known = await connections.has_search_attributes(client)
    if not known:
        output.say("warning: the namespace lacks Esper's search attributes; the run goes on without them")
    try:
        await client.start_workflow(
            TRAINING_RUN,
            request if known else request.model_copy(update={"search_attributes": False}),
            id=request.run_id,
            task_queue=queues.ORCHESTRATION,
            id_reuse_policy=policy,
            search_attributes=attributes if known else None,
            memo={
                "esper_run": request.run_id,
                "task": model,
                "policy": config.tamiyo.policy,
                "seed": config.run.seed,
                **memo,
            },
            static_summary=f"{config.run.name}: {model}, seed {config.run.seed}, {config.run.max_epochs} epochs",
            static_details=f"`esper-cli watch {request.run_id}` shows this run; policy {config.tamiyo.policy}, "
            f"delivery {config.delivery.mode.value}",
        )
    except WorkflowAlreadyStartedError as error:
        raise RunConflict(
            "ESP-501",
            f"run {request.run_id} exists already",
            hint=f"`esper-cli show {request.run_id}` shows it; choose another --run-id",
            run_id=request.run_id,
        ) from error


async def wait_for_row(client: Client, library: Library, run_id: str) -> RunRecord:
    """The run's row, which a worker's first activity writes. Raises `TemporalUnavailable` (ESP-307) when none does."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + ROW_TIMEOUT
    while True:
        try:
            return await library.run(run_id)
        except NotFoundError as missing:
            if loop.time() > deadline:
                raise await connections.no_worker(client, run_id, ROW_TIMEOUT) from missing
        await asyncio.sleep(ROW_INTERVAL)


async def _check_places(prepared: Prepared) -> None:
    """Before a stack is started for nothing: a database or store that cannot be used, an id that is taken."""
    # The stack itself migrates the database of the home.
    if await connections.is_usable_now(prepared.config.urza):
        await _refuse_recorded(prepared.config, prepared.run_id)
    await connections.check_objects(prepared.config.urza)


async def _refuse_recorded(config: EsperConfig, run_id: str) -> None:
    async with connections.library(config.urza) as library:
        if library is not None:
            await _refuse_existing(library, run_id)


async def _refuse_existing(library: Library, run_id: str) -> None:
    try:
        record = await library.run(run_id)
    except NotFoundError:
        return
    hint = (
        "choose another --run-id"
        if record.outcome is Outcome.COMPLETED
        else f"`esper-cli resume {run_id}` continues it"
    )
    if record.outcome is Outcome.RUNNING:
        hint = f"`esper-cli watch {run_id}` shows it; choose another --run-id"
    raise RunConflict(
        "ESP-501",
        f"run {run_id} exists already: {record.outcome.value} since {record.created}, epoch {record.epochs}",
        hint=hint,
        run_id=run_id,
    )
