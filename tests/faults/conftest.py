"""One real stack for the whole layer, started only when a test asks for it; and a real Urza behind a session."""

import sys
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path

import pytest
from checked_runs import every_run_is_judged as every_run_is_judged
from local_stack import LocalStack

from esper.contracts.config import EsperConfig

sys.path.insert(0, str(Path(__file__).parent.parent / "tolaria"))

from tolaria_world import Driver
from tolaria_world import World


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    local = LocalStack(tmp_path_factory.mktemp("faults") / "home")
    local.ok("up")
    try:
        yield local
    finally:
        local.ok("down")


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
