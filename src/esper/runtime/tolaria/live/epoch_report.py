"""Closing an epoch: everything is measured first, then the state moves at once, then report and head are committed."""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from time import monotonic

from esper.contracts.assets import ArtifactRef
from esper.contracts.enums import FactKind
from esper.contracts.operational import EpochReport
from esper.contracts.operational import Fact
from esper.contracts.operational import HeadRef
from esper.contracts.operational import HealthSignal
from esper.runtime.failpoints import hit
from esper.runtime.kasmina.health.window import Reading
from esper.runtime.kasmina.probe import ProbeCapture
from esper.runtime.kasmina.probe import capture
from esper.runtime.tezzeret.blueprints.registry import registered
from esper.runtime.tolaria.live.epoch_end import watch_early_stop
from esper.runtime.tolaria.live.kernel_faults.guard import measure
from esper.runtime.tolaria.live.live_run import LiveRun
from esper.runtime.tolaria.live.shared_run import Phase
from esper.runtime.tolaria.live.shared_run import SharedRun
from esper.runtime.tolaria.live.writer import Committed

EARLY_STOP = "early-stop"
"""Stands where other facts name an adaptation."""


def close_epoch(
    shared: SharedRun,
    phase: Phase,
    *,
    expects_decision: bool,
    began: float,
    stall_seconds: float,
    wants_head: bool = False,
) -> Future[Committed]:
    """Measure the epoch that has just been trained and commit it. Whatever cancels, cancels before anything has moved.

    `began` (monotonic seconds) is when training of the epoch began, `stall_seconds` how long it has waited since.
    The report is committed with a head where one is due: at every `training.checkpoint_every`-th epoch, at the last,
    where the model was changed, where something may be decided on it, and where it `wants_head`.
    """
    run = shared.run
    run.wait_for_writer(lambda commit: shared.stall_for(commit, phase))
    waited = shared.stall_seconds - stall_seconds
    metrics, held = measure(shared, phase)
    hit("epoch.before_report")
    epoch = run.trainee.completed + 1
    probed = _probe(run) if expects_decision and _can_grow(run, shared) else None
    looked = run.state.model_copy(update={"held": held})
    seen = watch_early_stop(run.trainee, looked, metrics, held=held is not None)
    stop = seen.early_stop.stopped_epoch == epoch
    if stop:
        fact = shared.record(
            _stop_fact(run, f"no better {_watched_name(run)} since epoch {seen.early_stop.best_epoch}")
        )
    run.state = seen
    if stop:
        run.execute(fact)
    run.count_flops()
    watched = run.telemetry.take()
    state = run.state
    learning_rate = float(run.trainee.optimizer.param_groups[0]["lr"])
    samples = run.trainee.loss_rows
    parameters = run.trainee.parameters
    graph = run.graph()
    busy = monotonic() - began - waited
    step = run.step
    every = run.trainee.plan.config.training.checkpoint_every.epochs
    is_last = stop or epoch >= run.trainee.plan.config.run.max_epochs
    due = wants_head or is_last or run.changed or probed is not None or epoch % every == 0

    def make_report(head: HeadRef, site_samples: ArtifactRef | None) -> EpochReport:
        return EpochReport(
            run_id=run.run_id,
            epoch=epoch,
            step=step,
            head=head,
            metrics=metrics,
            learning_rate=learning_rate,
            samples=samples,
            parameters=parameters,
            training_flops=state.training_flops,
            probe_flops=state.probe_flops,
            busy_seconds=max(0.0, busy),
            stall_seconds=waited,
            graph=graph,
            health=_with_errors(_health(watched, probed, epoch, step), state.executed[state.reported :]),
            site_samples=site_samples,
            held_adaptation=None if held is None else held.fact.adaptation_id,
            facts=state.executed[state.reported :],
            stop=stop,
        )

    run.trainee.end_epoch()
    run.state = state.model_copy(update={"reported": len(state.executed), "training_flops": 0.0, "probe_flops": 0.0})
    if not due:
        return run.report(make_report)
    return run.commit(make_report, None if probed is None else partial(probed.samples, outputs=_wants_outputs(run)))


def _probe(run: LiveRun) -> ProbeCapture:
    """Takes only: what is measured of it is measured on the writer's thread, while training goes on."""
    plan, model = run.trainee.plan, run.trainee.model
    batch = plan.train.peek(plan.probed)
    taken = capture(model, lambda: plan.loss(model, batch))
    run.count_probe(len(plan.probed) * run.meter.cost(run.trainee).training)
    return taken


def _health(watched: Reading, probed: ProbeCapture | None, epoch: int, step: int) -> tuple[HealthSignal, ...]:
    """The probe's signals, with what only an optimizer step can tell: that of the last step of the epoch, so that
    they are the same in a run that was resumed within the epoch. Without a probe, what telemetry saw."""
    if probed is None:
        return watched.signals(epoch=epoch, step=step)
    updates = watched.updates()
    return tuple(
        signal.model_copy(update={"update_to_weight": updates.get(signal.site)})
        for signal in probed.signals(epoch=epoch, step=step)
    )


def _with_errors(signals: tuple[HealthSignal, ...], facts: Sequence[Fact]) -> tuple[HealthSignal, ...]:
    """The signals with what the kernels of each site failed in this epoch."""
    errors = Counter(fact.site for fact in facts if fact.kind in (FactKind.STRIKE, FactKind.BREAKER))
    return tuple(
        signal.model_copy(update={"error_count": signal.error_count + errors[signal.site]})
        if errors[signal.site]
        else signal
        for signal in signals
    )


def _wants_outputs(run: LiveRun) -> bool:
    """Whether a blueprint that may be ordered reads what a site gives."""
    names = run.trainee.plan.config.tamiyo.blueprints
    return any(registered(name).reads == "output" for name in names)


def _can_grow(run: LiveRun, shared: SharedRun) -> bool:
    """Whether anything that a decision orders now could still be grafted and judged."""
    plan = run.trainee.plan
    if run.state.held is not None or shared.book.pending_graft(run.state) is not None:
        return False
    lag = plan.config.delivery.lag_epochs * plan.steps_per_epoch
    return plan.judge_step(run.step + lag) <= plan.total_steps


def _stop_fact(run: LiveRun, reason: str) -> Fact:
    return Fact(
        run_id=run.run_id, adaptation_id=EARLY_STOP, kind=FactKind.STOP, apply_step=run.step, seq=0, reason=reason
    )


def _watched_name(run: LiveRun) -> str:
    config = run.trainee.plan.config.training.early_stop
    return "metric" if config is None else config.metric
