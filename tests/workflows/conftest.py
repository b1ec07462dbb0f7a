"""Plays scenes on the session's real dev server."""

import asyncio
from collections.abc import Awaitable
from collections.abc import Callable
from typing import TypeVar

import pytest
from fake_activities import FakeWorld
from workflow_stage import Stage
from workflow_stage import stage

ResultT = TypeVar("ResultT")


@pytest.fixture
def play(temporal_address: str) -> Callable[..., ResultT]:
    """`play(world, scene)` runs the coroutine function `scene(stage)` with workers up and returns its result."""

    def run(world: FakeWorld, scene: Callable[[Stage], Awaitable[ResultT]], *, cached: int = 1000) -> ResultT:
        async def whole() -> ResultT:
            async with stage(temporal_address, world, cached=cached) as on:
                return await scene(on)

        return asyncio.run(whole())

    return run
