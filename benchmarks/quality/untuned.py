"""Arms at the learning rate that a quick start brings along: what a user gets who changes nothing."""

from collections.abc import Mapping
from collections.abc import Sequence

from arms import StaticRun
from arms import quick_start
from arms import train_static
from comparison import Arm
from grown import GrownRun
from grown import in_stack
from store import Store
from workers import in_processes


def host_arm(store: Store, name: str, seeds: Sequence[int], processes: int) -> Arm:
    """The quick start without growth."""
    rate = quick_start(name, seed=0).optimizer.lr
    keys = {f"host-{rate:g}-{seed}": seed for seed in seeds}
    work = {key: StaticRun(name, seed, rate) for key, seed in keys.items()}
    found = in_processes(store, work, train_static, processes=processes)
    return Arm("host, no growth", {rate: {seed: found[key] for key, seed in keys.items()}}, rate, tuned=False)


def grown_arm(
    store: Store, name: str, seeds: Sequence[int], settings: Mapping[str, str] | None = None, title: str = "grown"
) -> Arm:
    """The quick start through the whole stack, with `settings` over it."""
    rate = quick_start(name, seed=0).optimizer.lr
    keys = {f"{title.replace(' ', '-')}-{seed}": seed for seed in seeds}
    work = {key: GrownRun(name, seed, None, settings or {}) for key, seed in keys.items()}
    found = in_stack(store, work)
    return Arm(title, {rate: {seed: found[key] for key, seed in keys.items()}}, rate, tuned=False)
