"""From a configuration and what Urza knows of a run to its live session: fresh, or bit for bit where it stood."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from pydantic import JsonValue

from esper.contracts.base import Digest
from esper.contracts.config import EsperConfig
from esper.contracts.enums import FactKind
from esper.errors import RunConflict
from esper.runtime.failpoints import hit
from esper.runtime.tezzeret.build import KernelModule
from esper.runtime.tolaria.checkpoint import in_words
from esper.runtime.tolaria.checkpoint import machine_drift
from esper.runtime.tolaria.checkpoint import recipe_drift
from esper.runtime.tolaria.checkpoint import require_same_recipe
from esper.runtime.tolaria.checkpoint import resume
from esper.runtime.tolaria.live.compilation import compile_grown
from esper.runtime.tolaria.live.compilation import compile_kernel
from esper.runtime.tolaria.live.compilation import no_compiler
from esper.runtime.tolaria.live.compilation import wants_compiled
from esper.runtime.tolaria.live.damage import Found
from esper.runtime.tolaria.live.damage import newest_whole
from esper.runtime.tolaria.live.delivery import prepare_kernel
from esper.runtime.tolaria.live.epoch_end import measure_epoch
from esper.runtime.tolaria.live.epoch_end import watched_value
from esper.runtime.tolaria.live.facts import FactBook
from esper.runtime.tolaria.live.facts import check_ledger
from esper.runtime.tolaria.live.kernel_faults.pace import Pace
from esper.runtime.tolaria.live.kernel_faults.quarantine import is_left_out
from esper.runtime.tolaria.live.kernel_faults.quarantine import quarantine
from esper.runtime.tolaria.live.live_run import LiveRun
from esper.runtime.tolaria.live.run_state import RunState
from esper.runtime.tolaria.live.shared_run import SharedRun
from esper.runtime.tolaria.live.turns import Turn
from esper.runtime.tolaria.live.writer import Committed
from esper.runtime.tolaria.live.writer import HeadWriter
from esper.runtime.tolaria.plan import TrainingPlan
from esper.runtime.tolaria.plan import prepare
from esper.runtime.tolaria.plan import require_repeatable
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
    rewound_from: tuple[Digest, ...] = ()
    """The damaged heads in whose place the run goes on from an older one."""


def load_run(
    config: EsperConfig, ledger: Ledger, store: SessionStore, *, accept_drift: bool = False, timed: bool = True
) -> Loaded:
    """Build the task and the model, go back to the head if there is one, else commit the first one at step 0.

    Kernels of grafts that are recorded but not in the head are fetched at once: they must be made again, at exactly
    their steps. A damaged head is left for the one before it, on record. Another recipe, model or data set than the
    head's is refused, unless `accept_drift` says to go on, on record. Raises the errors of `prepare`, `newest_whole`,
    `resume`, `require_same_recipe`, `require_repeatable` and `check_ledger`; then nothing has been written.
    """
    run_id = store.lease.run_id
    plan, model = prepare(config)
    trainee = begin(plan, model)
    _check_watched(trainee)
    state, random, last = RunState(), capture_random_state(), None
    warnings: tuple[str, ...] = no_compiler(config.tezzeret, plan.device)
    hit("load.before_restore")
    found = newest_whole(ledger, store)
    hit("load.after_restore")
    drift = {} if found is None else recipe_drift(found.restored.manifest, config, plan.identity)
    if not accept_drift:
        require_same_recipe(drift, run_id)
    if found is None:
        require_repeatable(config, plan.identity, plan.data_digest)
    else:
        _require_same_epochs(ledger, plan, run_id)
        state, random = resume(trainee, found.restored), found.restored.random
        last = Committed(found.head, found.manifest)
        hit("load.after_resume")
        warnings = (*warnings, *compile_grown(trainee, lambda: None))
    check_ledger(ledger.facts, state, trainee.step, run_id)
    rewound_from = tuple(ledger.rewound_from)
    if found is not None:
        # Nothing refuses any more: only now is it written down.
        warnings = (*warnings, *_note(found, drift, plan, store))
        rewound_from += () if found.fall is None else (found.fall.damaged.digest,)
    book = FactBook(ledger.facts, ledger.frontier)
    quarantine(book, ledger.crashes, state, trainee.step, store)
    writer = HeadWriter(store, last)
    run = LiveRun(run_id, trainee, state, store, writer)
    shared = SharedRun(
        run=run,
        book=book,
        turn=Turn(plan.threads, random),
        store=store,
        passed=trainee.step - 1,
        prepared=_kernels(book, run, store),
        quarantined=frozenset(ledger.quarantined),
        pace=Pace() if timed else None,
    )
    if last is None:
        hit("load.before_first_head")
        with shared.turn.condition:
            shared.turn.claim()
        with shared.turn.taken():
            shared.await_commit(run.commit(), lambda phase: None)
    hit("load.loaded")
    return Loaded(shared, writer, warnings, rewound_from)


def _kernels(book: FactBook, run: LiveRun, store: SessionStore) -> dict[str, KernelModule]:
    plan = run.trainee.plan
    kernels = {}
    for fact in book.all():
        if fact.kind is not FactKind.GRAFT or is_left_out(book, fact):
            continue
        if fact.delivery is not None and not run.state.has_executed(fact):
            hit("load.before_kernel")
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


def _require_same_epochs(ledger: Ledger, plan: TrainingPlan, run_id: str) -> None:
    """Other rows or another batch size move the steps at which epochs end, grafts are made and verdicts fall: that no
    drift can be accepted for. Raises `RunConflict` (ESP-502)."""
    last = ledger.reports[-1] if ledger.reports else None
    if last is not None and last.step != last.epoch * plan.steps_per_epoch:
        raise RunConflict(
            "ESP-502",
            f"run {run_id} counts {last.step // last.epoch} steps an epoch, with this batch size and these rows it "
            f"would be {plan.steps_per_epoch}",
            hint="Start another run with them",
            run_id=run_id,
        )


def _note(
    found: Found, drift: Mapping[str, tuple[JsonValue, JsonValue]], plan: TrainingPlan, store: SessionStore
) -> tuple[str, ...]:
    """Record a fall to an older head, an accepted drift, and a machine of another kind; all of it in words."""
    words = []
    if found.fall is not None:
        store.rewind(found.fall.damaged, found.head, found.fall.objects, found.fall.reason)
        words.append(
            f"the checkpoint at step {found.fall.damaged.step} was damaged: the run went back to step "
            f"{found.head.step} and trains again from there ({found.fall.reason})"
        )
    machine = machine_drift(
        found.restored.manifest,
        threads=plan.threads,
        device=str(plan.device),
        torch_version=str(torch.__version__),
    )
    if drift or machine:
        store.record_drift(found.head.step, {**drift, **machine})
    if drift:
        words.append(f"went on at step {found.head.step} with another recipe, as accepted: {in_words(drift)}")
    words += [
        f"resumed with {name} {now}, the checkpoint was made with {then}: results are no longer bit for bit the same"
        for name, (then, now) in machine.items()
    ]
    return tuple(words)
