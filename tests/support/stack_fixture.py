"""One real stack for all tests of a layer that ask for it; the layer's conftest imports `stack`."""

from collections.abc import Iterator

import pytest
from local_stack import LocalStack


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    local = LocalStack(tmp_path_factory.mktemp("stack") / "home")
    local.ok("up")
    try:
        yield local
    finally:
        local.ok("down")
