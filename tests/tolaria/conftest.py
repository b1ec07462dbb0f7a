"""Fixtures of the session's tests; the helper modules beside this file are imported by name."""

import sys
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from tolaria_world import Driver
from tolaria_world import World

from esper.contracts.config import EsperConfig


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.close()


@pytest.fixture
def drive(world: World) -> Callable[..., Driver]:
    def open_session(config: EsperConfig, run_id: str = "run") -> Driver:
        return Driver(world, world.open(config, run_id), run_id)

    return open_session
