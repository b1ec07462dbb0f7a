import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from temporalio.api.operatorservice.v1 import ListSearchAttributesRequest
from temporalio.api.workflowservice.v1 import DescribeNamespaceRequest
from temporalio.client import Client

from esper.contracts.config import TemporalConfig
from esper.contracts.messages import Envelope
from esper.contracts.messages import TrainerLost
from esper.errors import UnavailableError
from esper.runtime.home import make_home
from esper.runtime.home import stack_file
from esper.runtime.logs import read_logs
from esper.runtime.processes import identify
from esper.runtime.stack import down
from esper.runtime.stack import running_stack
from esper.runtime.stack_state import StackInfo
from esper.runtime.stack_state import read_stack
from esper.runtime.stack_state import write_stack
from esper.runtime.temporal.client import connect
from esper.runtime.temporal.server import SEARCH_ATTRIBUTES
from esper.runtime.worker_files import read_all

pytestmark = pytest.mark.temporal

Start = Callable[[Path], StackInfo]
WaitFor = Callable[[Callable[[], object], str], None]


def pids(info: StackInfo) -> set[int]:
    assert info.server is not None
    return {info.supervisor.pid, info.server.pid, *(worker.process.pid for worker in info.workers)}


def now(home: Path) -> StackInfo:
    info = running_stack(home)
    assert info is not None
    return info


def worker(info: StackInfo, role: str) -> int:
    return next((worker.process.pid for worker in info.workers if role in worker.roles), 0)


def server(info: StackInfo) -> int:
    return info.server.pid if info.server is not None else 0


def client(home: Path) -> "asyncio.Future[Client]":
    return connect(TemporalConfig(), home, {"TEMPORAL_CONFIG_FILE": os.devnull})  # type: ignore[return-value]


def test_stack_file_has_the_documented_shape(shared_home: Path) -> None:
    document = json.loads(stack_file(shared_home).read_text())
    assert {"address", "ui", "pid"} <= set(document["temporal"])
    assert document["temporal"]["ui"].startswith("http://127.0.0.1:")
    assert "pid" in document["supervisor"]
    assert sorted(worker["roles"] for worker in document["workers"]) == [
        ["orchestrator"],
        ["tamiyo", "forge"],
        ["trainer"],
    ]
    assert all({"roles", "pid", "log"} <= set(worker) for worker in document["workers"])
    assert all(worker["log"].startswith(str(shared_home)) for worker in document["workers"])


def test_up_twice_is_up_once(shared_home: Path, start: Start) -> None:
    before = now(shared_home)
    assert start(shared_home) == before


def test_the_server_keeps_histories_and_knows_our_attributes(shared_home: Path) -> None:
    async def ask() -> tuple[timedelta, dict[str, int]]:
        connected = await client(shared_home)
        namespace = await connected.workflow_service.describe_namespace(DescribeNamespaceRequest(namespace="default"))
        attributes = await connected.operator_service.list_search_attributes(
            ListSearchAttributesRequest(namespace="default")
        )
        return namespace.config.workflow_execution_retention_ttl.ToTimedelta(), dict(attributes.custom_attributes)

    retention, attributes = asyncio.run(ask())
    assert retention >= timedelta(days=90)
    assert set(SEARCH_ATTRIBUTES) <= set(attributes)


def test_everything_is_bound_to_loopback(shared_home: Path) -> None:
    info = now(shared_home)
    inodes = {str(link.readlink()) for link in Path(f"/proc/{server(info)}/fd").iterdir() if link.is_symlink()}
    listening = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{server(info)}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                listening.append(fields[1].rpartition(":")[0])
    assert len(listening) >= 2
    assert set(listening) <= {"0100007F", "0000000000000000FFFF00000100007F", "0" * 24 + "01000000"}


def test_urza_is_migrated(shared_home: Path) -> None:
    assert (shared_home / "urza.db").stat().st_size > 0


def test_a_dead_worker_is_started_again(shared_home: Path, wait_for: WaitFor) -> None:
    before = worker(now(shared_home), "orchestrator")
    os.kill(before, signal.SIGKILL)
    wait_for(lambda: worker(now(shared_home), "orchestrator") not in (0, before), "a new orchestrator")
    wait_for(lambda: now(shared_home).ready, "a stack that is ready again")
    said = [line["message"] for line in read_logs(shared_home)]
    assert any(f"orchestrator, process {before}, ended (SIGKILL)" in message for message in said)


@pytest.mark.fault("C1")
def test_a_dead_server_is_started_again_at_its_address_with_its_histories(shared_home: Path, wait_for: WaitFor) -> None:
    async def start_workflow() -> None:
        connected = await client(shared_home)
        await connected.start_workflow("Anything", id="survivor", task_queue="nobody")

    async def describe() -> str:
        connected = await client(shared_home)
        return (await connected.get_workflow_handle("survivor").describe()).id

    asyncio.run(start_workflow())
    before = now(shared_home)
    os.kill(server(before), signal.SIGKILL)
    wait_for(lambda: server(now(shared_home)) not in (0, server(before)), "a new server")
    assert now(shared_home).address == before.address
    # Its port is closed until it has read its database.
    wait_for(lambda: _answers(describe), "an answer")
    assert worker(now(shared_home), "orchestrator") == worker(before, "orchestrator")


def _answers(ask: Callable[[], object]) -> bool:
    try:
        return asyncio.run(ask()) == "survivor"  # type: ignore[arg-type]
    except UnavailableError:
        return False


@pytest.mark.fault("A1")
def test_a_trainer_that_is_claimed_has_a_warm_successor_and_its_death_is_told(
    shared_home: Path, wait_for: WaitFor
) -> None:
    async def start_run() -> None:
        connected = await client(shared_home)
        await connected.start_workflow("TrainingRun", id="run-1", task_queue="nobody")

    async def signals() -> list[Envelope[TrainerLost]]:
        connected = await client(shared_home)
        history = await connected.get_workflow_handle("run-1").fetch_history()
        found = [event.workflow_execution_signaled_event_attributes for event in history.events]
        return [
            Envelope[TrainerLost].model_validate_json(signal.input.payloads[0].data)
            for signal in found
            if signal.signal_name == "trainer_lost"
        ]

    asyncio.run(start_run())
    first = worker(now(shared_home), "trainer")
    (shared_home / "claim").write_text("run-1")
    wait_for(lambda: (r := read_all(shared_home).get(first)) and r.state == "claimed", "a claim")
    wait_for(
        lambda: [r for r in read_all(shared_home).values() if r.roles == ("trainer",) and r.state == "idle"],
        "a successor",
    )
    trainers = [worker for worker in now(shared_home).workers if worker.roles == ("trainer",)]
    assert len(trainers) == 2

    os.kill(first, signal.SIGKILL)
    wait_for(lambda: asyncio.run(signals()), "the signal")
    (envelope,) = asyncio.run(signals())
    assert envelope.trace_id == "run-1"
    assert envelope.payload.task_queue == f"esper-trainer@test-{first}"
    assert "SIGKILL" in envelope.payload.reason
    assert first not in read_all(shared_home)
    assert [line for line in read_logs(shared_home, "run-1") if "lost" in line["message"]]


def test_a_trainer_that_has_served_its_run_is_forgotten(shared_home: Path, wait_for: WaitFor) -> None:
    wait_for(
        lambda: [r for r in read_all(shared_home).values() if r.roles == ("trainer",) and r.state == "idle"], "one"
    )
    before = next(r.pid for r in read_all(shared_home).values() if r.roles == ("trainer",))
    (shared_home / f"end-{before}").touch()
    wait_for(lambda: worker(now(shared_home), "trainer") not in (0, before), "a successor")
    assert before not in read_all(shared_home)
    assert now(shared_home).failures == ()


def test_two_homes_run_side_by_side_and_down_stops_one(home: Path, shared_home: Path, start: Start) -> None:
    other = now(shared_home)
    mine = start(home)
    assert mine.address != other.address
    assert mine.ui != other.ui
    assert not pids(mine) & pids(other)
    stopped = down(home)
    assert len(stopped) == 5
    assert [pid for pid in pids(mine) if identify(pid) is not None] == []
    assert running_stack(home) is None
    assert not stack_file(home).exists()
    assert read_all(home) == {}
    assert down(home) == ()
    assert [pid for pid in pids(other) if identify(pid) is None] == []


def test_concurrent_ups_make_one_stack(home: Path, start: Start) -> None:
    with ThreadPoolExecutor(3) as pool:
        first, *others = pool.map(start, [home] * 3)
    assert all(pids(info) == pids(first) for info in others)


def test_a_killed_supervisor_leaves_nothing_that_down_does_not_find(
    home: Path, start: Start, wait_for: WaitFor
) -> None:
    before = start(home)
    os.kill(before.supervisor.pid, signal.SIGKILL)
    wait_for(lambda: running_stack(home) is None, "the death of the supervisor")
    assert identify(server(before)) is not None
    assert down(home)
    assert [pid for pid in pids(before) if identify(pid) is not None] == []


def test_up_after_a_killed_supervisor_starts_afresh(home: Path, start: Start, wait_for: WaitFor) -> None:
    before = start(home)
    os.kill(before.supervisor.pid, signal.SIGKILL)
    wait_for(lambda: running_stack(home) is None, "the death of the supervisor")
    after = start(home)
    assert not pids(after) & pids(before)
    assert [pid for pid in pids(before) if identify(pid) is not None] == []


def test_down_spares_a_process_that_is_not_ours(home: Path) -> None:
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    try:
        identity = identify(stranger.pid)
        assert identity is not None
        # The right number and even the right start time, but another program.
        write_stack(home, StackInfo("127.0.0.1:1", "http://127.0.0.1:2", "1.31.2", identity, identity))
        assert down(home) == ()
        assert stranger.poll() is None
        assert not stack_file(home).exists()
    finally:
        stranger.kill()
        stranger.wait()


@pytest.mark.fault("C1")
def test_up_leaves_a_stack_alone_that_has_seen_its_server_die_or_has_a_worker_that_fails(
    home: Path, start: Start, wait_for: WaitFor
) -> None:
    before = start(home)
    for _ in range(3):
        died = server(now(home))
        os.kill(died, signal.SIGKILL)
        wait_for(lambda died=died: server(now(home)) not in (0, died), "a new server")  # type: ignore[misc]
        wait_for(lambda: _answers(lambda: _reachable(home)), "an answer")
    wait_for(lambda: now(home).ready and not now(home).failures, "a stack without failures")
    assert start(home).supervisor == before.supervisor

    (home / "broken-forge").touch()
    (home / "broken-tamiyo").touch()
    os.kill(worker(now(home), "forge"), signal.SIGKILL)
    wait_for(lambda: now(home).failures, "a worker that fails again and again")
    with pytest.raises(UnavailableError, match="does not start"):
        start(home)
    assert now(home).supervisor == before.supervisor


async def _reachable(home: Path) -> str:
    await client(home)
    return "survivor"


def test_a_worker_that_does_not_start_is_an_error_and_leaves_nothing(home: Path, start: Start) -> None:
    (home / "broken-trainer").touch()
    with pytest.raises(UnavailableError) as caught:
        start(home)
    assert caught.value.code == "ESP-306"
    assert "trainer ended (exit code 3): stub: told to break" in caught.value.message
    assert read_stack(home) is None
    found = subprocess.run(["pgrep", "-f", str(home)], capture_output=True, text=True, check=False)
    assert found.stdout == ""


def test_down_of_a_home_that_is_not_there_is_nothing(tmp_path: Path) -> None:
    assert down(tmp_path / "nowhere") == ()
    assert not (tmp_path / "nowhere").exists()


def test_a_stack_survives_the_one_who_started_it(home: Path, start: Start) -> None:
    stub = [sys.executable, str(Path(__file__).parent / "stub_worker.py")]
    code = "from pathlib import Path\nfrom esper.runtime.stack import up\n"
    code += f"up(Path({str(home)!r}), print, worker_command={stub!r})"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=200, start_new_session=True)
    assert now(home).ready
    assert start(home) == now(home)


def test_home_may_have_a_space_in_its_name(tmp_path: Path, start: Start) -> None:
    home = make_home({"ESPER_HOME": str(tmp_path / "my home")})
    try:
        assert start(home).ready
    finally:
        assert len(down(home)) == 5
    shutil.rmtree(home)
