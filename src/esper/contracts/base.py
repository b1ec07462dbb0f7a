"""The one base of everything that crosses a process border."""

from typing import Annotated

from pydantic import BaseModel
from pydantic import ConfigDict
from pydantic import StringConstraints
from pydantic import ValidationError


class Contract(BaseModel):
    """Strict, frozen, finite: no coercion, no unknown keys, no NaN or infinity.

    No field may default to a clock, a random number or a uuid: contracts are built inside
    workflows, and such a default would take another value at replay.
    """

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


def first_problem(error: ValidationError) -> tuple[str, str]:
    """Where the first thing is that a document gets wrong (dotted; empty: the whole), and what. Its value is not told:
    it may be a secret."""
    first = error.errors(include_url=False, include_input=False)[0]
    return ".".join(str(part) for part in first["loc"]), first["msg"]


RUN_ID_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"

RunId = Annotated[str, StringConstraints(pattern=RUN_ID_PATTERN)]
"""Names a run; also the workflow id of its ``TrainingRun``."""

AdaptationId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}/a[1-9][0-9]{0,6}$")]
"""``<run id>/a<number>``, numbered from 1 within a run in the order of decision."""

SiteName = Annotated[str, StringConstraints(min_length=1, max_length=512)]
"""The dotted module name of a growth site."""

Digest = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]
"""A content address: ``sha256:<64 hex digits>``."""
