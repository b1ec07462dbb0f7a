"""The Temporal dev server: where its program comes from, and the command that starts it.

Looked for in this order: `ESPER_TEMPORAL_CLI`; PATH (server 1.30 or newer); the user's cache folder, shared
by all homes; the SDK's download; a build from source with Go, pinned by the packaged `go.mod` and `go.sum`.
"""

import contextlib
import fcntl
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import as_file
from importlib.resources import files
from pathlib import Path

import platformdirs

from esper.errors import TemporalUnavailable

CLI_VERSION = "1.8.2"
"""The version that is downloaded or built."""
LEAST_SERVER = (1, 30)
LEAST_GO = (1, 26, 4)
RETENTION_DAYS = 90
USUAL_PORT = 7233
USUAL_UI_PORT = 8233
SEARCH_ATTRIBUTES = {
    "EsperExperiment": "Keyword",
    "EsperPhase": "Keyword",
    "EsperModel": "Keyword",
    "EsperParent": "Keyword",
    "EsperEpoch": "Int",
    "EsperKernels": "Int",
    "EsperBestMetric": "Double",
}

DOWNLOAD_SECONDS = 120.0
_BUILD_SECONDS = 3600.0
_PACKAGES_IN_BUILD = 1900
_VERSION = re.compile(r"temporal version (?P<cli>\S+) \(Server (?P<server>\d+\.\d+[^\s,)]*)")

Progress = Callable[[str], None]


@dataclass(frozen=True)
class ServerProgram:
    """A `temporal` program that was run and said who it is. `origin` says where it was found."""

    path: Path
    cli_version: str
    server_version: str
    origin: str


def find_server(environment: Mapping[str, str], *, cache: Path | None = None) -> ServerProgram | list[str]:
    """A program that is already on this machine, or why each of the three places has none. Nothing is fetched.

    Raises:
        TemporalUnavailable: ESP-306 when `ESPER_TEMPORAL_CLI` names something that is no such program: what a
            person chose is not passed over in silence.
    """
    reasons = []
    chosen = environment.get("ESPER_TEMPORAL_CLI", "")
    if chosen:
        found = _inspect(Path(chosen).expanduser(), "ESPER_TEMPORAL_CLI")
        if isinstance(found, str):
            raise TemporalUnavailable(
                "ESP-306", f"ESPER_TEMPORAL_CLI: {found}", hint="Give the path of a temporal program, or unset it"
            )
        return found
    reasons.append("ESPER_TEMPORAL_CLI: not set")
    on_path = shutil.which("temporal", path=environment.get("PATH", ""))
    found = _inspect(Path(on_path), "PATH") if on_path else "no temporal program"
    if isinstance(found, ServerProgram):
        return found
    reasons.append(f"PATH: {found}")
    cached = cache_folder(cache) / "temporal"
    found = _inspect(cached, "cache") if cached.exists() else f"no {cached}"
    if isinstance(found, ServerProgram):
        return found
    return [*reasons, f"cache: {found}"]


def obtain_server(environment: Mapping[str, str], progress: Progress, *, cache: Path | None = None) -> ServerProgram:
    """A program from the first of the five places that has one; what is fetched or built is kept in the cache.

    Args:
        environment: normally `os.environ`.
        progress: called with a line of text whenever there is something to tell.
        cache: instead of the user's cache folder.

    Raises:
        TemporalUnavailable: ESP-306, listing why each place failed.
    """
    found = find_server(environment, cache=cache)
    if isinstance(found, ServerProgram):
        return found
    folder = cache_folder(cache)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _nowhere([*found, f"cache: {folder} cannot be made: {error.strerror}"]) from None
    with _alone(folder / "lock", progress):
        # Another process may have had the lock to do the very same.
        again = find_server(environment, cache=cache)
        if isinstance(again, ServerProgram):
            return again
        reasons = list(again)
        for title, obtain in (("the SDK's download", _download), ("build from source", _build)):
            with tempfile.TemporaryDirectory(dir=folder, prefix="new-") as scratch:
                made = obtain(Path(scratch), environment, progress)
                if isinstance(made, str):
                    reasons.append(f"{title}: {made}")
                    continue
                made.chmod(0o755)
                checked = _inspect(made, title)
                if isinstance(checked, str):
                    reasons.append(f"{title}: {checked}")
                    continue
                made.replace(folder / "temporal")
                return ServerProgram(folder / "temporal", checked.cli_version, checked.server_version, title)
    raise _nowhere(reasons)


def cache_folder(cache: Path | None = None) -> Path:
    """Where downloaded and built programs are kept, by version, for all homes of this user."""
    return (cache or Path(platformdirs.user_cache_dir("esper", appauthor=False))) / f"temporal-{CLI_VERSION}"


def server_command(program: Path, *, port: int, ui_port: int, database: Path) -> list[str]:
    """The command line of the dev server: loopback only, its database kept safe and fast under load."""
    command = [str(program), "server", "start-dev", "--ip", "127.0.0.1", "--ui-ip", "127.0.0.1"]
    command += ["--port", str(port), "--ui-port", str(ui_port), "--db-filename", str(database)]
    # Measured under disk load: 2.46 times the undisturbed time without these two, 1.08 times with them.
    command += ["--sqlite-pragma", "journal_mode=WAL", "--sqlite-pragma", "synchronous=NORMAL"]
    command += ["--ui-disable-news-fetch", "--log-level", "warn"]
    command += ["--dynamic-config-value", "frontend.enableServerVersionCheck=false"]
    # The dev server looks for what to hand on 20 times a second: every step of a run waited for that grid of 50 ms.
    # Measured from scheduled to started: 42 ms as it comes, 3 ms with these two.
    command += ["--dynamic-config-value", "history.transferProcessorMaxPollRPS=1000"]
    command += ["--dynamic-config-value", "history.timerProcessorMaxPollRPS=1000"]
    for name, kind in SEARCH_ATTRIBUTES.items():
        command += ["--search-attribute", f"{name}={kind}"]
    return command


def free_port(preferred: int, taken: frozenset[int] = frozenset()) -> int:
    """`preferred` if nothing listens there on the loopback interface, else a port that the system gives."""
    for port in (preferred, 0):
        if port in taken:
            continue
        with socket.socket() as probe:
            # As the server itself binds: a connection that lingers after a stop is no reason to move.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return int(probe.getsockname()[1])
    raise TemporalUnavailable("ESP-306", "no free port on 127.0.0.1", hint="Stop what holds them, or look at ulimit -n")


def _inspect(path: Path, origin: str) -> ServerProgram | str:
    if not path.is_file() or not os.access(path, os.X_OK):
        return f"{path} is not a program"
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{path} --version failed: {error}"
    match = _VERSION.search(said.stdout)
    if match is None:
        return f"{path} --version does not speak like the temporal CLI: {said.stdout.strip()[:80]!r}"
    version = tuple(int(part) for part in match["server"].split(".")[:2])
    if version < LEAST_SERVER:
        return f"{path} has server {match['server']}, needed is {'.'.join(map(str, LEAST_SERVER))} or newer"
    return ServerProgram(path, match["cli"], match["server"], origin)


def _download(scratch: Path, environment: Mapping[str, str], progress: Progress) -> Path | str:
    progress(f"fetching the Temporal server {CLI_VERSION} (once for this user)")
    command = [sys.executable, "-m", "esper.runtime.temporal.download", str(scratch), f"v{CLI_VERSION}"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS, check=False, env=dict(environment)
        )
    except subprocess.TimeoutExpired:
        return f"not done after {DOWNLOAD_SECONDS:.0f} s"
    # The file counts, not the exit code: the child may be aborted at its end when all is done.
    program = next((path for path in scratch.glob("temporal-*") if os.access(path, os.X_OK)), None)
    if program is not None:
        return program
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:300]


def _build(scratch: Path, environment: Mapping[str, str], progress: Progress) -> Path | str:
    go = shutil.which("go", path=f"{environment.get('PATH', '')}{os.pathsep}/usr/local/go/bin")
    if go is None:
        return "no Go on PATH"
    build_environment = {**environment, "CGO_ENABLED": "0", "GOFLAGS": "-mod=readonly", "GOTOOLCHAIN": "local"}
    asked = subprocess.run(
        [go, "env", "GOVERSION"], capture_output=True, text=True, timeout=30, check=False, env=build_environment
    )
    numbers = re.match(r"go(\d+)\.(\d+)(?:\.(\d+))?", asked.stdout.strip())
    if numbers is None or tuple(int(number or 0) for number in numbers.groups()) < LEAST_GO:
        least = ".".join(map(str, LEAST_GO))
        return f"{go} is {asked.stdout.strip() or 'not working'}, needed is {least} or newer"
    source = scratch / "source"
    with as_file(files("esper.runtime.temporal") / "server_source") as packaged:
        shutil.copytree(packaged, source)
    target = scratch / "temporal"
    flags = f"-s -w -X github.com/temporalio/cli/internal/temporalcli.Version={CLI_VERSION}"
    command = [
        go,
        "build",
        "-v",
        "-trimpath",
        "-ldflags",
        flags,
        "-o",
        str(target),
        "github.com/temporalio/cli/cmd/temporal",
    ]
    progress(f"building the Temporal server {CLI_VERSION} from source (once for this user, some minutes)")
    lines = _follow(command, source, build_environment, progress)
    if target.is_file():
        return target
    return "; ".join(line.strip() for line in lines[-3:])[:300] or "go build failed"


def _follow(command: list[str], folder: Path, environment: Mapping[str, str], progress: Progress) -> list[str]:
    """Run the build and tell how far it is, every few seconds; returns the lines it wrote."""
    lines: list[str] = []
    began = told = time.monotonic()
    with subprocess.Popen(
        command, cwd=folder, env=dict(environment), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            now = time.monotonic()
            if now - told >= 5:
                told = now
                progress(f"building Temporal: {len(lines)} of some {_PACKAGES_IN_BUILD} packages, {now - began:.0f} s")
            if now - began > _BUILD_SECONDS:
                process.kill()
    return lines


@contextlib.contextmanager
def _alone(path: Path, progress: Progress) -> Iterator[None]:
    with path.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("another process is obtaining the Temporal server; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _nowhere(reasons: list[str]) -> TemporalUnavailable:
    listed = "".join(f"\n  {number}. {reason}" for number, reason in enumerate(reasons, 1))
    return TemporalUnavailable(
        "ESP-306",
        f"no Temporal server for this machine; tried:{listed}\n",
        hint="Install the temporal CLI (server 1.30 or newer) or Go 1.26.4 or newer, or set TEMPORAL_ADDRESS",
    )
