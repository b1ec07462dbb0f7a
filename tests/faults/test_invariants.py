"""The judge of all runs finds nothing in whole records, and what is wrong in each way in which they can be damaged."""

import base64
import hashlib
import json
from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from invariants import CHECKS
from invariants import check_run
from invariants import violations
from run_records import RunRecords
from run_records import read_records
from tolaria_world import Driver
from tolaria_world import World
from tolaria_world import make_config
from tolaria_world import ordered
from tolaria_world import silent

from esper.contracts.assets import Kernel
from esper.contracts.config import UrzaConfig
from esper.contracts.enums import AdaptationState
from esper.contracts.enums import FactKind
from esper.contracts.enums import KernelState
from esper.contracts.enums import Outcome
from esper.contracts.enums import SeedState
from esper.contracts.enums import Verdict
from esper.contracts.operational import Adaptation
from esper.contracts.operational import Fact
from esper.contracts.orders import FinishedRun
from esper.contracts.orders import RecordOutcome
from esper.runtime.tolaria.checkpoint import CheckpointManifest
from esper.runtime.urza.ledger import Rewind

pytestmark = pytest.mark.fault("I1", "I2", "I3", "I4", "I5", "I6", "I7", "I8", "I9", "I10", "I11", "I12")

EPOCHS = 5
SECRET = "correct-horse-battery"


async def _end(world: World, finished: FinishedRun) -> RunRecords:
    """What a workflow records of the run at its end."""
    library = world.library
    (graft,) = [fact for fact in await library.facts("run") if fact.kind is FactKind.GRAFT]
    assert graft.delivery is not None
    order = graft.delivery.adaptation
    await library.record_adaptation(
        Adaptation(
            adaptation_id=order.adaptation_id,
            number=1,
            epoch=1,
            site=order.site,
            seed=order.seed,
            seed_generation=order.seed_generation,
            blueprint=order.blueprint,
            kernel=graft.delivery.kernel,
            apply_step=graft.apply_step,
            state=AdaptationState.FOSSILIZED,
            reason="worth it",
        )
    )
    end = RecordOutcome(run_id="run", urza=UrzaConfig(), outcome=Outcome.COMPLETED, finished=finished)
    await library.finish(end)
    ref = world.objects.put(json.dumps({"events": []}).encode())
    await library.store_history("run", "run", "first", ref, 0)
    return await read_records(library, world.objects, "run")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunRecords:
    """A run that grew a block, kept it, and ended."""
    world = World(tmp_path_factory.mktemp("whole"))
    try:
        config = make_config("tolaria_tasks:narrow", optimizer={"lr": 0.02}, run={"max_epochs": EPOCHS})
        driver = Driver(world, world.open(config))
        steps = driver.session.describe().steps_per_epoch
        order = ordered(1, 2 * steps, site="layers.0", blueprint="widen")
        driver.schedule = (order,)
        (report,) = driver.train(1, expects_decision=True)
        assert driver.session.install(world.deliver(report, order)).accepted
        driver.train(2)
        driver.session.checkpoint(hold=False)
        driver.train(3)
        assert driver.session.judge("run/a1", silent).verdict is Verdict.KEEP
        driver.train(*range(4, EPOCHS + 1))
        return world.call(_end(world, driver.session.finish()))
    finally:
        world.close()


Damage = Callable[[RunRecords], RunRecords]


def heads(change: Callable[[list[Any]], list[Any]]) -> Damage:
    return lambda records: replace(records, heads=tuple(change(list(records.heads))))


def head(index: int, **values: Any) -> Damage:
    """One committed head with another parent, step or epoch."""

    def change(items: list[Any]) -> list[Any]:
        items[index] = replace(items[index], head=items[index].head.model_copy(update=values))
        return items

    return heads(change)


def lease(index: int, lease_gen: int) -> Damage:
    def change(items: list[Any]) -> list[Any]:
        items[index] = replace(items[index], lease_gen=lease_gen)
        return items

    return heads(change)


def run(**values: Any) -> Damage:
    return lambda records: replace(records, run=records.run.model_copy(update=values))


def rewind(from_head: int, to_head: int) -> Damage:
    def change(records: RunRecords) -> RunRecords:
        names = [records.heads[index].head.digest for index in (from_head, to_head)]
        return replace(records, rewinds=(Rewind(names[0], names[1], 1, "damaged"),))

    return change


def facts(kind: FactKind, **values: Any) -> Damage:
    return lambda records: replace(
        records,
        facts=tuple(fact.model_copy(update=values) if fact.kind is kind else fact for fact in records.facts),
    )


def no_facts(kind: FactKind) -> Damage:
    return lambda records: replace(records, facts=tuple(fact for fact in records.facts if fact.kind is not kind))


def one_more(kind: FactKind, **values: Any) -> Damage:
    """A copy of the graft's fact as one of another kind."""

    def change(records: RunRecords) -> RunRecords:
        graft = next(fact for fact in records.facts if fact.kind is FactKind.GRAFT)
        return replace(records, facts=(*records.facts, graft.model_copy(update={"kind": kind, **values})))

    return change


def manifest(index: int, change: Callable[[CheckpointManifest], CheckpointManifest]) -> Damage:
    """Another manifest of one head of the line."""

    def damaged(records: RunRecords) -> RunRecords:
        digest = records.heads[index].head.digest
        return replace(records, manifests={**records.manifests, digest: change(records.manifests[digest])})

    return damaged


def state(index: int, **values: Any) -> Damage:
    def change(document: CheckpointManifest) -> CheckpointManifest:
        return document.model_copy(update={"state": document.state.model_copy(update=values)})

    return manifest(index, change)


def executed(index: int, change: Callable[[tuple[Fact, ...]], tuple[Fact, ...]]) -> Damage:
    return lambda records: state(
        index, executed=change(records.manifests[records.heads[index].head.digest].state.executed)
    )(records)


def seed(index: int, **values: Any) -> Damage:
    """The seed that has grown, otherwise."""

    def change(document: CheckpointManifest) -> CheckpointManifest:
        sites = tuple(
            site.model_copy(
                update={
                    "seeds": tuple(
                        each.model_copy(update={"seed": each.seed.model_copy(update=values)})
                        if each.seed.adaptation_id is not None
                        else each
                        for each in site.seeds
                    )
                }
            )
            for site in document.growth.sites
        )
        return document.model_copy(update={"growth": document.growth.model_copy(update={"sites": sites})})

    return manifest(index, change)


def block_twice(document: CheckpointManifest) -> CheckpointManifest:
    """The seed that has grown, at every site."""
    sites = document.growth.sites
    grown = next(each for site in sites for each in site.seeds if each.seed.adaptation_id is not None)
    moved = tuple(
        site.model_copy(
            update={
                "seeds": tuple(
                    grown.model_copy(update={"seed": grown.seed.model_copy(update={"site": site.site})})
                    for _ in site.seeds
                )
            }
        )
        for site in sites
    )
    return document.model_copy(update={"growth": document.growth.model_copy(update={"sites": moved})})


def older_model(document: CheckpointManifest) -> CheckpointManifest:
    return document.model_copy(update={"growth": document.growth.model_copy(update={"generation": 0})})


def other_kernel(records: RunRecords) -> RunRecords:
    """The kernel that was grafted was made for another site."""
    (digest,) = [fact.delivery.kernel for fact in records.facts if fact.delivery is not None]
    document = records.manifests[records.heads[-1].head.digest]
    contract = {"site": "elsewhere", "output_site": "elsewhere", "kind": "linear", "input_shape": (1,)}
    kernel = Kernel.model_validate(
        {
            "digest": digest,
            "blueprint": "widen",
            "hyperparameters": {},
            "site": {**contract, "output_shape": (1,), "dtype": "float32"},
            "manifest": document.model,
            "weights": document.model,
            "parameter_count": 1,
            "state": KernelState.CERTIFIED,
        }
    )
    return replace(records, kernels={digest: kernel})


def reports(change: Callable[[list[Any]], list[Any]]) -> Damage:
    return lambda records: replace(records, reports=tuple(change(list(records.reports))))


def report(index: int, **values: Any) -> Damage:
    def change(items: list[Any]) -> list[Any]:
        items[index] = items[index].model_copy(update=values)
        return items

    return reports(change)


def adaptation(**values: Any) -> Damage:
    return lambda records: replace(
        records, adaptations=tuple(each.model_copy(update=values) for each in records.adaptations)
    )


def failed(code: str) -> Damage:
    return run(outcome=Outcome.FAILED, failure={"code": code, "message": "why"})


def document(name: str, data: bytes) -> Damage:
    return lambda records: replace(records, documents={**records.documents, name: data})


def history(payload: bytes) -> Damage:
    events = [{"input": {"payloads": [{"metadata": {}, "data": base64.b64encode(payload).decode()}]}}]
    return document("history of run", json.dumps({"events": events}).encode())


def finished(**values: Any) -> Damage:
    def change(records: RunRecords) -> RunRecords:
        assert records.run.finished is not None
        return run(finished=records.run.finished.model_copy(update=values))(records)

    return change


OTHER = "sha256:" + 64 * "0"
DAMAGES: Mapping[str, tuple[str, Damage]] = {
    "a head behind its parent": ("I1", head(-1, step=1)),
    "a head of nowhere": ("I1", head(3, parent=OTHER)),
    "a head that goes on from an older one": ("I1", lambda r: head(-1, parent=r.heads[1].head.digest)(r)),
    "a present head that was never committed": (
        "I1",
        lambda r: run(head=r.run.head.model_copy(update={"digest": OTHER}))(r),
    ),  # type: ignore[union-attr]
    "a present head that fell back unseen": ("I1", lambda r: run(head=r.heads[1].head)(r)),
    "a fall back that goes forward": ("I1", rewind(1, 2)),
    "a report of another head": ("I1", lambda r: report(1, head=r.heads[-1].head)(r)),
    "two facts over one graft": ("I2", one_more(FactKind.MISSED)),
    "a graft executed twice": ("I2", executed(-1, lambda done: (*done, done[0]))),
    "a block that is there twice": ("I2", manifest(-1, block_twice)),
    "a kernel of another generation": ("I3", seed(-1, generation=7)),
    "another kernel in the model": ("I3", seed(-1, kernel=OTHER)),
    "a kernel for another site": ("I3", other_kernel),
    "a graft without a kernel": ("I3", facts(FactKind.GRAFT, delivery=None)),
    "a kernel for another adaptation": ("I3", facts(FactKind.GRAFT, adaptation_id="run/a9")),
    "a second graft into one generation": ("I3", one_more(FactKind.GRAFT, adaptation_id="run/a2")),
    "a model of an older generation": ("I3", manifest(-1, older_model)),
    "a later head that forgot": ("I4", executed(-1, lambda done: done[1:])),
    "a change that no fact tells": ("I4", no_facts(FactKind.GRAFT)),
    "a change at another step than recorded": ("I4", facts(FactKind.GRAFT, apply_step=3)),
    "a fact that a head passed by": ("I4", one_more(FactKind.CULL, apply_step=1)),
    "an epoch without a report": ("I5", reports(lambda items: [*items[:1], *items[2:]])),
    "an epoch that used other rows": ("I5", report(2, samples=7)),
    "an epoch that ends at another step": ("I5", report(2, step=16)),
    "rows that were used without a step": ("I5", state(-1, loss_rows=32)),
    "a manifest of another step": ("I5", manifest(2, lambda m: m.model_copy(update={"step": m.step + 1}))),
    "a head beyond the last report": ("I5", reports(lambda items: items[:-1])),
    "a kept block that trains again": ("I6", seed(-1, state=SeedState.TRAINING)),
    "a generation that came back": ("I6", lambda r: seed(-1, generation=0)(seed(-2, generation=1)(r))),
    "a fossil without a verdict": ("I6", executed(-1, lambda done: done[:1])),
    "a verdict before its graft": ("I6", facts(FactKind.FOSSILIZE, apply_step=1)),
    "a verdict on nothing": ("I6", no_facts(FactKind.GRAFT)),
    "grafted and missed": ("I6", one_more(FactKind.MISSED)),
    "culled, then kept": ("I6", one_more(FactKind.CULL)),
    "an object that is gone": ("I7", lambda r: replace(r, unreadable={"head": "it is missing"})),
    "an adaptation that never ended": ("I8", adaptation(state=AdaptationState.TRAINING)),
    "an adaptation nobody sees": ("I8", lambda r: replace(r, adaptations=())),
    "an adaptation without a reason": ("I8", adaptation(reason="")),
    "missed and yet grafted": ("I8", adaptation(state=AdaptationState.MISSED)),
    "culled, as nobody recorded": ("I8", adaptation(state=AdaptationState.CULLED)),
    "failed and yet in the model": ("I8", adaptation(state=AdaptationState.FAILED)),
    "kept, and removed by a fact": ("I8", one_more(FactKind.REMOVE)),
    "an older lease that commits": ("I9", lease(-2, 2)),
    "a lease that was never issued": ("I9", run(lease_gen=0)),
    "a run failed by its forge": ("I10", failed("ESP-412")),
    "a run failed by a kernel's digest": ("I10", failed("ESP-404")),
    "a digest of other weights": ("I11", finished(digest=OTHER)),
    "an end on another head": ("I11", lambda r: finished(head=r.heads[0].head)(r)),
    "an end without a digest": ("I11", finished(digest=None)),
    "a secret in a history": ("I12", history(f'{{"url": "{SECRET}"}}'.encode())),
    "a secret in an output file": ("I12", document("output config.yaml", SECRET.encode())),
    "a tensor in a history": ("I12", history(base64.b64encode(hashlib.sha512(b"").digest() * 64))),
    "a large payload": ("I12", history(b" " * 200_000)),
    "a pickle in a history": ("I12", history(b"\x80\x04\x95")),
    "a pickle among the objects": ("I12", document("model", b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00")),
    "an archive among the objects": ("I12", document("kernel weights", b"PK\x03\x04 and more")),
    "machine code among the objects": ("I12", document("kernel weights", b"\x7fELF and more")),
}


def test_whole_records_break_nothing(whole: RunRecords) -> None:
    assert violations(whole, secrets=(SECRET,)) == []
    assert len(whole.heads) > EPOCHS and len(whole.facts) == 2 and len(whole.reports) == EPOCHS
    assert whole.final_digest is not None and len(whole.documents) > 10


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_is_found_by_its_invariant(whole: RunRecords, damage: str) -> None:
    name, change = DAMAGES[damage]
    found = violations(change(whole), secrets=(SECRET,))
    assert name in {violation.split(":")[0] for violation in found}, found
    spared = violations(change(whole), secrets=(SECRET,), unchecked=frozenset({name}))
    assert name not in {violation.split(":")[0] for violation in spared}


def test_every_invariant_has_a_damage_that_only_it_finds_first() -> None:
    assert {name for name, _ in DAMAGES.values()} == {*CHECKS, "I12"} == {f"I{number}" for number in range(1, 13)}


def test_a_recorded_fall_back_is_no_regress(whole: RunRecords) -> None:
    at, to = whole.heads[3], whole.heads[1]
    branch = replace(at, head=at.head.model_copy(update={"digest": OTHER, "parent": to.head.digest, "step": 9}))
    fallen = replace(whole, heads=(*whole.heads[:4], branch), run=whole.run.model_copy(update={"head": branch.head}))
    assert any("no fall back" in found for found in violations(fallen))
    assert not any("no fall back" in found for found in violations(rewind(3, 1)(fallen)))


@pytest.mark.unchecked("I7")
@pytest.mark.parametrize("part", ["head", "model", "kernel"])
def test_a_damaged_or_missing_object_is_found_where_it_lies(
    world: World, drive: Callable[..., Driver], part: str, tmp_path: Path
) -> None:
    driver = drive(make_config())
    order = ordered(1, 14, blueprint="lowrank")
    driver.schedule = (order,)
    (report,) = driver.train(1, expects_decision=True)
    delivery = world.deliver(report, order)
    assert driver.session.install(delivery).accepted
    driver.train(2)
    assert world.call(check_run(world.library, world.objects, "run")) == []
    present = world.call(world.library.heads("run"))[-1]
    parts = {
        "head": present.manifest,
        "model": world.call(read_records(world.library, world.objects, "run")).manifests[present.head.digest].model,
        "kernel": delivery.weights,
    }
    path = tmp_path / "objects" / "sha256" / parts[part].digest.removeprefix("sha256:")
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    (damaged,) = [v for v in judged(world) if v.startswith("I7")]
    assert "damaged" in damaged
    path.unlink()
    (missing,) = [v for v in judged(world) if v.startswith("I7")]
    assert "missing" in missing


def judged(world: World) -> list[str]:
    found: list[str] = world.call(check_run(world.library, world.objects, "run"))
    return found


def test_a_served_history_is_judged_too(world: World, drive: Callable[..., Driver]) -> None:
    drive(make_config()).train(1)
    events = [{"payload": {"metadata": {}, "data": base64.b64encode(SECRET.encode()).decode()}}]
    served = [("history of run", json.dumps({"events": events}).encode())]
    found = world.call(check_run(world.library, world.objects, "run", served, secrets=(SECRET,)))
    assert {violation.split(":")[0] for violation in found} == {"I12"}
