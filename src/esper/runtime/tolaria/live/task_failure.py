"""What the user's own model, data or task raises in the middle of a run: the end of the session, said in one line."""

from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager

from esper.errors import EsperError
from esper.errors import RunFailed
from esper.errors import last_line
from esper.runtime.tolaria.live.shared_run import SharedRun
from esper.runtime.tolaria.live.turns import Pulse


def failed(shared: SharedRun, what: str, error: BaseException) -> EsperError:
    """The error that every call of the session raises from now on: `error`, or `RunFailed` (ESP-601) in its place."""
    run = shared.run
    end = error
    if not isinstance(end, EsperError):
        end = RunFailed(
            "ESP-601",
            f"{what} raised {last_line(error)}",
            hint="It is the task's own model, data or loss that raised: mend it, then "
            f"`esper-cli resume {run.run_id}`; the traceback is in `esper-cli logs {run.run_id}`",
            run_id=run.run_id,
        )
        end.__cause__ = error
    shared.turn.fail(end)
    return end


@contextmanager
def guarded(shared: SharedRun, pulse: Pulse | None, what: Callable[[], str]) -> Iterator[None]:
    """Inside, what the task raises ends the session, also an exit: it is the worker's to end. What Esper raises and
    what the caller's beat raises to cancel pass."""
    try:
        yield
    except EsperError:
        raise
    except (Exception, SystemExit) as error:
        if pulse is not None and error is pulse.raised:
            raise
        raise failed(shared, what(), error) from error
