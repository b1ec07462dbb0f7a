"""Failpoints do nothing unless asked, act at the hit that was asked for and once, and stand where they are said to."""

import ast
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import esper
from esper.errors import ConfigurationError
from esper.errors import IntegrityError
from esper.runtime import failpoints
from esper.runtime.failpoints import Crashed
from esper.runtime.failpoints import hit
from esper.runtime.processes import identify
from esper.runtime.urza.objects import FolderStore
from esper.runtime.urza.objects import reference

SOURCE = Path(next(iter(esper.__path__)))

PROGRAM = """
import os, sys
from pathlib import Path
from esper.runtime.failpoints import arm_process, hit
from esper.runtime.urza.objects import FolderStore
arm_process(os.environ)
for _ in range(3):
    hit("commit.after_head")
    hit("fact.executed", "graft")
FolderStore(Path(sys.argv[1])).put(b"bytes")
print("ended")
"""


def child(folder: Path, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def hits_in_source() -> list[tuple[str, str]]:
    """(file, name) of every call of `hit`; a name that is not a literal is named by its code."""
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "hit":
                name = node.args[0]
                found.append((path.name, name.value if isinstance(name, ast.Constant) else ast.unparse(name)))
    return found


def test_every_failpoint_is_registered_and_every_registered_one_stands_in_the_code() -> None:
    assert {name for _, name in hits_in_source()} == set(failpoints.FAILPOINTS)


def test_no_two_places_have_one_name() -> None:
    names = [name for _, name in hits_in_source()]
    assert sorted(set(names)) == sorted(names)


def test_an_unarmed_process_passes() -> None:
    hit("commit.after_head")
    hit("not even registered")


def test_an_unregistered_failpoint_is_a_mistake_once_armed() -> None:
    with failpoints.armed(), pytest.raises(ValueError, match="registered"):
        hit("commit.somewhere")
    with pytest.raises(ConfigurationError), failpoints.armed("commit.somewhere", "raise", 1):
        pass


def test_hits_are_counted_by_name_by_detail_and_all_together() -> None:
    with failpoints.armed() as seen:
        hit("fact.executed", "graft")
        hit("fact.executed", "cull")
        hit("commit.after_head")
    assert seen.hits == {
        "*": 3,
        "fact.executed": 2,
        "fact.executed:graft": 1,
        "fact.executed:cull": 1,
        "commit.after_head": 1,
    }


@pytest.mark.parametrize(("name", "nth", "at"), [("*", 3, 3), ("fact.executed", 2, 4), ("fact.executed:cull", 1, 4)])
def test_the_nth_hit_raises_and_so_does_every_later_one_on_any_thread(name: str, nth: int, at: int) -> None:
    hits = [("commit.after_head", ""), ("fact.executed", "graft"), ("commit.after_head", ""), ("fact.executed", "cull")]
    raised: list[BaseException] = []

    def later() -> None:
        try:
            hit("commit.before_head")
        except Crashed as error:
            raised.append(error)

    with failpoints.armed(name, "raise", nth) as trap:
        for place, detail in hits[: at - 1]:
            hit(place, detail)
        with pytest.raises(Crashed):
            hit(*hits[at - 1])
        thread = threading.Thread(target=later)
        thread.start()
        thread.join()
        assert trap.fired in (hits[at - 1][0], ":".join(hits[at - 1]))
    assert len(raised) == 1
    hit("commit.before_head")


@pytest.mark.parametrize(
    "text",
    ["commit.after_head", "commit.after_head=kill", "commit.after_head=die@1", "commit.after_head=kill@0", "x=kill@1"],
)
def test_an_entry_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        failpoints.arm_process({"ESPER_FAILPOINTS": text})
    assert caught.value.code == "ESP-214"
    hit("commit.after_head")


def test_a_process_is_killed_once_and_its_successor_is_not(tmp_path: Path) -> None:
    entry, spent = "fact.executed:graft=kill@2", tmp_path / "spent"
    first = child(tmp_path, ESPER_FAILPOINTS=entry, ESPER_FAILPOINTS_SPENT=str(spent))
    out, _ = first.communicate(timeout=60)
    assert (first.returncode, out) == (-signal.SIGKILL, "")
    assert (spent / entry).read_text() == str(first.pid)
    second = child(tmp_path, ESPER_FAILPOINTS=entry, ESPER_FAILPOINTS_SPENT=str(spent))
    out, err = second.communicate(timeout=60)
    assert (second.returncode, out) == (0, "ended\n"), err


def test_a_process_is_stopped_where_it_stands(tmp_path: Path) -> None:
    stopped = child(tmp_path, ESPER_FAILPOINTS="commit.after_head=stop@3")
    assert os.WIFSTOPPED(os.waitpid(stopped.pid, os.WUNTRACED)[1])
    assert identify(stopped.pid) is not None and not (tmp_path / "sha256").exists()
    os.kill(stopped.pid, signal.SIGCONT)
    assert stopped.communicate(timeout=60)[0] == "ended\n"


@pytest.mark.fault("A2", "I7")
def test_bytes_whose_writer_was_killed_have_no_name_and_are_written_again(tmp_path: Path) -> None:
    killed = child(tmp_path, ESPER_FAILPOINTS="file.before_rename=kill@1")
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    left = [path.name for path in (tmp_path / "sha256").iterdir()]
    assert len(left) == 1 and left[0].endswith(".partial")
    store, ref = FolderStore(tmp_path), reference(b"bytes")
    assert list(store.objects()) == [] and not store.exists(ref)
    with pytest.raises(IntegrityError):
        store.get(ref)
    assert store.get(store.put(b"bytes")) == b"bytes"
    assert store.delete_unfinished(3600) == 0
    assert store.delete_unfinished(0) == 1 and store.exists(ref)
