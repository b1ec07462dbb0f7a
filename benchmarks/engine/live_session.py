"""A live session on a real Urza (SQLite and a folder), as a trainer process has it, and its steps seen one by one.

No server: what the workflow would order is ordered here, from the threads it would come from.
"""

import asyncio
import json
import threading
import time
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any
from typing import TypeVar

import torch
from benchmarks.engine import workload
from torch.optim import AdamW
from torch.optim import Optimizer

import esper
from esper.activities.trainer_store import UrzaStore
from esper.contracts.assets import ArtifactRef
from esper.contracts.config import EsperConfig
from esper.contracts.operational import EpochReport
from esper.contracts.operational import HeadRef
from esper.contracts.operational import KernelDelivery
from esper.contracts.operational import ScheduledAdaptation
from esper.contracts.orders import EpochRequest
from esper.contracts.orders import Lease
from esper.contracts.orders import RecordRun
from esper.runtime.kasmina.cache import kernel_cache
from esper.runtime.tezzeret.blueprints.registry import site_contract_for
from esper.runtime.tezzeret.build import build_kernel
from esper.runtime.tezzeret.certify import certify
from esper.runtime.tezzeret.samples import samples_for
from esper.runtime.tezzeret.samples import unpack_samples
from esper.runtime.tolaria.session import Session
from esper.runtime.tolaria.store import Progress
from esper.runtime.urza import migration
from esper.runtime.urza.library import Library
from esper.runtime.urza.objects import FolderStore
from esper.runtime.urza.objects import reference

ResultT = TypeVar("ResultT")

SITE = "2"
"""The middle layer of `workload.network`, hidden -> hidden."""


@dataclass(frozen=True)
class Moment:
    """The end of one optimizer step: wall time and the CPU time of the training thread, in seconds."""

    wall: float
    thread: float


SEEN: list[Moment] = []
"""The steps of the session under test, in order: a task is made from its import string, so this is a module's."""


def watched_task(rows: int, hidden: int, frozen: bool = False) -> "esper.Task":
    """`workload.task`, with an ordinary AdamW that notes the end of each of its steps; `frozen`: only the last layer
    trains."""

    def note(*_: Any) -> None:
        SEEN.append(Moment(time.perf_counter(), time.thread_time()))

    def optimizer(parameters: Any) -> Optimizer:
        made = AdamW(parameters, lr=1e-3)
        made.register_step_post_hook(note)
        return made

    task = workload.task(rows, hidden)
    if frozen:
        *others, _ = task.model.children()
        for layer in others:
            layer.requires_grad_(False)
    task.optimizer = optimizer
    return task


def configuration(
    *, rows: int, hidden: int, batch_size: int, epochs: int, mode: str, frozen: bool = False
) -> EsperConfig:
    """A run of `watched_task` on one thread."""
    document = {
        "run": {"name": "benchmark", "max_epochs": epochs, "threads": 1, "device": "cpu"},
        "task": {
            "target": "benchmarks.engine.live_session:watched_task",
            "arguments": {"rows": rows, "hidden": hidden, "frozen": frozen},
        },
        "training": {"batch_size": batch_size},
        "delivery": {"mode": mode},
        "tamiyo": {"hold_epochs": 1, "hold_steps": 0},
    }
    return EsperConfig.model_validate_json(json.dumps(document))


class LiveRun:
    """One run, claimed and loaded; a context manager that closes its session and its Urza."""

    def __init__(self, folder: Path, config: EsperConfig, run_id: str) -> None:
        self.run_id = run_id
        self._folder = folder / "objects"
        self.objects = FolderStore(self._folder)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="urza-loop", daemon=True)
        self._thread.start()
        url = f"sqlite+aiosqlite:///{folder / 'urza.db'}"
        self._call(migration.upgrade(url))
        self._library = self._call(Library.open(url, default_file=folder / "urza.db"))
        self._call(self._library.record_run(RecordRun(run_id=run_id, config=config), now="2030-01-01T00:00:00Z"))
        self.lease: Lease = self._call(self._library.claim(run_id, "queue"))
        ledger = self._call(self._library.take_over(self.lease))
        SEEN.clear()
        store = UrzaStore(self._loop, self._library, self.objects, self.lease)
        self.session = Session.load(config, ledger, store)

    def __enter__(self) -> "LiveRun":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.session.close()
        self._call(self._library.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def train(self, epoch: int, schedule: tuple[ScheduledAdaptation, ...] = (), *, probe: bool = False) -> EpochReport:
        """One epoch, in the calling thread."""
        request = EpochRequest(lease=self.lease, epoch=epoch, schedule=schedule, expects_decision=probe)
        result = self.session.train_epoch(request, _silent)
        if result.report is None:
            raise RuntimeError(f"epoch {epoch} ended {result.status}")
        return result.report

    def stored_bytes(self) -> int:
        """The size of everything in the objects' folder."""
        return sum(path.stat().st_size for path in self._folder.rglob("*") if path.is_file())

    def manifest_of(self, head: HeadRef) -> ArtifactRef:
        """Where the checkpoint of a head lies."""
        committed = self._call(self._library.heads(self.run_id))
        return next(each.manifest for each in committed if each.head.digest == head.digest)

    def adaptation(self, apply_step: int | None, rank: int) -> ScheduledAdaptation:
        """A bottleneck for the middle layer."""
        return ScheduledAdaptation(
            adaptation_id=f"{self.run_id}/a1",
            number=1,
            site=SITE,
            seed=0,
            seed_generation=0,
            blueprint="bottleneck",
            hyperparameters={"rank": rank},
            decided_epoch=1,
            apply_step=apply_step,
        )

    def forge(self, report: EpochReport, wanted: ScheduledAdaptation) -> KernelDelivery:
        """Build, certify and store the kernel, as the forge does; the cache of this process knows nothing of it."""
        node = next(node for node in report.graph.nodes if node.contract.site == wanted.site)
        contract = site_contract_for(wanted.blueprint, node, report.graph)
        if contract is None or report.site_samples is None:
            raise RuntimeError(f"{wanted.blueprint} does not fit at {wanted.site}, or nothing was probed there")
        samples = samples_for(contract, unpack_samples(self.objects.get(report.site_samples)))
        files = build_kernel(
            wanted.blueprint, contract, wanted.hyperparameters, seed=1, samples=samples, max_parameters=10_000_000
        )
        certificate = certify(files, samples=samples)
        if not certificate.passed:
            raise RuntimeError(f"no certificate: {certificate.failures}")
        kernel_cache().clear()
        return KernelDelivery(
            delivery_id=reference(wanted.adaptation_id.encode()).digest,
            adaptation=wanted,
            kernel=files.digest,
            manifest=self.objects.put(files.manifest),
            weights=self.objects.put(files.weights),
            certificate=self.objects.put(certificate.model_dump_json().encode()),
        )

    def _call(self, coroutine: Coroutine[Any, Any, ResultT]) -> ResultT:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()


def wait_for_steps(count: int, training: threading.Thread) -> None:
    """Until so many steps were taken; looks 500 times a second and leaves the processor alone meanwhile."""
    while len(SEEN) < count:
        with suppress(TimeoutError):
            training.join(0.002)
        if not training.is_alive():
            raise RuntimeError("training ended before the kernel was delivered")


def use_one_thread() -> None:
    torch.set_num_threads(1)


def _silent(progress: Progress) -> None:
    """A beat that nobody hears."""
