"""What earlier releases wrote is loaded by this one, or refused by name: databases, checkpoints, kernels, models,
configurations."""

import asyncio
import hashlib
import json
import shutil
import sqlite3
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tolaria_tasks import Small
from tolaria_world import Driver
from tolaria_world import World
from tolaria_world import silent

import esper
from esper.contracts.config import EsperConfig
from esper.contracts.enums import DecisionKind
from esper.contracts.enums import FactKind
from esper.contracts.orders import RunRecord
from esper.errors import DatabaseUnavailable
from esper.errors import IntegrityError
from esper.runtime.configuration import load_config
from esper.runtime.urza import migration
from esper.runtime.urza.library import Library

pytestmark = pytest.mark.fault("H4")

HERE = Path(__file__).parent
RELEASES = sorted(path.parent for path in HERE.glob("*/golden.json"))
DATABASES = sorted(HERE.glob("*/urza-*.sql"))


def facts_of(release: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((release / "golden.json").read_text())
    return document


def config_of(release: Path) -> EsperConfig:
    return load_config(release / "config.yaml", environment={})


def restored(dump: Path, folder: Path) -> str:
    """The database and the blobs as that release left them; gives the URL."""
    with sqlite3.connect(folder / "urza.db") as connection:
        connection.executescript(dump.read_text())
    shutil.copytree(dump.parent / "objects", folder / "objects")
    return f"sqlite+aiosqlite:///{folder / 'urza.db'}"


@pytest.fixture
def reopened(tmp_path: Path) -> Iterator[Callable[[Path], World]]:
    """`reopened(release)`: the newest database of a release, migrated, and its blobs, as a trainer finds them."""
    opened: list[World] = []

    def open_world(release: Path) -> World:
        restored(sorted(release.glob("urza-*.sql"))[-1], tmp_path)
        opened.append(World(tmp_path))
        return opened[-1]

    yield open_world
    for world in opened:
        world.close()


def test_every_release_is_here() -> None:
    assert {release.name for release in RELEASES} >= {"growth_engine", "nothing_lost"}
    newest = {path.stem.removeprefix("urza-") for path in (HERE / "nothing_lost").glob("urza-*.sql")}
    assert newest >= {"0001", "0002"}


@pytest.mark.parametrize("dump", DATABASES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_database_of_every_revision_is_refused_until_it_is_migrated_and_then_has_everything(
    dump: Path, tmp_path: Path
) -> None:
    url = restored(dump, tmp_path)

    async def main() -> tuple[RunRecord, list[int], list[DecisionKind], list[FactKind]]:
        if (await migration.check(url)).state == "older":
            with pytest.raises(DatabaseUnavailable, match=r"revision"):
                await Library.open(url, default_file=tmp_path / "urza.db")
        assert (await migration.upgrade(url)).state == "current"
        async with await Library.open(url, default_file=tmp_path / "urza.db") as library:
            return (
                await library.run("run"),
                [report.epoch for report in await library.reports("run")],
                [decision.kind for decision in await library.decisions("run")],
                [fact.kind for fact in await library.facts("run")],
            )

    record, epochs, decisions, facts = asyncio.run(main())
    assert (record.epochs, record.config) == (3, config_of(dump.parent))
    assert record.head is not None and record.head.step == 21
    assert (epochs, decisions, facts) == ([1, 2, 3], [DecisionKind.GERMINATE], [FactKind.GRAFT])


@pytest.mark.parametrize("release", RELEASES, ids=lambda path: path.name)
def test_a_checkpoint_with_a_graft_on_probation_goes_on_or_is_refused_by_name(
    release: Path, reopened: Callable[[Path], World]
) -> None:
    known = facts_of(release)
    world = reopened(release)
    try:
        driver = Driver(world, world.open(config_of(release)))
    except IntegrityError as refusal:
        # Only an older release may be refused, and then by its own code and with what to do.
        assert release.name != "nothing_lost"
        assert refusal.code == "ESP-408" and refusal.hint
        return
    assert driver.session.describe().epoch == 3
    driver.train(4)
    driver.session.judge("run/a1", silent)
    driver.train(5, 6)
    digest = driver.digest()
    # Other versions of torch may round otherwise; the same one may not.
    assert digest == known["digest"] or torch.__version__ != known["torch"]


@pytest.mark.parametrize("release", RELEASES, ids=lambda path: path.name)
def test_the_blobs_are_what_their_names_say(release: Path) -> None:
    kernel = facts_of(release)["kernel"]
    names = [path.name for path in (release / "objects" / "sha256").iterdir()]
    assert kernel.removeprefix("sha256:") in names
    for path in (release / "objects" / "sha256").iterdir():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name


@pytest.mark.parametrize("release", RELEASES, ids=lambda path: path.name)
def test_a_saved_model_is_loaded(release: Path) -> None:
    model = esper.load(release / "library", Small())
    assert esper.weights_digest(model) == facts_of(release)["model"]
