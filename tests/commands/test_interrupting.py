"""Ctrl-C ends a command also when what it waits for does not let go."""

import subprocess
import sys
import time

import pytest

from esper.commands.actions.interrupting import GRACE_S
from esper.commands.actions.interrupting import run_interruptibly

STUCK = """
import asyncio, os, signal
from esper.commands.actions.interrupting import run_interruptibly

async def stuck():
    os.kill(os.getpid(), signal.SIGINT)
    while True:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            pass

try:
    run_interruptibly(stuck())
except KeyboardInterrupt:
    print("interrupted", flush=True)
    os._exit(130)
"""


def test_a_call_that_never_lets_go_is_given_up() -> None:
    began = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", STUCK], capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stdout) == (130, "interrupted\n"), ended.stderr
    assert time.monotonic() - began >= GRACE_S


def test_results_and_errors_pass_through() -> None:
    async def answer() -> int:
        return 42

    async def fail() -> None:
        raise ValueError("no")

    assert run_interruptibly(answer()) == 42
    with pytest.raises(ValueError, match="no"):
        run_interruptibly(fail())
