"""A person's own modules, found by a command as by the trainer that serves a run which was started here."""

import sys
from pathlib import Path


def reach_own_code() -> None:
    """Put the current folder first on `sys.path`: a console script begins with its own folder there instead.

    For commands that call a task in this process. Nothing is done where the current folder is gone.
    """
    try:
        here = str(Path.cwd())
    except FileNotFoundError:
        return
    if here not in sys.path:
        sys.path.insert(0, here)
