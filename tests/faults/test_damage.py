"""A damaged checkpoint costs the steps since the one before it, and not a bit: fault rows D4, D5 and bad input 39."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tolaria_world import Driver
from tolaria_world import World
from tolaria_world import make_config
from tolaria_world import ordered
from tolaria_world import silent

from esper.contracts.assets import ArtifactRef
from esper.contracts.enums import FactKind
from esper.contracts.operational import HeadRef
from esper.errors import IntegrityError
from esper.errors import LeaseLost
from esper.runtime.tolaria.session import Session

pytestmark = pytest.mark.fault("D4", "J")

DAMAGE: dict[str, Callable[[Path], None]] = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: _rewrite(path, b""),
    "truncated": lambda path: _rewrite(path, path.read_bytes()[:-1]),
    "flipped": lambda path: _rewrite(path, _flipped(path.read_bytes())),
}
HOLD = {"hold_epochs": 2, "hold_steps": 0, "keep_margin": 0.0}
HELD = make_config(tamiyo=HOLD)


def _rewrite(path: Path, data: bytes) -> None:
    path.chmod(0o600)
    path.write_bytes(data)


def _flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def place(world: World, ref: ArtifactRef) -> Path:
    return world.folder / "objects" / "sha256" / ref.digest.removeprefix("sha256:")


def parts(world: World, manifest: ArtifactRef) -> dict[str, ArtifactRef]:
    document = json.loads(world.objects.get(manifest))
    return {"manifest": manifest} | {
        name: ArtifactRef(**document[name]) for name in ("model", "optimizer", "random") if document[name] is not None
    }


def heads(world: World, run_id: str = "run") -> list[Any]:
    return list(world.call(world.library.heads(run_id)))


def quarantined(world: World) -> list[Path]:
    return sorted((world.folder / "objects" / "damaged").glob("*"))


def grow(drive: Callable[..., Driver], config: Any, run_id: str, until: int) -> Driver:
    """A run whose block is grafted at step 14 and judged at step 28, trained to the end of `until`."""
    driver = drive(config, run_id=run_id)
    order = ordered(1, 14, run_id=run_id)
    driver.schedule = (order,)
    (first,) = driver.train(1, expects_decision=True)
    assert driver.session.install(driver.world.deliver(first, order)).accepted
    driver.train(*range(2, until + 1))
    return driver


@pytest.mark.fault("D5")
@pytest.mark.parametrize(
    ("part", "damage", "optimizer"),
    [
        ("manifest", "truncated", "adamw"),
        ("model", "flipped", "adamw"),
        ("optimizer", "empty", "adamw"),
        # Stochastic gradient descent without momentum keeps nothing: its file would be that of every head.
        ("optimizer", "flipped", "sgd"),
        ("random", "missing", "adamw"),
        ("random", "flipped", "sgd"),
    ],
)
def test_a_damaged_head_is_left_for_the_one_before_and_the_run_ends_in_the_same_bits(
    drive: Callable[..., Driver], world: World, part: str, damage: str, optimizer: str
) -> None:
    config = make_config(optimizer={"name": optimizer}, run={"max_epochs": 3})
    whole = drive(config, run_id="whole")
    whole.train(1, 2, 3)
    drive(config).train(1, 2)
    reports = world.call(world.library.reports("run"))
    newest, before = heads(world)[-1], heads(world)[-2]
    DAMAGE[damage](place(world, parts(world, newest.manifest)[part]))
    again = drive(config)
    loaded = again.session.describe()
    assert (loaded.step, loaded.head, loaded.rewound_from) == (7, before.head, (newest.head.digest,))
    assert "step 14 was damaged" in loaded.warnings[0] and "step 7" in loaded.warnings[0]
    (rewind,) = world.call(world.library.rewinds("run"))
    assert (rewind.from_head, rewind.to_head) == (newest.head.digest, before.head.digest)
    assert len(quarantined(world)) == (0 if damage == "missing" else 1)
    again.train(2, 3)
    # The first record wins, and the second training of the epoch gave the same.
    assert world.call(world.library.reports("run"))[:2] == reports
    assert world.call(world.library.run("run")).divergences == 0
    assert again.digest() == whole.digest()
    assert drive(config).session.describe().warnings == ()


@pytest.mark.parametrize("at", [3, 4, 5])
def test_facts_above_the_older_head_are_executed_again_at_their_steps(
    drive: Callable[..., Driver], world: World, at: int
) -> None:
    """The newest head holds the graft (3), is the one that was judged (4), or has the verdict behind it (5)."""
    config = make_config(tamiyo=HOLD)
    whole = grow(drive, config, "whole", 4)
    verdict = whole.session.judge("whole/a1", silent)
    whole.train(5, 6)
    driver = grow(drive, config, "run", min(at, 4))
    if at == 5:
        driver.session.judge("run/a1", silent)
        driver.train(5)
    facts = world.facts()
    newest = heads(world)[-1]
    DAMAGE["flipped"](place(world, parts(world, newest.manifest)["model"]))
    again = drive(config)
    assert again.session.describe().head != newest.head
    again.schedule = (ordered(1, 14),)
    again.train(*range(again.session.describe().epoch + 1, 5))
    second = again.session.judge("run/a1", silent)
    assert (second.verdict, second.grown_loss, second.twin_loss) == (
        verdict.verdict,
        verdict.grown_loss,
        verdict.twin_loss,
    )
    again.train(5, 6)
    assert again.digest() == whole.digest()
    assert world.facts()[: len(facts)] == facts and world.facts() == world.facts("whole")
    assert world.call(world.library.run("run")).divergences == 0


def test_a_graft_that_was_recorded_above_the_older_head_is_made_again(
    drive: Callable[..., Driver], world: World
) -> None:
    config = make_config(tamiyo=HOLD)
    grow(drive, config, "run", 2)
    assert (FactKind.GRAFT.value, 14) in world.facts()
    DAMAGE["truncated"](place(world, heads(world)[-1].manifest))
    again = drive(config)
    assert again.session.describe().step == 7
    again.train(2, 3)
    assert [fact.kind for fact in again.session.describe().facts] == [FactKind.GRAFT]


def test_the_newest_two_damaged_stop_the_run_and_overwrite_nothing(drive: Callable[..., Driver], world: World) -> None:
    drive(make_config()).train(1, 2, 3)
    for head in heads(world)[-2:]:
        DAMAGE["flipped"](place(world, parts(world, head.manifest)["model"]))
    record = world.call(world.library.run("run"))
    before = {path: path.read_bytes() for path in (world.folder / "objects").rglob("*") if path.is_file()}
    with pytest.raises(IntegrityError) as caught:
        drive(make_config())
    assert (caught.value.code, caught.value.exit_code, caught.value.run_id) == ("ESP-402", 4, "run")
    assert "at step 21" in caught.value.message and "at step 14" in caught.value.message
    assert caught.value.hint is not None and "fork run" in caught.value.hint
    after = {path: path.read_bytes() for path in (world.folder / "objects").rglob("*") if path.is_file()}
    assert after == before and world.call(world.library.rewinds("run")) == ()
    assert world.call(world.library.run("run")).head == record.head
    # With one of the two restored from a copy it goes on.
    manifest = heads(world)[-2].manifest
    _rewrite(path := place(world, parts(world, manifest)["model"]), _flipped(path.read_bytes()))
    assert drive(make_config()).session.describe().step == 14


@pytest.mark.unchecked("I7")
def test_a_run_with_one_damaged_head_only_stops(drive: Callable[..., Driver], world: World) -> None:
    drive(make_config())
    DAMAGE["empty"](place(world, heads(world)[0].manifest))
    with pytest.raises(IntegrityError) as caught:
        drive(make_config())
    assert caught.value.code == "ESP-402"


def test_heads_of_one_step_that_share_a_damaged_file_are_both_left(drive: Callable[..., Driver], world: World) -> None:
    config = make_config(tamiyo=HOLD)
    driver = grow(drive, config, "run", 4)
    driver.session.judge("run/a1", silent)
    judged, closed, third = heads(world)[-1], heads(world)[-2], heads(world)[-3]
    assert judged.head.step == closed.head.step == 28
    for head in (judged, closed):
        path = place(world, parts(world, head.manifest)["random"])
        if parts(world, head.manifest)["random"] != parts(world, judged.manifest)["random"] or head is judged:
            DAMAGE["flipped"](path)
    again = drive(config)
    assert again.session.describe().head == third.head
    (rewind,) = world.call(world.library.rewinds("run"))
    assert (rewind.from_head, rewind.to_head) == (judged.head.digest, third.head.digest)


def test_a_bit_that_flips_only_on_the_way_is_read_again(drive: Callable[..., Driver], world: World) -> None:
    drive(make_config()).train(1)
    lease = world.call(world.library.claim("run", "other"))
    ledger = world.call(world.library.take_over(lease))
    flips = [ledger.manifest.digest]

    class Flaky(type(world.store)):  # type: ignore[misc]
        def get(self, ref: ArtifactRef) -> bytes:
            if flips and ref.digest == flips[0]:
                raise IntegrityError("ESP-401", f"object {flips.pop()} is damaged")
            return super().get(ref)

    session = Session.load(make_config(), ledger, Flaky(world._loop, world.library, world.objects, lease))
    world._sessions.append(session)
    assert session.describe().step == 7 and session.describe().warnings == ()


@pytest.mark.unchecked("I7")
def test_a_stale_owner_rewinds_nothing_and_moves_no_object(drive: Callable[..., Driver], world: World) -> None:
    drive(make_config()).train(1)
    lease = world.call(world.library.claim("run", "second"))
    ledger = world.call(world.library.take_over(lease))
    store = world.store_under(lease)
    DAMAGE["flipped"](place(world, ledger.manifest))
    world.call(world.library.claim("run", "third"))
    with pytest.raises(LeaseLost):
        Session.load(make_config(), ledger, store)
    assert quarantined(world) == [] and world.call(world.library.rewinds("run")) == ()


def test_a_crash_between_rewind_and_quarantine_heals_by_the_next_put(
    drive: Callable[..., Driver], world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(run={"max_epochs": 2})
    whole = drive(config, run_id="whole")
    whole.train(1, 2)
    drive(config).train(1, 2)
    newest = heads(world)[-1]
    DAMAGE["flipped"](place(world, parts(world, newest.manifest)["model"]))

    class Crash(BaseException):
        pass

    def crash(ref: ArtifactRef) -> None:
        raise Crash

    with monkeypatch.context() as patched:
        patched.setattr(world.objects, "set_aside", crash)
        with pytest.raises(Crash):
            drive(config)
    again = drive(config)
    loaded = again.session.describe()
    # The fall is known from the ledger, so that a resumed workflow accepts the older head.
    assert (loaded.step, loaded.rewound_from) == (7, (newest.head.digest,))
    again.train(2)
    assert len(quarantined(world)) == 1
    assert again.digest() == whole.digest()
    assert drive(config).session.describe().step == 14


@pytest.mark.unchecked("I5", "I7")
def test_a_checkpoint_of_a_newer_esper_is_whole_and_not_left(drive: Callable[..., Driver], world: World) -> None:
    """Bad input 39: what this Esper cannot read is no damage; going back would throw good work away."""
    driver = drive(make_config())
    driver.train(1)
    head = heads(world)[-1]
    document = json.loads(world.objects.get(head.manifest)) | {"schema_version": 99}
    manifest = world.objects.put(json.dumps(document).encode())
    newer = HeadRef(digest=manifest.digest, parent=head.head.digest, step=14, epoch=2)
    world.call(
        world.library.commit_head(driver.lease, head=newer, manifest=manifest, parent=head.head.digest, report=None)
    )
    with pytest.raises(IntegrityError, match="format 99") as caught:
        drive(make_config())
    assert caught.value.code == "ESP-408" and world.call(world.library.rewinds("run")) == ()


# --- the checkpoint at which the twin of a graft on probation begins ---


def head_at(world: World, step: int) -> HeadRef:
    head: HeadRef = next(item.head for item in heads(world) if item.head.step == step)
    return head


def damage_head(world: World, step: int, part: str, damage: str) -> Path:
    """The file of a part of the newest head at a step, which no other head has, and which is damaged now."""
    (item,) = (item for item in heads(world) if item.head.step == step)
    path = place(world, parts(world, item.manifest)[part])
    DAMAGE[damage](path)
    return path


@pytest.fixture
def expected(drive: Callable[..., Driver]) -> str:
    whole = grow(drive, HELD, "whole", 4)
    whole.session.judge("whole/a1", silent)
    whole.train(5, 6)
    return whole.digest()


def finish(driver: Driver) -> str:
    """The rest of the run, from wherever it stands."""
    driver.schedule = (ordered(1, 14),)
    driver.train(*range(driver.session.describe().epoch + 1, 5))
    driver.session.judge("run/a1", silent)
    driver.train(5, 6)
    return driver.digest()


@pytest.mark.parametrize(("part", "damage"), [("model", "flipped"), ("manifest", "truncated"), ("random", "missing")])
@pytest.mark.parametrize("until", [3, 4])
def test_a_run_goes_back_behind_a_damaged_start_and_ends_in_the_same_bits(
    drive: Callable[..., Driver], world: World, expected: str, until: int, part: str, damage: str
) -> None:
    grow(drive, HELD, "run", until)
    newest = heads(world)[-1].head
    damage_head(world, 14, part, damage)
    again = drive(HELD)
    loaded = again.session.describe()
    # All heads since the graft need the same damaged file: that is one damage, however many they are.
    assert (loaded.step, loaded.head, loaded.rewound_from) == (7, head_at(world, 7), (newest.digest,))
    assert "the twin of run/a1 has nowhere to begin" in loaded.warnings[0]
    (rewind,) = world.call(world.library.rewinds("run"))
    assert (rewind.from_head, rewind.to_head) == (newest.digest, loaded.head.digest)
    assert len(quarantined(world)) == (0 if damage == "missing" else 1)
    assert finish(again) == expected
    assert world.call(world.library.run("run")).divergences == 0
    assert world.facts() == world.facts("whole")


def test_a_damaged_start_and_a_damaged_head_before_it_stop_the_run(
    drive: Callable[..., Driver], world: World, expected: str
) -> None:
    grow(drive, HELD, "run", 4)
    paths = [damage_head(world, step, "model", "flipped") for step in (7, 14)]
    with pytest.raises(IntegrityError) as caught:
        drive(HELD)
    assert (caught.value.code, caught.value.exit_code) == ("ESP-402", 4)
    assert "at step 28" in caught.value.message and "at step 7" in caught.value.message
    assert world.call(world.library.rewinds("run")) == () and quarantined(world) == []
    # With the start restored from a copy it goes on where it stood.
    DAMAGE["flipped"](paths[1])
    again = drive(HELD)
    assert again.session.describe().step == 28
    assert finish(again) == expected


def test_a_start_that_is_damaged_after_the_run_was_loaded_gives_no_verdict_and_the_next_load_mends_it(
    drive: Callable[..., Driver], world: World, expected: str
) -> None:
    driver = grow(drive, HELD, "run", 4)
    damage_head(world, 14, "optimizer", "flipped")
    facts = world.facts()
    with pytest.raises(IntegrityError) as caught:
        driver.session.judge("run/a1", silent)
    assert (caught.value.code, caught.value.exit_code) == ("ESP-407", 4)
    assert "run/a1" in caught.value.message
    assert caught.value.hint is not None and "esper-cli resume run" in caught.value.hint
    assert world.facts() == facts
    assert finish(drive(HELD)) == expected


@pytest.mark.unchecked("I7")
def test_a_start_is_of_no_matter_once_the_verdict_is_in_the_head(drive: Callable[..., Driver], world: World) -> None:
    driver = grow(drive, HELD, "run", 4)
    driver.session.judge("run/a1", silent)
    driver.train(5)
    damage_head(world, 14, "model", "flipped")
    loaded = drive(HELD).session.describe()
    assert (loaded.step, loaded.warnings) == (35, ())
