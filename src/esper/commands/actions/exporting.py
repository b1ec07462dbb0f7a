"""`export` where the model itself is needed: as plain PyTorch in some format, or of a run that has not ended."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esper.commands.actions import connections
from esper.commands.actions.own_code import reach_own_code
from esper.commands.actions.records import look
from esper.commands.actions.records import output_files
from esper.commands.actions.records import require
from esper.contracts.assets import ArtifactRef
from esper.contracts.operational import HeadRef
from esper.errors import ConfigurationError
from esper.errors import RunConflict
from esper.runtime.kasmina.exporting.export import FORMATS
from esper.runtime.kasmina.exporting.export import exported
from esper.runtime.kasmina.exporting.probe import Comparison
from esper.runtime.kasmina.exporting.verify import Format
from esper.runtime.kasmina.exporting.verify import manifest_name
from esper.runtime.kasmina.exporting.verify import verify_export
from esper.runtime.kasmina.keeping.persistence import saved_files
from esper.runtime.run_document import RunView
from esper.runtime.run_document import check_output_folder
from esper.runtime.run_document import write_output_folder
from esper.runtime.tolaria.taken_model import TakenModel
from esper.runtime.tolaria.taken_model import finished_model
from esper.runtime.tolaria.taken_model import head_model
from esper.runtime.tolaria.taken_model import plain_base


@dataclass(frozen=True)
class Written:
    """What was exported, or found exported and checked. `step` is that of the head it was taken from, where known."""

    run_id: str
    folder: str
    format: Format | None
    files: tuple[str, ...]
    step: int | None
    checked: Comparison | None = None

    def to_json(self) -> dict[str, Any]:
        """The document of `export --json`."""
        document: dict[str, Any] = {"run_id": self.run_id, "output": self.folder}
        document |= {"format": self.format, "files": list(self.files), "step": self.step}
        if self.checked is not None:
            document["verified"] = {"max_difference": self.checked.difference, "bound": self.checked.bound}
        return document


@dataclass(frozen=True)
class _Found:
    """What Urza has of the run: the files of its output folder, and of one that has not ended the head's manifest."""

    view: RunView
    files: Mapping[str, bytes]
    head: HeadRef | None
    manifest: ArtifactRef | None


def export(run_id: str, folder: str | None, form: str | None, *, verify: bool) -> Written:
    """Write the output folder of a run, with its model in the format `form`; of a run that has not ended, the model
    of its last head. With `verify`, a folder that already holds such an export is checked and not written.

    Raises `ConfigurationError` (ESP-204, ESP-208), `RunConflict` (ESP-504) for a run that has not finished an epoch,
    `GrowthError` (ESP-438) for a model that cannot be exported so, `PackageMissing` (ESP-102), `IntegrityError`
    (exit 4) when the check fails, and the errors of the run's own task.
    """
    chosen = _format("safetensors" if form is None and verify else form)
    reach_own_code()
    named = folder or f"results/{run_id}" + (f"-{chosen}" if chosen else "")
    if chosen is not None and verify and (Path(named).expanduser() / manifest_name(chosen)).exists():
        return _check_again(run_id, named, chosen)
    path = check_output_folder(named)
    found = asyncio.run(_find(run_id))
    taken = _taken(found)
    files = {**found.files, **(saved_files(taken.model) if found.manifest is not None else {})}
    checked = None
    if chosen is not None:
        made = exported(
            taken.model,
            format=chosen,
            call=taken.example_call() if chosen != "safetensors" or verify else None,
            name=found.view.record.config.run.name,
            verify=verify,
        )
        files |= made.files
        checked = made.comparison
    write_output_folder(path, files)
    return Written(run_id, named, chosen, tuple(sorted(files)), found.head.step if found.head else None, checked)


def _format(given: str | None) -> Format | None:
    for known in FORMATS:
        if given == known:
            return known
    if given is None:
        return None
    raise ConfigurationError("ESP-204", f"--format {given!r} is unknown", hint=f"Give {', '.join(FORMATS)}")


async def _find(run_id: str) -> _Found:
    async with connections.library() as library:
        known = require(library, run_id)
        view = await look(known, run_id, None)
        files = await output_files(known, connections.store(), view)
        if view.record.finished is not None:
            return _Found(view, files, view.record.finished.head, None)
        head = view.record.head
        if head is None or head.epoch == 0:
            raise RunConflict(
                "ESP-504",
                f"run {run_id} is {view.record.outcome.value} and has not finished an epoch",
                hint=f"`esper-cli watch {run_id}` shows when it has" if not view.ended else None,
                run_id=run_id,
            )
        committed = await known.heads(run_id)
        return _Found(view, files, head, next(item.manifest for item in committed if item.head.digest == head.digest))


def _taken(found: _Found) -> TakenModel:
    config = found.view.record.config
    if found.manifest is not None:
        return head_model(config, found.manifest, connections.store().get)
    return finished_model(config, found.files)


def _check_again(run_id: str, named: str, chosen: Format) -> Written:
    path = Path(named).expanduser()
    model = plain_base(asyncio.run(_find(run_id)).view.record.config) if chosen == "safetensors" else None
    checked = verify_export(path, chosen, model)
    return Written(run_id, named, chosen, tuple(sorted(item.name for item in path.iterdir())), None, checked)
