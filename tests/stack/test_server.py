import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from esper.errors import TemporalUnavailable
from esper.runtime.temporal.server import CLI_VERSION
from esper.runtime.temporal.server import ServerProgram
from esper.runtime.temporal.server import cache_folder
from esper.runtime.temporal.server import find_server
from esper.runtime.temporal.server import free_port
from esper.runtime.temporal.server import obtain_server
from esper.runtime.temporal.server import server_command

UNREACHABLE = {"HTTPS_PROXY": "http://127.0.0.1:1", "https_proxy": "http://127.0.0.1:1"}
"""Makes the SDK's download fail at once, wherever the tests run."""


def program(path: Path, output: str, code: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{output}'\nexit {code}\n")
    path.chmod(0o755)
    return path


def temporal(path: Path, server: str = "1.31.2") -> Path:
    return program(path, f"temporal version 1.8.2 (Server {server}, UI 2.50.1)")


def go(path: Path, version: str, *, builds: bool = True) -> Path:
    """A Go that says its version and, asked to build, writes a `temporal` and where it was asked."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made = 'printf \'#!/bin/sh\\necho "temporal version 1.8.2 (Server 1.31.2, UI 2.50.1)"\\n\' > "$target"'
    path.write_text(
        f"""#!/bin/sh
if [ "$1" = env ]; then echo {version}; exit 0; fi
echo "$@" >> "{path}.calls"; env | grep -E '^(CGO_ENABLED|GOFLAGS|GOTOOLCHAIN)=' >> "{path}.calls"; ls >> "{path}.calls"
while [ $# -gt 0 ]; do if [ "$1" = -o ]; then target=$2; fi; shift; done
echo some/package >&2
{made if builds else "echo 'no space left on device' >&2; exit 1"}
"""
    )
    path.chmod(0o755)
    return path


def environment(tmp_path: Path, **more: str) -> dict[str, str]:
    return {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "HOME": str(tmp_path), **UNREACHABLE, **more}


def found(tmp_path: Path, **more: str) -> ServerProgram:
    result = find_server(environment(tmp_path, **more), cache=tmp_path / "cache")
    assert isinstance(result, ServerProgram)
    return result


def test_the_variable_beats_path_beats_cache(tmp_path: Path) -> None:
    cached = temporal(cache_folder(tmp_path / "cache") / "temporal")
    assert found(tmp_path).path == cached
    on_path = temporal(tmp_path / "bin" / "temporal")
    assert found(tmp_path).path == on_path
    chosen = temporal(tmp_path / "chosen")
    assert found(tmp_path, ESPER_TEMPORAL_CLI=str(chosen)) == ServerProgram(
        chosen, "1.8.2", "1.31.2", "ESPER_TEMPORAL_CLI"
    )


def test_a_chosen_program_that_is_none_is_not_passed_over(tmp_path: Path) -> None:
    temporal(tmp_path / "bin" / "temporal")
    old = temporal(tmp_path / "old", server="1.29.9")
    silent = program(tmp_path / "silent", "something else")
    for chosen, why in (
        (tmp_path / "missing", "not a program"),
        (old, "1.29.9"),
        (silent, "something else"),
        (tmp_path, "not a"),
    ):
        with pytest.raises(TemporalUnavailable) as caught:
            find_server(environment(tmp_path, ESPER_TEMPORAL_CLI=str(chosen)), cache=tmp_path / "cache")
        assert caught.value.code == "ESP-306"
        assert "ESPER_TEMPORAL_CLI" in caught.value.message
        assert why in caught.value.message


@pytest.mark.parametrize(
    ("server", "enough"), [("1.29.9", False), ("1.30.0", True), ("1.31.2", True), ("2.0.0", True), ("0.99.0", False)]
)
def test_path_counts_from_server_1_30(tmp_path: Path, server: str, enough: bool) -> None:
    temporal(tmp_path / "bin" / "temporal", server=server)
    result = find_server(environment(tmp_path), cache=tmp_path / "cache")
    assert isinstance(result, ServerProgram) is enough
    if not isinstance(result, ServerProgram):
        assert any(server in reason for reason in result)


def test_without_anything_one_error_lists_all_five(tmp_path: Path) -> None:
    program(tmp_path / "bin" / "go", "go1.20.1")
    with pytest.raises(TemporalUnavailable) as caught:
        obtain_server(environment(tmp_path), lambda line: None, cache=tmp_path / "cache")
    assert caught.value.code == "ESP-306"
    lines = caught.value.message.splitlines()[1:]
    for number, (line, said) in enumerate(
        zip(lines, ["ESPER_TEMPORAL_CLI", "PATH", "cache", "the SDK's download", "build from source"], strict=True), 1
    ):
        assert line.startswith(f"  {number}. {said}: ")
    assert "1.20.1" in lines[4]
    assert list(cache_folder(tmp_path / "cache").glob("new-*")) == []


def test_a_build_from_source_is_pinned_and_kept_for_all_homes(tmp_path: Path) -> None:
    compiler = go(tmp_path / "bin" / "go", "go1.26.4")
    told: list[str] = []
    made = obtain_server(environment(tmp_path), told.append, cache=tmp_path / "cache")
    assert made.path == cache_folder(tmp_path / "cache") / "temporal"
    assert (made.cli_version, made.server_version, made.origin) == ("1.8.2", "1.31.2", "build from source")
    assert os.access(made.path, os.X_OK)
    assert any("from source" in line for line in told)
    calls = Path(f"{compiler}.calls").read_text()
    for said in ("-trimpath", f"Version={CLI_VERSION}", "CGO_ENABLED=0", "GOFLAGS=-mod=readonly", "GOTOOLCHAIN=local"):
        assert said in calls
    assert {"go.mod", "go.sum"} <= set(calls.split())
    again = obtain_server(environment(tmp_path), told.append, cache=tmp_path / "cache")
    assert again.origin == "cache"
    assert Path(f"{compiler}.calls").read_text() == calls


def test_a_failed_build_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    go(tmp_path / "bin" / "go", "go1.26.4", builds=False)
    with pytest.raises(TemporalUnavailable, match="no space left on device"):
        obtain_server(environment(tmp_path), lambda line: None, cache=tmp_path / "cache")
    assert [path.name for path in cache_folder(tmp_path / "cache").iterdir()] == ["lock"]


def test_two_processes_build_once(tmp_path: Path) -> None:
    compiler = go(tmp_path / "bin" / "go", "go1.27.0")
    with ThreadPoolExecutor(2) as pool:
        made = list(
            pool.map(
                lambda _: obtain_server(environment(tmp_path), lambda line: None, cache=tmp_path / "cache"), range(2)
            )
        )
    assert made[0].path == made[1].path
    assert Path(f"{compiler}.calls").read_text().count("build -v") == 1


def test_a_cache_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    with pytest.raises(TemporalUnavailable, match="cannot be made"):
        obtain_server(environment(tmp_path), lambda line: None, cache=tmp_path / "cache")


def test_the_download_child_fails_alone(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "esper.runtime.temporal.download", str(tmp_path), f"v{CLI_VERSION}"],
        env={**os.environ, **UNREACHABLE},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 1
    assert "download" in done.stderr


def test_a_program_of_the_download_is_used_whatever_the_exit_code(
    tmp_path: Path, server_program: ServerProgram
) -> None:
    # A file that is there already is taken by the SDK without any request: a real start and stop, no network.
    (tmp_path / f"temporal-v{CLI_VERSION}").symlink_to(server_program.path)
    done = subprocess.run(
        [sys.executable, "-m", "esper.runtime.temporal.download", str(tmp_path), f"v{CLI_VERSION}"],
        env={**os.environ, **UNREACHABLE},
        timeout=100,
        check=False,
    )
    assert done.returncode == 0


def test_a_usual_port_is_left_when_it_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        other = free_port(port)
        assert other != port
    assert free_port(port) == port
    assert free_port(port, frozenset({port})) != port


def test_the_server_command_is_loopback_and_safe(tmp_path: Path) -> None:
    command = server_command(Path("temporal"), port=1, ui_port=2, database=tmp_path / "t.db")
    text = " ".join(command)
    assert "--ip 127.0.0.1" in text
    assert "--sqlite-pragma journal_mode=WAL --sqlite-pragma synchronous=NORMAL" in text
    assert "--search-attribute EsperBestMetric=Double" in text
    assert "headless" not in text
