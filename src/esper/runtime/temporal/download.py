"""The SDK's own download of the dev server, as a program of its own: it may abort the interpreter at exit.

`python -m esper.runtime.temporal.download FOLDER VERSION` leaves the program in FOLDER.
"""

import asyncio
import os
import sys

from temporalio.testing import WorkflowEnvironment


async def download(folder: str, version: str) -> None:
    """Start a server once, which makes the SDK fetch it, and stop it again."""
    environment = await WorkflowEnvironment.start_local(download_dest_dir=folder, dev_server_download_version=version)
    await environment.shutdown()


def main() -> None:
    """Exit code 0: the program lies in the folder."""
    code = 0
    try:
        asyncio.run(download(sys.argv[1], sys.argv[2]))
    except RuntimeError as error:
        sys.stderr.write(f"{error}\n")
        code = 1
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
