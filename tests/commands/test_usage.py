"""Help, usage errors, the error form, exit codes, and the ways out of a command line."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from esper.cli import app
from esper.cli import run
from esper.errors import RunConflict
from esper.errors import by_code

COMMANDS = [
    *("start-run", "watch", "list", "show", "seeds", "logs", "export", "report"),
    *("history", "replay", "reproduce", "what-if", "fork"),
    *("pause", "resume", "recover", "stop", "adapt", "veto", "pin", "cull"),
    *("gc", "up", "down", "worker", "doctor"),
    *("kernels", "blueprints", "config", "db"),
]
GROUPS = {
    "kernels": ["list", "show", "verify"],
    "blueprints": ["list", "show"],
    "config": ["init", "show", "validate", "schema"],
    "db": ["upgrade", "check", "rebuild"],
}
Cli = Callable[..., Any]


def test_help_lists_every_command_and_nothing_else(cli: Cli) -> None:
    result = cli("--help")
    assert result.code == 0
    listed = result.out.split("Commands:")[1].splitlines()
    assert [line.split()[0] for line in listed if line.startswith("  ") and line[2] != " "] == COMMANDS


@pytest.mark.parametrize("arguments", [*[[name] for name in COMMANDS], *[[g, c] for g in GROUPS for c in GROUPS[g]]])
def test_every_command_explains_itself(cli: Cli, arguments: list[str]) -> None:
    for flag in ("-h", "--help"):
        result = cli(*arguments, flag)
        assert result.code == 0
        assert result.out.startswith(f"Usage: esper-cli {' '.join(arguments)}")
        assert result.err == ""


def test_help_of_every_command_loads_nothing_heavy() -> None:
    names = [*[[name] for name in COMMANDS], *[[group, name] for group in GROUPS for name in GROUPS[group]]]
    code = (
        "import sys\nfrom esper.cli import run\n"
        f"codes = [run([*name, '--help']) for name in {names!r}]\n"
        "heavy = {'torch', 'temporalio', 'sqlalchemy', 'boto3', 'numpy', 'rich', 'ruamel', 'torch_geometric'}\n"
        "print('RESULT', set(codes), heavy & set(sys.modules), [n for n in sys.modules if n.startswith('esper.contr')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "RESULT {0} set() []"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["start-ru"], "Did you mean 'start-run'?"),
        (["start-run", "--quikstart", "digits"], "No such option: --quikstart"),
        (["show"], "Missing argument 'RUN'"),
        (["list", "--limit", "many"], "--limit"),
        (["list", "extra"], "unexpected extra argument"),
        (["start-run", "--config"], "--config"),
        (["kernels", "lst"], "Did you mean 'list'?"),
    ],
)
def test_usage_errors_are_one_line_and_exit_2(cli: Cli, arguments: list[str], message: str) -> None:
    result = cli(*arguments)
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith("error[ESP-200]: ")
    assert message in result.err
    assert result.err.count("\n") == 1
    assert "--help" in result.err
    as_json = (
        cli(*arguments[:-1], "--json", arguments[-1]) if arguments[-1] == "--config" else cli(*arguments, "--json")
    )
    assert (as_json.code, as_json.out) == (2, "")
    assert as_json.error["code"] == "ESP-200"
    assert message in as_json.error["message"]


@pytest.mark.parametrize("arguments", [[], ["kernels"], ["config"]])
def test_no_arguments_is_help(cli: Cli, arguments: list[str]) -> None:
    result = cli(*arguments)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("Usage: esper-cli")


def test_an_error_has_the_documented_json_form(cli: Cli) -> None:
    result = cli("show", "nothing", "--json")
    assert (result.code, result.out) == (6, "")
    assert set(result.error) == {"code", "message", "hint", "run_id"}
    assert (result.error["code"], result.error["run_id"]) == ("ESP-505", "nothing")


def test_an_unexpected_error_has_no_traceback_unless_debug(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(home: Path) -> None:
        raise ZeroDivisionError("on purpose")

    monkeypatch.setattr("esper.runtime.home.find_home", broken)
    monkeypatch.setattr("esper.commands.actions.connections.find_home", broken)
    result = cli("list")
    assert result.code == 1
    assert result.err.startswith("error[ESP-602]: unexpected ZeroDivisionError: on purpose")
    assert "Traceback" not in result.err
    assert "Traceback" in cli("list", "--debug").err


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [
        ("ESP-101", 2), ("ESP-200", 2), ("ESP-204", 2), ("ESP-207", 3), ("ESP-301", 3), ("ESP-310", 2), ("ESP-314", 2),
        ("ESP-315", 2), ("ESP-322", 3), ("ESP-333", 3), ("ESP-344", 2), ("ESP-401", 4), ("ESP-409", 4), ("ESP-416", 2),
        ("ESP-421", 2), ("ESP-430", 6), ("ESP-433", 2), ("ESP-501", 5), ("ESP-503", 5), ("ESP-505", 6), ("ESP-601", 1),
        ("nonsense", 1),
    ],
)  # fmt: skip
def test_a_code_alone_gives_its_exit_code(code: str, exit_code: int) -> None:
    assert by_code(code).exit_code == exit_code


def test_an_error_of_esper_ends_with_its_own_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise RunConflict("ESP-501", "exists")

    monkeypatch.setattr("esper.cli.app", refuse)
    assert run(["list"]) == 5
    assert app is not None


def test_an_interrupt_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("esper.cli.app", interrupted)
    assert run(["list"]) == 130


def call(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "esper", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **options)


def test_python_dash_m_is_the_same_command() -> None:
    done = call("show", "nothing")
    assert done.returncode == 6
    assert done.stderr.startswith("error[ESP-505]")


def test_a_closed_stdout_is_quiet() -> None:
    script = f"{sys.executable} -m esper config schema | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines() == ["{", "0"]
    assert done.stderr == ""
    gone = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m esper config schema >&-"], capture_output=True, text=True, timeout=60
    )
    assert "Traceback" not in gone.stderr


def test_an_encoding_that_cannot_hold_a_character_ends_nothing(tmp_path: Path) -> None:
    environment = {"PYTHONIOENCODING": "ascii", "PATH": "/usr/bin:/bin", "ESPER_HOME": str(tmp_path), "LC_ALL": "C"}
    done = call("show", "grün", env=environment)
    assert done.returncode == 6
    assert r"gr\xfcn" in done.stderr
    as_json = call("show", "grün", "--json", env=environment)
    assert r"gr\u00fcn" in as_json.stderr
