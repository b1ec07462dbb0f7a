"""What a run shows in the Temporal Web UI: summaries, current details, search attributes."""

from typing import Any

from temporalio import workflow
from temporalio.common import SearchAttributeKey
from temporalio.common import SearchAttributeUpdate

from esper.contracts.operational import Adaptation
from esper.contracts.operational import EpochReport
from esper.contracts.orders import RunStatus

EXPERIMENT = SearchAttributeKey.for_keyword("EsperExperiment")
PHASE = SearchAttributeKey.for_keyword("EsperPhase")
MODEL = SearchAttributeKey.for_keyword("EsperModel")
PARENT = SearchAttributeKey.for_keyword("EsperParent")
EPOCH = SearchAttributeKey.for_int("EsperEpoch")
KERNELS = SearchAttributeKey.for_int("EsperKernels")
BEST_METRIC = SearchAttributeKey.for_float("EsperBestMetric")

_SUMMARY_BYTES = 400


def epoch_summary(epoch: int, last: EpochReport | None, live_kernels: int) -> str:
    """The timeline row of one epoch: what was known when it was ordered."""
    if last is None:
        return f"epoch {epoch}"
    noun = "seed" if live_kernels == 1 else "seeds"
    return f"epoch {epoch} | val {last.metrics.val_loss:.4g} after {last.epoch} | {live_kernels} {noun} active"


def clipped(text: str) -> str:
    """A summary within the server's limit."""
    encoded = text.encode()
    return text if len(encoded) <= _SUMMARY_BYTES else encoded[: _SUMMARY_BYTES - 3].decode(errors="ignore") + "..."


def details(status: RunStatus, adaptations: tuple[Adaptation, ...]) -> str:
    """The run's current state as a markdown table."""
    rows = [
        ("phase", status.phase),
        ("epoch", f"{status.epoch} of {status.max_epochs}"),
        ("step", str(status.step)),
        ("training loss", _number(status.train_loss)),
        ("validation loss", f"{_number(status.val_loss)} (best {_number(status.best_val_loss)})"),
        ("parameters", _number(status.parameters)),
        ("live kernels", str(status.live_kernels)),
        ("decisions", str(status.decisions)),
        ("trainer", status.task_queue or "none"),
        ("restarts", str(status.restarts)),
    ]
    messages = status.messages
    if messages.dead_letters or messages.stale or messages.repeated:
        counts = f"{messages.dead_letters} unreadable, {messages.stale} stale, {messages.repeated} repeated"
        rows.append(("messages put aside", "; ".join((counts, *messages.recent))))
    lines = ["| | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in rows)]
    if adaptations:
        lines += ["", "| adaptation | epoch | site | blueprint | step | state | why |", "|---|---|---|---|---|---|---|"]
        lines += [
            f"| {a.adaptation_id} | {a.epoch} | {_cell(a.site)} | {_cell(a.blueprint)} | "
            f"{'-' if a.apply_step is None else a.apply_step} | {a.state.value} | {_cell(a.reason)} |"
            for a in adaptations[-20:]
        ]
    return "\n".join(lines)


def upsert_progress(status: RunStatus) -> None:
    """One history event at the end of an epoch, never per step."""
    updates: list[SearchAttributeUpdate[Any]] = [
        EPOCH.value_set(status.epoch),
        KERNELS.value_set(status.live_kernels),
        PHASE.value_set(status.phase),
    ]
    if status.best_val_loss is not None:
        updates.append(BEST_METRIC.value_set(status.best_val_loss))
    workflow.upsert_search_attributes(updates)


def _number(value: float | int | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
