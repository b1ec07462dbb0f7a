"""A real Urza (SQLite and a folder) behind a session, kernels as the forge delivers them, orders as a workflow
gives them."""

import asyncio
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from esper.activities.trainer_store import UrzaStore
from esper.contracts.config import EsperConfig
from esper.contracts.operational import EpochReport
from esper.contracts.operational import KernelDelivery
from esper.contracts.operational import ScheduledAdaptation
from esper.contracts.orders import EpochRequest
from esper.contracts.orders import Lease
from esper.contracts.orders import RecordRun
from esper.runtime.tezzeret.blueprints.registry import site_contract_for
from esper.runtime.tezzeret.build import build_kernel
from esper.runtime.tezzeret.certify import certify
from esper.runtime.tezzeret.samples import samples_for
from esper.runtime.tezzeret.samples import unpack_samples
from esper.runtime.tolaria.reproduction import RecordedRun
from esper.runtime.tolaria.reproduction import reproduce
from esper.runtime.tolaria.session import Session
from esper.runtime.tolaria.store import Progress
from esper.runtime.urza import migration
from esper.runtime.urza.library import Library
from esper.runtime.urza.objects import FolderStore
from esper.runtime.urza.objects import reference


def silent(progress: Progress) -> None:
    """A beat that nobody hears."""


class World:
    """Urza in a temporary folder, and the sessions that train against it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.objects = FolderStore(folder / "objects")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="urza-loop", daemon=True)
        self._thread.start()
        self._url = f"sqlite+aiosqlite:///{folder / 'urza.db'}"
        self.call(migration.upgrade(self._url))
        self.library = self.call(Library.open(self._url, default_file=folder / "urza.db"))
        self._sessions: list[Session] = []

    def call(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def open(self, config: EsperConfig, run_id: str = "run", store_kind: type[UrzaStore] = UrzaStore) -> Session:
        """Claim the run, as a new trainer process does, and load it."""
        self.call(self.library.record_run(RecordRun(run_id=run_id, config=config), now="2030-01-01T00:00:00Z"))
        lease = self.call(self.library.claim(run_id, "queue"))
        ledger = self.call(self.library.take_over(lease))
        self.store = store_kind(self._loop, self.library, self.objects, lease)
        session = Session.load(config, ledger, self.store)
        self._sessions.append(session)
        return session

    def store_under(self, lease: Lease) -> UrzaStore:
        """What a trainer that holds `lease` reads and writes with."""
        return UrzaStore(self._loop, self.library, self.objects, lease)

    def recorded(self, config: EsperConfig, run_id: str = "run") -> RecordedRun:
        """All that a reproduction is given of a run."""
        return RecordedRun(
            run_id=run_id,
            config=config,
            facts=self.call(self.library.facts(run_id)),
            heads=[(item.head, item.manifest) for item in self.call(self.library.heads(run_id))],
            get=self.objects.get,
        )

    def facts(self, run_id: str = "run") -> list[tuple[str, int]]:
        return [(fact.kind.value, fact.apply_step) for fact in self.call(self.library.facts(run_id))]

    def deliver(self, report: EpochReport, order: ScheduledAdaptation, *, seed: int = 1) -> KernelDelivery:
        """Build, certify and store a kernel for what `order` asks, as the forge does."""
        node = next(node for node in report.graph.nodes if node.contract.site == order.site)
        contract = site_contract_for(order.blueprint, node, report.graph)
        assert contract is not None
        samples = None
        if report.site_samples is not None:
            samples = samples_for(contract, unpack_samples(self.objects.get(report.site_samples)))
        files = build_kernel(
            order.blueprint, contract, order.hyperparameters, seed=seed, samples=samples, max_parameters=100_000
        )
        certificate = certify(files, samples=samples)
        assert certificate.passed, certificate.failures
        return KernelDelivery(
            delivery_id=reference(order.adaptation_id.encode()).digest,
            adaptation=order,
            kernel=files.digest,
            manifest=self.objects.put(files.manifest),
            weights=self.objects.put(files.weights),
            certificate=self.objects.put(certificate.model_dump_json().encode()),
        )

    def close(self) -> None:
        for session in self._sessions:
            session.close()
        self.call(self.library.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def make_config(target: str = "tolaria_tasks:small", **sections: dict[str, Any]) -> EsperConfig:
    """Seven steps an epoch; a graft is judged at the end of the first epoch after the one it was made in."""
    given: dict[str, Any] = {
        "run": {"name": "small", "seed": 3, "max_epochs": 6, "threads": 1, "device": "cpu"},
        "task": {"target": target},
        "optimizer": {
            "name": "adamw",
            "lr": 0.01,
            "weight_decay": 0.01,
            "schedule": {"name": "cosine", "warmup": 0.1},
            "clip": 1.0,
        },
        "training": {"batch_size": 32},
        "tamiyo": {"hold_epochs": 1, "hold_steps": 0},
        "tezzeret": {"timeout_s": 20.0},
    }
    for name, values in sections.items():
        given[name] = given.get(name, {}) | values
    return EsperConfig.model_validate_json(json.dumps(given))


def ordered(
    number: int,
    apply_step: int | None,
    *,
    site: str = "first",
    blueprint: str = "bottleneck",
    generation: int = 0,
    run_id: str = "run",
) -> ScheduledAdaptation:
    return ScheduledAdaptation(
        adaptation_id=f"{run_id}/a{number}",
        number=number,
        site=site,
        seed=0,
        seed_generation=generation,
        blueprint=blueprint,
        hyperparameters={"rank": 4} if blueprint in ("bottleneck", "lowrank") else {"units": 6},
        decided_epoch=1,
        apply_step=apply_step,
    )


class Driver:
    """What a workflow does with a session, in one thread."""

    def __init__(self, world: World, session: Session, run_id: str = "run") -> None:
        self.world = world
        self.session = session
        lease = world.call(world.library.lease(run_id))
        assert lease is not None
        self.lease = lease
        self.schedule: tuple[ScheduledAdaptation, ...] = ()

    def request(self, epoch: int, **changes: Any) -> EpochRequest:
        return EpochRequest(lease=self.lease, epoch=epoch, schedule=self.schedule, **changes)

    def train(self, *epochs: int, beat: Callable[[Progress], None] = silent, **changes: Any) -> list[EpochReport]:
        reports = []
        for epoch in epochs:
            result = self.session.train_epoch(self.request(epoch, **changes), beat)
            assert result.report is not None, result
            reports.append(result.report)
        return reports

    def digest(self) -> str:
        finished = self.session.finish()
        assert finished.digest is not None
        return finished.digest


def undisturbed_digest(folder: Path, config: EsperConfig, epochs: int) -> str:
    """The weights after so many epochs in which nothing happens."""
    world = World(folder)
    try:
        driver = Driver(world, world.open(config))
        driver.train(*range(1, epochs + 1))
        return driver.digest()
    finally:
        world.close()


def assert_reproduced(world: World, config: EsperConfig, digest: str, run_id: str = "run") -> None:
    """The records alone give every head, and the end, to the bit."""
    outcome = reproduce(world.recorded(config, run_id), silent)
    assert outcome.clean, outcome
    assert all(head.same for head in outcome.heads)
    assert outcome.digest == digest
