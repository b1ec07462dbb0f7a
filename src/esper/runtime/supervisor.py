"""The supervisor of a local stack: keeps the Temporal dev server and the worker processes alive.

A process of its own without torch, started by `stack.up` as `python -m esper.runtime.supervisor`. It starts
again, with back-off and a log line, whatever dies; keeps one warm trainer ready while others serve runs;
tells a run at once when its trainer died; and writes `stack.json`.
"""

import argparse
import asyncio
import contextlib
import fcntl
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Coroutine
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from google.protobuf.duration_pb2 import Duration
from temporalio.api.namespace.v1 import NamespaceConfig
from temporalio.api.workflowservice.v1 import UpdateNamespaceRequest
from temporalio.client import Client
from temporalio.service import RPCError
from temporalio.service import RPCStatusCode

from esper.contracts.messages import Envelope
from esper.contracts.messages import TrainerLost
from esper.errors import EsperError
from esper.runtime.children import BackOff
from esper.runtime.children import Child
from esper.runtime.children import last_words
from esper.runtime.children import start_child
from esper.runtime.home import logs_folder
from esper.runtime.home import stack_file
from esper.runtime.logs import configure_logging
from esper.runtime.logs import log_path
from esper.runtime.logs import run_context
from esper.runtime.processes import identify
from esper.runtime.processes import stop
from esper.runtime.stack_state import StackInfo
from esper.runtime.stack_state import StackWorker
from esper.runtime.stack_state import write_stack
from esper.runtime.temporal.client import DEFAULT_NAMESPACE
from esper.runtime.temporal.client import connect_to
from esper.runtime.temporal.server import RETENTION_DAYS
from esper.runtime.temporal.server import USUAL_PORT
from esper.runtime.temporal.server import USUAL_UI_PORT
from esper.runtime.temporal.server import free_port
from esper.runtime.temporal.server_process import SERVER_GRACE_S
from esper.runtime.temporal.server_process import local_address
from esper.runtime.temporal.server_process import start_server
from esper.runtime.temporal.server_process import without_temporal
from esper.runtime.worker_files import WorkerReport
from esper.runtime.worker_files import forget
from esper.runtime.worker_files import read_all

Roles = tuple[str, ...]

TRAINER: Roles = ("trainer",)
PERMANENT: tuple[Roles, ...] = (("orchestrator",), ("tamiyo", "forge"))
"""What always runs once; trainers come and go."""

WORKER_GRACE_S = 25.0
"""From SIGTERM to SIGKILL: longer than a worker's own graceful shutdown."""
TOLD_FAILURES = 2
"""Ends in a row before a role is called failing in `stack.json`."""
_TICK_S = 0.1
_TELL_SECONDS = 60.0

log = logging.getLogger("esper.supervisor")


class Supervisor:
    """One stack. `run` returns when `stop_requested` is set and all children have ended."""

    def __init__(
        self,
        home: Path,
        program: Path,
        server_version: str,
        worker_command: Sequence[str],
        environment: Mapping[str, str],
        most_trainers: int,
    ) -> None:
        self._home = home
        self._program = program
        self._server_version = server_version
        self._worker_command = list(worker_command)
        self._environment = environment
        self._most_trainers = most_trainers
        identity = identify(os.getpid())
        assert identity is not None
        self._identity = identity
        self._choose_ports()
        self._server: Child | None = None
        self._client: Client | None = None
        self._workers: list[Child] = []
        self._server_back_off = BackOff()
        self._back_offs = {roles: BackOff() for roles in (*PERMANENT, TRAINER)}
        self._warmed: set[int] = set()
        self._claims: dict[int, WorkerReport] = {}
        self._last_ends: dict[Roles, str] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._written: StackInfo | None = None
        self.stop_requested = asyncio.Event()
        for pid in read_all(home):
            # Left by workers of a stack that was killed; the number may be another's by now.
            forget(home, pid)

    async def run(self) -> None:
        """Supervise until `stop_requested`, then end everything in order: workers, server, `stack.json`."""
        try:
            while not self.stop_requested.is_set():
                self._keep_server()
                reports = read_all(self._home)
                self._reap_workers(reports)
                if self._client is not None:
                    self._start_workers(reports)
                self._write(reports)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.stop_requested.wait(), _TICK_S)
        finally:
            self._stop_all()

    def _choose_ports(self) -> None:
        self._port = free_port(USUAL_PORT)
        self._ui_port = free_port(USUAL_UI_PORT, frozenset({self._port}))

    def _keep_server(self) -> None:
        if self._server is not None and (code := self._server.ended()) is not None:
            never_served = self._client is None
            delay = self._server_back_off.failed()
            log.warning("the Temporal server ended (%s), starting it again in %.1f s", _ending(code), delay)
            self._server = None
            if never_served:
                # Another process may have taken a port between looking and binding.
                self._choose_ports()
        if self._server is None and self._server_back_off.due():
            self._server = start_server(
                self._program,
                self._server_version,
                self._home,
                port=self._port,
                ui_port=self._ui_port,
                environment=self._environment,
            )
            if self._server is not None:
                log.info("started the Temporal server, process %d, 127.0.0.1:%d", self._server.identity.pid, self._port)
                self._spawn(self._prepare_server(self._server))

    async def _prepare_server(self, server: Child) -> None:
        """Connect as soon as the server answers, and make it keep histories."""
        where = local_address(self._port)
        while self._server is server:
            try:
                client = await connect_to(where)
                retention = Duration(seconds=RETENTION_DAYS * 24 * 3600)
                await client.workflow_service.update_namespace(
                    UpdateNamespaceRequest(
                        namespace=DEFAULT_NAMESPACE,
                        config=NamespaceConfig(workflow_execution_retention_ttl=retention),
                    )
                )
            except (EsperError, RPCError) as error:
                log.debug("the Temporal server does not answer yet: %s", error)
                await asyncio.sleep(_TICK_S)
                continue
            self._client = client
            self._server_back_off.succeeded()
            log.info("the Temporal server answers")
            return

    def _reap_workers(self, reports: Mapping[int, WorkerReport]) -> None:
        for worker in list(self._workers):
            pid = worker.identity.pid
            report = reports.get(pid)
            if report is not None and report.state in ("idle", "claimed") and pid not in self._warmed:
                # Once: one that serves a run says nothing about whether the next one starts.
                self._warmed.add(pid)
                self._back_offs[worker.roles].succeeded()
            if report is not None and report.run_id:
                self._claims[pid] = report
            code = worker.ended()
            if code is None:
                continue
            self._workers.remove(worker)
            # It may have said more since the reports were read; and one that drains no longer says for whom.
            report = read_all(self._home).get(pid)
            claim = report if report is not None and report.run_id else self._claims.pop(pid, None)
            forget(self._home, pid)
            self._warmed.discard(pid)
            served = report is not None and report.state != "starting"
            if worker.roles == TRAINER and served and code == 0:
                self._claims.pop(pid, None)
                log.info("trainer %d has served its run and ended", pid)
                continue
            self._last_ends[worker.roles] = f"{worker.name} ended ({_ending(code)}): {last_words(worker.output)}"
            delay = self._back_offs[worker.roles].failed()
            log.warning("%s, process %d, ended (%s), next in %.1f s", worker.name, pid, _ending(code), delay)
            if claim is not None and claim.run_id and claim.task_queue:
                self._spawn(self._tell_lost(claim.run_id, claim.task_queue, pid, _ending(code)))

    async def _tell_lost(self, run_id: str, task_queue: str, pid: int, ending: str) -> None:
        """The run learns of a death before a heartbeat times out."""
        envelope = Envelope[TrainerLost](
            event_id=f"{task_queue}/lost",
            trace_id=run_id,
            causation_id=f"process/{pid}",
            sender="supervisor",
            payload=TrainerLost(task_queue=task_queue, reason=f"process {pid} ended: {ending}"),
        )
        deadline = time.monotonic() + _TELL_SECONDS
        with run_context(run_id):
            while time.monotonic() < deadline:
                try:
                    if self._client is not None:
                        await self._client.get_workflow_handle(run_id).signal("trainer_lost", envelope)
                        log.warning("told run %s that trainer %d is lost", run_id, pid)
                        return
                except RPCError as error:
                    if error.status == RPCStatusCode.NOT_FOUND:
                        log.info("run %s had ended before its trainer %d", run_id, pid)
                        return
                await asyncio.sleep(0.5)
            log.error("could not tell run %s that trainer %d is lost", run_id, pid)

    def _start_workers(self, reports: Mapping[int, WorkerReport]) -> None:
        running = {worker.roles for worker in self._workers}
        wanted = [roles for roles in PERMANENT if roles not in running]
        trainers = [worker for worker in self._workers if worker.roles == TRAINER]
        if len(trainers) < self._most_trainers and not any(
            _warm(reports.get(child.identity.pid)) for child in trainers
        ):
            wanted.append(TRAINER)
        for roles in wanted:
            if self._back_offs[roles].due():
                self._start_worker(roles)

    def _start_worker(self, roles: Roles) -> None:
        environment = without_temporal(self._environment) | {
            "ESPER_HOME": str(self._home),
            "TEMPORAL_ADDRESS": f"127.0.0.1:{self._port}",
            "TEMPORAL_NAMESPACE": DEFAULT_NAMESPACE,
            # Spinning threads of several torch processes starve one another: measured up to 113 times slower.
            "OMP_WAIT_POLICY": self._environment.get("OMP_WAIT_POLICY", "PASSIVE"),
        }
        output = logs_folder(self._home) / f"{'+'.join(roles)}.out"
        child = start_child(
            roles, [*self._worker_command, *roles], environment=environment, folder=self._home, output=output
        )
        if child is None:
            self._back_offs[roles].failed()
            return
        self._workers.append(child)
        log.info("started %s, process %d", child.name, child.identity.pid)

    def _write(self, reports: Mapping[int, WorkerReport]) -> None:
        warm = {
            worker.roles
            for worker in self._workers
            if (report := reports.get(worker.identity.pid)) and report.state in ("idle", "claimed")
        }
        failures = [
            self._last_ends[roles]
            for roles, back_off in self._back_offs.items()
            if back_off.failures >= TOLD_FAILURES and roles in self._last_ends
        ]
        if self._server_back_off.failures >= TOLD_FAILURES:
            failures.append(f"the Temporal server ended: {last_words(logs_folder(self._home) / 'temporal.out')}")
        info = StackInfo(
            address=f"127.0.0.1:{self._port}",
            ui=f"http://127.0.0.1:{self._ui_port}",
            server_version=self._server_version,
            server=self._server.identity if self._server else None,
            supervisor=self._identity,
            workers=tuple(
                StackWorker(worker.roles, worker.identity, str(log_path(self._home, worker.name, worker.identity.pid)))
                for worker in self._workers
            ),
            ready=self._client is not None and self._server is not None and warm >= {*PERMANENT, TRAINER},
            failures=tuple(failures),
        )
        if info != self._written:
            write_stack(self._home, info)
            self._written = info

    def _stop_all(self) -> None:
        for task in self._tasks:
            task.cancel()
        log.info("stopping %d workers", len(self._workers))
        stop([worker.identity for worker in self._workers], WORKER_GRACE_S)
        if self._server is not None:
            log.info("stopping the Temporal server")
            stop([self._server.identity], SERVER_GRACE_S)
        for pid in read_all(self._home):
            forget(self._home, pid)
        stack_file(self._home).unlink(missing_ok=True)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _warm(report: WorkerReport | None) -> bool:
    """Ready for a run, or about to be: a worker that has said nothing yet is starting."""
    return report is None or report.state in ("starting", "idle")


def _ending(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


async def supervise(arguments: argparse.Namespace) -> None:
    """Run until SIGTERM or SIGINT."""
    supervisor = Supervisor(
        home=arguments.home,
        program=arguments.program,
        server_version=arguments.server_version,
        worker_command=json.loads(arguments.worker_command),
        environment=os.environ,
        most_trainers=max(2, os.cpu_count() or 1),
    )
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, supervisor.stop_requested.set)
    await supervisor.run()


def main() -> None:
    """The program. A second one for the same home ends at once."""
    parser = argparse.ArgumentParser(prog="esper.runtime.supervisor")
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--program", type=Path, required=True)
    parser.add_argument("--server-version", required=True)
    parser.add_argument("--worker-command", required=True)
    arguments = parser.parse_args()
    configure_logging(arguments.home, "supervisor")
    code = 0
    with (arguments.home / "supervisor.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("another supervisor has this home")
            code = 5
        else:
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            try:
                asyncio.run(supervise(arguments))
            except Exception:
                log.exception("the supervisor failed")
                code = 1
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        # Ordinary finalisation of a process with a Temporal client was seen to crash or hang.
        os._exit(code)


if __name__ == "__main__":
    main()
