"""A worker process without torch: tells the supervisor what files in the home make it tell."""

import os
import signal
import sys
import time
from pathlib import Path

from esper.runtime.worker_files import report


def main() -> None:
    home = Path(os.environ["ESPER_HOME"])
    roles = sys.argv[1:]
    if (home / f"broken-{roles[0]}").exists():
        print("stub: told to break", flush=True)
        os._exit(3)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    report(home, "idle", roles=roles)
    claim, end = home / "claim", home / f"end-{os.getpid()}"
    claimed = False
    while not end.exists():
        if roles == ["trainer"] and not claimed and claim.exists():
            run_id = claim.read_text()
            claim.unlink()
            claimed = True
            report(home, "claimed", roles=roles, run_id=run_id, task_queue=f"esper-trainer@test-{os.getpid()}")
        time.sleep(0.02)
    os._exit(0)


main()
