"""A worker whose `TrainingRun` writes a run into a real Urza and answers updates, in place of the whole machinery.

For the command line alone: what it starts, waits for, shows, sends and ends with.
"""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from recorded_run import RecordedRun
from temporalio import activity
from temporalio import workflow
from temporalio.client import Client
from temporalio.exceptions import ApplicationError
from temporalio.worker import UnsandboxedWorkflowRunner
from temporalio.worker import Worker

from esper.contracts.enums import AdaptationState
from esper.contracts.enums import DecisionKind
from esper.contracts.enums import Outcome
from esper.contracts.messages import Answer
from esper.contracts.messages import Envelope
from esper.contracts.messages import Pause
from esper.contracts.messages import PinSite
from esper.contracts.messages import Resume
from esper.contracts.messages import Stop
from esper.contracts.orders import TrainingRequest
from esper.errors import TargetError
from esper.runtime.temporal import queues
from esper.runtime.temporal.failures import to_failure
from esper.runtime.temporal.plugin import EsperPlugin
from esper.runtime.urza.library import Library
from esper.runtime.urza.objects import FolderStore

SITES = ("layers.0",)


@workflow.defn(name="TrainingRun")
class StandInRun:
    """Begins, waits for `stop` when its name says so, and ends; `run.name` says how."""

    def __init__(self) -> None:
        self._stopped = False

    @workflow.run
    async def run(self, request: TrainingRequest) -> None:
        script = request.config.run.name
        if script == "resumed" and request.expected_head is not None:
            script = "finish"
        await self._do("begin", request)
        if script == "waits":
            await workflow.wait_condition(lambda: self._stopped)
        elif script == "fails":
            await self._do("fail", request)
            raise to_failure(TargetError("ESP-312", "task.target returned None"))
        elif script == "resumed":
            await self._do("stopped", request)
            return
        elif script == "dies":
            raise ApplicationError("nobody recorded this")
        await self._do("finish", request)

    async def _do(self, what: str, request: TrainingRequest) -> None:
        await workflow.execute_activity(
            f"stand_in_{what}", request, start_to_close_timeout=timedelta(seconds=20), retry_policy=None
        )

    @workflow.update
    def stop(self, message: Envelope[Stop]) -> Answer:
        self._stopped = True
        return Answer(run_id=message.trace_id, message=f"stopping for {message.sender.partition(':')[0]}")

    @workflow.update
    def resume(self, message: Envelope[Resume]) -> Answer:
        return Answer(run_id=message.trace_id, message="training goes on")

    @workflow.update
    def pause(self, message: Envelope[Pause]) -> Answer:
        return Answer(run_id=message.trace_id, message="pausing")

    @pause.validator
    def _may_pause(self, message: Envelope[Pause]) -> None:
        raise ValueError("the run is already paused")

    @workflow.update
    def pin_site(self, message: Envelope[PinSite]) -> Answer:
        return Answer(run_id=message.trace_id, message=f"{message.payload.site} is pinned")

    @pin_site.validator
    def _may_pin(self, message: Envelope[PinSite]) -> None:
        if message.payload.site not in SITES:
            raise ValueError(f"there is no site {message.payload.site!r}; sites: {', '.join(SITES)}")


class StandInActivities:
    """Writes what a run would have written, into the Urza of one home."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._runs: dict[str, RecordedRun] = {}

    async def _run(self, request: TrainingRequest) -> RecordedRun:
        if request.run_id not in self._runs:
            library = await Library.open("default", default_file=self._home / "urza.db")
            store = FolderStore(self._home / "objects")
            self._runs[request.run_id] = RecordedRun(library, store, request.config, request.run_id)
        return self._runs[request.run_id]

    async def close(self) -> None:
        for run in self._runs.values():
            await run.library.close()

    @activity.defn(name="stand_in_begin")
    async def begin(self, request: TrainingRequest) -> None:
        run = await self._run(request)
        if request.expected_head is None:
            await run.begin()
        else:
            await run.go_on(request.expected_head)

    @activity.defn(name="stand_in_stopped")
    async def stopped(self, request: TrainingRequest) -> None:
        await (await self._run(request)).end(Outcome.STOPPED)

    @activity.defn(name="stand_in_fail")
    async def fail(self, request: TrainingRequest) -> None:
        await (await self._run(request)).fail("ESP-312", "task.target returned None")

    @activity.defn(name="stand_in_finish")
    async def finish(self, request: TrainingRequest) -> None:
        run = await self._run(request)
        for epoch in range(1, 4):
            await run.epoch(epoch)
            await run.decide(epoch, DecisionKind.GERMINATE if epoch == 1 else DecisionKind.WAIT)
        await run.adapt(AdaptationState.FOSSILIZED)
        await run.end(Outcome.COMPLETED)


@contextmanager
def stand_in_worker(address: str, home: Path) -> Iterator[None]:
    """The worker, in a thread with its own event loop, while the block runs."""
    ready = threading.Event()
    loop = asyncio.new_event_loop()
    done = asyncio.Event()

    async def serve() -> None:
        client = await Client.connect(address, plugins=[EsperPlugin()])
        activities = StandInActivities(home)
        async with Worker(
            client,
            task_queue=queues.ORCHESTRATION,
            workflows=[StandInRun],
            activities=[activities.begin, activities.stopped, activities.fail, activities.finish],
            workflow_runner=UnsandboxedWorkflowRunner(),
        ):
            ready.set()
            await done.wait()
        await activities.close()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    try:
        assert ready.wait(30)
        yield
    finally:
        loop.call_soon_threadsafe(done.set)
        thread.join(30)
        loop.close()
