"""What commands reach out to: the home, the configuration, Urza, the Temporal server and the local stack."""

import asyncio
import getpass
import os
import uuid
from collections.abc import AsyncIterator
from collections.abc import Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

from temporalio.api.enums.v1 import TaskQueueType
from temporalio.api.operatorservice.v1 import ListSearchAttributesRequest
from temporalio.api.taskqueue.v1 import TaskQueue
from temporalio.api.workflowservice.v1 import DescribeTaskQueueRequest
from temporalio.client import Client
from temporalio.client import WorkflowExecutionStatus
from temporalio.client import WorkflowQueryFailedError
from temporalio.client import WorkflowQueryRejectedError
from temporalio.client import WorkflowUpdateFailedError
from temporalio.client import WorkflowUpdateRPCTimeoutOrCancelledError
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError
from temporalio.service import RPCStatusCode

from esper.contracts.config import EsperConfig
from esper.contracts.config import TemporalConfig
from esper.contracts.config import UrzaConfig
from esper.contracts.messages import Answer
from esper.contracts.messages import Envelope
from esper.contracts.messages import Payload
from esper.contracts.orders import RunStatus
from esper.errors import ConfigurationError
from esper.errors import EsperError
from esper.errors import RunConflict
from esper.errors import TemporalUnavailable
from esper.errors import by_name
from esper.runtime import stack
from esper.runtime.configuration import list_packaged
from esper.runtime.configuration import list_quick_starts
from esper.runtime.configuration import load_config
from esper.runtime.home import find_home
from esper.runtime.home import make_home
from esper.runtime.home import resolve_urza
from esper.runtime.home import urza_database_url
from esper.runtime.stack_state import StackInfo
from esper.runtime.stack_state import read_stack
from esper.runtime.temporal import queues
from esper.runtime.temporal.client import DEFAULT_NAMESPACE
from esper.runtime.temporal.client import connect
from esper.runtime.temporal.client import find_address
from esper.runtime.temporal.client import uses_local_stack
from esper.runtime.temporal.failures import from_failure
from esper.runtime.temporal.server import SEARCH_ATTRIBUTES
from esper.runtime.tolaria.data.installed import target_refused
from esper.runtime.urza import migration
from esper.runtime.urza.engine import describe
from esper.runtime.urza.engine import has_password
from esper.runtime.urza.engine import parse_url
from esper.runtime.urza.engine import resolve_database
from esper.runtime.urza.library import Library
from esper.runtime.urza.locations import open_store
from esper.runtime.urza.objects import ObjectStore

Progress = Callable[[str], None]

_PLACES = ("ESPER_URZA_", "ESPER_TEMPORAL_ADDRESS", "ESPER_TEMPORAL_NAMESPACE")

QUERY_TIMEOUT = timedelta(seconds=20)

UPDATE_TIMEOUT = timedelta(seconds=60)
"""How long a person waits for a run to answer."""


def home() -> Path:
    """`ESPER_HOME`; need not exist."""
    return find_home(os.environ)


def read_configuration(quick_start: str | None, config: str | None, values: list[str]) -> EsperConfig:
    """The resolved configuration of `--quick-start` or `--config`. Raises `ConfigurationError` (ESP-201..212).

    Also `DatabaseUnavailable` (ESP-331) for a database URL that is none.
    """
    if quick_start is None and config is None:
        raise ConfigurationError(
            "ESP-206",
            "give --quick-start or --config",
            hint=f"Quick starts: {', '.join(list_quick_starts())}. Packaged: {', '.join(list_packaged())}",
        )
    source = Path(config) if config is not None else None
    resolved = load_config(source, quick_start=quick_start, overrides=values, environment=os.environ)
    return resolved.model_copy(update={"urza": _anchored(resolved.urza)})


def _anchored(urza: UrzaConfig) -> UrzaConfig:
    """The same with absolute paths: the workers of a run have another current folder. Raises ESP-331, and ESP-204 for
    a password: what a run is configured with stands in its history, in Urza and in its output folder."""
    database, objects = urza.database, urza.objects
    if database != "default":
        url = parse_url(database, home() / "urza.db")
        if has_password(url):
            raise ConfigurationError(
                "ESP-204",
                f"urza.database {describe(url)!r}: the password would be kept in the history of every run",
                hint="Leave it out of the URL, and give it to every worker as PGPASSWORD or in ~/.pgpass",
            )
        database = resolve_database(database, home())
    if objects != "default" and objects.strip() and "://" not in objects:
        objects = str(Path(objects).expanduser().absolute())
    return UrzaConfig(database=database, objects=objects)


async def is_usable_now(urza: UrzaConfig) -> bool:
    """False when the database is the home's own and `up` has yet to make or migrate it."""
    return urza.database != "default" or (await migration.check(database_url("default"))).state == "current"


async def check_objects(urza: UrzaConfig) -> None:
    """Whether a store that is named can be written to: it is given the empty object, which every store may hold.

    Raises `ObjectsUnavailable` (ESP-321..324), `ConfigurationError` (ESP-204, 211).
    """
    if urza.objects != "default":
        await asyncio.to_thread(store(urza).put, b"")


def settings() -> EsperConfig:
    """What the environment says of Urza and Temporal, for commands that have no configuration of a run."""
    places = {name: value for name, value in os.environ.items() if name.startswith(_PLACES)}
    # A configuration must name a task; this one is never trained.
    return load_config(None, overrides=["task.name=none"], environment=places)


def database_url(given: str | None) -> str:
    """The URL of the Urza database: what was given, else the environment's, else the home's."""
    urza = settings().urza
    return resolve_urza(urza.model_copy(update={"database": given}) if given else urza, home()).database


@asynccontextmanager
async def library(urza: UrzaConfig | None = None) -> AsyncIterator[Library | None]:
    """Urza's rows; `None` when the home has no database yet. Raises `DatabaseUnavailable` (ESP-331..334)."""
    place = resolve_urza(urza or settings().urza, home())
    if place.database == urza_database_url(home()) and (await migration.check(place.database)).state == "empty":
        yield None
        return
    async with opened_library(place) as opened:
        yield opened


@asynccontextmanager
async def opened_library(urza: UrzaConfig) -> AsyncIterator[Library]:
    """Urza's rows for one that cannot go on without. Raises `DatabaseUnavailable` (ESP-331..334)."""
    url = resolve_urza(urza, home()).database
    async with await Library.open(url, default_file=home() / "urza.db") as opened:
        yield opened


def store(urza: UrzaConfig | None = None) -> ObjectStore:
    """Urza's objects."""
    place = resolve_urza(urza or settings().urza, home())
    return open_store(place.objects, default_folder=home() / "objects")


def is_local(config: EsperConfig) -> bool:
    """Whether the local stack serves a run of this configuration."""
    return uses_local_stack(config.temporal, os.environ)


def check_remote(config: EsperConfig) -> None:
    """A server on another host cannot reach a database on this one, nor its workers the person's own modules.

    Raises `ConfigurationError` (ESP-204), `TargetError` (ESP-310).
    """
    if is_local(config) or find_address(config.temporal, home(), os.environ).loopback:
        return
    if config.task.target is not None:
        raise target_refused(config.task.target)
    for name in ("database", "objects"):
        if getattr(config.urza, name) == "default":
            raise ConfigurationError(
                "ESP-204",
                f"urza.{name}: the Temporal server is on another host, and the default Urza is on this one",
                hint="Set urza.database to a PostgreSQL URL and urza.objects to s3://bucket/prefix",
            )


async def client(temporal: TemporalConfig | None = None) -> Client:
    """A connected client. Raises `TemporalUnavailable` (ESP-301..306)."""
    return await connect(temporal or settings().temporal, home())


def address_of(connected: Client) -> str:
    """`host:port` of the server."""
    return connected.service_client.config.target_host


def stack_up(progress: Progress) -> StackInfo:
    """Start what is missing of the local stack. Raises `UnavailableError` (ESP-306) when something does not start."""
    return stack.up(make_home(os.environ), progress)


def stack_down(progress: Progress) -> tuple[str, ...]:
    """End the local stack; what was ended, such as `trainer 4711`."""
    return stack.down(home(), progress)


def web_ui(run_id: str) -> str | None:
    """The run's page in the Web UI of the local stack; `None` when it was never up or another server is named."""
    temporal = settings().temporal
    info = read_stack(home()) if uses_local_stack(temporal, os.environ) else None
    namespace = DEFAULT_NAMESPACE if temporal.namespace == "default" else temporal.namespace
    return f"{info.ui.rstrip('/')}/namespaces/{namespace}/workflows/{run_id}" if info is not None else None


async def has_search_attributes(connected: Client) -> bool:
    """Whether the namespace knows all of Esper's search attributes; a server that does not say counts as no."""
    try:
        listed = await connected.operator_service.list_search_attributes(
            ListSearchAttributesRequest(namespace=connected.namespace)
        )
    except RPCError:
        return False
    return SEARCH_ATTRIBUTES.keys() <= listed.custom_attributes.keys()


async def is_closed(connected: Client, run_id: str) -> bool:
    """Whether the run's workflow has ended, or the server does not know it."""
    return await _status(connected, run_id) is not WorkflowExecutionStatus.RUNNING


async def is_known(connected: Client, run_id: str) -> bool:
    """Whether the server has any execution, running or ended, under the run's id."""
    return await _status(connected, run_id) is not None


async def _status(connected: Client, run_id: str) -> WorkflowExecutionStatus | None:
    try:
        description = await connected.get_workflow_handle(run_id).describe()
    except RPCError as error:
        if error.status is RPCStatusCode.NOT_FOUND:
            return None
        raise _unavailable(connected, error) from error
    return description.status


async def leases_given(connected: Client, run_id: str) -> int:
    """The highest lease that the run's newest workflow was given, by its own word; 0 when nobody can say it."""
    handle = connected.get_workflow_handle(run_id)
    try:
        status: RunStatus = await handle.query("status", result_type=RunStatus, rpc_timeout=QUERY_TIMEOUT)
    except (WorkflowQueryFailedError, WorkflowQueryRejectedError, RPCError):
        return 0
    return status.lease_gen


async def raise_failure(connected: Client, run_id: str) -> None:
    """Raise what ended the run's workflow, which is closed, if it failed."""
    try:
        await connected.get_workflow_handle(run_id).result()
    except Exception as error:  # whatever ended it is what the person must read
        raise from_failure(error) from error


async def no_worker(connected: Client, run_id: str, waited: float) -> EsperError:
    """Why a run that was started has not been recorded: its workflow failed, or no worker polls the queue."""
    if await is_closed(connected, run_id):
        try:
            await raise_failure(connected, run_id)
        except EsperError as error:
            return error
    request = DescribeTaskQueueRequest(
        namespace=connected.namespace,
        task_queue=TaskQueue(name=queues.ORCHESTRATION),
        task_queue_type=TaskQueueType.TASK_QUEUE_TYPE_WORKFLOW,
    )
    described = await connected.workflow_service.describe_task_queue(request)
    lately = ", although one has polled it in the last minutes" if described.pollers else ""
    return TemporalUnavailable(
        "ESP-307",
        f"no worker polls {queues.ORCHESTRATION!r} (waited {waited:g} s){lately}: run {run_id} was not taken up",
        hint="Start `esper-cli worker orchestrator trainer tamiyo forge`; the run waits for one",
        run_id=run_id,
    )


async def execute_update(connected: Client, run_id: str, name: str, payload: Payload) -> dict[str, object]:
    """Send one update and return its answer.

    Raises `RunConflict` (ESP-504) with the validator's sentence when it is rejected, `TemporalUnavailable` (ESP-307)
    when nobody answers in time.
    """
    event_id = str(uuid.uuid4())
    envelope = Envelope(event_id=event_id, trace_id=run_id, causation_id=event_id, sender=_person(), payload=payload)
    handle = connected.get_workflow_handle(run_id)
    waited = f"{UPDATE_TIMEOUT.total_seconds():.0f} s"
    try:
        async with asyncio.timeout(UPDATE_TIMEOUT.total_seconds()):
            answer: Answer = await handle.execute_update(name, envelope, id=event_id, result_type=Answer)
    except WorkflowUpdateFailedError as error:
        raise _rejected(run_id, error) from error
    except (TimeoutError, WorkflowUpdateRPCTimeoutOrCancelledError) as error:
        raise TemporalUnavailable(
            "ESP-307",
            f"run {run_id} did not answer {name} within {waited}: no worker polls its queue",
            hint="`esper-cli doctor` shows what is missing",
            run_id=run_id,
        ) from error
    except RPCError as error:
        if error.status is RPCStatusCode.NOT_FOUND:
            raise RunConflict("ESP-504", f"run {run_id} has ended: {name} changes nothing", run_id=run_id) from error
        raise _unavailable(connected, error) from error
    return answer.model_dump(mode="json")


def _rejected(run_id: str, error: WorkflowUpdateFailedError) -> EsperError:
    cause = error.cause
    if isinstance(cause, ApplicationError) and cause.type is not None and by_name(cause.type) is not None:
        return from_failure(error)
    reason = cause.message if isinstance(cause, ApplicationError) else str(cause)
    return RunConflict("ESP-504", f"run {run_id} refuses: {reason}", run_id=run_id)


def _unavailable(connected: Client, error: RPCError) -> TemporalUnavailable:
    return TemporalUnavailable("ESP-301", f"Temporal at {address_of(connected)} does not answer: {error.message}")


def _person() -> str:
    try:
        return f"esper-cli:{getpass.getuser()}"
    except (OSError, KeyError):
        return "esper-cli"
