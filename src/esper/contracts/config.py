"""The configuration of a run: every key, its type, its range and its default.

`runtime.configuration` reads YAML into these; nothing else in Esper knows a default of its own.
"""

from enum import StrEnum
from typing import Annotated
from typing import Literal
from typing import Self

from pydantic import Field
from pydantic import JsonValue
from pydantic import StringConstraints
from pydantic import model_validator

from esper.contracts.base import Contract
from esper.contracts.enums import DeliveryMode

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]


class RunConfig(Contract):
    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,39}$")] = "run"
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    max_epochs: Annotated[int, Field(ge=1, le=1_000_000)] = 10
    device: Annotated[str, StringConstraints(pattern=r"^(auto|cpu|cuda(:[0-9]+)?|mps)$")] = "auto"
    threads: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] = "auto"


class TaskConfig(Contract):
    """What is trained: a packaged task by `name`, or the user's own by `target` (`module:function`)."""

    name: str | None = None
    target: Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$")] | None = None
    path: str | None = None
    """The folder of a data set that the user names (CIFAR)."""
    arguments: dict[str, JsonValue] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.name is None) == (self.target is None):
            raise ValueError("give exactly one of task.name and task.target")
        return self


class ScheduleConfig(Contract):
    name: Literal["constant", "cosine", "linear"] = "constant"
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of all steps over which the learning rate rises linearly from near zero."""


class OptimizerConfig(Contract):
    name: Literal["sgd", "adam", "adamw"] = "adamw"
    lr: Positive = 1e-3
    weight_decay: NonNegative = 0.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    schedule: ScheduleConfig = ScheduleConfig()
    clip: Positive | None = None
    """Largest total gradient norm; `null` for no clipping."""


class EarlyStopConfig(Contract):
    metric: str = "val_loss"
    patience: Annotated[int, Field(ge=1)] = 8
    """Epochs without a new best before the run ends."""
    mode: Literal["min", "max"] = "min"


class CheckpointEvery(Contract):
    """How often an epoch ends with a checkpoint. The last epoch does in any case, and so does every one in which the
    model was changed or on which something may be ordered; a pause, a stop and a graft make one as well. The report of
    every epoch is recorded at once: after a crash the epochs since the last checkpoint are trained again."""

    epochs: Annotated[int, Field(ge=1)] = 1


class TrainingConfig(Contract):
    batch_size: Annotated[int, Field(ge=1, le=1_000_000)] = 64
    early_stop: EarlyStopConfig | None = None
    checkpoint_every: CheckpointEvery = CheckpointEvery()
    step_timeout_s: Annotated[float, Field(ge=10, le=86_400)] = 10.0
    """Seconds that one step, of training or evaluation, may take at most."""


class KasminaConfig(Contract):
    target_layers: Literal["auto"] | tuple[str, ...] = "auto"
    exclude: tuple[str, ...] = ()
    seeds_per_layer: Annotated[int, Field(ge=1, le=64)] = 4
    cache_size_mb: Annotated[int, Field(ge=1, le=65536)] = 128
    strikes: Annotated[int, Field(ge=1, le=100)] = 3


class DeliveryConfig(Contract):
    mode: DeliveryMode = DeliveryMode.SCHEDULED
    lag_epochs: Annotated[int, Field(ge=1, le=1000)] = 1


class TamiyoConfig(Contract):
    policy: str = "heuristic"
    adaptation_frequency: Annotated[int, Field(ge=1)] = 1
    hold_epochs: Annotated[int, Field(ge=1)] = 6
    hold_steps: Annotated[int, Field(ge=0)] = 800
    max_adaptations: Annotated[int, Field(ge=0, le=10_000)] = 6
    blueprints: Annotated[tuple[str, ...], Field(min_length=1)] = ("bottleneck", "widen")
    keep_margin: Annotated[float, Field(ge=0, lt=1)] = 0.02


class CompileMode(StrEnum):
    AUTO = "auto"
    ON = "on"
    OFF = "off"


class TezzeretConfig(Contract):
    timeout_s: Positive = 60.0
    memory_mb: Annotated[int, Field(ge=256)] = 2048
    max_parameters: Annotated[int, Field(ge=1)] = 10_000_000
    max_flops: Annotated[int, Field(ge=1)] = 100_000_000_000
    """Floating point operations of one sample, forward, that a kernel may add."""
    compile: CompileMode = CompileMode.AUTO


class UrzaConfig(Contract):
    database: str = "default"
    objects: str = "default"


class TemporalConfig(Contract):
    address: str = "default"
    namespace: str = "default"


class EsperConfig(Contract):
    """The whole configuration of one run."""

    run: RunConfig = RunConfig()
    task: TaskConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    kasmina: KasminaConfig = KasminaConfig()
    delivery: DeliveryConfig = DeliveryConfig()
    tamiyo: TamiyoConfig = TamiyoConfig()
    tezzeret: TezzeretConfig = TezzeretConfig()
    urza: UrzaConfig = UrzaConfig()
    temporal: TemporalConfig = TemporalConfig()
