"""What a kernel costs that is in the cache of the process, and one that must come from a folder store.

Rows are kernels (d -> rank -> d, ReLU); columns: finding it, making the private copy that trains, and a miss: two
files read and hashed by the store, verified and built by the cache, and copied.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from benchmarks.engine.measure import alternate
from benchmarks.engine.measure import median_interval
from benchmarks.engine.measure import ratio
from benchmarks.engine.measure import spread
from benchmarks.engine.measure import verdict
from benchmarks.engine.report import Report
from benchmarks.engine.report import options_of

from esper.contracts.assets import SiteContract
from esper.contracts.base import Digest
from esper.runtime.kasmina.cache import KernelCache
from esper.runtime.tezzeret.artifact import KernelFiles
from esper.runtime.tezzeret.build import build_kernel
from esper.runtime.urza.objects import FolderStore

SIZES = ((256, 16), (1024, 64), (4096, 256), (4096, 1024))
LIMIT = 512 * 2**20
FIND_GOAL = 2e-6
COPY_GOAL = 1e-3
"""Seconds, medians."""
FINDINGS = 1000
"""Finding a kernel takes a fraction of a microsecond: so many are timed together."""


def kernel(width: int, rank: int) -> KernelFiles:
    """A certified-size kernel whose weights are all random, as a trained one's are."""
    site = SiteContract(
        site="layer",
        output_site="layer",
        kind="linear",
        input_shape=(width,),
        output_shape=(width,),
        dtype="float32",
        attributes={"bias": True},
    )
    return build_kernel("bottleneck", site, {"rank": rank}, seed=0, samples=None, max_parameters=20_000_000)


def arms_of(files: KernelFiles, digest: Digest, store: FolderStore) -> dict[str, Callable[[], object]]:
    manifest, weights = store.put(files.manifest), store.put(files.weights)
    warm = KernelCache(LIMIT)
    warm.put(files, digest)

    def find() -> None:
        for _ in range(FINDINGS):
            if warm.files(digest) is None:
                raise RuntimeError("the kernel left the cache")

    def instantiate() -> object:
        return _found(warm.get(digest))

    def miss() -> object:
        cold = KernelCache(LIMIT)
        if cold.get(digest) is not None:
            raise RuntimeError("a new cache held a kernel")
        cold.put(KernelFiles(store.get(manifest), store.get(weights)), digest)
        return _found(cold.get(digest))

    return {"find": find, "instantiate": instantiate, "instantiate again": instantiate, "miss": miss}


def _found(module: torch.nn.Module | None) -> torch.nn.Module:
    if module is None or not all(parameter.requires_grad for parameter in module.parameters()):
        raise RuntimeError("no private trainable copy came out of the cache")
    return module


def main() -> None:
    parser = options_of("kernel cache: hit, instantiate, miss")
    parser.add_argument("--rounds", type=int, default=200, help="rounds of each kernel (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    report = Report(
        "kernel_cache",
        "Kernel cache: find, make a private trainable copy, miss from a folder store",
        (
            "kernel",
            "kB",
            "find, us",
            "<= 2",
            "private copy, us",
            "<= 1000",
            "miss, us",
            "miss / copy",
            "copy again / copy",
        ),
    )
    with tempfile.TemporaryDirectory(prefix="esper-benchmark-") as folder:
        for width, rank in SIZES:
            files = kernel(width, rank)
            arms = arms_of(files, files.digest, FolderStore(Path(folder)))
            seconds = alternate(arms, options.rounds, clock=time.perf_counter)
            find = median_interval([taken / FINDINGS for taken in seconds["find"]])
            copied = median_interval(seconds["instantiate"])
            report.rows.append(
                (
                    f"{width}-{rank}-{width}",
                    f"{files.size_bytes / 1e3:.0f}",
                    f"{1e6 * find.median:.2f}",
                    verdict(find, FIND_GOAL),
                    f"{1e6 * copied.median:.0f}",
                    verdict(copied, COPY_GOAL),
                    f"{1e6 * spread(seconds['miss']).median:.0f}",
                    ratio(seconds, "miss", "instantiate").show(1),
                    ratio(seconds, "instantiate again", "instantiate").show(2),
                )
            )
            report.data.append({"kernel": [width, rank], "findings": FINDINGS, "wall_seconds": seconds})
    report.notes = [
        "Wall time, medians; ratios are medians [quartiles] within a round, order shuffled, garbage collection off. "
        "`copy again` is a second identical arm: the noise floor.",
        "A miss reads files that the operating system still has in memory, checks size, sha256, schema, contract and "
        "finiteness, and builds; it does not include the certificate.",
        "Up to about 1 MB the time of a copy is that of making modules; from there on it is that of copying the "
        "weights: the goal is for kernels up to some 8 MB. By default a kernel may have 10 million parameters.",
    ]
    report.publish(options)


if __name__ == "__main__":
    main()
