"""Oona: the messages between the parts, carried by Temporal signals and updates.

Every message is one `Envelope`: who sent it, what it is about, what it belongs to (`trace_id`: the run)
and what caused it (`causation_id`: another event or decision). `event_id` is the same for every resend
of one message, so that receiving it twice is receiving it once.
"""

from typing import Annotated
from typing import Generic
from typing import Literal
from typing import TypeVar

from pydantic import Field
from pydantic import SerializeAsAny

from esper.contracts.assets import Hyperparameters
from esper.contracts.base import AdaptationId
from esper.contracts.base import Contract
from esper.contracts.base import RunId
from esper.contracts.base import SiteName
from esper.contracts.enums import Topic
from esper.contracts.operational import KernelDelivery


class Payload(Contract):
    """What a message carries; each subclass belongs to exactly one topic, named by its own field."""

    topic: Topic


PayloadT = TypeVar("PayloadT", bound=Payload)


class Envelope(Contract, Generic[PayloadT]):
    """One message. The topic is the payload's own, so the two cannot disagree."""

    version: Literal[1] = 1
    event_id: Annotated[str, Field(min_length=1, max_length=256)]
    trace_id: RunId
    causation_id: Annotated[str, Field(min_length=1, max_length=256)]
    sender: Annotated[str, Field(min_length=1, max_length=128)]
    payload: SerializeAsAny[PayloadT]

    @property
    def topic(self) -> Topic:
        return self.payload.topic


class KernelReady(Payload):
    """Tezzeret to a run: a certified kernel lies in Urza."""

    topic: Literal[Topic.KERNEL_READY] = Topic.KERNEL_READY
    delivery: KernelDelivery


class KernelFailed(Payload):
    """Tezzeret to a run: there will be no kernel for this adaptation."""

    topic: Literal[Topic.KERNEL_FAILED] = Topic.KERNEL_FAILED
    adaptation_id: AdaptationId
    reason: str


class TrainerLost(Payload):
    """The supervisor to a run: the process that served this queue is dead."""

    topic: Literal[Topic.TRAINER_LOST] = Topic.TRAINER_LOST
    task_queue: str
    reason: str


class Pause(Payload):
    """A person to a run: stop at the next step boundary, commit, and wait."""

    topic: Literal[Topic.PAUSE] = Topic.PAUSE


class Resume(Payload):
    """A person to a run: go on."""

    topic: Literal[Topic.RESUME] = Topic.RESUME


class Stop(Payload):
    """A person to a run: stop at the next step boundary, keep the checkpoint, end."""

    topic: Literal[Topic.STOP] = Topic.STOP


class RequestAdaptation(Payload):
    """A person to a run: grow here, now."""

    topic: Literal[Topic.REQUEST_ADAPTATION] = Topic.REQUEST_ADAPTATION
    site: SiteName
    blueprint: str
    hyperparameters: Hyperparameters = Field(default_factory=dict)


class Veto(Payload):
    """A person to a run: do not graft this adaptation."""

    topic: Literal[Topic.VETO] = Topic.VETO
    adaptation_id: AdaptationId


class PinSite(Payload):
    """A person to a run: never grow this site again."""

    topic: Literal[Topic.PIN_SITE] = Topic.PIN_SITE
    site: SiteName


class CullSeed(Payload):
    """A person to a run: ramp what was grown at this site to zero, then remove it."""

    topic: Literal[Topic.CULL_SEED] = Topic.CULL_SEED
    site: SiteName


class Answer(Contract):
    """What a run answers to an update."""

    run_id: RunId
    message: str
    adaptation_id: AdaptationId | None = None
