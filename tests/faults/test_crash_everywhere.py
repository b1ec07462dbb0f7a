"""The process ends at the n-th failpoint, for n = 1, 2, 3 ... until it ends no more: each time its successor ends in
the bits of a run that was never disturbed, with the same facts and the same reports, and nothing happens twice."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from crash_scenario import CONFIG
from crash_scenario import Ended
from crash_scenario import Forged
from crash_scenario import ended
from crash_scenario import forge
from crash_scenario import new_world
from crash_scenario import process
from tolaria_world import World
from tolaria_world import silent

from esper.contracts.enums import FactKind
from esper.runtime import failpoints
from esper.runtime.tolaria.reproduction import reproduce
from esper.runtime.urza.collection import collect

pytestmark = [pytest.mark.fault("A1", "A2", "A3", "F3", "I1", "I2", "I11")]

ELSEWHERE = {FactKind.QUARANTINE.value}
"""Recorded after two crashes in a kernel's first step: crashed where that is tested."""

SHARDS = 12
PAIRS = 48
SEED = 20_011


@pytest.fixture(scope="module", autouse=True)
def hurried() -> Iterator[None]:
    """Waits and ramps of seconds would be all that these tests do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("esper.runtime.tolaria.live.turns.BEAT_SECONDS", 0.02)
        patch.setattr("esper.runtime.tolaria.live.shared_run.POLL_SECONDS", 0.02)
        patch.setattr("esper.runtime.tolaria.live.surgery.REMOVAL_STEPS", 5)
        yield


@dataclass(frozen=True)
class Oracle:
    """A run that nobody disturbed, what was hit on its way, and what it takes to run it again."""

    ended: Ended
    forged: Forged
    empty: Path
    hits: int
    by_name: dict[str, int]


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory, hurried: None) -> Oracle:
    folder = tmp_path_factory.mktemp("oracle")
    forging = World(folder)
    forged = forge(forging)
    forging.close()
    empty = tmp_path_factory.mktemp("empty")
    World(empty).close()
    world = new_world(folder / "run", empty / "urza.db", forged)
    try:
        with failpoints.armed() as seen:
            digest = process(world, forged)
        assert digest is not None
        return Oracle(ended(world, digest), forged, empty / "urza.db", seen.hits[failpoints.ANY], dict(seen.hits))
    finally:
        world.close()


@pytest.fixture
def crash(oracle: Oracle, tmp_path: Path) -> Iterator["Crashes"]:
    crashes = Crashes(oracle, tmp_path)
    yield crashes
    crashes.close()


class Crashes:
    """Runs of the scenario that are crashed, each in a world of its own."""

    def __init__(self, oracle: Oracle, folder: Path) -> None:
        self.oracle = oracle
        self.reached: set[str] = set()
        self._folder = folder
        self._runs = 0
        self._world: World | None = None

    def at(self, *traps: tuple[str, int]) -> tuple[list[str], World]:
        """Crash one process after the other at the n-th hit of a name, each the successor of the one before, then let
        one end in peace. Returns where they crashed, and the world, which is open until the next call."""
        self.close()
        self._runs += 1
        self._world = world = new_world(self._folder / str(self._runs), self.oracle.empty, self.oracle.forged)
        places = []
        digest = None
        for name, nth in traps:
            with failpoints.armed(name, "raise", nth) as trap:
                digest = process(world, self.oracle.forged)
            self.reached |= trap.hits.keys()
            if trap.fired is None:
                break
            assert digest is None, trap.fired
            places.append(trap.fired)
        if digest is None:
            with failpoints.armed() as seen:
                digest = process(world, self.oracle.forged)
            self.reached |= seen.hits.keys()
        assert digest is not None
        assert ended(world, digest) == self.oracle.ended, places
        assert world.call(world.library.run("run")).divergences == 0, places
        return places, world

    def close(self) -> None:
        if self._world is not None:
            self._world.close()
            self._world = None


def reproduced(world: World) -> str:
    outcome = reproduce(world.recorded(CONFIG), silent)
    assert outcome.clean, outcome
    return outcome.digest


def test_the_oracle_is_eventful(oracle: Oracle) -> None:
    kinds = {kind for _, kind, _ in oracle.ended.facts}
    assert kinds == {kind.value for kind in FactKind} - ELSEWHERE


def test_every_failpoint_is_reached(crash: Crashes) -> None:
    """Those of a run's first life, of a second one that finds a graft recorded and not made, and of a collection."""
    places, world = crash.at(("fact.executed:graft", 1))
    assert places == ["fact.executed:graft"]
    with failpoints.armed() as seen:
        world.call(collect(world.library, world.objects, grace_s=-1.0, dry_run=False))
    assert set(failpoints.FAILPOINTS) - crash.reached - seen.hits.keys() == set()
    kinds = {kind for _, kind, _ in crash.oracle.ended.facts}
    around = ("before_insert", "in_transaction", "after_insert", "executed")
    assert {f"fact.{where}:{kind}" for where in around for kind in kinds} <= crash.reached


@pytest.mark.parametrize("shard", range(4))
def test_a_crash_costs_no_bit_and_nothing_happens_twice(crash: Crashes, shard: int) -> None:
    """A spread of what the slow test below tries all of."""
    (nth,) = random.Random(SEED + shard).sample(range(1, crash.oracle.hits + 1), 1)
    places, _ = crash.at((failpoints.ANY, nth))
    assert len(places) == 1, nth


@pytest.mark.parametrize(
    "place",
    [
        "commit.after_head",
        "graft.parameters_added",
        "cull.in_adoption",
    ],
)
def test_a_run_that_crashed_is_reproduced_from_its_records(crash: Crashes, place: str) -> None:
    places, world = crash.at((place, 1))
    assert places == [place]
    assert reproduced(world) == crash.oracle.ended.digest


@pytest.mark.fault("J")
@pytest.mark.parametrize(
    "second",
    ["lease.in_claim", "lease.after_take_over", "load.after_restore", "load.after_resume", "load.before_kernel"],
)
def test_a_crash_while_a_crashed_run_is_loaded_costs_no_bit(crash: Crashes, second: str) -> None:
    places, _ = crash.at(("fact.executed:graft", 1), (second, 1))
    assert places == ["fact.executed:graft", second]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.fault("J")
@pytest.mark.parametrize("shard", range(SHARDS))
def test_two_crashes_cost_no_bit(crash: Crashes, shard: int) -> None:
    """A seeded spread of pairs: anywhere, and then anywhere in the life of the successor."""
    spread = random.Random(SEED - shard)
    for _ in range(PAIRS // SHARDS):
        first, second = spread.randint(1, crash.oracle.hits), spread.randint(1, crash.oracle.hits // 2)
        crash.at((failpoints.ANY, first), (failpoints.ANY, second))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("shard", range(SHARDS))
def test_a_crash_at_the_nth_failpoint_costs_no_bit_for_every_n(crash: Crashes, shard: int) -> None:
    nth, tried = shard + 1, 0
    while crash.at((failpoints.ANY, nth))[0]:
        nth += SHARDS
        tried += 1
    assert tried >= crash.oracle.hits // SHARDS - 1
