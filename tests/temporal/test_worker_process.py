"""Real trainer processes under SIGTERM: nothing that was trained is lost, and the run goes on elsewhere."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from activity_bench import TASK
from temporalio.client import Client
from temporalio.worker import Worker
from workflow_stage import WORKFLOWS

from esper.activities.urza import UrzaActivities
from esper.contracts.config import EsperConfig
from esper.contracts.config import UrzaConfig
from esper.contracts.enums import Outcome
from esper.contracts.orders import CodeLocation
from esper.contracts.orders import RunRecord
from esper.contracts.orders import TrainingRequest
from esper.runtime import worker_files
from esper.runtime.temporal import queues
from esper.runtime.temporal.plugin import EsperPlugin
from esper.runtime.urza import migration
from esper.runtime.urza.connections import Connections
from esper.workflows.training_run import TrainingRun

pytestmark = [pytest.mark.temporal, pytest.mark.system]

SLOW = TASK.replace("    x, y = batch\n", "    time.sleep(0.05)\n    x, y = batch\n").replace(
    "import torch\n", "import time\n\nimport torch\n", 1
)


@contextmanager
def trainers(home: Path, address: str, count: int) -> Iterator[list["subprocess.Popen[bytes]"]]:
    environment = os.environ | {"ESPER_HOME": str(home), "TEMPORAL_ADDRESS": address, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "esper.worker", "trainer"]
    with (home / "output").open("wb") as output:
        started = [subprocess.Popen(command, env=environment, stdout=output, stderr=output) for _ in range(count)]
        try:
            yield started
        finally:
            for process in started:
                process.kill()
                process.wait()


async def state_of(home: Path, processes: list["subprocess.Popen[bytes]"], state: str, count: int) -> list[int]:
    """Wait until so many of them say so."""
    async with asyncio.timeout(90):
        while True:
            assert all(process.poll() in (None, 0) for process in processes), (home / "output").read_text()
            found = [pid for pid, report in worker_files.read_all(home).items() if report.state == state]
            if len(found) >= count:
                return found
            await asyncio.sleep(0.1)


@pytest.mark.fault("A12")
def test_sigterm_in_the_middle_of_an_epoch_loses_no_step(temporal_address: str, tmp_path: Path) -> None:
    home, run_id = tmp_path, f"drained-{os.getpid()}"
    (home / "slow_task.py").write_text(SLOW)
    config = EsperConfig.model_validate(
        {
            "run": {"name": "slow", "max_epochs": 5, "threads": 1, "device": "cpu"},
            "task": {"target": "slow_task:tiny"},
            "training": {"batch_size": 8},
            "tamiyo": {"policy": "none"},
        },
        strict=False,
    )
    request = TrainingRequest(run_id=run_id, config=config, code=CodeLocation(directory=str(home)))

    async def scene() -> tuple[RunRecord, list[tuple[int, int]], float]:
        await migration.upgrade("default", default_file=home / "urza.db")
        connections = Connections(home)
        library = await connections.library(UrzaConfig())
        client = await Client.connect(temporal_address, plugins=[EsperPlugin()])
        with trainers(home, temporal_address, 2) as processes:
            await state_of(home, processes, "idle", 2)
            async with Worker(
                client,
                task_queue=queues.ORCHESTRATION,
                workflows=WORKFLOWS,
                activities=UrzaActivities(connections).all(),
            ):
                handle = await client.start_workflow(
                    TrainingRun.run, request, id=run_id, task_queue=queues.ORCHESTRATION
                )
                [claimed] = await state_of(home, processes, "claimed", 1)
                victim = next(process for process in processes if process.pid == claimed)
                async with asyncio.timeout(60):
                    while (await library.run(run_id)).epochs < 1:
                        await asyncio.sleep(0.05)
                began = time.monotonic()
                victim.send_signal(signal.SIGTERM)
                code = await asyncio.to_thread(victim.wait, 60)
                assert code == 0, (home / "output").read_text()
                took = time.monotonic() - began
                record = await asyncio.wait_for(handle.result(), 60)
            heads = [(head.head.step, head.head.epoch) for head in await library.heads(run_id)]
            await connections.close()
            return record, heads, took

    record, heads, took = asyncio.run(scene())
    assert (record.outcome, record.restarts, record.divergences) == (Outcome.COMPLETED, 1, 0)
    assert record.steps == 5 * 8
    assert heads == sorted(set(heads))
    drained = [step for step, epoch in heads if step != 8 * epoch]
    assert len(drained) <= 1, f"at most one commit before the end of an epoch: {heads}"
    assert took < 20


@pytest.mark.fault("A12")
def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    """Also while it still looks for its server."""
    with trainers(tmp_path, "127.0.0.1:1", 1) as [process]:
        deadline = time.monotonic() + 60
        while not worker_files.read_all(tmp_path):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) in (0, 130)
