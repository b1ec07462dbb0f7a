"""Workers with the real workflows and fake activities on the session's real dev server."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from collections.abc import Awaitable
from collections.abc import Callable
from collections.abc import Collection
from contextlib import AsyncExitStack
from contextlib import asynccontextmanager
from datetime import timedelta

from fake_activities import PINNED
from fake_activities import FakeWorld
from temporalio.client import Client
from temporalio.client import WorkflowHandle
from temporalio.worker import Worker

from esper.contracts.config import EsperConfig
from esper.contracts.messages import Envelope
from esper.contracts.messages import Payload
from esper.contracts.orders import RunRecord
from esper.contracts.orders import TrainingRequest
from esper.runtime.temporal import queues
from esper.runtime.temporal.plugin import EsperPlugin
from esper.workflows.tamiyo_decision import TamiyoDecision
from esper.workflows.tezzeret_compile import TezzeretCompile
from esper.workflows.training_run import TrainingRun

WORKFLOWS = [TrainingRun, TamiyoDecision, TezzeretCompile]


def configuration(epochs: int, **sections: dict[str, object]) -> EsperConfig:
    document: dict[str, object] = {"run": {"max_epochs": epochs}, "task": {"name": "fake"}, **sections}
    return EsperConfig.model_validate(document, strict=False)


class Stage:
    """Starts runs on the fake world and talks to them."""

    def __init__(self, client: Client, world: FakeWorld, start: Callable[[str], Awaitable[Worker]]) -> None:
        self.client = client
        self.world = world
        self._start = start
        self._workers: dict[str, Worker] = {}

    async def serve(self, queue: str) -> None:
        """Begin to serve a task queue."""
        self._workers[queue] = await self._start(queue)

    async def close(self, queue: str) -> None:
        """Serve a task queue no more."""
        await self._workers.pop(queue).shutdown()

    async def start(
        self, config: EsperConfig, *, limit: timedelta = timedelta(seconds=40), **request: object
    ) -> WorkflowHandle[TrainingRun, RunRecord]:
        run_id = f"run-{uuid.uuid4().hex[:8]}"
        return await self.client.start_workflow(
            TrainingRun.run,
            TrainingRequest(run_id=run_id, config=config, **request),  # type: ignore[arg-type]
            id=run_id,
            task_queue=queues.ORCHESTRATION,
            execution_timeout=limit,
        )

    async def tell(self, handle: WorkflowHandle[TrainingRun, RunRecord], update: str, payload: Payload) -> object:
        envelope = Envelope(
            event_id=uuid.uuid4().hex, trace_id=handle.id, causation_id="test", sender="test", payload=payload
        )
        return await handle.execute_update(update, envelope)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not condition():
                await asyncio.sleep(0.01)


@asynccontextmanager
async def stage(
    address: str, world: FakeWorld, *, cached: int = 1000, without: Collection[str] = ()
) -> AsyncIterator[Stage]:
    client = await Client.connect(address, plugins=[EsperPlugin()])
    async with AsyncExitStack() as stack:
        activities = world.all()

        async def begin(queue: str) -> Worker:
            return await stack.enter_async_context(
                Worker(
                    client,
                    task_queue=queue,
                    activities=activities,
                    workflows=WORKFLOWS if queue == queues.ORCHESTRATION else [],
                    max_cached_workflows=cached,
                    # A cancellation reaches an activity with its next heartbeat.
                    max_heartbeat_throttle_interval=timedelta(seconds=0.1),
                    default_heartbeat_throttle_interval=timedelta(seconds=0.1),
                )
            )

        on = Stage(client, world, begin)
        for queue in (queues.ORCHESTRATION, queues.TRAINER, PINNED, queues.TAMIYO, queues.FORGE):
            if queue not in without:
                await on.serve(queue)
        yield on
