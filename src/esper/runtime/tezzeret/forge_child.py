"""Building and certifying in a child process with limits: what a kernel or a compiler does there ends there.

`start_forkserver()` loads torch once (seconds); a child then costs a fork. A child is told everything as JSON and
bytes, sees an environment without secrets, and is killed with all that it started. Codes of `BlueprintError`:

    ESP-424 over time       ESP-425 over memory       ESP-426 died
"""

import contextlib
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import NoReturn

from esper.contracts.assets import Certificate
from esper.contracts.assets import Scalar
from esper.contracts.assets import SiteContract
from esper.contracts.config import OptimizerConfig
from esper.errors import BlueprintError
from esper.errors import EsperError
from esper.errors import by_name
from esper.runtime.tezzeret.artifact import KernelFiles
from esper.runtime.tezzeret.blueprints.registry import get_blueprint
from esper.runtime.tezzeret.blueprints.registry import kernel_graph
from esper.runtime.tezzeret.blueprints.registry import resolve_hyperparameters
from esper.runtime.tezzeret.forge_jobs import SAMPLES
from esper.runtime.tezzeret.frames import Message
from esper.runtime.tezzeret.frames import receive_message
from esper.runtime.tezzeret.frames import send_message
from esper.runtime.tezzeret.initialisers import DEFAULT
from esper.runtime.tezzeret.ir import canonical_json
from esper.runtime.tezzeret.samples import SiteSamples
from esper.runtime.tezzeret.samples import pack_samples

START_SECONDS = 300.0
STATUS_SECONDS = 10.0

_PASSED_ON = re.compile(r"PATH|HOME|USER|LOGNAME|LANG|LC_.*|TZ|TMPDIR|VIRTUAL_ENV|CC|CXX|LD_LIBRARY_PATH|COVERAGE_.*")
_SECRET = re.compile(r"AWS_.*|.*(TOKEN|KEY|SECRET|PASSWORD|CREDENTIAL).*", re.IGNORECASE)


def scrubbed_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What a child may see of an environment: an allow-list, and nothing that looks like a secret."""
    return {k: v for k, v in environment.items() if _PASSED_ON.fullmatch(k) and not _SECRET.fullmatch(k)}


class ForkServer:
    """The parent's side of `forge_server`. All methods may be called from any thread.

    `jobs` is the module whose `JOBS` its children can do; `search_path` is put before the caller's `sys.path`.
    """

    def __init__(self, jobs: str = "esper.runtime.tezzeret.forge_jobs", search_path: Sequence[str] = ()) -> None:
        self._jobs = jobs
        self._search_path = tuple(search_path)
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._folder: str | None = None

    @property
    def pid(self) -> int | None:
        """The server's process id, None while there is none."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start the server and wait until it has everything loaded; nothing when it runs. Raises BlueprintError
        ESP-426 when it does not come up."""
        with self._lock:
            self._ensure()

    def stop(self) -> None:
        """End the server and the children it has; nothing when there is none."""
        with self._lock:
            self._close()

    def run(
        self, job: str, arguments: dict[str, Any], blobs: Sequence[bytes], *, timeout_s: float, memory_mb: int
    ) -> Message:
        """Run one job in a child of its own and return its answer.

        `timeout_s` is wall time from the fork on, `memory_mb` address space beyond what a bare child has. Raises what
        the job raised if it is one of Esper's errors; BlueprintError ESP-424, ESP-425, ESP-426 when the child went
        over time, over memory, or died.
        """
        channel, life = self._fork()
        deadline = time.monotonic() + timeout_s
        header = {
            "job": job,
            "arguments": arguments,
            "memory_mb": memory_mb,
            # One more than the wall time: processor time is the second line, for a caller that has died.
            "cpu_seconds": math.ceil(timeout_s) + 1,
        }
        with channel, life:
            try:
                send_message(channel, header, blobs, deadline=deadline)
                answer, results = receive_message(channel, deadline=deadline)
            except TimeoutError:
                self._await_end(life, kill=True)
                _refuse("ESP-424", f"{job}: over time, more than {timeout_s:g} s", "raise tezzeret.timeout_s")
            except (OSError, EOFError, ValueError):
                _died(job, self._await_end(life, kill=False), timeout_s)
            self._await_end(life, kill=True)
        return _result(job, answer, memory_mb), results

    def _fork(self) -> tuple[socket.socket, socket.socket]:
        """A child that waits for its job: the channel to it, and the life line of its guard."""
        with self._lock:
            begun = self._hand_over()
            if begun is None:
                # The server was killed before it forked: nothing has begun, the next server gets it.
                self._close()
                begun = self._hand_over()
        if begun is None:
            _refuse("ESP-426", "the server died twice before a child began", None)
        return begun

    def _hand_over(self) -> tuple[socket.socket, socket.socket] | None:
        control = self._ensure()
        channel, child_channel = socket.socketpair()
        life, child_life = socket.socketpair()
        with child_channel, child_life, contextlib.suppress(OSError):
            socket.send_fds(control, [b"j"], [child_channel.fileno(), child_life.fileno()])
        life.settimeout(STATUS_SECONDS)
        with contextlib.suppress(OSError):
            if life.recv(1):
                return channel, life
        channel.close()
        life.close()
        return None

    def _ensure(self) -> socket.socket:
        if self._control is not None and self._process is not None and self._process.poll() is None:
            return self._control
        self._close()
        try:
            self._folder = folder = tempfile.mkdtemp(prefix="esper-forkserver-")
        except OSError as error:
            reason = error.strerror or str(error)
            _refuse("ESP-426", f"no temporary folder can be made: {reason}", "set TMPDIR to a folder with room")
        control, theirs = socket.socketpair()
        environment = scrubbed_environment(os.environ) | {
            "PYTHONPATH": os.pathsep.join([*self._search_path, *(entry for entry in sys.path if entry)]),
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            # Compiled by this server's children, removed with it; the kernel's own files never hold code.
            "TORCHINDUCTOR_CACHE_DIR": folder,
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
        }
        module = "esper.runtime.tezzeret.forge_server"
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", module, str(theirs.fileno()), self._jobs, folder],
                env=environment,
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._control = control
        control.settimeout(START_SECONDS)
        try:
            ready = control.recv(1)
        except OSError:
            ready = b""
        if not ready:
            self._close()
            _refuse("ESP-426", "the forge's server did not start", "its own message is on stderr")
        control.settimeout(None)
        return control

    def _close(self) -> None:
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            # Its control socket is closed: it removes its folder and ends.
            try:
                self._process.wait(timeout=STATUS_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._folder is not None:
            # A killed server could not.
            shutil.rmtree(self._folder, ignore_errors=True)
        self._control = self._process = self._folder = None

    def _await_end(self, life: socket.socket, *, kill: bool) -> int | None:
        """The child's exit status once it, its group and its folder are gone; negative for a signal, None when the
        guard itself has gone."""
        try:
            if kill:
                life.shutdown(socket.SHUT_WR)
            header, _ = receive_message(life, deadline=time.monotonic() + STATUS_SECONDS)
        except (OSError, EOFError, ValueError):
            return None
        return int(header["status"])


_SERVER = ForkServer()


def start_forkserver() -> None:
    """Load the forge's server of this process now, before the first job needs it. Blocks for some seconds once."""
    _SERVER.start()


def stop_forkserver() -> None:
    """End it. It also ends by itself with this process."""
    _SERVER.stop()


def build_in_child(
    blueprint: str,
    site: SiteContract,
    hyperparameters: Mapping[str, Scalar],
    *,
    seed: int,
    samples: SiteSamples | None,
    max_parameters: int,
    timeout_s: float,
    memory_mb: int,
    max_flops: int | None = None,
    initialiser: str = DEFAULT,
    server: ForkServer | None = None,
) -> KernelFiles:
    """`build.build_kernel` in a child. Raises as it does, and BlueprintError ESP-424..426.

    The blueprint's function is called here, where it is registered, and the child gets the graph that it made: what a
    user wrote is known to this process only, and no child imports anything for it.
    """
    resolved = resolve_hyperparameters(blueprint, site, hyperparameters)
    graph = kernel_graph(blueprint, site, resolved, max_parameters=max_parameters, max_flops=max_flops)
    arguments = {
        "graph": graph.model_dump(mode="json"),
        "blueprint": blueprint,
        "blueprint_version": get_blueprint(blueprint).version,
        "site": site.model_dump(mode="json"),
        "hyperparameters": resolved,
        "seed": seed,
        "initialiser": initialiser,
        "max_parameters": max_parameters,
        "max_flops": max_flops,
    }
    chosen = server if server is not None else _SERVER
    _, blobs = chosen.run("build", arguments, _packed(samples), timeout_s=timeout_s, memory_mb=memory_mb)
    return KernelFiles(blobs[0], blobs[1])


def certify_in_child(
    files: KernelFiles,
    *,
    samples: SiteSamples | None,
    optimizer: OptimizerConfig | None,
    compile: bool,
    timeout_s: float,
    memory_mb: int,
    server: ForkServer | None = None,
) -> Certificate:
    """`certify.certify` in a child. Raises as it does, and BlueprintError ESP-424..426."""
    arguments = {
        "optimizer": None if optimizer is None else optimizer.model_dump(mode="json"),
        "compile": compile,
    }
    blobs = [files.manifest, files.weights, *_packed(samples)]
    chosen = server if server is not None else _SERVER
    answer, _ = chosen.run("certify", arguments, blobs, timeout_s=timeout_s, memory_mb=memory_mb)
    return Certificate.model_validate_json(canonical_json(answer["certificate"]))


def _packed(samples: SiteSamples | None) -> list[bytes]:
    return [] if samples is None else [pack_samples({SAMPLES: samples})]


def _result(job: str, answer: dict[str, Any], memory_mb: int) -> dict[str, Any]:
    if "ok" in answer:
        result: dict[str, Any] = answer["ok"]
        return result
    if "memory" in answer:
        _refuse(
            "ESP-425", f"{job}: over memory, more than {memory_mb} MB: {answer['memory']}", "raise tezzeret.memory_mb"
        )
    if "error" in answer:
        error = answer["error"]
        kind = by_name(error["kind"]) or EsperError
        raise kind(error["code"], error["message"], hint=error["hint"])
    _refuse("ESP-426", f"{job}: the child failed: {answer.get('crash', 'it gave no reason')}", None)


def _died(job: str, status: int | None, timeout_s: float) -> NoReturn:
    if status == -signal.SIGXCPU:
        _refuse("ESP-424", f"{job}: over time, more than {timeout_s:g} s of processor time", "raise tezzeret.timeout_s")
    if status is None:
        _refuse("ESP-426", f"{job}: the child was lost with its guard", None)
    if status >= 0:
        _refuse("ESP-426", f"{job}: the child died, exit status {status}, without an answer", None)
    hint = "the machine may be out of memory" if status == -signal.SIGKILL else None
    _refuse("ESP-426", f"{job}: the child died by signal {signal.Signals(-status).name}", hint)


def _refuse(code: str, message: str, hint: str | None) -> NoReturn:
    raise BlueprintError(code, f"forge: {message}", hint=hint)
