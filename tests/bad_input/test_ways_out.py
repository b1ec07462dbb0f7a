"""Interrupts, closed and full streams, and a folder that is gone: rows 35 and 37, in processes of their own."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Say = Callable[..., Any]
ESPER = f"{sys.executable} -m esper"


def shell(script: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120, check=False, **options)


def test_row_35_an_interrupt_while_the_command_line_loads_is_quiet() -> None:
    code = (
        "import sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'esper.commands': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "from esper.__main__ import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_row_35_an_interrupt_while_the_stack_starts_says_what_goes_on(
    say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("esper.runtime.stack.up", interrupted)
    answer = say("start-run", "--quick-start", "digits")
    assert (answer.code, answer.out) == (130, "")
    assert "No run has begun" in answer.err
    assert "esper-cli down" in answer.err


def test_row_35_a_full_disk_behind_stdout_is_no_fault_of_esper() -> None:
    done = shell(f"{ESPER} config schema > /dev/full")
    assert done.returncode == 2
    assert done.stderr == "error[ESP-208]: stdout cannot be written: No space left on device\n"


@pytest.mark.parametrize("columns", ["1", "40"])
def test_row_35_any_terminal_and_a_plain_locale_get_the_same_words(tmp_path: Path, columns: str) -> None:
    plain = {"COLUMNS": columns, "LANG": "C", "LC_ALL": "C", "NO_COLOR": "1", "PATH": "/usr/bin:/bin"}
    done = shell(f"{ESPER} list", env=plain | {"ESPER_HOME": str(tmp_path / "home"), "TERM": "dumb"})
    assert done.returncode == 0
    assert done.stderr == "No runs yet: `esper-cli start-run --quick-start digits` starts one.\n"


@pytest.mark.parametrize("command", ["start-run --quick-start digits", "doctor"])
def test_row_37_a_current_folder_that_is_gone(tmp_path: Path, command: str) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    done = shell(f"rmdir {gone}; {ESPER} {command}", cwd=gone)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error[ESP-208]: the current folder is gone")


def test_a_refusal_waits_for_neither_torch_nor_a_graph_library() -> None:
    code = (
        "import sys\nfrom esper.cli import run\n"
        "code = run(['start-run', '--quick-start', 'digits', '--run-id', 'a b'])\n"
        "print(code, {'torch', 'torch_geometric', 'boto3', 'sklearn'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines()[-1] == "2 set()"
