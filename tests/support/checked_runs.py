"""Finds every Urza that a test made, and judges every run in it: what the layers of real runs apply after each test."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import local_stack
import pytest
from content_scan import secrets_in
from content_scan import tensors_in_text
from invariants import check_run

from esper.contracts.assets import ArtifactRef
from esper.errors import EsperError
from esper.errors import IntegrityError
from esper.runtime.urza.library import Library
from esper.runtime.urza.objects import FolderStore

SECRET_VARIABLES = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "PGPASSWORD", "TEMPORAL_API_KEY")


class Folders:
    """The objects of several folders, as one store."""

    def __init__(self, folders: list[Path]) -> None:
        self._stores = [FolderStore(folder) for folder in folders]

    def exists(self, ref: ArtifactRef) -> bool:
        return any(store.exists(ref) for store in self._stores)

    def get(self, ref: ArtifactRef) -> bytes:
        for store in self._stores:
            if store.exists(ref):
                return store.get(ref)
        raise IntegrityError("ESP-401", f"object {ref.digest} is missing")


Databases = dict[Path, set[Path]]
"""SQLite files, each with the folders that its objects may lie in."""

_judged: dict[tuple[Path, str], str] = {}
"""How every run stood when it was judged last: it is judged again when it stands otherwise."""

_read: dict[Path, int] = {}
"""How many bytes of every log were read."""


@contextmanager
def watching() -> Iterator[Databases]:
    """Notes every SQLite database that this process opens meanwhile."""
    opened = Library.__init__
    found: Databases = {}

    def noting(self: Library, engine: Any) -> None:
        if engine.url.get_backend_name() == "sqlite":
            file = Path(engine.url.database)
            found.setdefault(file, set()).add(file.parent / "objects")
        opened(self, engine)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Library, "__init__", noting)
        yield found


def judge_all(databases: Databases, unchecked: frozenset[str] = frozenset()) -> list[str]:
    """The violations in these databases and in the homes of all stacks, as far as anything changed since last time."""
    found: list[str] = []
    places = {file: set(folders) for file, folders in databases.items()}
    planted = {secret for environment in local_stack.HOMES.values() for secret in secrets_of(environment)}
    for home in local_stack.HOMES:
        places.setdefault(home / "urza.db", set()).add(home / "objects")
        found += [] if "I12" in unchecked else _logs(home, tuple(planted))
    for file, folders in places.items():
        if file.exists():
            found += asyncio.run(_judge(file, [each for each in folders if each.is_dir()], tuple(planted), unchecked))
    return found


def secrets_of(environment: dict[str, str]) -> tuple[str, ...]:
    """The values of the secret variables that are long enough not to stand anywhere by chance."""
    return tuple(environment[name] for name in SECRET_VARIABLES if len(environment.get(name, "")) >= 8)


def _logs(home: Path, secrets: tuple[str, ...]) -> list[str]:
    found: list[str] = []
    for path in sorted((home / "logs").glob("*")):
        data = path.read_bytes()
        if _read.get(path) != len(data):
            wrong = (*secrets_in(path.name, data, secrets), *tensors_in_text(path.name, data))
            found += [f"I12: {what}" for what in wrong]
            _read[path] = len(data)
    return found


async def _judge(file: Path, folders: list[Path], secrets: tuple[str, ...], unchecked: frozenset[str]) -> list[str]:
    try:
        library = await Library.open(f"sqlite+aiosqlite:///{file}", default_file=file)
    except EsperError as error:
        return [] if "I7" in unchecked else [f"I7: {file} cannot be opened: {error}"]
    found: list[str] = []
    store = Folders(folders)
    async with library:
        for run in await library.runs(10_000):
            heads = await library.heads(run.run_id)
            others = (library.facts, library.histories, library.rewinds)
            counts = [len(heads), *[len(await read(run.run_id)) for read in others]]
            state = f"{run.model_dump_json()} {counts}"
            if _judged.get((file, run.run_id)) != state:
                _judged[file, run.run_id] = state
                # Rows alone, where a test made heads up whose bytes nobody ever stored.
                objects = store if any(store.exists(item.manifest) for item in heads) else None
                found += await check_run(library, objects, run.run_id, secrets=secrets, unchecked=unchecked)
    return found


@pytest.fixture(autouse=True)
def every_run_is_judged(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every test: no run in any Urza that it made breaks an invariant."""
    with watching() as databases:
        yield
    unchecked = frozenset(str(name) for mark in request.node.iter_markers("unchecked") for name in mark.args)
    found = judge_all(databases, unchecked)
    hint = 'a test that breaks records on purpose says so: @pytest.mark.unchecked("I7")'
    assert not found, "\n".join([*found, hint])
