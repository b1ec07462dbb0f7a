"""Checkpoints: everything that training needs to go on bit for bit, as one JSON manifest and a few tensor files.

`snapshot` copies in line, between two steps; `write` turns the copy into bytes, on any thread; `restore` reads it
back and `resume` puts it into a new model. Nothing is ever unpickled, and equal states give equal bytes. Codes of
`IntegrityError`: ESP-407 truncated or not a checkpoint, ESP-408 from a newer Esper, ESP-409 of another architecture.
"""

import json
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import safetensors.torch
import torch
from pydantic import JsonValue
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor
from torch import nn

from esper.contracts.assets import ArtifactRef
from esper.contracts.base import Contract
from esper.contracts.base import first_problem
from esper.contracts.config import EsperConfig
from esper.errors import IntegrityError
from esper.errors import RunConflict
from esper.runtime.failpoints import hit
from esper.runtime.kasmina.keeping.manifest import GrowthManifest
from esper.runtime.kasmina.keeping.manifest import growth_manifest
from esper.runtime.kasmina.keeping.manifest import rebuild
from esper.runtime.tezzeret.ir import canonical_json
from esper.runtime.tolaria.live.run_state import RunState
from esper.runtime.tolaria.optimizer_state import GroupRecord
from esper.runtime.tolaria.optimizer_state import OptimizerState
from esper.runtime.tolaria.optimizer_state import capture_optimizer
from esper.runtime.tolaria.optimizer_state import restore_optimizer
from esper.runtime.tolaria.randomness import RandomState
from esper.runtime.tolaria.randomness import capture_random_state
from esper.runtime.tolaria.schedule import BASE_LR
from esper.runtime.tolaria.trainee import Trainee

SCHEMA_VERSION = 1

_CONFIGURED = (BASE_LR, "weight_decay", "momentum")
"""Settings of every group of an optimizer that the configuration makes: the rate itself follows from its schedule."""

Put = Callable[[bytes], ArtifactRef]
Get = Callable[[ArtifactRef], bytes]
Each = Callable[[Put, Iterable[bytes]], Iterable[ArtifactRef]]


class CheckpointManifest(Contract):
    """What the head of a run names by its digest."""

    schema_version: int = SCHEMA_VERSION
    torch_version: str
    device: str
    threads: int
    fingerprint: dict[str, JsonValue]
    """The part of the configuration that decides over bits."""
    step: int
    epoch: int
    """Epochs completed."""
    model: ArtifactRef
    frozen: ArtifactRef | None = None
    """The parameters that do not train: a file of their own, so that it is stored once and not with every head."""
    optimizer: ArtifactRef
    random: ArtifactRef
    optimizer_kind: str
    groups: tuple[GroupRecord, ...]
    optimizer_scalars: dict[str, JsonValue]
    random_scalars: dict[str, JsonValue]
    growth: GrowthManifest
    state: RunState

    @property
    def files(self) -> tuple[ArtifactRef, ...]:
        """The tensor files, those of the model first."""
        fixed = () if self.frozen is None else (self.frozen,)
        return (self.model, *fixed, self.optimizer, self.random)


@dataclass(frozen=True)
class Snapshot:
    """A run between two steps, copied: nothing in it changes when training goes on."""

    step: int
    epoch: int
    device: str
    threads: int
    config: EsperConfig
    identity: Mapping[str, JsonValue]
    model: dict[str, Tensor]
    frozen: frozenset[str]
    """Names of the parameters that do not train."""
    optimizer: OptimizerState
    random: RandomState
    growth: GrowthManifest
    state: RunState


@dataclass(frozen=True)
class Restored:
    """A checkpoint read back: its manifest and its tensors."""

    manifest: CheckpointManifest
    model: dict[str, Tensor]
    optimizer: OptimizerState
    random: RandomState


def fingerprint(config: EsperConfig, identity: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """Every setting that decides over the bits of a run, and the `identity` of its model and data; a resume with
    others is a conflict."""
    document = config.model_dump(mode="json")
    sections = ("task", "optimizer", "training", "delivery")
    keys: dict[str, JsonValue] = {f"{name}.{key}": document[name][key] for name in sections for key in document[name]}
    keys |= {f"run.{key}": document["run"][key] for key in ("seed", "max_epochs")}
    keys |= {f"kasmina.{key}": document["kasmina"][key] for key in ("target_layers", "exclude", "seeds_per_layer")}
    keys |= {f"tamiyo.{key}": document["tamiyo"][key] for key in ("hold_epochs", "hold_steps", "keep_margin")}
    for harmless in ("task.path", "training.checkpoint_every", "training.step_timeout_s"):
        keys.pop(harmless)
    return keys | dict(identity)


def identity_of(manifest: CheckpointManifest) -> dict[str, JsonValue]:
    """The part of a checkpoint's fingerprint that is no setting: its model and its data."""
    return {key: value for key, value in manifest.fingerprint.items() if key.startswith(("model.", "data"))}


def snapshot(trainee: Trainee, state: RunState) -> Snapshot:
    """A private copy of everything, on the CPU."""
    plan = trainee.plan
    totals = {"loss_sum": float(trainee.loss_sum), "loss_rows": trainee.loss_rows}
    return Snapshot(
        step=trainee.step,
        epoch=trainee.completed,
        device=str(plan.device),
        threads=plan.threads,
        config=plan.config,
        identity=plan.identity,
        model={name: tensor.detach().clone().cpu() for name, tensor in _tensors(trainee.model).items()},
        frozen=frozenset(name for name, tensor in trainee.model.named_parameters() if not tensor.requires_grad),
        optimizer=capture_optimizer(trainee.optimizer, trainee.model),
        random=capture_random_state(),
        growth=growth_manifest(trainee.model),
        state=state.model_copy(update=totals),
    )


def write(taken: Snapshot, put: Put, each: Each = map) -> ArtifactRef:
    """Store a snapshot: tensors first, then the manifest that names them, whose reference is returned.

    `each` applies `put` to the tensor files: the `map` of an executor stores them side by side.
    """
    numbers = taken.random
    trained = {name: tensor for name, tensor in taken.model.items() if name not in taken.frozen}
    frozen = {name: tensor for name, tensor in taken.model.items() if name in taken.frozen}
    # With its step, what happens to be as it was gets a file of its own: one damaged file is one damaged head.
    parts = [_pack(trained), _pack(taken.optimizer.tensors, taken.step), _pack(numbers.tensors, taken.step)]
    parts += [_pack(frozen)] if frozen else []
    model, optimizer, random, *fixed = each(partial(_put_file, put), parts)
    hit("commit.after_blobs")
    manifest = CheckpointManifest(
        torch_version=str(torch.__version__),
        device=taken.device,
        threads=taken.threads,
        fingerprint=fingerprint(taken.config, taken.identity),
        step=taken.step,
        epoch=taken.epoch,
        model=model,
        frozen=fixed[0] if fixed else None,
        optimizer=optimizer,
        random=random,
        optimizer_kind=taken.optimizer.kind,
        groups=taken.optimizer.groups,
        optimizer_scalars=taken.optimizer.scalars,
        random_scalars={
            "python_version": numbers.python_version,
            "python_gauss": numbers.python_gauss,
            "numpy_position": numbers.numpy_position,
            "numpy_has_gauss": numbers.numpy_has_gauss,
            "numpy_gauss": numbers.numpy_gauss,
        },
        growth=taken.growth,
        state=taken.state,
    )
    data = canonical_json(manifest.model_dump(mode="json"))
    hit("commit.before_manifest")
    stored = put(data)
    hit("commit.after_manifest")
    return stored


def read_manifest(manifest: ArtifactRef, fetch: Get) -> CheckpointManifest:
    """The manifest of a checkpoint without its tensors. Raises as `restore` does."""
    return _manifest(_whole(fetch)(manifest))


def restore(manifest: ArtifactRef, fetch: Get) -> Restored:
    """Read a checkpoint back. Raises `IntegrityError` (ESP-407, ESP-408), or what the store raises when it is away."""
    get = _whole(fetch)
    document = _manifest(get(manifest))
    fixed = {} if document.frozen is None else _unpack(get(document.frozen), "model")
    return Restored(
        manifest=document,
        model=_unpack(get(document.model), "model") | fixed,
        optimizer=OptimizerState(
            document.optimizer_kind,
            document.groups,
            _unpack(get(document.optimizer), "optimizer"),
            document.optimizer_scalars,
        ),
        random=_random(document, _unpack(get(document.random), "random")),
    )


def recipe_drift(
    manifest: CheckpointManifest, config: EsperConfig, identity: Mapping[str, JsonValue]
) -> dict[str, tuple[JsonValue, JsonValue]]:
    """What decides over bits and is not as it was when the checkpoint was made: by name, what was and what is."""
    return _recipe_differing(manifest.fingerprint, fingerprint(config, identity), identity)


def machine_drift(
    manifest: CheckpointManifest, *, threads: int, device: str, torch_version: str
) -> dict[str, tuple[JsonValue, JsonValue]]:
    """What of the machine is not as it was when the checkpoint was made: the bits will be others too."""
    pairs: dict[str, tuple[JsonValue, JsonValue]] = {
        "threads": (manifest.threads, threads),
        "device": (manifest.device, device),
        "torch": (manifest.torch_version, torch_version),
    }
    return {name: (then, now) for name, (then, now) in pairs.items() if then != now}


def drift_between(then: CheckpointManifest, now: CheckpointManifest) -> dict[str, tuple[JsonValue, JsonValue]]:
    """What was drift, of recipe and machine, when the run of one checkpoint went on to the other."""
    recipe = _recipe_differing(then.fingerprint, now.fingerprint, identity_of(now))
    machine = machine_drift(then, threads=now.threads, device=now.device, torch_version=now.torch_version)
    return recipe | machine


def config_drift(then: EsperConfig, now: EsperConfig) -> dict[str, tuple[JsonValue, JsonValue]]:
    """As `recipe_drift`, between two configurations."""
    return _differing(fingerprint(then, {}), fingerprint(now, {}))


def _recipe_differing(
    then: Mapping[str, JsonValue], now: Mapping[str, JsonValue], identity: Mapping[str, JsonValue]
) -> dict[str, tuple[JsonValue, JsonValue]]:
    if "model.structure" not in then:
        # It was made before Esper noted model and data: what it does not say cannot differ.
        now = {key: value for key, value in now.items() if key in then or key not in identity}
    return _differing(then, now)


def _differing(then: Mapping[str, JsonValue], now: Mapping[str, JsonValue]) -> dict[str, tuple[JsonValue, JsonValue]]:
    return {
        key: (then.get(key), now.get(key)) for key in sorted(now.keys() | then.keys()) if then.get(key) != now.get(key)
    }


def in_words(drift: Mapping[str, tuple[JsonValue, JsonValue]]) -> str:
    """`optimizer.lr was 0.01, is 0.5; ...`."""
    return "; ".join(f"{key} was {json.dumps(was)}, is {json.dumps(now)}" for key, (was, now) in drift.items())


def require_same_recipe(drift: Mapping[str, tuple[JsonValue, JsonValue]], run_id: str) -> None:
    """Raises `RunConflict` (ESP-502) with all that differs, if anything does."""
    if drift:
        raise RunConflict(
            "ESP-502",
            f"run {run_id} cannot go on with another recipe: {in_words(drift)}",
            hint=f"Resume with what it began with; `esper-cli resume {run_id} --accept-drift` goes on as it is",
            run_id=run_id,
        )


def resume(trainee: Trainee, restored: Restored) -> RunState:
    """Put a checkpoint into a trainee that stands where a new run begins, and return the run's state.

    The global generators are not touched: the caller restores `restored.random` when training goes on. Raises
    `IntegrityError` (ESP-409) when the model or the optimizer is not the one that the checkpoint was made with.
    """
    manifest = restored.manifest
    configured = {key: trainee.optimizer.param_groups[0].get(key) for key in _CONFIGURED}
    restore_model(trainee.model, restored)
    restore_optimizer(trainee.optimizer, trainee.model, restored.optimizer)
    if trainee.plan.task_optimizer is None:
        # The same as before, unless a branch or an accepted drift says otherwise.
        for group in trainee.optimizer.param_groups:
            group.update({key: value for key, value in configured.items() if key in group})
    trainee.step = manifest.step
    trainee.completed = manifest.epoch
    trainee.loss_sum.fill_(manifest.state.loss_sum)
    trainee.loss_rows = manifest.state.loss_rows
    return manifest.state


def restore_model(model: nn.Module, restored: Restored) -> None:
    """Put the grown structure and the tensors of a checkpoint onto a freshly wrapped model. Raises `IntegrityError`
    (ESP-404, ESP-408, ESP-409) when it is not the one that the checkpoint was made with."""
    rebuild(model, restored.manifest.growth)
    _load(model, restored.model)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and all buffers, also those that no `state_dict` has: they too are part of what is computed."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _load(model: nn.Module, stored: Mapping[str, Tensor]) -> None:
    tensors = _tensors(model)
    if tensors.keys() != stored.keys():
        odd = sorted(tensors.keys() ^ stored.keys())[0]
        raise _other(f"{odd!r} is in the {'model' if odd in tensors else 'checkpoint'} only")
    for name, tensor in tensors.items():
        if tensor.shape != stored[name].shape or tensor.dtype != stored[name].dtype:
            found, kept = (f"{item.dtype} {tuple(item.shape)}" for item in (tensor, stored[name]))
            raise _other(f"{name!r} is {found}, the checkpoint has {kept}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(stored[name])


def _whole(fetch: Get) -> Get:
    """`fetch` with damaged bytes told as a damaged checkpoint."""

    def get(ref: ArtifactRef) -> bytes:
        try:
            return fetch(ref)
        except IntegrityError as error:
            raise _damaged(error.message) from error

    return get


def _manifest(data: bytes) -> CheckpointManifest:
    try:
        document: Any = json.loads(data)
        version = document["schema_version"] if isinstance(document, dict) else None
    except (ValueError, KeyError) as error:
        raise _damaged(f"its manifest of {len(data)} bytes is not JSON: {error}") from error
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise IntegrityError(
            "ESP-408",
            f"the checkpoint has format {version}, this Esper reads up to {SCHEMA_VERSION}",
            hint="Resume with the version of Esper that wrote it",
        )
    try:
        return CheckpointManifest.model_validate_json(data)
    except ValidationError as error:
        place, problem = first_problem(error)
        raise _damaged(f"its manifest is wrong at {place}: {problem}") from error


def _random(manifest: CheckpointManifest, tensors: dict[str, Tensor]) -> RandomState:
    try:
        return RandomState(tensors=tensors, **manifest.random_scalars)  # type: ignore[arg-type]
    except TypeError as error:
        raise _damaged(f"its random states are incomplete: {error}") from error


def _put_file(put: Put, data: bytes) -> ArtifactRef:
    hit("commit.before_blob")
    stored = put(data)
    hit("commit.after_blob")
    return stored


def _pack(tensors: Mapping[str, Tensor], step: int | None = None) -> bytes:
    noted = None if step is None else {"step": str(step)}
    return safetensors.torch.save({name: tensors[name].contiguous() for name in sorted(tensors)}, noted)


def _unpack(data: bytes, what: str) -> dict[str, Tensor]:
    try:
        return {name: tensor.clone() for name, tensor in safetensors.torch.load(data).items()}
    except (SafetensorError, ValueError, KeyError) as error:
        raise _damaged(f"its {what} file of {len(data)} bytes is not safetensors: {error}") from error


def _damaged(why: str) -> IntegrityError:
    return IntegrityError("ESP-407", f"the checkpoint is damaged: {why}", hint="An older head of the run may be whole")


def _other(why: str) -> IntegrityError:
    return IntegrityError(
        "ESP-409", f"the checkpoint is of another architecture: {why}", hint="Resume with the task it was made with"
    )
