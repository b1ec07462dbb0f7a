"""`esper-cli` and `python -m esper`: ends quietly also when it is interrupted while it is still loading."""

import os
from typing import NoReturn


def main() -> NoReturn:
    """The console script."""
    try:
        from esper.cli import main as command_line

        command_line()
    except KeyboardInterrupt:
        os._exit(130)


if __name__ == "__main__":
    main()
