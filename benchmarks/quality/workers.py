"""Measurements in processes of their own, two at a time at most, each on one thread."""

import multiprocessing
import os
import sys
from collections.abc import Callable
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import wait
from time import monotonic
from typing import Any
from typing import TypeVar

from store import Store

Work = TypeVar("Work")

MOST_PROCESSES = 2


def in_processes(
    store: Store, work: Mapping[str, Work], function: Callable[[Work], Any], *, processes: int
) -> dict[str, Any]:
    """What `function` makes of each work, by key: from the store where it is there, else measured and stored.

    `function` and each work must be picklable. Ends at the first measurement that raises; what was measured until
    then is stored.
    """
    missing = {key: each for key, each in work.items() if store.get(key) is None}
    if missing:
        os.environ["OMP_NUM_THREADS"] = "1"
        began = monotonic()
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(processes, MOST_PROCESSES), mp_context=context) as pool:
            running = {pool.submit(function, each): key for key, each in missing.items()}
            done = 0
            while running:
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    key = running.pop(future)
                    error = future.exception()
                    if error is not None:
                        pool.shutdown(wait=False, cancel_futures=True)
                        raise error
                    store.put(key, future.result())
                    done += 1
                    print(
                        f"{store.folder.name} {key}: {done}/{len(missing)}, {monotonic() - began:.0f} s",
                        file=sys.stderr,
                    )
    return {key: store.get(key) for key in work}
