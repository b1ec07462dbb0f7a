"""Running torch's tracers and exporters without what they say: their refusals reach the user as one error."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_TALKING = ("torch", "onnxscript", "onnx_ir")


@contextmanager
def quietly() -> Iterator[None]:
    """No warnings, and no log lines of torch and the ONNX packages; all others' stay."""
    names = [name for name in logging.root.manager.loggerDict if name.partition(".")[0] in _TALKING]
    silenced = [logger for logger in map(logging.getLogger, names) if not logger.disabled]
    for logger in silenced:
        logger.disabled = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger in silenced:
            logger.disabled = False


def first_line(error: BaseException) -> str:
    """What an error says, in one line: of the innermost cause, which is the user's own, where errors were wrapped."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
