"""A short run in which everything happens that changes a model, driven as a workflow drives it: whatever has ended the
process, the next one asks for the same again and goes on.

Gaps are the moments between two epochs; gap n follows epoch n. Every order is given in one gap, and again by whoever
resumes there.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from failing_kernels import failing
from failing_kernels import raises
from tolaria_world import World
from tolaria_world import make_config
from tolaria_world import ordered
from tolaria_world import silent

from esper.contracts.enums import EpochStatus
from esper.contracts.operational import EpochReport
from esper.contracts.operational import KernelDelivery
from esper.contracts.orders import EpochRequest
from esper.runtime.failpoints import Crashed
from esper.runtime.kasmina.cache import kernel_cache
from esper.runtime.tolaria.session import Session
from esper.runtime.urza.ledger import TIMINGS

STEPS = 4
STOPS_AFTER = 8

CONFIG = make_config(
    "crash_tasks:bottlenecked",
    run={"max_epochs": 10},
    optimizer={"lr": 0.05},
    training={"batch_size": 32, "early_stop": {"metric": "val_loss", "mode": "max", "patience": STOPS_AFTER - 1}},
    tezzeret={"timeout_s": 0.05},
)
"""Early stopping that waits for a larger loss ends a run that learns at a known epoch."""

KEPT = ordered(1, 2 * STEPS, site="first", blueprint="widen")
CULLED = ordered(2, 4 * STEPS, site="second", blueprint="lowrank")
ABANDONED = ordered(3, 5 * STEPS + 1, site="last", blueprint="lowrank")
MISSED = ordered(4, 6 * STEPS + 2, site="last", blueprint="lowrank")
BROKEN = ordered(5, 7 * STEPS, site="last", blueprint="lowrank")
DELIVERED = (KEPT, CULLED, BROKEN)
STRIKES = range(7 * STEPS, 7 * STEPS + 3)
"""The steps at which kernels raise: only the last one is in the model then, and its breaker opens."""


@dataclass(frozen=True)
class Ended:
    """How a run ended: all that must be the same, however often it was crashed."""

    digest: str
    facts: tuple[tuple[str, str, int], ...]
    reports: tuple[EpochReport, ...]


@dataclass(frozen=True)
class Forged:
    """What the forge made for the run: deliveries and the bytes they name."""

    deliveries: dict[str, KernelDelivery]
    files: tuple[bytes, ...]


def new_world(folder: Path, empty: Path, forged: Forged) -> World:
    """An Urza in which no run was recorded, with the kernels in its store. `empty`: a migrated database file."""
    folder.mkdir()
    shutil.copy(empty, folder / "urza.db")
    world = World(folder)
    for data in forged.files:
        world.objects.put(data)
    return world


def forge(world: World) -> Forged:
    """Build the kernels for what the run measures in its first epoch."""
    session = world.open(CONFIG)
    report = _train(world, session, 1)
    deliveries = {order.adaptation_id: world.deliver(report, order) for order in DELIVERED}
    refs = [ref for item in deliveries.values() for ref in (item.manifest, item.weights, item.certificate)]
    return Forged(deliveries, tuple(world.objects.get(ref) for ref in refs))


def process(world: World, forged: Forged) -> str | None:
    """The life of one trainer process, from the claim to the release; `None` when it crashed on the way, else the
    digest that it finished with. Nothing of the process runs any more afterwards."""
    kernel_cache().clear()
    opened = len(world._sessions)

    def step() -> int:
        return -1 if len(world._sessions) == opened else world._sessions[-1]._shared.run.step

    try:
        with failing(raises, STRIKES, step):
            session = world.open(CONFIG)
            for gap in range(session.describe().epoch, STOPS_AFTER + 1):
                _orders(session, gap, forged)
                _train(world, session, gap + 1)
            digest = session.finish().digest
            world.call(world.library.release(world.store.lease))
            return digest
    except Crashed:
        return None
    finally:
        for started in world._sessions[opened:]:
            started.close()


def _orders(session: Session, gap: int, forged: Forged) -> None:
    match gap:
        case 1:
            assert session.install(forged.deliveries[KEPT.adaptation_id]).accepted
        case 3:
            session.judge(KEPT.adaptation_id, silent)
            assert session.install(forged.deliveries[CULLED.adaptation_id]).accepted
        case 4:
            session.abandon(ABANDONED, "the forge failed")
        case 5:
            session.judge(CULLED.adaptation_id, silent)
            assert session.remove(KEPT.adaptation_id).accepted
            # Delivered too late, and twice: both are answered by what is recorded.
            assert not session.install(forged.deliveries[CULLED.adaptation_id]).reason.startswith("rejected")
        case 6:
            assert session.install(forged.deliveries[BROKEN.adaptation_id]).accepted


def _train(world: World, session: Session, epoch: int) -> EpochReport:
    schedule = {2: (KEPT,), 4: (CULLED,), 5: (ABANDONED,), 6: (MISSED,), 7: (BROKEN,)}.get(epoch - 1, ())
    expects = epoch in (1, 3)
    request = EpochRequest(lease=world.store.lease, epoch=epoch, schedule=schedule, expects_decision=expects)
    result = session.train_epoch(request, silent)
    trainee = session._shared.run.trainee
    trained = {id(parameter) for group in trainee.optimizer.param_groups for parameter in group["params"]}
    assert trained == {id(parameter) for parameter in trainee.model.parameters()}
    if epoch > STOPS_AFTER:
        assert result.status is EpochStatus.SKIPPED
    return result.report


def ended(world: World, digest: str) -> Ended:
    """What Urza has of the run."""
    facts = world.call(world.library.facts("run"))
    reports = world.call(world.library.reports("run"))
    return Ended(
        digest,
        tuple((fact.adaptation_id, fact.kind.value, fact.apply_step) for fact in facts),
        tuple(report.model_copy(update=dict.fromkeys(TIMINGS, 0.0)) for report in reports),
    )
