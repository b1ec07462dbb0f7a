"""A real Urza in a temporary folder, and scenes played on its event loop with activities in threads."""

import asyncio
import shutil
from collections.abc import Awaitable
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
from activity_bench import TASK
from activity_bench import Bench

from esper.contracts.config import UrzaConfig
from esper.runtime.urza import migration
from esper.runtime.urza.connections import Connections

ResultT = TypeVar("ResultT")


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("urza") / "template.db"
    asyncio.run(migration.upgrade("default", default_file=file))
    return file


@pytest.fixture
def play(migrated: Path, tmp_path: Path) -> Callable[[Callable[[Bench], Awaitable[ResultT]]], ResultT]:
    """`play(scene)` runs the coroutine function `scene(bench)` and returns its result."""
    (tmp_path / "tiny_task.py").write_text(TASK)
    shutil.copyfile(migrated, tmp_path / "urza.db")

    def run(scene: Callable[[Bench], Awaitable[ResultT]]) -> ResultT:
        async def whole() -> ResultT:
            connections = Connections(tmp_path)
            library = await connections.library(UrzaConfig())
            try:
                return await scene(Bench(tmp_path, library, connections))
            finally:
                await connections.close()

        return asyncio.run(whole())

    return run
