import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from esper.runtime import processes
from esper.runtime.children import FIRST_DELAY_S
from esper.runtime.children import LONGEST_DELAY_S
from esper.runtime.children import BackOff
from esper.runtime.children import last_words
from esper.runtime.children import start_child
from esper.runtime.processes import Identity
from esper.runtime.processes import command_line
from esper.runtime.processes import identify
from esper.runtime.processes import is_ours
from esper.runtime.processes import kill_group
from esper.runtime.processes import stop
from esper.runtime.processes import wait_gone
from esper.runtime.stack_state import read_stack
from esper.runtime.worker_files import WorkerReport
from esper.runtime.worker_files import forget
from esper.runtime.worker_files import read_all
from esper.runtime.worker_files import report

SLEEPER = [sys.executable, "-c", "import time; time.sleep(600)"]


def test_we_are_who_we_are() -> None:
    own = Path(sys.executable).name
    me = identify(os.getpid())
    assert me is not None
    assert me == identify(os.getpid())
    assert own in command_line(os.getpid())
    assert is_ours(me, own)
    assert not is_ours(me, "no such word in it")
    assert not is_ours(Identity(me.pid, "another start"), own)


@pytest.mark.parametrize("pid", [0, -1, 2**22 + 1])
def test_nobody_is_nobody(pid: int) -> None:
    assert identify(pid) is None


def test_an_ended_process_is_gone_before_it_is_reaped() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        identity = Identity(process.pid, "x")
        while identify(process.pid) is not None:
            time.sleep(0.01)
        assert wait_gone([identity], 0) == []
        assert command_line(process.pid) == ""


def test_stopping_ends_what_ignores_sigterm_and_its_children() -> None:
    code = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        identity = identify(process.pid)
        assert identity is not None
        stop([identity], 0.3)
        assert process.wait() == -signal.SIGKILL
        deadline = time.monotonic() + 30
        while identify(child) is not None:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_our_own_group_is_never_killed() -> None:
    kill_group(os.getpgrp())
    kill_group(0)
    kill_group(1)
    kill_group(2**22 + 1)


def test_a_child_is_apart_and_its_words_are_kept(tmp_path: Path) -> None:
    output = tmp_path / "logs" / "child.out"
    code = (
        "import os, sys; print('group', os.getpgid(0) == os.getpid()); sys.stderr.write(os.environ['WHO']); os._exit(7)"
    )
    child = None
    while child is None:
        # It may be gone before it can be looked at.
        child = start_child(
            ["one", "two"], [sys.executable, "-uc", code], environment={"WHO": "me"}, folder=tmp_path, output=output
        )
    assert child.name == "one+two"
    while child.ended() is None:
        time.sleep(0.01)
    assert child.ended() == 7
    assert output.read_text().endswith("group True\nme")
    assert last_words(output) == "me"
    assert last_words(tmp_path / "missing") == ""


def test_back_off_grows_to_a_bound_and_forgets() -> None:
    back_off = BackOff()
    assert back_off.due()
    delays = [back_off.failed() for _ in range(10)]
    assert delays[0] == FIRST_DELAY_S
    assert delays == sorted(delays)
    assert delays[-1] == LONGEST_DELAY_S
    assert not back_off.due()
    back_off.succeeded()
    assert back_off.due()
    assert back_off.failures == 0


def test_a_worker_says_where_it_stands(tmp_path: Path) -> None:
    report(tmp_path, "starting", roles=["trainer"])
    report(tmp_path, "claimed", roles=["trainer"], run_id="run-1", task_queue="q")
    assert read_all(tmp_path) == {os.getpid(): WorkerReport(os.getpid(), ("trainer",), "claimed", "run-1", "q")}
    forget(tmp_path, os.getpid())
    forget(tmp_path, os.getpid())
    assert read_all(tmp_path) == {}


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"pid": 1, "roles": [], "state": "dancing"}', '{"state": "idle"}']
)
def test_what_no_worker_wrote_is_left_out(tmp_path: Path, text: str) -> None:
    (tmp_path / "workers").mkdir()
    (tmp_path / "workers" / "1.json").write_text(text)
    assert read_all(tmp_path) == {}


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"temporal": 3}', json.dumps({"temporal": {}, "supervisor": {}})]
)
def test_what_no_supervisor_wrote_is_no_stack(tmp_path: Path, text: str) -> None:
    (tmp_path / "stack.json").write_text(text)
    assert read_stack(tmp_path) is None


def test_without_proc_the_same_is_known_from_ps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Other systems have no /proc: their branch, on this system's own `ps`."""
    if not Path("/bin/ps").exists():
        pytest.skip("no ps on this machine")
    real = processes.Path

    def without_proc(path: str) -> Path:
        return tmp_path / "missing" if str(path).startswith("/proc") else real(path)

    own = Path(sys.executable).name
    monkeypatch.setattr(processes, "Path", without_proc)
    me = identify(os.getpid())
    assert me is not None
    assert me == identify(os.getpid())
    assert own in command_line(os.getpid())
    assert identify(2**22 + 1) is None
