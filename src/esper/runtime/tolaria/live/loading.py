"""From a configuration and what Urza knows of a run to its live session: fresh, or bit for bit where it stood."""

from dataclasses import dataclass

import torch

from esper.contracts.config import EsperConfig
from esper.contracts.enums import FactKind
from esper.runtime.tezzeret.build import KernelModule
from esper.runtime.tolaria.checkpoint import CheckpointManifest
from esper.runtime.tolaria.checkpoint import require_same_recipe
from esper.runtime.tolaria.checkpoint import restore
from esper.runtime.tolaria.checkpoint import resume
from esper.runtime.tolaria.live.compilation import compile_grown
from esper.runtime.tolaria.live.compilation import compile_kernel
from esper.runtime.tolaria.live.compilation import no_compiler
from esper.runtime.tolaria.live.compilation import wants_compiled
from esper.runtime.tolaria.live.delivery import prepare_kernel
from esper.runtime.tolaria.live.epoch_end import measure_epoch
from esper.runtime.tolaria.live.epoch_end import watched_value
from esper.runtime.tolaria.live.facts import FactBook
from esper.runtime.tolaria.live.facts import check_ledger
from esper.runtime.tolaria.live.live_run import LiveRun
from esper.runtime.tolaria.live.run_state import RunState
from esper.runtime.tolaria.live.shared_run import SharedRun
from esper.runtime.tolaria.live.turns import Turn
from esper.runtime.tolaria.live.writer import Committed
from esper.runtime.tolaria.live.writer import HeadWriter
from esper.runtime.tolaria.plan import TrainingPlan
from esper.runtime.tolaria.plan import prepare
from esper.runtime.tolaria.randomness import capture_random_state
from esper.runtime.tolaria.store import Ledger
from esper.runtime.tolaria.store import SessionStore
from esper.runtime.tolaria.trainee import Trainee
from esper.runtime.tolaria.trainee import begin


@dataclass(frozen=True)
class Loaded:
    """A run in memory, and what is worth telling a person about how it was loaded."""

    shared: SharedRun
    writer: HeadWriter
    warnings: tuple[str, ...]


def load_run(config: EsperConfig, ledger: Ledger, store: SessionStore) -> Loaded:
    """Build the task and the model, go back to the head if there is one, else commit the first one at step 0.

    Kernels of grafts that are recorded but not in the head are fetched at once: they must be made again, at exactly
    their steps. Raises the errors of `prepare`, `restore`, `resume`, `require_same_recipe` and `check_ledger`.
    """
    run_id = store.lease.run_id
    plan, model = prepare(config)
    trainee = begin(plan, model)
    _check_watched(trainee)
    state, random, last = RunState(), capture_random_state(), None
    warnings: tuple[str, ...] = no_compiler(config.tezzeret, plan.device)
    if ledger.manifest is not None and ledger.head is not None:
        restored = restore(ledger.manifest, store.get)
        require_same_recipe(restored.manifest, config, plan.data_digest, run_id)
        state, random = resume(trainee, restored), restored.random
        last = Committed(ledger.head, ledger.manifest)
        warnings = (*warnings, *_other_bits(restored.manifest, plan), *compile_grown(trainee, lambda: None))
    check_ledger(ledger.facts, state, trainee.step, run_id)
    book = FactBook(ledger.facts, ledger.frontier)
    writer = HeadWriter(store, last)
    run = LiveRun(run_id, trainee, state, store, writer)
    shared = SharedRun(
        run=run,
        book=book,
        turn=Turn(plan.threads, random),
        store=store,
        passed=trainee.step - 1,
        prepared=_kernels(book, run, store),
    )
    if last is None:
        with shared.turn.condition:
            shared.turn.claim()
        with shared.turn.taken():
            shared.await_commit(run.commit(), lambda phase: None)
    return Loaded(shared, writer, warnings)


def _kernels(book: FactBook, run: LiveRun, store: SessionStore) -> dict[str, KernelModule]:
    plan = run.trainee.plan
    kernels = {}
    for fact in book.all():
        if fact.kind is FactKind.GRAFT and fact.delivery is not None and not run.state.has_executed(fact):
            kernel = prepare_kernel(fact.delivery, store, plan.device)
            if wants_compiled(plan.config.tezzeret, plan.device):
                compile_kernel(kernel, run.graph(), plan.device, plan.config.tezzeret.timeout_s, lambda: None)
            kernels[fact.adaptation_id] = kernel
    return kernels


def _check_watched(trainee: Trainee) -> None:
    """An unknown early-stopping metric is found before an epoch has been spent on it."""
    config = trainee.plan.config.training.early_stop
    if config is not None and config.metric not in ("train_loss", "val_loss"):
        watched_value(config, measure_epoch(trainee, lambda: None))


def _other_bits(manifest: CheckpointManifest, plan: TrainingPlan) -> tuple[str, ...]:
    """Why this run will not end in the bits that it would have ended in where it began."""
    here = {
        "threads": (manifest.threads, plan.threads),
        "device": (manifest.device, str(plan.device)),
        "torch": (manifest.torch_version, str(torch.__version__)),
    }
    return tuple(
        f"resumed with {name} {now}, the checkpoint was made with {then}: results are no longer bit for bit the same"
        for name, (then, now) in here.items()
        if then != now
    )
