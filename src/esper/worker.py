"""One worker process with one or more roles: orchestrator, trainer, tamiyo, forge.

Each role imports what it serves when it is taken on, so that the orchestrator never loads torch and only the
tamiyo role loads PyTorch Geometric.
"""

import asyncio
import gc
import logging
import os
import secrets
import signal
import socket
import sys
from collections.abc import Callable
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any
from typing import NoReturn
from typing import Protocol

from temporalio.client import Client
from temporalio.client import WorkflowExecutionDescription
from temporalio.client import WorkflowExecutionStatus
from temporalio.service import RPCError
from temporalio.service import RPCStatusCode
from temporalio.worker import Worker

from esper.contracts.config import TemporalConfig
from esper.contracts.config import UrzaConfig
from esper.contracts.messages import Envelope
from esper.contracts.messages import TrainerLost
from esper.contracts.orders import Lease
from esper.errors import ConfigurationError
from esper.errors import EsperError
from esper.errors import RunFailed
from esper.errors import TemporalUnavailable
from esper.runtime import worker_files
from esper.runtime.failpoints import arm_process
from esper.runtime.home import make_home
from esper.runtime.home import urza_database_url
from esper.runtime.logs import configure_logging
from esper.runtime.temporal import queues
from esper.runtime.temporal.client import connect
from esper.runtime.temporal.client import is_loopback
from esper.runtime.temporal.options import DRAIN_LIMIT
from esper.runtime.temporal.options import GRACEFUL_SHUTDOWN
from esper.runtime.temporal.options import HEARTBEAT_THROTTLE
from esper.runtime.temporal.options import TRAINER_SLOTS
from esper.runtime.tezzeret.blueprints import sources
from esper.runtime.urza.connections import Connections
from esper.runtime.urza.submitted import submitted_blueprints

log = logging.getLogger(__name__)

ROLES = ("orchestrator", "trainer", "tamiyo", "forge")
CONNECT_ATTEMPTS = 20
ORPHAN_CHECK_S = 5.0
"""How often a claimed trainer looks whether the run is still its own, and while nobody asks it anything, whether the
run still lives; it also looks at once when work has failed. So a run that was terminated frees its trainer within this
and the latency of a heartbeat."""

RPC_LIMIT = timedelta(seconds=5)
"""A question to a server that swallows packets must not keep a trainer from looking into Urza."""

SECOND_LOOK_S = 1.0
"""A claim is in the library a moment before it is here: what looks like another's is looked at again."""


def main(roles: Sequence[str]) -> NoReturn:
    """Serve these roles until SIGTERM, or until a trainer's run has ended; then leave without finalisation."""
    code = 0
    try:
        unknown = [role for role in roles if role not in ROLES]
        if unknown or not roles:
            raise ConfigurationError(
                "ESP-214", f"unknown worker role {', '.join(unknown) or '(none)'}", hint=f"roles: {', '.join(ROLES)}"
            )
        arm_process(os.environ)
        # Spinning OpenMP threads starve every other process; read by the library when torch is imported.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        asyncio.run(serve(tuple(roles)))
    except EsperError as error:
        log.error("%s: %s", error.code, error)
        sys.stderr.write(f"error[{error.code}]: {error}\n")
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        log.exception("the worker failed")
        code = 1
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    # Ordinary finalisation of a process that used a Temporal client crashed or hung in 15 of 120 tries.
    os._exit(code)


async def serve(roles: tuple[str, ...]) -> None:
    """Connect, take the roles on, report ready, and serve."""
    home = make_home(os.environ)
    configure_logging(home, "+".join(roles))
    database = os.environ.get("ESPER_URZA_DATABASE") or urza_database_url(home)
    sources.follow(lambda: submitted_blueprints(database, default_file=home / "urza.db"))
    worker_files.report(home, "starting", roles=roles)
    ending = _signals()
    client = await _patiently(home, ending)
    if client is None:
        return
    connections = Connections(home)
    try:
        async with AsyncExitStack() as stack:
            for role in roles:
                if role == "orchestrator":
                    await _orchestrator(client, connections, stack)
                elif role == "tamiyo":
                    await _tamiyo(client, stack)
                elif role == "forge":
                    await _forge(client, connections, stack)
            if "trainer" in roles:
                await _trainer(client, connections, home, roles, ending)
            else:
                gc.freeze()
                worker_files.report(home, "idle", roles=roles)
                log.info("ready: %s", ", ".join(roles))
                await ending.wait()
                _limit_draining()
                worker_files.report(home, "draining", roles=roles)
    finally:
        await connections.close()


def _signals() -> asyncio.Event:
    """An event that SIGTERM and SIGINT set; a second signal ends the process at once."""
    ending = asyncio.Event()

    def end() -> None:
        if ending.is_set():
            os._exit(130)
        ending.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, end)
    return ending


def _limit_draining() -> None:
    """From now on the process ends in bounded time: a step that hangs or a long build must not keep it."""

    def end() -> None:
        message = f"not drained after {DRAIN_LIMIT.total_seconds():g} s: ending; what was last committed stands"
        log.error(message)
        logging.shutdown()
        sys.stderr.write(f"error: {message}\n")
        sys.stderr.flush()
        os._exit(1)

    asyncio.get_running_loop().call_later(DRAIN_LIMIT.total_seconds(), end)


async def _patiently(home: Path, ending: asyncio.Event) -> Client | None:
    """The server may come up a moment after its workers. `None`: the process was told to end meanwhile."""
    attempts = 0
    while not ending.is_set():
        try:
            return await connect(TemporalConfig(), home)
        except TemporalUnavailable:
            attempts += 1
            if attempts == CONNECT_ATTEMPTS:
                raise
            with suppress(TimeoutError):
                await asyncio.wait_for(ending.wait(), 1.0)
    return None


def _worker(client: Client, task_queue: str, activities: Sequence[Callable[..., Any]], **more: Any) -> Worker:
    return Worker(
        client,
        task_queue=task_queue,
        activities=activities,
        max_heartbeat_throttle_interval=HEARTBEAT_THROTTLE,
        default_heartbeat_throttle_interval=HEARTBEAT_THROTTLE,
        graceful_shutdown_timeout=GRACEFUL_SHUTDOWN,
        **more,
    )


async def _orchestrator(client: Client, connections: Connections, stack: AsyncExitStack) -> None:
    from esper.activities.urza import UrzaActivities
    from esper.runtime.temporal.historian import Historian
    from esper.workflows.tamiyo_decision import TamiyoDecision
    from esper.workflows.tezzeret_compile import TezzeretCompile
    from esper.workflows.training_run import TrainingRun

    # A worker refuses a library that was not migrated, before it takes any work.
    await connections.library(UrzaConfig())
    worker = _worker(
        client,
        queues.ORCHESTRATION,
        UrzaActivities(connections).all(),
        workflows=[TrainingRun, TamiyoDecision, TezzeretCompile],
        max_cached_workflows=int(os.environ.get("ESPER_MAX_CACHED_WORKFLOWS", "1000")),
    )
    await stack.enter_async_context(worker)
    keeping = asyncio.create_task(Historian(client, connections).keep())
    stack.callback(keeping.cancel)


async def _tamiyo(client: Client, stack: AsyncExitStack) -> None:
    from esper.activities.tamiyo import score_sites

    executor = stack.enter_context(ThreadPoolExecutor(4, thread_name_prefix="tamiyo"))
    await stack.enter_async_context(
        _worker(client, queues.TAMIYO, [score_sites], activity_executor=executor, max_concurrent_activities=4)
    )


async def _forge(client: Client, connections: Connections, stack: AsyncExitStack) -> None:
    from esper.activities.tezzeret import TezzeretActivities
    from esper.runtime.tezzeret.forge_child import start_forkserver

    await asyncio.to_thread(start_forkserver)
    executor = stack.enter_context(ThreadPoolExecutor(4, thread_name_prefix="forge"))
    activities = TezzeretActivities(connections, asyncio.get_running_loop())
    await stack.enter_async_context(
        _worker(client, queues.FORGE, activities.all(), activity_executor=executor, max_concurrent_activities=4)
    )


async def _trainer(
    client: Client, connections: Connections, home: Path, roles: tuple[str, ...], ending: asyncio.Event
) -> None:
    """One run, then the end of the process: user code is never stale, and the supervisor has the next one warm."""
    from esper.activities.trainer import TrainerActivities
    from esper.runtime.tolaria.warm_up import warm_up

    await asyncio.to_thread(warm_up)
    own_queue = queues.pinned_trainer(socket.gethostname(), os.getpid(), secrets.token_hex(3))
    trainer = TrainerActivities(own_queue, connections, asyncio.get_running_loop())
    trainer.serves_other_hosts = not is_loopback(client.service_client.config.target_host)
    with ThreadPoolExecutor(TRAINER_SLOTS, thread_name_prefix="trainer") as executor:
        pinned = _worker(
            client,
            own_queue,
            trainer.on_own_queue(),
            activity_executor=executor,
            max_concurrent_activities=TRAINER_SLOTS,
        )
        shared = _worker(client, queues.TRAINER, [trainer.claim_trainer], max_concurrent_activities=1)
        async with pinned:
            async with shared:
                gc.freeze()
                worker_files.report(home, "idle", roles=roles)
                log.info("ready: %s on %s", ", ".join(roles), own_queue)
                await _first(trainer.claimed, ending)
            if trainer.lease is not None:
                run_id = trainer.lease.run_id
                worker_files.report(home, "claimed", roles=roles, run_id=run_id, task_queue=own_queue)
                orphaned = asyncio.Event()
                watching = asyncio.create_task(_watch(client, trainer, orphaned))
                await _first(trainer.released, ending, orphaned)
                watching.cancel()
            _limit_draining()
            worker_files.report(home, "draining", roles=roles)
        await trainer.give_up()
        if trainer.lease is not None and not trainer.released.is_set():
            await _say_goodbye(client, trainer.lease)
        if trainer.uncommitted is not None:
            raise RunFailed(
                "ESP-602",
                f"told to end, but where training stood could not be committed: {trainer.uncommitted.message}",
                hint="What was last committed stands, and the run goes on from there",
            ) from trainer.uncommitted


async def _say_goodbye(client: Client, lease: Lease) -> None:
    """A run that is paused asks its trainer nothing, and would not notice that it has gone."""
    message = Envelope[TrainerLost](
        event_id=f"{lease.task_queue}/ended",
        trace_id=lease.run_id,
        causation_id=lease.task_queue,
        sender="trainer",
        payload=TrainerLost(task_queue=lease.task_queue, reason="the trainer ended in order"),
    )
    with suppress(RPCError):
        await client.get_workflow_handle(lease.run_id).signal("trainer_lost", message, rpc_timeout=RPC_LIMIT)


class _Claimed(Protocol):
    """What must be known of a claimed trainer without importing what it is made of."""

    doubted: asyncio.Event

    @property
    def lease(self) -> Lease | None: ...

    @property
    def claimed_by(self) -> str | None: ...

    @property
    def idle(self) -> bool: ...

    async def holds_lease(self) -> bool: ...


async def _watch(client: Client, trainer: _Claimed, orphaned: asyncio.Event) -> None:
    """A run that was terminated, or that another process was given, never releases its trainer: be free again."""
    while True:
        with suppress(TimeoutError):
            await asyncio.wait_for(trainer.doubted.wait(), ORPHAN_CHECK_S)
        trainer.doubted.clear()
        try:
            needless = await _needless(client, trainer)
        except (RPCError, EsperError) as error:
            log.info("could not look whether this trainer is still needed: %s", error)
            continue
        if needless is not None:
            log.warning("%s", needless)
            orphaned.set()
            return


async def _needless(client: Client, trainer: _Claimed) -> str | None:
    """Why nobody needs this trainer any more; `None` while somebody does."""
    lease = trainer.lease
    if lease is None:
        return None
    if not await trainer.holds_lease():
        await asyncio.sleep(SECOND_LOOK_S)
        if not await trainer.holds_lease():
            return f"LeaseLost: run {lease.run_id} was given to another trainer; lease {lease.lease_gen} was ours"
    if trainer.idle and await _is_over(client, lease.run_id, trainer.claimed_by):
        return f"run {lease.run_id} is over and never released this trainer"
    return None


async def _is_over(client: Client, run_id: str, claimed_by: str | None) -> bool:
    """Whether the workflow has ended whose execution `claimed_by` claimed this process. One of the same id that was
    started after its end is another life of the run, and claims a trainer of its own."""
    try:
        latest = await client.get_workflow_handle(run_id).describe(rpc_timeout=RPC_LIMIT)
        if latest.status is not WorkflowExecutionStatus.RUNNING or claimed_by in (None, latest.run_id):
            return latest.status is not WorkflowExecutionStatus.RUNNING
        ours = await client.get_workflow_handle(run_id, run_id=claimed_by).describe(rpc_timeout=RPC_LIMIT)
    except RPCError as error:
        if error.status is RPCStatusCode.NOT_FOUND:
            return True
        raise
    # What continued as new has the same first execution.
    return _first_execution(latest) != _first_execution(ours)


def _first_execution(description: WorkflowExecutionDescription) -> str:
    return description.raw_description.workflow_execution_info.first_run_id


async def _first(*events: asyncio.Event) -> None:
    """Wait until one of them is set."""
    tasks = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()


if __name__ == "__main__":
    main(sys.argv[1:])
