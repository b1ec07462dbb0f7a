"""Real trainer processes on a real server, with the orchestrator in the test's own process: takeovers without the cost
of a whole stack. What the trainers train obeys files in their folder, so that a test can hang one of them."""

import asyncio
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator
from collections.abc import Callable
from contextlib import asynccontextmanager
from pathlib import Path

import activity_bench
import pytest
from temporalio.client import Client
from temporalio.client import WorkflowHandle
from temporalio.worker import Worker
from tolaria_world import undisturbed_digest
from workflow_stage import WORKFLOWS

from esper.activities.urza import UrzaActivities
from esper.contracts.config import EsperConfig
from esper.contracts.config import UrzaConfig
from esper.contracts.enums import Outcome
from esper.contracts.orders import CodeLocation
from esper.contracts.orders import RunRecord
from esper.contracts.orders import TrainingRequest
from esper.runtime import worker_files
from esper.runtime.logs import read_logs
from esper.runtime.temporal import queues
from esper.runtime.temporal.plugin import EsperPlugin
from esper.runtime.urza import migration
from esper.runtime.urza.connections import Connections
from esper.runtime.urza.library import Library
from esper.workflows.training_run import TrainingRun

OBEDIENCE = """
import ctypes
import threading
import time
from pathlib import Path

HERE = Path(__file__).parent


def obey():
    if (HERE / "pace").exists():
        time.sleep(float((HERE / "pace").read_text()))
    try:
        (HERE / "hang").rename(HERE / "hung")
    except FileNotFoundError:
        return
    kind = (HERE / "hung").read_text()
    if kind == "gil":
        ctypes.PyDLL(None).sleep(3600)
    while kind == "loop":
        pass
    if kind == "deadlock":
        threading.Event().wait()
"""

IN_LOSS = "    x, y = batch\n"
TASK = OBEDIENCE + activity_bench.TASK.replace(IN_LOSS, "    if model.training:\n        obey()\n" + IN_LOSS)
EPOCHS = 6
STEPS_PER_EPOCH = 8


def configuration(epochs: int, step_timeout_s: float = 10.0) -> EsperConfig:
    return EsperConfig.model_validate(
        {
            "run": {"name": "obedient", "seed": 5, "max_epochs": epochs, "threads": 1, "device": "cpu"},
            "task": {"target": "obedient_task:tiny"},
            "training": {"batch_size": 8, "step_timeout_s": step_timeout_s},
            "tamiyo": {"policy": "none"},
        },
        strict=False,
    )


@pytest.fixture(scope="module")
def digest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The weights of a run of `EPOCHS` epochs when nothing happens to it, trained in this process."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "obedient_task.py").write_text(TASK)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "path", [str(folder), *sys.path])
            return undisturbed_digest(folder, configuration(EPOCHS), EPOCHS)
    finally:
        sys.modules.pop("obedient_task", None)


def assert_whole(record: RunRecord, digest: str) -> None:
    """The run has ended with every step, in the bits of the undisturbed one."""
    assert (record.outcome, record.divergences) == (Outcome.COMPLETED, 0)
    assert record.steps == EPOCHS * STEPS_PER_EPOCH
    assert record.finished is not None and record.finished.digest == digest


class TrainerStage:
    """One home: its trainers, its Urza, and the client of the orchestrator, which `address` names."""

    def __init__(self, home: Path, address: str, client: Client, connections: Connections, library: Library) -> None:
        self.home = home
        self.address = address
        self.client = client
        self.connections = connections
        self.library = library
        self.trainers: list[subprocess.Popen[bytes]] = []

    def spawn(self, *, address: str | None = None, **environment: str) -> int:
        """Start a trainer, which needs some seconds to be warm. Gives its process id."""
        given = os.environ | {
            "ESPER_HOME": str(self.home),
            "TEMPORAL_ADDRESS": address or self.address,
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "esper.worker", "trainer"]
        with self.output.open("ab") as output:
            process = subprocess.Popen(command, env=given | environment, stdout=output, stderr=output)
        self.trainers.append(process)
        return process.pid

    @property
    def output(self) -> Path:
        """What the trainers printed."""
        return self.home / "output"

    def pids(self, state: str) -> list[int]:
        """The trainers that said so last, and live."""
        living = {process.pid for process in self.trainers if process.poll() is None}
        return [pid for pid, said in worker_files.read_all(self.home).items() if said.state == state and pid in living]

    def process(self, pid: int) -> "subprocess.Popen[bytes]":
        return next(process for process in self.trainers if process.pid == pid)

    async def warm(self, count: int) -> None:
        await self.until(lambda: len(self.pids("idle")) >= count, "warm trainers")

    async def claimed(self, *, other_than: int = 0) -> int:
        """The process that serves the run now."""

        def found() -> list[int]:
            return [pid for pid in self.pids("claimed") if pid != other_than]

        await self.until(lambda: bool(found()), "a claim")
        return found()[0]

    async def start(
        self, epochs: int, *, pace: float = 0.0, run_id: str = "", step_timeout_s: float = 10.0
    ) -> WorkflowHandle[TrainingRun, RunRecord]:
        """Begin a run whose every step takes `pace` seconds longer."""
        self.obey("pace", str(pace))
        run_id = run_id or f"run-{uuid.uuid4().hex[:8]}"
        request = TrainingRequest(
            run_id=run_id,
            config=configuration(epochs, step_timeout_s),
            code=CodeLocation(directory=str(self.home)),
        )
        return await self.client.start_workflow(TrainingRun.run, request, id=run_id, task_queue=queues.ORCHESTRATION)

    def obey(self, name: str, text: str) -> None:
        """A whole file at once: a trainer may look at any moment."""
        fresh = self.home / f"{name}.fresh"
        fresh.write_text(text)
        fresh.replace(self.home / name)

    async def trained(self, run_id: str, epochs: int) -> None:
        """Until so many epochs are committed."""
        async with asyncio.timeout(120):
            while (await self.library.run(run_id)).epochs < epochs:
                await asyncio.sleep(0.05)

    async def until(self, true: Callable[[], bool], what: str, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline, f"{what} did not come\n{self.words()}"
            await asyncio.sleep(0.05)

    async def ended(self, pid: int, seconds: float = 120) -> int:
        """The exit code of a trainer that should end by itself."""
        try:
            return await asyncio.to_thread(self.process(pid).wait, seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"trainer {pid} does not end\n{self.words()}") from None

    async def heads_of(self, run_id: str, lease_gen: int) -> list[int]:
        """The steps that were committed under one lease."""
        return [each.head.step for each in await self.library.heads(run_id) if each.lease_gen == lease_gen]

    def said(self, pid: int) -> list[str]:
        """What one process logged."""
        return [str(line["message"]) for line in read_logs(self.home) if line["pid"] == pid]

    def words(self) -> str:
        """For the message of a failing test."""
        logged = "\n".join(f"{line['time']} {line['pid']} {line['message']}" for line in read_logs(self.home))
        return f"{logged}\n{self.output.read_text() if self.output.exists() else ''}"

    def end(self) -> None:
        for process in self.trainers:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait()


@asynccontextmanager
async def trainer_stage(home: Path, address: str, *, trainers: int = 2) -> AsyncIterator[TrainerStage]:
    """An orchestrator that serves, and so many warm trainers. Every trainer has ended afterwards."""
    (home / "obedient_task.py").write_text(TASK)
    await migration.upgrade("default", default_file=home / "urza.db")
    connections = Connections(home)
    library = await connections.library(UrzaConfig())
    client = await Client.connect(address, plugins=[EsperPlugin()])
    stage = TrainerStage(home, address, client, connections, library)
    orchestrator = Worker(
        client, task_queue=queues.ORCHESTRATION, workflows=WORKFLOWS, activities=UrzaActivities(connections).all()
    )
    try:
        for _ in range(trainers):
            stage.spawn()
        async with orchestrator:
            await stage.warm(trainers)
            yield stage
    finally:
        stage.end()
        await connections.close()
