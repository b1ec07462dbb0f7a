"""One real stack for the whole layer: supervisor, dev server, orchestrator, trainers, forge and strategist."""

from collections.abc import Iterator

import pytest
from local_stack import LocalStack


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    # Never more than one workflow cached: every workflow task replays the history from its first event.
    local = LocalStack(tmp_path_factory.mktemp("stack") / "home", ESPER_MAX_CACHED_WORKFLOWS="0")
    local.ok("up")
    try:
        yield local
    finally:
        local.ok("down")
