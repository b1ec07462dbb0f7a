"""One real stack for the whole layer: supervisor, dev server, orchestrator, trainers, forge and strategist."""

from collections.abc import Iterator

import pytest
from checked_runs import every_run_is_judged as every_run_is_judged
from local_stack import LocalStack


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    local = LocalStack(tmp_path_factory.mktemp("stack") / "home")
    local.ok("up")
    try:
        yield local
    finally:
        local.ok("down")
