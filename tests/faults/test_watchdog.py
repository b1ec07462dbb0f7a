"""A process whose work is silent ends itself, whoever holds the GIL; and no order of events rests on a wall clock."""

import ast
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import esper
from esper.runtime.watchdog import Watchdog

PROGRAM = """
import ctypes
import sys
import threading
import time

from esper.runtime.watchdog import Watchdog

watchdog = Watchdog(1.0)


def lively():
    with watchdog.watching() as alive:
        while True:
            alive()
            time.sleep(0.05)


threading.Thread(target=lively, daemon=True).start()
with watchdog.watching() as alive:
    for _ in range(3):
        time.sleep(0.1)
        alive()
    {hang}
sys.exit(7)
"""


def run(hang: str) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.format(hang=hang)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.fault("A5")
@pytest.mark.parametrize(
    "hang",
    ["ctypes.PyDLL(None).sleep(600)", "[None for _ in iter(int, 1)]", "threading.Event().wait()"],
    ids=["the GIL is held", "endless loop", "deadlock"],
)
def test_a_hang_ends_the_process_with_its_stacks_also_beside_work_that_lives(hang: str) -> None:
    ended = run(hang)
    assert ended.returncode == 1, ended.stderr
    assert "Timeout (0:00:0" in ended.stderr and "line " in ended.stderr


@pytest.mark.fault("A5")
def test_work_that_has_ended_is_watched_no_more() -> None:
    ended = run("pass\n[time.sleep(0.5) for _ in range(3)]")
    assert ended.returncode == 7, ended.stderr


def test_the_quietest_piece_of_work_counts() -> None:
    watchdog = Watchdog(3600.0)
    assert watchdog.silence() == 0.0
    with watchdog.watching() as alive:
        time.sleep(0.02)
        with watchdog.watching():
            assert watchdog.silence() >= 0.02
        silent = watchdog.silence()
        alive()
        assert watchdog.silence() < silent
    assert watchdog.silence() == 0.0


WALL_CLOCKS = frozenset(
    {"time.time", "time.time_ns", "time.localtime", "datetime.now", "datetime.utcnow", "datetime.today", "date.today"}
    | {"func.now", "func.current_timestamp"}
)

MAY_READ_A_WALL_CLOCK = {
    "runtime/urza/objects.py": "how old a file is, for the grace of the garbage collection",
    "runtime/urza/s3.py": "how old an object is, by the store's own clock where it says it",
    "activities/urza.py": "when a run was created, for people",
    "commands/actions/launch.py": "the name of a run, and when it was created",
    "runtime/logs.py": "the time of a log line",
}
"""Never an order of events, a lease, or what training computes."""


def wall_clocks(code: str) -> Iterator[int]:
    """The lines of `code` that name a wall clock."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else node.value.attr
            if f"{owner}.{node.attr}" in WALL_CLOCKS:
                yield node.lineno
        elif isinstance(node, ast.ImportFrom) and any(f"{node.module}.{a.name}" in WALL_CLOCKS for a in node.names):
            yield node.lineno


@pytest.mark.fault("C9")
def test_no_order_and_no_lease_rests_on_a_wall_clock() -> None:
    root = Path(esper.__file__).parent
    found = {
        f"{path.relative_to(root)}:{line}"
        for path in sorted(root.rglob("*.py"))
        if str(path.relative_to(root)) not in MAY_READ_A_WALL_CLOCK
        for line in wall_clocks(path.read_text())
    }
    assert found == set()


@pytest.mark.fault("C9")
@pytest.mark.parametrize(
    "code",
    ["import time\nx = time.time()", "x = datetime.datetime.now()", "x = datetime.now(UTC)", "from time import time"],
)
def test_a_wall_clock_is_found(code: str) -> None:
    assert list(wall_clocks(code))
