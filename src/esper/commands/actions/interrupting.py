"""Ctrl-C that always ends a command: what is under way is cancelled, and waited for only so long."""

import asyncio
from collections.abc import Coroutine
from typing import Any
from typing import TypeVar

ResultT = TypeVar("ResultT")

GRACE_S = 3.0
"""For letting go of connections. A cancelled database call was seen never to return (1 of some 300 times)."""


def run_interruptibly(coroutine: Coroutine[Any, Any, ResultT]) -> ResultT:
    """As `asyncio.run`, but after Ctrl-C it raises `KeyboardInterrupt` within `GRACE_S` seconds, whatever hangs.

    What hangs then is left to the end of the process.
    """
    runner = asyncio.Runner()
    try:
        result = runner.run(_bounded(coroutine))
    except KeyboardInterrupt:
        # Closing would wait for what was given up.
        raise
    except BaseException:
        runner.close()
        raise
    runner.close()
    return result


async def _bounded(coroutine: Coroutine[Any, Any, ResultT]) -> ResultT:
    task = asyncio.ensure_future(coroutine)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        task.cancel()
        await asyncio.wait([task], timeout=GRACE_S)
        raise
