"""A run does not go on silently with another recipe, model, data set, machine or database: rows A14, A15, E5."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tolaria_tasks
import torch
from fake_activities import FakeWorld
from temporalio import activity
from temporalio.client import WorkflowFailureError
from tolaria_world import Driver
from tolaria_world import World
from tolaria_world import make_config
from torch import nn
from torch.utils.data import TensorDataset
from workflow_stage import configuration
from workflow_stage import stage

from esper.activities import names
from esper.commands.actions import records
from esper.commands.actions import reproducing
from esper.contracts.config import EsperConfig
from esper.contracts.enums import Outcome
from esper.contracts.orders import ClaimRequest
from esper.contracts.orders import Lease
from esper.contracts.orders import RecordRun
from esper.contracts.orders import TrainingRequest
from esper.errors import IntegrityError
from esper.errors import RunConflict
from esper.runtime.temporal import queues
from esper.runtime.temporal.failures import from_failure
from esper.runtime.temporal.failures import to_failure
from esper.runtime.tolaria.checkpoint import read_manifest
from esper.runtime.tolaria.checkpoint import recipe_drift
from esper.runtime.tolaria.plan import prepare
from esper.runtime.tolaria.session import Session

Drive = Callable[..., Driver]


def load(world: World, config: EsperConfig, *, accept_drift: bool = False) -> Session:
    """Claim the run and load it, as a trainer does for a workflow that was started with this configuration."""
    lease = world.call(world.library.claim("run", "queue"))
    ledger = world.call(world.library.take_over(lease))
    session = Session.load(config, ledger, world.store_under(lease), accept_drift=accept_drift)
    world._sessions.append(session)
    return session


def objects(world: World) -> set[Path]:
    return {path for path in (world.folder / "objects").rglob("*") if path.is_file()}


def test_another_configuration_is_refused_by_its_fields_and_goes_on_only_when_accepted(
    drive: Drive, world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drive(make_config()).train(1)
    other = make_config(optimizer={"lr": 0.5})
    before = objects(world), world.call(world.library.run("run")).head
    with pytest.raises(RunConflict, match=r"optimizer\.lr was 0\.01, is 0\.5") as caught:
        load(world, other)
    assert (caught.value.code, caught.value.exit_code) == ("ESP-502", 5)
    assert caught.value.hint is not None and "--accept-drift" in caught.value.hint
    assert (objects(world), world.call(world.library.run("run")).head) == before
    assert world.call(world.library.drifts("run")) == ()
    for _ in range(2):
        # Safe twice: a trainer may die before its first commit.
        session = load(world, other, accept_drift=True)
    assert "optimizer.lr was 0.01, is 0.5" in session.describe().warnings[0]
    (drift,) = world.call(world.library.drifts("run"))
    assert (drift.step, drift.fields) == (7, {"optimizer.lr": (0.01, 0.5)})
    assert world.call(world.library.run("run")).divergences == 1
    world.call(world.library.record_run(RecordRun(run_id="run", config=other, replaces=True), "2030-01-01T00:00:00Z"))
    Driver(world, session).train(2)
    # From there on it reproduces: no training leads there from what came before.
    monkeypatch.setenv("ESPER_HOME", str(world.folder))
    capsys.readouterr()
    assert reproducing.reproduce_run("run", as_json=True) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["clean"] and [head["same"] for head in document["heads"]] == [False, True]
    assert asyncio.run(records.one_run("run")).drifts == (drift,)
    # From the first head with it on, it is the recipe.
    assert load(world, other).describe().warnings == ()
    with pytest.raises(RunConflict, match=r"optimizer\.lr was 0\.5, is 0\.01"):
        load(world, make_config())


def test_what_was_accepted_takes_effect(drive: Drive, world: World) -> None:
    drive(make_config()).train(1)
    head = world.call(world.library.run("run")).head
    session = load(world, make_config(optimizer={"lr": 0.5}), accept_drift=True)
    (report,) = Driver(world, session).train(2)
    assert report.head.parent == head.digest
    # The last of 14 steps of 42, after a warm-up of 4: the factor of a cosine is that of step 13.
    expected = 0.5 * prepare(make_config())[0].schedule.factor(13)
    assert report.learning_rate == pytest.approx(expected)


def test_other_steps_an_epoch_cannot_be_accepted(drive: Drive, world: World) -> None:
    drive(make_config()).train(1)
    with pytest.raises(RunConflict, match=r"counts 7 steps an epoch, .* it would be 13") as caught:
        load(world, make_config(training={"batch_size": 16}), accept_drift=True)
    assert caught.value.code == "ESP-502" and world.call(world.library.drifts("run")) == ()


@pytest.mark.fault("A14")
def test_data_that_changed_under_a_run_are_refused_with_both_digests(
    drive: Drive, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    drive(make_config()).train(1)
    whole = tolaria_tasks.small_data

    def changed(rows: int = 200) -> tuple[TensorDataset, TensorDataset]:
        train, validation = whole(rows)
        train.tensors[0][17, 3] += 1.0
        return train, validation

    monkeypatch.setattr(tolaria_tasks, "small_data", changed)
    then = prepare_identity(world)["data"]
    with pytest.raises(RunConflict) as caught:
        load(world, make_config())
    now = prepare(make_config())[0].identity["data"]
    assert caught.value.code == "ESP-502" and then != now
    assert str(then) in caught.value.message and str(now) in caught.value.message
    session = load(world, make_config(), accept_drift=True)
    assert str(now) in session.describe().warnings[0]
    assert world.call(world.library.drifts("run"))[0].fields == {"data": (then, now)}


@pytest.mark.fault("A14")
def test_a_short_read_is_refused_by_its_rows(drive: Drive, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of data that nobody can digest the number of rows is known."""
    config = make_config("tolaria_tasks:noisy", training={"batch_size": 16})
    drive(config).train(1)
    whole = tolaria_tasks.small_data
    monkeypatch.setattr(tolaria_tasks, "small_data", lambda rows=200: whole(rows - 1))
    with pytest.raises(RunConflict, match=r"data.rows was \[64, 160, null\], is \[63, 160, null\]"):
        load(world, config)


def prepare_identity(world: World) -> dict[str, Any]:
    manifest = world.call(world.library.heads("run"))[-1].manifest
    return dict(read_manifest(manifest, world.objects.get).fingerprint)


def test_another_model_is_refused_by_its_size_and_cannot_be_accepted_where_it_does_not_fit(
    drive: Drive, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    drive(make_config()).train(1)

    class Wider(tolaria_tasks.Small):
        def __init__(self, dropout: float = 0.1) -> None:
            super().__init__(dropout)
            self.second, self.last = nn.Linear(8, 9), nn.Linear(9, 3)

    monkeypatch.setattr(tolaria_tasks, "Small", Wider)
    differs = r'model\.class was "Small", is "Wider"; model\.parameters was 219, is'
    with pytest.raises(RunConflict, match=differs) as caught:
        load(world, make_config())
    assert "model.structure" in caught.value.message
    with pytest.raises(IntegrityError, match="second") as refused:
        load(world, make_config(), accept_drift=True)
    assert refused.value.code in ("ESP-408", "ESP-409")
    assert world.call(world.library.drifts("run")) == ()


def test_a_checkpoint_that_notes_no_model_and_no_data_is_gone_on_from(drive: Drive, world: World) -> None:
    """As the versions of Esper before this one wrote them."""
    drive(make_config()).train(1)
    manifest = read_manifest(world.call(world.library.heads("run"))[-1].manifest, world.objects.get)
    identity = prepare(make_config())[0].identity
    kept = {key: value for key, value in manifest.fingerprint.items() if key not in identity}
    assert len(kept) == len(manifest.fingerprint) - 5
    older = manifest.model_copy(update={"fingerprint": kept})
    assert recipe_drift(older, make_config(), identity) == {}
    assert set(recipe_drift(older, make_config(optimizer={"lr": 0.5}), identity)) == {"optimizer.lr"}


@pytest.mark.fault("A15")
def test_another_machine_is_allowed_recorded_and_ends_near(
    drive: Drive, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(run={"max_epochs": 2})
    whole = drive(config, run_id="whole").train(1, 2)
    drive(config).train(1)
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    again = make_config(run={"max_epochs": 2, "threads": 2})
    world.call(world.library.record_run(RecordRun(run_id="run", config=again, replaces=True), "2030-01-01T00:00:00Z"))
    driver = drive(again)
    warnings = driver.session.describe().warnings
    assert len(warnings) == 2 and all("no longer bit for bit" in warning for warning in warnings)
    (drift,) = world.call(world.library.drifts("run"))
    assert set(drift.fields) == {"threads", "torch"} and drift.fields["threads"] == (1, 2)
    (report,) = driver.train(2)
    assert report.metrics.val_loss == pytest.approx(whole[-1].metrics.val_loss, rel=1e-3)


@pytest.mark.fault("E5")
def test_a_database_that_is_older_than_the_run_gives_no_lease(drive: Drive, world: World) -> None:
    drive(make_config())
    before = world.call(world.library.run("run"))
    with pytest.raises(RunConflict, match="leases up to 1, its workflow was given lease 7") as caught:
        world.call(world.library.claim("run", "queue", known=7))
    assert caught.value.code == "ESP-502" and caught.value.hint is not None
    assert "esper-cli recover run" in caught.value.hint
    assert world.call(world.library.run("run")) == before
    assert world.call(world.library.claim("run", "queue", known=7, recovers=True)).lease_gen == 8
    assert world.call(world.library.claim("run", "queue", known=8)).lease_gen == 9
    # A database that knows more is no worry: the workflow was reset, or another one trained the run.
    assert world.call(world.library.claim("run", "queue", known=3)).lease_gen == 10


class RestoredWorld(FakeWorld):
    """Its database falls back to a copy that is as old as the run, when an epoch has been trained."""

    restored_at: int | None = None

    @activity.defn(name=names.CLAIM_TRAINER.name)
    async def claim_trainer(self, request: ClaimRequest) -> Lease:
        if self.restored_at is not None and self.epoch >= self.restored_at:
            self.lease_gen, self.restored_at, self.epoch = 0, None, 0
        if request.known_lease_gen > self.lease_gen:
            if not request.recovers:
                self.journal.append(("refused", request.known_lease_gen))
                raise to_failure(RunConflict("ESP-502", "the database was restored", hint="recover it"))
            self.lease_gen = request.known_lease_gen
        return await super().claim_trainer(request)


@pytest.mark.fault("E5")
@pytest.mark.temporal
@pytest.mark.parametrize("continued", [None, 1], ids=["one history", "continued as new"])
def test_a_workflow_stops_at_its_next_claim_when_the_database_is_older_and_goes_on_when_recovered(
    temporal_address: str, continued: int | None
) -> None:
    world = RestoredWorld(lose_at=3)
    world.restored_at = 2
    config = configuration(4, tamiyo={"policy": "none"})

    async def scene() -> None:
        async with stage(temporal_address, world) as on:
            handle = await on.start(config, continue_after_epochs=continued)
            with pytest.raises(WorkflowFailureError) as caught:
                await handle.result()
            error = from_failure(caught.value)
            assert (error.code, error.exit_code, error.run_id) == ("ESP-502", 5, handle.id)
            # What came after the refusal is the word of it, and nothing else.
            assert world.journal[world.journal.index(("refused", 1)) + 1 :] in ([], [("release", Outcome.FAILED)])
            assert world.outcomes[-1] is Outcome.FAILED
            known = (await on.client.get_workflow_handle(handle.id).query("status"))["lease_gen"]
            assert known == 1
            again = await on.client.start_workflow(
                "TrainingRun",
                TrainingRequest(run_id=handle.id, config=config, recovers_above=known),
                id=handle.id,
                task_queue=queues.ORCHESTRATION,
            )
            await again.result()
            assert world.outcomes[-1] is Outcome.COMPLETED
            assert world.lease_gen == known + 1

    asyncio.run(scene())
