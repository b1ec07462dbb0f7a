"""`reproduce`: a run trained again from its records alone, and compared with them."""

import asyncio
from collections.abc import Callable
from dataclasses import asdict

from esper.commands import output
from esper.commands.actions import connections
from esper.commands.actions import records
from esper.commands.actions.own_code import reach_own_code
from esper.contracts.orders import RunRecord
from esper.errors import DivergenceError
from esper.errors import RunConflict
from esper.runtime.tolaria.reproduction import RecordedRun
from esper.runtime.tolaria.reproduction import Reproduction
from esper.runtime.tolaria.reproduction import reproduce
from esper.runtime.tolaria.store import Progress


def reproduce_run(run_id: str, *, as_json: bool) -> int:
    """Train the run again in this process and print what agrees; a difference ends with its own error (exit 4).

    Raises `NotFoundError` (ESP-505), `RunConflict` (ESP-504) for a run that has trained nothing yet, and what a
    trainer raises where task, data or kernels are not what they were.
    """
    record, recorded = asyncio.run(recorded_run(run_id))
    reach_own_code()
    outcome = reproduce(recorded, tell_epochs())
    expected = record.finished.digest if record.finished is not None else None
    problems = _problems(outcome, expected)
    _write(outcome, expected, clean=not problems, as_json=as_json)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise DivergenceError(
            "ESP-409",
            f"run {run_id} does not reproduce: {problems[0]}{more}",
            hint="Bits are only promised on one kind of machine, with the same torch and the same number of threads",
            run_id=run_id,
        )
    return 0


def tell_epochs() -> Callable[[Progress], None]:
    """Says each epoch that is trained again, once."""
    told = -1

    def tick(progress: Progress) -> None:
        nonlocal told
        if progress.epoch != told:
            told = progress.epoch
            output.say(f"epoch {progress.epoch}, step {progress.step}")

    return tick


def _problems(outcome: Reproduction, expected: str | None) -> list[str]:
    problems = list(outcome.divergences)
    problems += [f"the head at step {head.step} has other bits" for head in outcome.different]
    if expected is not None and outcome.digest != expected:
        problems.append(f"the final model is {outcome.digest}, the run's is {expected}")
    return problems


async def recorded_run(run_id: str) -> tuple[RunRecord, RecordedRun]:
    """The run with all that its training follows from. Raises `NotFoundError` (ESP-505), `RunConflict` (ESP-504) for
    one that has trained nothing yet."""
    async with connections.library() as library:
        known = records.require(library, run_id)
        record = await known.run(run_id)
        heads = [(item.head, item.manifest) for item in await known.heads(run_id)]
        facts = await known.facts(run_id)
        drifts = await known.drifts(run_id)
    if not any(head.step for head, _ in heads):
        raise RunConflict("ESP-504", f"run {run_id} has not trained yet: there is nothing to reproduce", run_id=run_id)
    store = connections.store(record.config.urza)
    # `auto` may mean another number here than on the machine that trained the run, and so other bits.
    threads = record.config.run.model_copy(update={"threads": record.threads or record.config.run.threads})
    config = record.config.model_copy(update={"run": threads})
    start = next((each for each in heads if each[0].parent is None), None) if record.lineage is not None else None
    if drifts:
        # With what was accepted there, nothing that came before comes out again: from there on it does.
        start = next((each for each in heads if each[0].step == drifts[-1].step), start)
    return record, RecordedRun(
        run_id=run_id, config=config, facts=facts, heads=heads, get=store.get, start=start, drifted=bool(drifts)
    )


def _write(outcome: Reproduction, expected: str | None, *, clean: bool, as_json: bool) -> None:
    if as_json:
        output.write_json(
            {
                "schema": 1,
                "run_id": outcome.run_id,
                "clean": clean,
                "digest": outcome.digest,
                "recorded_digest": expected,
                "heads": [asdict(head) for head in outcome.heads],
                "divergences": list(outcome.divergences),
            }
        )
        return
    same = sum(head.same for head in outcome.heads)
    kept = [head for head in outcome.heads if head.obstacle is None]
    output.write(f"{same} of {len(kept)} heads are the same to the bit")
    if len(kept) < len(outcome.heads):
        output.write(f"{len(outcome.heads) - len(kept)} heads could not be compared: their bytes are gone")
    relation = "no recorded digest to compare with" if expected is None else f"the run's own is {expected}"
    output.write(f"final model {outcome.digest}; {relation}")
