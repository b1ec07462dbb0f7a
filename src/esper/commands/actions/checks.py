"""The checks of `doctor`, each from a fact of this machine to what to do about it."""

import asyncio
import os
import platform
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Awaitable
from collections.abc import Callable
from dataclasses import asdict
from dataclasses import dataclass
from typing import Any
from typing import Literal

from esper.commands.actions import connections
from esper.commands.actions.versions import check_version
from esper.commands.actions.versions import installed
from esper.contracts.config import TemporalConfig
from esper.errors import EsperError
from esper.runtime.configuration import check_current_folder
from esper.runtime.temporal.client import connect_to
from esper.runtime.temporal.client import find_address
from esper.runtime.temporal.server import LEAST_GO
from esper.runtime.temporal.server import ServerProgram
from esper.runtime.temporal.server import find_server
from esper.runtime.urza import migration
from esper.runtime.urza.engine import wal_is_safe
from esper.runtime.urza.objects import reference


@dataclass(frozen=True)
class Check:
    """One line of `doctor`."""

    name: str
    state: Literal["ok", "warn", "fail"]
    message: str
    hint: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


async def all_checks() -> list[Check]:
    """Every check in reading order; none stops the others. Raises `ConfigurationError` (ESP-208) in a lost folder."""
    check_current_folder()
    return [
        await _guarded(name, check)
        for name, check in (
            ("python", _python),
            ("esper", _import_name),
            ("torch", _torch_version),
            ("temporalio", _temporalio_version),
            ("home", _home),
            ("sqlite", _sqlite),
            ("database", _database),
            ("objects", _objects),
            ("temporal", _temporal),
            ("temporal program", _temporal_program),
            ("devices", _devices),
            ("compiler", _compiler),
            ("go", _go),
        )
    ]


async def _guarded(name: str, check: Callable[[], Awaitable[Check]]) -> Check:
    try:
        return await check()
    except EsperError as error:
        return Check(name, "fail", f"[{error.code}] {error.message}", error.hint)


async def _python() -> Check:
    return Check("python", "ok", f"{platform.python_version()} at {sys.executable}")


async def _import_name() -> Check:
    version = installed("esper-morphogenetic")
    if installed("esper") is not None:
        return Check(
            "esper",
            "fail",
            "the distribution 'esper' (another project with the same import name) is installed beside this one",
            "pip uninstall esper, then reinstall esper-morphogenetic",
        )
    if version is None:
        return Check("esper", "warn", "esper-morphogenetic is not installed, it is imported from a folder")
    return Check("esper", "ok", f"esper-morphogenetic {version}, no other package of that import name")


async def _torch_version() -> Check:
    return Check("torch", "ok", check_version("torch"))


async def _temporalio_version() -> Check:
    return Check("temporalio", "ok", check_version("temporalio"))


async def _home() -> Check:
    home = connections.home()
    parent = next(folder for folder in (home, *home.parents) if folder.exists())
    if not os.access(parent, os.W_OK | os.X_OK):
        return Check("home", "fail", f"{parent} is not writable", "Set ESPER_HOME to a folder that you may write to")
    return Check("home", "ok", f"{home}" if home.exists() else f"{home}, not made yet")


async def _sqlite() -> Check:
    if wal_is_safe(sqlite3.sqlite_version_info):
        return Check("sqlite", "ok", f"{sqlite3.sqlite_version}, write-ahead log on")
    return Check(
        "sqlite",
        "warn",
        f"{sqlite3.sqlite_version} has the write-ahead-log reset bug; Esper uses the slower rollback journal",
        "Nothing must be done; SQLite 3.51.3, 3.50.7 or 3.44.6 and PostgreSQL do not have it",
    )


async def _database() -> Check:
    status = await migration.check(connections.database_url(None))
    if status.state == "current":
        return Check("database", "ok", f"{status.database} at revision {status.current}")
    if status.state == "newer":
        return Check(
            "database",
            "fail",
            f"{status.database} is at revision {status.current}, newer than {status.head}",
            "[ESP-334] Install the Esper that made it, or a later one",
        )
    if status.state == "empty" and status.database.startswith("sqlite"):
        return Check("database", "ok", f"{status.database}, not made yet")
    found = "has no tables yet" if status.current is None else f"is at revision {status.current}"
    return Check("database", "fail", f"{status.database} {found}", "[ESP-334] Run `esper-cli db upgrade`")


async def _objects() -> Check:
    store = connections.store()
    place = connections.settings().urza.objects
    if place == "default" and not connections.home().exists():
        return Check("objects", "ok", f"{store.describe()}, not made yet")
    data = b"esper-cli doctor was here"
    existed = await asyncio.to_thread(store.exists, reference(data))
    written = await asyncio.to_thread(store.put, data)
    again = await asyncio.to_thread(store.put, data)
    read = await asyncio.to_thread(store.get, written)
    if not existed:
        await asyncio.to_thread(store.delete, written)
    if read != data or again != written:
        return Check("objects", "fail", f"{store.describe()} gives back other bytes than were put")
    return Check("objects", "ok", f"{store.describe()}: put, put again, get and delete work")


async def _temporal() -> Check:
    settings: TemporalConfig = connections.settings().temporal
    try:
        where = find_address(settings, connections.home(), os.environ)
    except EsperError as error:
        if error.code == "ESP-301":
            return Check("temporal", "ok", "no server is named and the local stack is not up; `start-run` starts it")
        raise
    try:
        client = await connect_to(where)
    except EsperError as error:
        if not where.local_stack:
            raise
        return Check("temporal", "warn", error.message, "`esper-cli up` starts the local stack again")
    if not await connections.has_search_attributes(client):
        return Check(
            "temporal",
            "warn",
            f"{where.address} ({where.origin}) answers; its namespace lacks Esper's search attributes",
            "Runs go on without them; `temporal operator search-attribute create` makes them",
        )
    return Check("temporal", "ok", f"{where.address} ({where.origin}), namespace {where.namespace}")


async def _temporal_program() -> Check:
    found = find_server(os.environ)
    if isinstance(found, ServerProgram):
        return Check("temporal program", "ok", f"{found.path}, server {found.server_version} ({found.origin})")
    return Check(
        "temporal program",
        "warn",
        "not on this machine yet",
        "The first `start-run` or `up` downloads it, or builds it with Go (5 minutes)",
    )


async def _devices() -> Check:
    # Torch takes seconds to load; the checks before it have been printed by nobody yet, but they have not waited.
    from esper.runtime.tolaria.device import available_devices

    return Check("devices", "ok", f"{', '.join(available_devices())}; {os.cpu_count()} CPU cores")


async def _compiler() -> Check:
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        if name and shutil.which(name):
            return Check("compiler", "ok", f"{shutil.which(name)}")
    return Check(
        "compiler",
        "warn",
        "no C compiler (CC, cc, gcc, clang)",
        "Kernels run uncompiled; install gcc or clang for tezzeret.compile: on",
    )


async def _go() -> Check:
    go = shutil.which("go")
    needed = ".".join(map(str, LEAST_GO))
    if go is None:
        return Check("go", "ok", f"not found; only needed (>= {needed}) where the Temporal server must be built")
    told = subprocess.run([go, "version"], capture_output=True, text=True, check=False, timeout=20).stdout.strip()
    return Check("go", "ok", f"{told or go}; needed >= {needed} only where the Temporal server must be built")
