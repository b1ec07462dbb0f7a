"""The kernel cache under pressure: what has left it is fetched again, and what is in the model needs it no more."""

from collections.abc import Callable
from collections.abc import Iterator

import pytest
import torch
from tolaria_world import Driver
from tolaria_world import make_config
from tolaria_world import ordered
from tolaria_world import silent

from esper.contracts.operational import KernelDelivery
from esper.runtime.kasmina.cache import KernelCache
from esper.runtime.kasmina.cache import kernel_cache
from esper.runtime.tolaria.live.delivery import prepare_kernel

pytestmark = pytest.mark.fault("G3")

Open = Callable[..., Driver]

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache() -> Iterator[KernelCache]:
    """The one of this process, empty before and after."""
    shared = kernel_cache()
    limit = shared.limit
    shared.clear()
    yield shared
    shared.clear()
    shared.set_limit(limit)


def deliveries(driver: Driver, count: int) -> list[KernelDelivery]:
    (report,) = driver.train(1, expects_decision=True)
    return [driver.world.deliver(report, ordered(number, 14), seed=number) for number in range(1, count + 1)]


def test_kernels_that_push_each_other_out_are_each_the_right_one(drive: Open, cache: KernelCache) -> None:
    driver = drive(make_config())
    sent = deliveries(driver, 3)
    assert len({delivery.kernel for delivery in sent}) == 3
    first = prepare_kernel(sent[0], driver.world.store, CPU)
    cache.set_limit(cache.size_bytes)
    weights = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    for _ in range(3):
        for delivery in sent:
            assert prepare_kernel(delivery, driver.world.store, CPU).digest == delivery.kernel
            assert len(cache) == 1
    again = prepare_kernel(sent[0], driver.world.store, CPU).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())


def test_kernel_that_another_run_pushes_out_at_once_is_prepared_all_the_same(
    drive: Open, cache: KernelCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = drive(make_config())
    (delivery,) = deliveries(driver, 1)
    put = cache.put

    def crowded(files, digest):
        put(files, digest)
        cache.clear()

    monkeypatch.setattr(cache, "put", crowded)
    assert prepare_kernel(delivery, driver.world.store, CPU).digest == delivery.kernel


def test_kernel_in_the_model_does_not_need_the_cache(drive: Open, cache: KernelCache) -> None:
    digests = []
    for run_id, evicted in (("kept", False), ("evicted", True)):
        driver = drive(make_config(tamiyo={"hold_epochs": 2, "hold_steps": 0}), run_id=run_id)
        driver.schedule = (ordered(1, 14, run_id=run_id),)
        (first,) = driver.train(1, expects_decision=True)
        assert driver.session.install(driver.world.deliver(first, driver.schedule[0])).accepted
        driver.train(2)
        if evicted:
            cache.clear()
        driver.train(3)
        if evicted:
            cache.clear()
        driver.train(4)
        driver.session.judge(f"{run_id}/a1", silent)
        driver.train(5, 6)
        digests.append(driver.digest())
    assert digests[0] == digests[1]
