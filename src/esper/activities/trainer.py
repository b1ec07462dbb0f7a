"""The trainer's activities: everything that touches the one live model of this process.

Training and judging run in threads and beat at step boundaries; deliveries are taken at the same time. A
cancellation never interrupts a step: it is noticed with the next beat.
"""

import asyncio
import logging
import os
import sys
import threading
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from temporalio import activity
from temporalio.exceptions import ApplicationError

from esper.activities import names
from esper.activities.heartbeats import Draining
from esper.activities.heartbeats import beat
from esper.activities.heartbeats import draining_to_failure
from esper.activities.heartbeats import pulse
from esper.activities.heartbeats import watched
from esper.activities.patience import FRESH_LIMIT_S
from esper.activities.patience import LIMIT_S
from esper.activities.patience import Patience
from esper.activities.patience import draining_here
from esper.activities.trainer_store import UrzaStore
from esper.contracts.operational import EpochResult
from esper.contracts.operational import HeadRef
from esper.contracts.operational import JudgeReport
from esper.contracts.orders import AbandonRequest
from esper.contracts.orders import CheckpointRequest
from esper.contracts.orders import ClaimRequest
from esper.contracts.orders import CodeLocation
from esper.contracts.orders import EpochRequest
from esper.contracts.orders import FinishedRun
from esper.contracts.orders import InstallRequest
from esper.contracts.orders import InstallResult
from esper.contracts.orders import JudgeRequest
from esper.contracts.orders import Lease
from esper.contracts.orders import LoadedRun
from esper.contracts.orders import LoadRequest
from esper.contracts.orders import ReleaseRequest
from esper.contracts.orders import RemoveRequest
from esper.errors import EsperError
from esper.errors import LeaseLost
from esper.runtime.remembering import recent_facts
from esper.runtime.temporal.options import HEARTBEAT
from esper.runtime.temporal.options import STUCK
from esper.runtime.temporal.options import longest_silence
from esper.runtime.tolaria.data.installed import refuse_unlisted
from esper.runtime.tolaria.data.quick_starts import PACKAGED_TASKS
from esper.runtime.tolaria.session import Session
from esper.runtime.urza.connections import Connections
from esper.runtime.urza.library import Library
from esper.runtime.watchdog import Watchdog

log = logging.getLogger(__name__)

OLD_WORK = 2
"""How long a trainer that is claimed again by its run waits for what it did under the lease before: so many times the
longest silence of a step."""


class TrainerActivities:
    """One process, one run, one live session. `task_queue` is the queue that this process alone serves."""

    def __init__(self, task_queue: str, connections: Connections, loop: asyncio.AbstractEventLoop) -> None:
        self.task_queue = task_queue
        self.lease: Lease | None = None
        self.claimed_by: str | None = None
        """The execution (Temporal's own run id) of the workflow that claimed this process last."""
        self.claimed = asyncio.Event()
        self.released = asyncio.Event()
        self.serves_other_hosts = False
        """Whether people on other hosts may start runs here: then nothing is imported that a run names."""
        self.doubted = asyncio.Event()
        """Set when work here has failed: the run may be another process's now, or over."""
        self.uncommitted: EsperError | None = None
        """Why the last commit of a process that was told to end could not be made."""
        self._connections = connections
        self._library: Library | None = None
        self._loop = loop
        self._session: Session | None = None
        self._patience = Patience()
        self._silence_s = HEARTBEAT.total_seconds()
        self._watchdog = Watchdog(STUCK * self._silence_s)
        self._busy = 0
        self._changed = threading.Condition()

    def on_own_queue(self) -> list[Callable[..., Any]]:
        return [
            self.claim_trainer,
            self.load_run,
            self.train_epoch,
            self.install_kernel,
            self.abandon_kernel,
            self.judge_seed,
            self.remove_seed,
            self.checkpoint,
            self.release_trainer,
        ]

    async def give_up(self) -> None:
        """The process ends: whoever claims the run next need not wonder whether this one still lives."""
        if self.lease is not None and self._library is not None:
            await self._library.release(self.lease)

    @property
    def idle(self) -> bool:
        """True while no activity touches the session."""
        return self._busy == 0

    async def holds_lease(self) -> bool:
        """Whether the run is still this process's, by the word of Urza."""
        if self.lease is None or self._library is None:
            return False
        return await self._library.lease(self.lease.run_id) == self.lease

    @activity.defn(name=names.CLAIM_TRAINER.name)
    async def claim_trainer(self, request: ClaimRequest) -> Lease:
        """Give this process to a run: a new lease, which fences off every earlier one of that run."""
        if activity.is_worker_shutdown():
            raise ApplicationError("this trainer shuts down", type="TrainerBusy")
        if self.lease is not None and self.lease.run_id != request.run_id:
            raise ApplicationError(f"this trainer serves {self.lease.run_id}", type="TrainerBusy")
        if self._watchdog.silence() > self._silence_s:
            raise ApplicationError("what this trainer does is stuck", type="TrainerBusy")
        if self.lease is not None and not await self.holds_lease():
            # A question that was asked before this process was stopped, and its successor claimed.
            raise ApplicationError("another trainer has been claimed since", type="TrainerBusy")
        library = await self._connections.library(request.urza)
        self.lease = await library.claim(
            request.run_id, self.task_queue, known=request.known_lease_gen, recovers=request.recovers
        )
        self._library = library
        self.claimed_by = activity.info().workflow_run_id
        self.claimed.set()
        log.info("claimed by run %s under lease %d", request.run_id, self.lease.lease_gen)
        return self.lease

    @activity.defn(name=names.LOAD_RUN.name, no_thread_cancel_exception=True)
    def load_run(self, request: LoadRequest) -> LoadedRun:
        """Build the task and the model, and go back to the run's head."""
        with self._holding(request.lease), pulse("loading"):
            self._clear()
            self._silence_s = longest_silence(request.config).total_seconds()
            self._watchdog.limit(STUCK * self._silence_s)
            if self.serves_other_hosts:
                refuse_unlisted(request.config.task, os.environ, PACKAGED_TASKS)
            else:
                _enter(request.code)
            library = asyncio.run_coroutine_threadsafe(
                self._connections.library(request.config.urza), self._loop
            ).result()
            ledger = asyncio.run_coroutine_threadsafe(library.take_over(request.lease), self._loop).result()
            self._patience = Patience(FRESH_LIMIT_S if ledger.head is None else LIMIT_S, draining_here())
            objects = self._connections.store(request.config.urza)
            store = UrzaStore(self._loop, library, objects, request.lease, self._patience)
            self._session = Session.load(request.config, ledger, store, accept_drift=request.accept_drift)
            self._patience.limit_s = LIMIT_S
            loaded = self._session.describe()
            loaded = loaded.model_copy(update={"facts": recent_facts(loaded.facts)})
            log.info("loaded %s at epoch %d, step %d", loaded.model_name, loaded.epoch, loaded.step)
            return loaded

    @activity.defn(name=names.TRAIN_EPOCH.name, no_thread_cancel_exception=True)
    def train_epoch(self, request: EpochRequest) -> EpochResult:
        """Train to the end of one epoch; on SIGTERM commit where it stands and let another process go on."""
        with draining_to_failure(), self._working(request.lease) as session:
            try:
                result = session.train_epoch(request, self._beat_under(request.lease))
            except Draining:
                self._commit_and_leave(session)
                raise
            log.info("epoch %d %s at step %d", result.epoch, result.status.value, result.step)
            return result

    @activity.defn(name=names.INSTALL_KERNEL.name, no_thread_cancel_exception=True)
    def install_kernel(self, request: InstallRequest) -> InstallResult:
        """Fetch, verify and build a kernel while training goes on, and record the step of its graft."""
        with self._working(request.lease) as session, pulse("installing"):
            result = session.install(request.delivery)
            log.info("kernel of %s: %s", result.adaptation_id, result.reason)
            return result

    @activity.defn(name=names.ABANDON_KERNEL.name, no_thread_cancel_exception=True)
    def abandon_kernel(self, request: AbandonRequest) -> InstallResult:
        """Do not wait for this kernel any more."""
        with self._working(request.lease) as session, pulse("abandoning"):
            return session.abandon(request.adaptation, request.reason)

    @activity.defn(name=names.JUDGE_SEED.name, no_thread_cancel_exception=True)
    def judge_seed(self, request: JudgeRequest) -> JudgeReport:
        """Train the twin and take the verdict."""
        with draining_to_failure(), self._working(request.lease) as session:
            report = session.judge(request.adaptation_id, self._beat_under(request.lease))
            log.info("verdict on %s: %s, %s", report.adaptation_id, report.verdict.value, report.reason)
            return report

    @activity.defn(name=names.REMOVE_SEED.name, no_thread_cancel_exception=True)
    def remove_seed(self, request: RemoveRequest) -> InstallResult:
        """Ramp a graft to zero, then remove it."""
        with self._working(request.lease) as session, pulse("removing"):
            return session.remove(request.adaptation_id)

    @activity.defn(name=names.CHECKPOINT.name, no_thread_cancel_exception=True)
    def checkpoint(self, request: CheckpointRequest) -> HeadRef:
        """Commit at the next step boundary."""
        with self._working(request.lease) as session, pulse("committing"):
            return session.checkpoint(hold=request.hold, pauses=request.pauses)

    @activity.defn(name=names.RELEASE_TRAINER.name, no_thread_cancel_exception=True)
    def release_trainer(self, request: ReleaseRequest) -> FinishedRun:
        """The end of this process's service: evaluate and export when the run ends well, then let go."""
        if request.finish:
            with self._working(request.lease) as session, pulse("finishing"):
                finished = session.finish()
        else:
            with self._holding(request.lease):
                finished = FinishedRun(head=None, digest=None, metrics={}, parameters=0)
        log.info("released: %s", request.outcome.value)
        self._loop.call_soon_threadsafe(self.released.set)
        return finished

    def _beat_under(self, lease: Lease) -> Callable[[object], None]:
        """Heartbeats of work under one lease: it ends at the next boundary once the process has been claimed anew."""

        def beat_under(details: object) -> None:
            beat(details)
            if self.lease != lease:
                raise _stale(lease, self.lease)

        return beat_under

    def _commit_and_leave(self, session: Session) -> None:
        """The last commit of a process that was told to end. Where it cannot be made, the head before it stands."""
        try:
            with pulse("committing"):
                head = session.checkpoint(hold=True)
        except EsperError as error:
            log.error("draining: where training stood could not be committed: %s", error)
            self.uncommitted = error
        else:
            log.info("draining: committed where training stood, step %d", head.step)

    def _clear(self) -> None:
        """Let the work under earlier leases end, and their session go: two models must not train side by side in
        one process, since they would draw from the same random generators."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._busy == 1, OLD_WORK * self._silence_s):
                raise LeaseLost(
                    "ESP-503",
                    "what this trainer did under an earlier lease does not end",
                    hint="nothing to do: another process is claimed",
                )
        session, self._session = self._session, None
        if session is not None:
            # Its last commit may be waiting for a store.
            self._patience.limit_s = 0.0
            session.close()

    @contextmanager
    def _holding(self, lease: Lease) -> Iterator[None]:
        """Refuse stale orders; count fresh ones."""
        with self._changed:
            if lease != self.lease:
                raise _stale(lease, self.lease)
            self._busy += 1
        failed = True
        try:
            with watched(self._watchdog):
                yield
            failed = False
        except LeaseLost as error:
            log.warning("LeaseLost: %s", error)
            raise
        finally:
            with self._changed:
                self._busy -= 1
                self._changed.notify_all()
            if failed:
                self._loop.call_soon_threadsafe(self.doubted.set)

    @contextmanager
    def _working(self, lease: Lease) -> Iterator[Session]:
        with self._holding(lease):
            if self._session is None:
                raise LeaseLost("ESP-503", f"run {lease.run_id} is not loaded here", hint="it is claimed anew")
            yield self._session


def _stale(lease: Lease, held: Lease | None) -> LeaseLost:
    return LeaseLost(
        "ESP-503",
        f"run {lease.run_id}: an order under lease {lease.lease_gen} reached a trainer that holds "
        f"{f'{held.lease_gen} of run {held.run_id}' if held is not None else 'none'}",
        hint="nothing to do: the run goes on under the newer lease",
        run_id=lease.run_id,
    )


def _enter(code: CodeLocation | None) -> None:
    """Make the user's own modules importable, as they were where the run was started."""
    if code is None:
        return
    if Path(code.directory).is_dir():
        os.chdir(code.directory)
    for place in reversed((code.directory, *code.python_path)):
        if place not in sys.path:
            sys.path.insert(0, place)
