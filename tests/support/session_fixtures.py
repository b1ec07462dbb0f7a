"""A real Urza behind a session, as fixtures: a layer's conftest imports `world` and `drive`."""

from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path

import pytest
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
