"""A checkpoint that was collected, trained again from the records and put back under its own digest.

It begins at the nearest older checkpoint that is whole, else where the run began, and goes through every recorded fact
on the way. What comes out must be what the records name, to the bit; else nothing is put back.
"""

from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import replace

from esper.contracts.assets import ArtifactRef
from esper.contracts.operational import EpochReport
from esper.contracts.operational import HeadRef
from esper.errors import DivergenceError
from esper.errors import IntegrityError
from esper.runtime.scratch import scratch_folder
from esper.runtime.tolaria.checkpoint import Get
from esper.runtime.tolaria.checkpoint import Put
from esper.runtime.tolaria.checkpoint import read_manifest
from esper.runtime.tolaria.checkpoint import restore
from esper.runtime.tolaria.reproduction import Fresh
from esper.runtime.tolaria.reproduction import RecordedRun
from esper.runtime.tolaria.reproduction import Shelf
from esper.runtime.tolaria.reproduction import train_again
from esper.runtime.tolaria.session import Session
from esper.runtime.tolaria.store import Progress


def is_whole(manifest: ArtifactRef, get: Get) -> bool:
    """Whether a checkpoint can be read, with the one that the twin of a graft on probation begins at."""
    try:
        held = restore(manifest, get).manifest.state.held
    except IntegrityError:
        return False
    return held is None or held.start is None or is_whole(held.start, get)


def train_to(
    recorded: RecordedRun, report: EpochReport, put: Put, tick: Callable[[Progress], None]
) -> tuple[HeadRef, ArtifactRef]:
    """The checkpoint at the end of the epoch of `report`, trained again and stored by `put`.

    Raises `DivergenceError` (ESP-409) when it is not the recorded head or, where the epoch had none of its own, when
    it does not measure what the report says; and what a session raises: another recipe, data that went away
    (`RunConflict` ESP-502, ESP-2xx, ESP-3xx), a kernel that is gone (`IntegrityError`).
    """
    # What was executed at the end of the epoch, such as a breaker that its evaluation opened, is part of it.
    facts = [fact for fact in recorded.facts if fact.apply_step < report.step or fact in report.facts]
    start = _start(recorded, report.step)
    with scratch_folder("retrain") as folder:
        shelf = Shelf(replace(recorded, start=start), folder)
        head, manifest = start or (None, None)
        ledger = Fresh(facts, head, manifest)
        session = Session.load(
            recorded.config, ledger, shelf, commit_at={report.step}, timed=False, accept_drift=recorded.drifted
        )
        try:
            train_again(session, shelf.lease, facts, report.epoch, tick)
        finally:
            session.close()
        found = _matching(shelf, report)
        if found is None or shelf.divergences:
            raise DivergenceError(
                "ESP-409",
                f"run {recorded.run_id}: epoch {report.epoch}, trained again from the records, is not what it was"
                + "".join(f"; {divergence}" for divergence in shelf.divergences[:1]),
                hint="Bits are only promised on one kind of machine, with the same torch and number of threads",
                run_id=recorded.run_id,
            )
        for ref in files_of(found[1], shelf.get):
            put(shelf.get(ref))
        return found


def _start(recorded: RecordedRun, step: int) -> tuple[HeadRef, ArtifactRef] | None:
    older = sorted((each for each in recorded.heads if each[0].step < step), key=lambda each: each[0].step)
    return next((each for each in reversed(older) if is_whole(each[1], recorded.get)), None)


def _matching(shelf: Shelf, report: EpochReport) -> tuple[HeadRef, ArtifactRef] | None:
    if report.head.step == report.step:
        return next((each for each in shelf.heads if each[0].digest == report.head.digest), None)
    again = shelf.reports.get(report.epoch)
    if again is None or again.metrics != report.metrics:
        return None
    return next((each for each in shelf.heads if each[0].digest == again.head.digest), None)


def files_of(manifest: ArtifactRef, get: Get) -> Sequence[ArtifactRef]:
    """What makes a checkpoint, with the one that a twin begins at. The manifest is last: whoever finds it finds all."""
    document = read_manifest(manifest, get)
    held = document.state.held
    start = [] if held is None or held.start is None else files_of(held.start, get)
    return [*start, *document.files, manifest]
