"""The one place where an `EsperError` becomes a Temporal failure and back."""

from typing import Any

from temporalio.exceptions import ApplicationError

from esper.errors import EsperError
from esper.errors import RunFailed
from esper.errors import UnavailableError
from esper.errors import by_name


def to_failure(error: EsperError) -> ApplicationError:
    """An `EsperError` as Temporal carries it: its kind is the type, its JSON form the detail.

    Only what may heal by itself (a service that is away) is retried.
    """
    return ApplicationError(
        str(error),
        error.to_json(),
        type=type(error).__name__,
        non_retryable=not isinstance(error, UnavailableError),
    )


def from_failure(failure: BaseException) -> EsperError:
    """The `EsperError` behind a failure, through all its causes; `RunFailed` (ESP-601) for any other."""
    innermost = failure
    current: BaseException | None = failure
    while current is not None:
        if isinstance(current, EsperError):
            return current
        if isinstance(current, ApplicationError) and current.type is not None:
            kind = by_name(current.type)
            form: Any = current.details[0] if current.details else None
            # A failure of that name that is not ours must not raise here: this runs inside workflows.
            if kind is not None and isinstance(form, dict) and {"code", "message"} <= form.keys():
                return kind(form["code"], form["message"], hint=form.get("hint"), run_id=form.get("run_id"))
        innermost = current
        current = getattr(current, "cause", None) or current.__cause__
    last_line = str(innermost).strip().splitlines()[-1] if str(innermost).strip() else type(innermost).__name__
    return RunFailed("ESP-601", last_line, hint="see `esper-cli logs RUN` for the traceback")
