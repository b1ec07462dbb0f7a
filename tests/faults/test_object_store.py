"""The object store goes away, stalls, tears or refuses in the middle of a run: training goes on until its next commit
must wait, waits there, and ends in the bits that it would have ended in."""

import logging
import time
from collections.abc import Callable
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from object_front import BUCKET
from object_front import SECRET
from object_front import Front
from object_front import running_front
from object_front import store_at
from outlasting import BAD_LINES
from outlasting import EPOCH
from outlasting import hurried as hurried
from outlasting import outlast
from outlasting import survive
from tcp_proxy import TcpProxy
from tcp_proxy import Weather
from tolaria_world import Driver
from tolaria_world import World
from tolaria_world import make_config
from tolaria_world import undisturbed_digest

from esper.activities import patience as patience_module
from esper.activities.patience import Patience
from esper.activities.trainer_store import UrzaStore
from esper.contracts.orders import Lease
from esper.errors import IntegrityError
from esper.errors import ObjectsUnavailable
from esper.runtime.urza.objects import FolderStore
from esper.runtime.urza.objects import reference

DATA = b"weights " * 20_000
LEASE = Lease(run_id="run", task_queue="q", lease_gen=1)

Drive = Callable[..., Driver]


@pytest.fixture(scope="module")
def door() -> Iterator[Front]:
    with running_front() as front:
        yield front


@pytest.fixture
def front(door: Front) -> Front:
    door.fault = door.times = None
    door.refused = 0
    return door


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    return undisturbed_digest(tmp_path_factory.mktemp("undisturbed"), make_config(), 4)


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "esper.activities.patience"]


def outlast_and_stand(driver: Driver, world: World, begin: Callable[[], object], end: Callable[[], object]) -> None:
    """`outlast`, in which the run stands where it stood when the store went away."""

    def stands() -> None:
        assert world.call(world.library.run("run")).steps == EPOCH

    outlast(driver, begin, end, stands)


FAULTS = [
    pytest.param((503, "SlowDown"), marks=pytest.mark.fault("D1")),
    pytest.param((500, "InternalError"), marks=pytest.mark.fault("D1")),
    pytest.param((403, "AccessDenied"), marks=pytest.mark.fault("D7")),
    pytest.param("swallow", marks=pytest.mark.fault("D6")),
]


@pytest.mark.fault("I1", "I7", "I10", "I11")
@pytest.mark.parametrize("fault", FAULTS)
def test_training_goes_on_until_its_next_commit_must_wait(
    drive: Drive,
    world: World,
    front: Front,
    fault: str | tuple[int, str],
    undisturbed: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    world.objects = store_at(front.endpoint)  # type: ignore[assignment]
    driver = drive(make_config())
    with caplog.at_level(logging.WARNING, "esper.activities.patience"):
        outlast_and_stand(driver, world, lambda: setattr(front, "fault", fault), lambda: setattr(front, "fault", None))
    assert front.refused
    assert BUCKET in said(caplog)[0]
    assert front.endpoint in said(caplog)[0]
    assert SECRET not in "\n".join(said(caplog))
    driver.train(4)
    assert driver.digest() == undisturbed
    assert world.call(world.library.run("run")).head == world.call(world.library.heads("run"))[-1].head


@pytest.mark.fault("D1", "I10", "I11")
def test_a_server_that_refuses_connections_is_waited_for(
    drive: Drive, world: World, front: Front, undisturbed: str
) -> None:
    with TcpProxy(front.endpoint.removeprefix("http://")) as proxy:
        world.objects = store_at(f"http://{proxy.address}")  # type: ignore[assignment]
        driver = drive(make_config())

        def cut() -> None:
            proxy.refuse = True
            proxy.reset()

        outlast_and_stand(driver, world, cut, proxy.heal)
        driver.train(4)
        assert driver.digest() == undisturbed


@pytest.mark.fault("D1")
def test_a_fresh_run_is_told_soon_and_without_secrets(
    world: World, front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    front.fault = (503, "SlowDown")
    world.objects = store_at(front.endpoint)  # type: ignore[assignment]

    class Hasty(UrzaStore):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments, Patience(limit_s=0.3))  # type: ignore[arg-type]

    with pytest.raises(ObjectsUnavailable) as away:
        world.open(make_config(), store_kind=Hasty)
    assert away.value.code == "ESP-321"
    assert BUCKET in str(away.value)
    assert front.endpoint in str(away.value)
    assert SECRET not in str(away.value)
    assert front.refused > 1


@pytest.mark.fault("D1", "A13")
def test_a_process_that_is_told_to_end_does_not_wait_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience_module, "DRAINING_LIMIT_S", 0.3)
    draining, tries = [False], [0]

    def away() -> None:
        tries[0] += 1
        draining[0] = tries[0] > 2
        raise ObjectsUnavailable("ESP-321", "no answer")

    with pytest.raises(ObjectsUnavailable):
        Patience(limit_s=3600.0, draining=lambda: draining[0]).insist("storing", away)
    assert tries[0] > 2


@pytest.mark.fault("D1")
def test_waits_grow_to_a_cap_and_other_errors_are_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(patience_module.time, "monotonic", lambda: now[0])

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(patience_module.time, "sleep", sleep)
    monkeypatch.setattr(patience_module, "FIRST_WAIT_S", 0.25)
    monkeypatch.setattr(patience_module, "LONGEST_WAIT_S", 10.0)
    tried: list[float] = []

    def away() -> None:
        tried.append(now[0])
        raise ObjectsUnavailable("ESP-321", "no answer")

    with pytest.raises(ObjectsUnavailable):
        Patience().insist("storing", away)
    waits = [later - earlier for earlier, later in pairwise(tried)]
    assert waits[:6] == pytest.approx([0.25, 0.5, 1, 2, 4, 8])
    assert max(waits) == pytest.approx(10.0)
    assert now[0] == pytest.approx(patience_module.LIMIT_S)

    def damaged() -> None:
        tried.append(-1.0)
        raise IntegrityError("ESP-401", "damaged")

    with pytest.raises(IntegrityError):
        Patience().insist("reading", damaged)
    assert tried.count(-1.0) == 1


@pytest.mark.fault("D2", "D3")
@pytest.mark.parametrize("fault", ["stall", "truncate"])
@pytest.mark.parametrize("times", [1, 5])
def test_half_an_object_is_never_taken_for_one(world: World, front: Front, fault: str, times: int) -> None:
    """Five times is more than the store itself tries: then the trainer's patience takes over."""
    world.objects = store_at(front.endpoint)  # type: ignore[assignment]
    store = world.store_under(LEASE)
    ref = store.put(DATA)
    front.fault, front.times = fault, times
    began = time.monotonic()
    assert store.get(ref) == DATA
    assert front.refused == times
    assert time.monotonic() - began < 60


@pytest.mark.fault("D6")
def test_a_put_that_was_done_and_not_answered_is_one_object(world: World, front: Front) -> None:
    world.objects = store_at(front.endpoint)  # type: ignore[assignment]
    store = world.store_under(LEASE)
    front.fault, front.times = "swallow", 2
    ref = store.put(b"once")
    assert front.refused == 2
    assert [each.ref for each in world.objects.objects() if each.ref == ref] == [ref]


@pytest.mark.fault("C6")
@pytest.mark.parametrize("weather", BAD_LINES)
def test_a_bad_line_to_the_store_loses_nothing_and_leaks_nothing(world: World, front: Front, weather: str) -> None:
    with TcpProxy(front.endpoint.removeprefix("http://")) as proxy:
        world.objects = store_at(f"http://{proxy.address}")  # type: ignore[assignment]
        store = world.store_under(LEASE)
        store.put(b"warm")
        before = open_files()
        slow, sliced = Weather(delay_s=0.1), Weather(delay_s=0.002, slice_bytes=4000)
        assert survive(weather, proxy, lambda: store.get(store.put(DATA)), slow=slow, sliced=sliced) == DATA
        assert abs(open_files() - before) <= 8


@pytest.mark.fault("D9", "I1", "I11")
def test_a_full_disk_is_named_and_waited_for(
    drive: Drive, world: World, small_disk: Path, undisturbed: str, caplog: pytest.LogCaptureFixture
) -> None:
    world.objects = FolderStore(small_disk)
    driver = drive(make_config())
    ballast = small_disk / "ballast"

    def fill() -> None:
        with ballast.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
            while True:
                file.write(b"x" * 4096)

    with caplog.at_level(logging.WARNING, "esper.activities.patience"):
        outlast_and_stand(driver, world, fill, ballast.unlink)
    words = "\n".join(said(caplog))
    assert str(small_disk) in words
    assert "No space left" in words
    assert "Free at least" in words
    driver.train(4)
    assert driver.digest() == undisturbed
    assert not list(small_disk.rglob("*.tmp*"))


@pytest.mark.fault("D9")
def test_a_full_disk_leaves_the_old_head_and_no_half_of_a_file(small_disk: Path) -> None:
    store = FolderStore(small_disk)
    old = store.put(b"old" * 1000)
    with pytest.raises(ObjectsUnavailable) as full:
        store.put(b"new" * 1_000_000)
    assert full.value.code == "ESP-321"
    assert str(small_disk) in str(full.value)
    assert "3000000 bytes" in str(full.value)
    assert store.get(old) == b"old" * 1000
    assert not store.exists(reference(b"new" * 1_000_000))
    assert sum(path.stat().st_size for path in small_disk.rglob("*") if path.is_file()) == 3000
