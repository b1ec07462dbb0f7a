"""Files that appear whole or not at all, also when the power fails."""

import errno
import os
import secrets
from pathlib import Path

from esper.runtime.failpoints import hit


def write_atomically(path: Path, data: bytes) -> None:
    """Make `path` hold exactly `data`; what was there before stays until then. The folder must exist.

    Two writers never mix: each writes a file of its own beside the path, and the last to finish wins. Raises
    `OSError` with nothing left behind.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        with partial.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        hit("file.before_rename")
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable: a new file's bytes are worth nothing while its name can be lost."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_full(error: BaseException) -> bool:
    """Whether it says that a disk, or a user's share of one, is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
