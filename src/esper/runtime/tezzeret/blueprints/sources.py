"""Where a process asks for blueprints that it has not heard of: set once by a command or a worker, asked on demand.

Nothing is imported here, so that a command line which asks for no blueprint pays nothing.
"""

from collections.abc import Callable
from collections.abc import Iterable
from typing import Any

SOURCES: list[Callable[[], Iterable[Any]]] = []
"""Each gives every submitted `Blueprint` that it knows, of each name the newest first."""


def follow(source: Callable[[], Iterable[Any]]) -> None:
    """Ask this one from now on, and no other."""
    SOURCES[:] = [source]
