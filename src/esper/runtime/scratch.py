"""Folders for files that nobody keeps, and one clear line where there is no room for them."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from esper.errors import ConfigurationError
from esper.runtime.atomic_file import is_full


@contextmanager
def scratch_folder(purpose: str) -> Iterator[Path]:
    """A folder that is gone afterwards; `purpose` is in its name. Raises `ConfigurationError` (ESP-208) where none can
    be made, or where what is written there finds no room."""
    try:
        folder = tempfile.TemporaryDirectory(prefix=f"esper-{purpose}-", ignore_cleanup_errors=True)
    except OSError as error:
        raise ConfigurationError(
            "ESP-208", f"no temporary folder can be made: {error.strerror or error}", hint=_HINT
        ) from error
    with folder as name:
        try:
            yield Path(name)
        except OSError as error:
            if not is_full(error):
                raise
            place = Path(name).parent
            raise ConfigurationError(
                "ESP-208", f"temporary folder '{place}': {error.strerror}", hint=f"Free some space there. {_HINT}"
            ) from error


_HINT = "Set TMPDIR to a folder with room for some checkpoints"
