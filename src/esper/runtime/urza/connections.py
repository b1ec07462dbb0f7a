"""One library and one object store per configuration and process, opened when first asked for."""

import asyncio
from pathlib import Path

from esper.contracts.config import UrzaConfig
from esper.runtime.urza.library import Library
from esper.runtime.urza.locations import open_store
from esper.runtime.urza.objects import ObjectStore


class Connections:
    """Opens Urza for the activities of one process and closes it with the process."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._libraries: dict[str, Library] = {}
        self._known: dict[UrzaConfig, None] = {}
        self._stores: dict[str, ObjectStore] = {}
        self._lock = asyncio.Lock()

    async def library(self, urza: UrzaConfig) -> Library:
        """The SQL side. Raises `DatabaseUnavailable` when it cannot be reached or is not migrated."""
        async with self._lock:
            if urza.database not in self._libraries:
                self._libraries[urza.database] = await Library.open(urza.database, default_file=self._home / "urza.db")
            self._known[urza] = None
            return self._libraries[urza.database]

    def known(self) -> tuple[UrzaConfig, ...]:
        """Every configuration whose library was opened so far."""
        return tuple(self._known)

    def store(self, urza: UrzaConfig) -> ObjectStore:
        """The object side."""
        if urza.objects not in self._stores:
            self._stores[urza.objects] = open_store(urza.objects, default_folder=self._home / "objects")
        return self._stores[urza.objects]

    async def close(self) -> None:
        for library in self._libraries.values():
            await library.close()
        self._libraries.clear()
