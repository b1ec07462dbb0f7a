import asyncio
import os
import signal
import socket
import struct
import threading
import time
from pathlib import Path

import pytest

from esper.contracts.config import OptimizerConfig
from esper.errors import BlueprintError
from esper.errors import IntegrityError
from esper.runtime.tezzeret.artifact import KernelFiles
from esper.runtime.tezzeret.blueprints.registry import kernel_graph
from esper.runtime.tezzeret.build import build_kernel
from esper.runtime.tezzeret.forge_child import ForkServer
from esper.runtime.tezzeret.forge_child import build_in_child
from esper.runtime.tezzeret.forge_child import certify_in_child
from esper.runtime.tezzeret.forge_child import scrubbed_environment
from esper.runtime.tezzeret.forge_jobs import JOBS
from esper.runtime.tezzeret.forge_jobs import SAMPLES
from esper.runtime.tezzeret.forge_server import perform
from esper.runtime.tezzeret.frames import receive_message
from esper.runtime.tezzeret.frames import send_message
from esper.runtime.tezzeret.samples import pack_samples

PATIENT = {"timeout_s": 120.0, "memory_mb": 4096}


def refused(
    server: ForkServer, job: str, *, timeout_s: float = 60.0, memory_mb: int = 1024, **arguments
) -> BlueprintError:
    with pytest.raises(BlueprintError) as caught:
        server.run(job, arguments, [], timeout_s=timeout_s, memory_mb=memory_mb)
    return caught.value


def gone(pid: int) -> bool:
    """No such process, or one that is dead and only waits to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_kernel_built_and_certified_in_a_child_is_the_same_kernel(fork_server, linear_site, draw_samples):
    samples = draw_samples(linear_site)
    files = build_in_child(
        "bottleneck",
        linear_site,
        {"rank": 4},
        seed=3,
        samples=samples,
        max_parameters=10_000,
        server=fork_server,
        **PATIENT,
    )
    here = build_kernel("bottleneck", linear_site, {"rank": 4}, seed=3, samples=samples, max_parameters=10_000)
    assert files == here
    settings = OptimizerConfig(name="sgd", lr=0.1, momentum=0.9)
    certificate = certify_in_child(
        files, samples=samples, optimizer=settings, compile=False, server=fork_server, **PATIENT
    )
    assert certificate.passed
    assert certificate.kernel == files.digest
    assert certificate.parameters_with_gradient == certificate.parameters_total == 3


def test_the_job_s_own_errors_keep_their_class_and_code(fork_server, linear_site):
    error = refused(fork_server, "refuse")
    assert (error.code, error.message, error.hint) == ("ESP-414", "node 'a': wrong", "right it")
    files = build_kernel("lowrank", linear_site, {}, seed=0, samples=None, max_parameters=10_000)
    broken = KernelFiles(files.manifest, files.weights[:-1])
    with pytest.raises(IntegrityError, match="bytes"):
        certify_in_child(broken, samples=None, optimizer=None, compile=False, server=fork_server, **PATIENT)


@pytest.mark.fault("B2")
def test_an_endless_job_is_over_time(fork_server):
    error = refused(fork_server, "loop", timeout_s=0.5)
    assert error.code == "ESP-424"
    assert "over time, more than 0.5 s" in error.message


@pytest.mark.fault("B2")
def test_too_much_processor_time_is_over_time(fork_server):
    assert refused(fork_server, "burn").code == "ESP-424"


@pytest.mark.fault("B2")
@pytest.mark.parametrize("job", ["hog", "python_hog"])
def test_a_memory_hog_is_over_memory(fork_server, job):
    error = refused(fork_server, job, memory_mb=512)
    assert error.code == "ESP-425"
    assert "over memory, more than 512 MB" in error.message


def test_a_child_that_leaves_is_named_with_its_status(fork_server):
    error = refused(fork_server, "leave", code=7)
    assert error.code == "ESP-426"
    assert "exit status 7" in error.message


@pytest.mark.fault("B2")
def test_a_segfault_is_named_by_its_signal(fork_server):
    error = refused(fork_server, "segfault")
    assert error.code == "ESP-426"
    assert "SIGSEGV" in error.message


@pytest.mark.fault("B2")
def test_a_file_beyond_the_limit_cannot_be_written(fork_server):
    error = refused(fork_server, "big_file")
    assert error.code == "ESP-426"
    assert "File too large" in error.message


@pytest.mark.fault("B2")
def test_a_crash_and_a_bad_answer_are_reported(fork_server):
    assert "KeyError: 'nonesuch'" in refused(fork_server, "crash").message
    assert refused(fork_server, "garbage").code == "ESP-426"
    assert "KeyError: 'no such job'" in refused(fork_server, "no such job").message


@pytest.mark.fault("B2")
def test_the_group_and_the_folder_of_a_killed_child_are_gone(fork_server, tmp_path):
    file = tmp_path / "pids"
    done = threading.Event()
    errors: list[BlueprintError] = []

    def order() -> None:
        errors.append(refused(fork_server, "sleep_with_grandchild", timeout_s=8.0, file=str(file)))
        done.set()

    threading.Thread(target=order).start()
    assert done.wait(120)
    child, grandchild, folder = file.read_text().split()
    assert errors[0].code == "ESP-424"
    assert not Path(folder).exists()
    deadline = time.monotonic() + 30
    while not (gone(int(child)) and gone(int(grandchild))) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert gone(int(child)) and gone(int(grandchild))


@pytest.mark.fault("B3", "I12")
def test_a_child_sees_no_secret_no_caller_and_no_heavy_module(fork_server):
    answer, blobs = fork_server.run("look", {}, [b"", b"abc"], **PATIENT)
    assert answer["modules"] == []
    assert answer["preloaded"]
    assert answer["main"].endswith("forge_server.py")
    assert answer["session"]
    assert answer["threads"] == 1
    assert answer["folder"] != str(Path.cwd())
    assert not Path(answer["folder"]).exists()
    assert answer["environment"].keys() <= scrubbed_environment(answer["environment"]).keys() | {
        "PYTHONPATH",
        "OMP_NUM_THREADS",
        "MKL_NUM_THREADS",
        "TORCHINDUCTOR_CACHE_DIR",
        "TORCHINDUCTOR_COMPILE_THREADS",
    }
    assert blobs == [b"", b"abc"]


@pytest.mark.fault("I12")
def test_scrubbed_environment_drops_what_looks_like_a_secret():
    given = {
        "PATH": "/bin",
        "LC_ALL": "C",
        "AWS_ACCESS_KEY_ID": "a",
        "TEMPORAL_API_KEY": "b",
        "GITHUB_TOKEN": "c",
        "COVERAGE_TOKEN": "d",
        "ESPER_URZA__DATABASE": "postgresql://user:password@host/db",
    }
    assert scrubbed_environment(given) == {"PATH": "/bin", "LC_ALL": "C"}


def test_children_work_from_threads_of_an_asyncio_process_side_by_side(fork_server):
    async def both() -> list[int]:
        orders = [asyncio.to_thread(fork_server.run, "look", {}, [], **PATIENT) for _ in range(4)]
        return [answer["pid"] for answer, _ in await asyncio.gather(*orders)]

    assert len(set(asyncio.run(both()))) == 4


@pytest.mark.fault("B1")
def test_a_killed_server_is_replaced():
    server = ForkServer(jobs="forge_faults", search_path=(str(Path(__file__).parent),))
    try:
        server.start()
        first = server.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        answer, _ = server.run("look", {}, [], **PATIENT)
        assert answer["session"]
        assert server.pid != first
    finally:
        server.stop()
    assert server.pid is None


def test_a_server_that_cannot_start_says_so():
    server = ForkServer(jobs="no_such_module_of_jobs")
    with pytest.raises(BlueprintError, match="did not start"):
        server.start()


def test_the_jobs_themselves_are_data_in_and_data_out(linear_site, draw_samples):
    """In this process: what the children of the other tests do."""
    samples = [pack_samples({SAMPLES: draw_samples(linear_site)})]
    arguments = {
        "graph": kernel_graph("lowrank", linear_site, {"rank": 2}).model_dump(mode="json"),
        "blueprint": "lowrank",
        "blueprint_version": 1,
        "site": linear_site.model_dump(mode="json"),
        "hyperparameters": {"rank": 2},
        "seed": 0,
        "initialiser": "residual",
        "max_parameters": 1000,
        "max_flops": None,
    }
    answer, files = perform(JOBS, "build", arguments, samples)
    assert answer == {"ok": {}}
    answer, rest = perform(JOBS, "certify", {"optimizer": None, "compile": False}, [*files, *samples])
    assert answer["ok"]["certificate"]["passed"]
    assert rest == []
    answer, _ = perform(JOBS, "build", arguments | {"max_parameters": 1}, [])
    assert answer["error"]["code"] == "ESP-416"
    answer, _ = perform(JOBS, "build", {}, [])
    assert answer == {"crash": "KeyError: 'graph'"}


def test_a_message_that_is_none_is_refused():
    one, two = socket.socketpair()
    with one, two:
        one.sendall(struct.pack(">Q", 2**40))
        with pytest.raises(ValueError, match="a frame of"):
            receive_message(two)
        send_message(one, {"a": 1}, [b""] * 9)
        with pytest.raises(ValueError, match="9 byte strings"):
            receive_message(two)
        with pytest.raises(TimeoutError):
            receive_message(one, deadline=time.monotonic() - 1)
