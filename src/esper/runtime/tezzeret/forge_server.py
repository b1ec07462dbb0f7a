"""The forge's fork server: a process that has torch loaded and gives every job a fresh, limited child of its own.

`multiprocessing`'s own fork server imports the caller's main module into its children and passes objects by pickle;
here a child gets JSON and bytes, and what is loaded is named below. For each job the server forks a guard, the guard
forks the child:

    server --fork--> guard --fork--> child (own session, limits, folder) --> answers on `job`
                       '--> waits, kills the child's whole group, removes its folder, reports the status on `life`

The guard kills as soon as the caller closes `life`, so nothing outlives the caller.
"""

import contextlib
import importlib
import os
import resource
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from typing import NoReturn

import torch
import torch._dynamo
import torch.optim

from esper.errors import EsperError
from esper.runtime.tezzeret.frames import Message
from esper.runtime.tezzeret.frames import receive_message
from esper.runtime.tezzeret.frames import send_message

MAX_FILE_BYTES = 256 * 2**20
OUT_OF_MEMORY = ("can't allocate memory", "Cannot allocate memory", "bad_alloc", "not enough memory")

Jobs = Mapping[str, Callable[[Mapping[str, Any], list[bytes]], Message]]


def main() -> None:
    """`python -m esper.runtime.tezzeret.forge_server FD MODULE FOLDER`: serve the jobs of `MODULE.JOBS` on the socket
    FD until it is closed; FOLDER is removed at the end."""
    control = socket.socket(fileno=int(sys.argv[1]))
    folder = Path(sys.argv[3])
    try:
        jobs: Jobs = importlib.import_module(sys.argv[2]).JOBS
        preload()
        control.sendall(b"r")
        serve(control, jobs)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def preload() -> None:
    """Pay here, once, what the first optimizer and the first counted forward of a process cost. No backward: it would
    start threads, which do not survive a fork."""
    torch.set_num_threads(1)
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.ones(2)
    torch.optim.AdamW([parameter]).step()


def serve(control: socket.socket, jobs: Jobs) -> None:
    """One guard for every pair of sockets that arrives; returns when the caller has gone."""
    # Guards are reaped by the kernel: nobody here waits for them.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        data, descriptors, _, _ = socket.recv_fds(control, 1, 2)
        if not data:
            return
        for descriptor in descriptors:
            os.set_inheritable(descriptor, False)
        job, life = (socket.socket(fileno=descriptor) for descriptor in descriptors)
        if os.fork() == 0:
            control.close()
            _guard(job, life, jobs)
        job.close()
        life.close()


def _guard(job: socket.socket, life: socket.socket, jobs: Jobs) -> NoReturn:
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        life.sendall(b"f")
        folder = Path(tempfile.mkdtemp(prefix="esper-forge-"))
        child = os.fork()
        if child == 0:
            life.close()
            run_child(job, jobs, folder)
        job.close()
        threading.Thread(target=_kill_when_closed, args=(life, child), daemon=True).start()
        _, status = os.waitpid(child, 0)
        # What the child started may live on in its group.
        _kill_group(child)
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            send_message(life, {"status": os.waitstatus_to_exitcode(status)})
    finally:
        os._exit(0)


def _kill_when_closed(life: socket.socket, child: int) -> None:
    with contextlib.suppress(OSError):
        life.recv(1)
    if not _kill_group(child):
        # It had not called setsid yet, or has ended.
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def _kill_group(leader: int) -> bool:
    try:
        os.killpg(leader, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def run_child(job: socket.socket, jobs: Jobs, folder: Path) -> NoReturn:
    """One job in this process, which ends with it."""
    try:
        os.setsid()
        os.chdir(folder)
        os.environ["TMPDIR"] = str(folder)
        tempfile.tempdir = str(folder)
        header, blobs = receive_message(job)
        limit(memory_mb=header["memory_mb"], cpu_seconds=header["cpu_seconds"])
        answer, results = perform(jobs, header["job"], header["arguments"], blobs)
        send_message(job, answer, results)
    finally:
        os._exit(0)


def limit(*, memory_mb: int, cpu_seconds: int) -> None:
    """Bound this process for ever: address space beyond what it has now, processor time, size of a file, no core."""
    with contextlib.suppress(FileNotFoundError):
        # Only Linux enforces RLIMIT_AS, and only there is the present size to be had.
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        ceiling = pages * resource.getpagesize() + memory_mb * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (ceiling, ceiling))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_FILE_BYTES, MAX_FILE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def perform(jobs: Jobs, job: str, arguments: Mapping[str, Any], blobs: list[bytes]) -> Message:
    """The answer to one job: `ok`, or `error` (one of Esper's own), `memory` or `crash` with their texts."""
    try:
        result, results = jobs[job](arguments, blobs)
    except EsperError as error:
        return {"error": error.to_json() | {"kind": type(error).__name__}}, []
    except MemoryError:
        return {"memory": "MemoryError"}, []
    except Exception as error:
        text = str(error)
        kind = "memory" if any(mark in text for mark in OUT_OF_MEMORY) else "crash"
        return {kind: f"{type(error).__name__}: {text[:500]}"}, []
    return {"ok": result}, results


if __name__ == "__main__":
    main()
