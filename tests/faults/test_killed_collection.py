"""A collection that is killed between two of its steps costs nothing: row D8, invariant I7."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from object_front import BUCKET
from object_front import SECRET
from object_front import running_front
from tolaria_world import Driver
from tolaria_world import World
from tolaria_world import make_config

from esper.contracts.assets import ArtifactRef
from esper.contracts.enums import DecisionKind
from esper.contracts.operational import AdaptationDecision
from esper.runtime.tolaria.checkpoint import read_manifest
from esper.runtime.urza.collection import Swept
from esper.runtime.urza.collection import collect
from esper.runtime.urza.locations import open_store
from esper.runtime.urza.objects import object_key

pytestmark = pytest.mark.fault("D8", "I7")

GRACE_S = 3600.0

COLLECTION = """
import asyncio, os, sys
from pathlib import Path
from esper.runtime.failpoints import arm_process
from esper.runtime.urza.collection import collect
from esper.runtime.urza.library import Library
from esper.runtime.urza.locations import open_store
async def main(file, objects, grace_s):
    async with await Library.open("default", default_file=Path(file)) as library:
        await collect(library, open_store(objects, default_folder=Path(objects)), grace_s=grace_s, dry_run=False)
arm_process(os.environ)
asyncio.run(main(sys.argv[1], sys.argv[2], float(sys.argv[3])))
"""


def killed_collection(world: World, objects: str, grace_s: float, place: str, nth: int = 1) -> None:
    """Another process collects and gets SIGKILL at the n-th hit of the place."""
    child = subprocess.run(
        [sys.executable, "-c", COLLECTION, str(world.folder / "urza.db"), objects, str(grace_s)],
        env={**os.environ, "ESPER_FAILPOINTS": f"{place}=kill@{nth}"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr


def swept(world: World, grace_s: float) -> Swept:
    found: Swept = world.call(collect(world.library, world.objects, grace_s=grace_s, dry_run=False))
    assert found.unreadable == ()
    return found


@pytest.fixture
def aside(drive: Callable[..., Driver], world: World) -> tuple[ArtifactRef, Path]:
    """The model of an old head, which a collection had set aside when it was killed; and its place."""
    drive(make_config()).train(1, 2, 3, 4)
    head = next(item for item in world.call(world.library.heads("run")) if item.head.step == 7)
    ref = read_manifest(head.manifest, world.objects.get).model
    path = world.folder / "objects" / object_key(ref)
    os.utime(path, (0, 0))
    killed_collection(world, str(world.folder / "objects"), GRACE_S, "collect.set_aside")
    assert not path.exists() and len(laid_aside(world)) == 1
    return ref, path


def laid_aside(world: World) -> list[Path]:
    return list((world.folder / "objects" / "sha256").glob(".*.collected"))


def decided_on(world: World) -> None:
    """From now on the head at step 7 is needed, as if the records had been read just before."""
    kind = DecisionKind.GERMINATE
    decision = AdaptationDecision(run_id="run", epoch=1, policy="heuristic", kind=kind, code="test", reason="test")
    world.call(world.library.record_decision(decision))


def test_the_next_collection_puts_back_what_is_needed(aside: tuple[ArtifactRef, Path], world: World) -> None:
    decided_on(world)
    assert swept(world, GRACE_S).removed == 0
    assert aside[1].is_file() and laid_aside(world) == []
    assert world.objects.get(aside[0])


def test_the_next_collections_remove_what_is_not_once_it_is_old_again(
    aside: tuple[ArtifactRef, Path], world: World
) -> None:
    assert swept(world, GRACE_S).removed == 0
    assert aside[1].is_file()
    os.utime(aside[1], (0, 0))
    assert swept(world, GRACE_S).removed == 1
    assert not aside[1].exists() and laid_aside(world) == []


@pytest.mark.parametrize("look", ["get", "exists"])
def test_who_looks_for_it_puts_it_back(aside: tuple[ArtifactRef, Path], world: World, look: str) -> None:
    decided_on(world)
    assert getattr(world.objects, look)(aside[0])
    assert aside[1].is_file() and laid_aside(world) == []


def test_what_was_put_in_the_meantime_stays(aside: tuple[ArtifactRef, Path], world: World) -> None:
    data = laid_aside(world)[0].read_bytes()
    laid_aside(world)[0].write_bytes(b"damaged")
    world.objects.put(data)
    swept(world, GRACE_S)
    assert world.objects.get(aside[0]) == data and laid_aside(world) == []


@pytest.fixture(params=["folder", "bucket"])
def location(request: pytest.FixtureRequest, world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where the objects of the world are: in a folder, or with a server that speaks S3."""
    if request.param == "folder":
        yield str(world.folder / "objects")
        return
    with running_front() as front:
        monkeypatch.setenv("ESPER_S3_ENDPOINT_URL", front.endpoint)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "visible")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        place = f"s3://{BUCKET}/gc"
        store: Any = open_store(place, default_folder=Path("unused"))
        world.objects = store
        yield place


def test_a_collection_that_was_killed_on_its_way_is_finished_by_the_next(
    drive: Callable[..., Driver], world: World, location: str
) -> None:
    drive(make_config()).train(1, 2, 3, 4)
    all_old = -GRACE_S
    planned = world.call(collect(world.library, world.objects, grace_s=all_old, dry_run=True))
    killed_collection(world, location, all_old, "collect.before_delete", nth=2)
    assert swept(world, all_old).removed == planned.removed - 1 > 0
    kept = [each.ref for each in world.objects.objects()]
    assert len(kept) == planned.kept and all(world.objects.get(ref) for ref in kept)
    again = drive(make_config())
    assert again.session.describe().step == 28
    again.train(5)
