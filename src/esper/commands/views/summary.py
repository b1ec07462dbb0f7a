"""A run in words: what `show` prints, what `start-run` ends with, and the decisions of `history`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from esper.commands import output
from esper.commands.actions import connections
from esper.contracts.enums import AdaptationState
from esper.contracts.enums import Outcome
from esper.contracts.orders import Lineage
from esper.contracts.orders import RunDocument
from esper.runtime.run_document import RunView
from esper.runtime.run_document import run_document

ENDINGS = {
    Outcome.COMPLETED: "completed",
    Outcome.STOPPED: "stopped; its checkpoint is kept",
    Outcome.FAILED: "failed",
    Outcome.RUNNING: "running",
    Outcome.PAUSED: "paused",
}
GREW = frozenset({AdaptationState.TRAINING.value, AdaptationState.FOSSILIZED.value})


def document(view: RunView, *, written: str | None = None) -> RunDocument:
    """The run document with the links that hold on this machine; `written` is the folder that was just written."""
    folder = written or f"results/{view.record.run_id}"
    found = folder if written is not None or (Path(folder) / "growth.json").is_file() else None
    return run_document(view, web_ui=connections.web_ui(view.record.run_id), output=found)


def write_summary(view: RunView, document: RunDocument) -> None:
    """The run for a person: one aligned line a fact, then what was grown."""
    maximum = view.record.config.run.max_epochs
    start, end = document.parameters["start"], document.parameters["end"]
    pairs: list[tuple[str, object]] = [
        ("run", document.run_id),
        ("outcome", ENDINGS[document.outcome]),
        ("branch of", None if document.lineage is None else branch_point(document.lineage)),
        ("epochs", f"{document.epochs} of {maximum}, {document.steps} steps"),
        ("device", None if document.device is None else f"{document.device}, {document.threads} threads"),
    ]
    pairs += [(name.replace("_", " "), output.number(value)) for name, value in document.metrics.items()]
    pairs += [
        ("parameters", "-" if start is None else f"{start} -> {end}"),
        ("training FLOPs", f"{document.compute.training_flops:.3g}"),
        ("probe and twin FLOPs", f"{document.compute.probe_flops:.3g}"),
        ("decisions", f"{document.decisions}, {document.missed} missed"),
        ("stall", f"{document.stall_s:g} s"),
        ("restarts", document.restarts),
        ("divergences", document.divergences or None),
        ("digest", document.digest),
        ("web UI", document.web_ui),
        ("output", document.output),
    ]
    output.write_pairs(pairs)
    output.write("")
    write_adaptations(document.adaptations)
    for warning in document.warnings:
        output.say(f"warning: {warning}")
    if view.record.failure is not None:
        output.say(f"error[{view.record.failure.get('code')}]: {view.record.failure.get('message')}")


def branch_point(lineage: Lineage) -> str:
    """`run after epoch 12, where wait was decided by hand`."""
    decided = "" if lineage.decision is None else f", where to {lineage.decision.value} was decided by hand"
    return f"{lineage.parent} after epoch {lineage.epoch}{decided}"


def write_adaptations(adaptations: tuple[Mapping[str, Any], ...]) -> None:
    """What was grown, kept or removed, and why."""
    if not adaptations:
        output.write("Nothing has been grown.")
        return
    grown = sum(adaptation["state"] in GREW for adaptation in adaptations)
    noun = "adaptation" if len(adaptations) == 1 else "adaptations"
    output.write(f"{len(adaptations)} {noun}, {grown} of them in the model:")
    output.write_table(
        ("adaptation", "epoch", "site", "seed", "blueprint", "state", "apply step", "reason"),
        [
            [
                adaptation[name]
                for name in ("adaptation_id", "epoch", "site", "seed", "blueprint", "state", "apply_step", "reason")
            ]
            for adaptation in adaptations
        ],
    )


def say_useful_commands(run_id: str, *, ended: bool, local_stack: bool) -> None:
    """What a person is likely to want next, with the id filled in."""
    command = "esper-cli"
    lines = [("Look at it", f"{command} show {run_id}"), ("Why it grew", f"{command} history {run_id}")]
    if ended:
        lines.append(("Replay it", f"{command} replay {run_id}"))
    else:
        lines += [
            ("Watch it", f"{command} watch {run_id}"),
            ("Pause it", f"{command} pause {run_id}"),
            ("Stop it", f"{command} stop {run_id}"),
        ]
    if local_stack:
        lines.append(("The Temporal server and the workers still run; end them", f"{command} down"))
    output.say("Useful commands:")
    for what, line in lines:
        output.say(f"  {what}:  {line}")


def write_history(document: Mapping[str, Any]) -> None:
    """Every decision on its own line; evidence and outcome below those that ordered something."""
    for decision in document["decisions"]:
        output.write(f"epoch {decision['epoch']:>4}  {decision['kind']:<9} {decision['code']:<16} {decision['reason']}")
        if decision["adaptation"] is not None:
            for alternative in decision["alternatives"]:
                chosen = all(alternative[name] == decision[name] for name in ("site", "blueprint"))
                output.write(f"          {'*' if chosen else ' '} {_alternative(alternative)}")
            output.write(f"          {_outcome(decision['adaptation'])}")
    for rewind in document["rewinds"]:
        output.write(
            f"rewind      lease {rewind['lease_gen']}: {rewind['from_head'][:19]} back to {rewind['to_head'][:19]}  "
            f"{rewind['reason']}"
        )
    for drift in document["drifts"]:
        fields = "; ".join(f"{name} was {was}, is {now}" for name, (was, now) in drift["fields"].items())
        output.write(f"drift       from step {drift['step']} on: {fields}")


def write_chronicle(workflow: Mapping[str, Any]) -> None:
    """What the run's workflow tells: one line a happening, in the order of its executions."""
    for happening in workflow["events"]:
        time = happening["time"][:19].replace("T", " ")
        output.write(f"{time}  {happening['kind']:<9} {happening['text']}")
    if workflow["missing"] is not None:
        output.say(f"note: {workflow['missing']}")


def _alternative(alternative: Mapping[str, Any]) -> str:
    return (
        f"{alternative['site']} {alternative['blueprint']}  score {alternative['score']:.4g} "
        f"(threshold {alternative['threshold']:.4g})  +{alternative['added_parameters']} parameters  "
        f"{alternative['reason']}"
    )


def _outcome(adaptation: Mapping[str, Any]) -> str:
    judge = adaptation["judge"]
    gains = (
        f"  gain {output.number(judge['gain'])}, lower bound {output.number(judge['gain_lower_bound'])}"
        if judge
        else ""
    )
    return (
        f"{adaptation['adaptation_id']}  apply step {adaptation['apply_step']}  {adaptation['state']}{gains}  "
        f"{adaptation['reason']}"
    )
