"""A claimed trainer whose run is over, or is another process's now, becomes free; one that works does not."""

import asyncio
import uuid
from collections.abc import Callable

import pytest
from temporalio.client import Client

from esper import worker
from esper.errors import DatabaseUnavailable

pytestmark = pytest.mark.temporal


class Claimed:
    def __init__(self, *, idle: bool, holds: Callable[[int], bool]) -> None:
        self.idle = idle
        self.looks = 0
        self._holds = holds

    async def holds_lease(self) -> bool:
        self.looks += 1
        return self._holds(self.looks)


def away_once(look: int) -> bool:
    if look == 1:
        raise DatabaseUnavailable("ESP-333", "locked")
    return True


@pytest.mark.parametrize(
    ("trainer", "freed"),
    [
        (Claimed(idle=True, holds=lambda look: True), True),
        (Claimed(idle=True, holds=away_once), True),
        (Claimed(idle=False, holds=lambda look: True), False),
        (Claimed(idle=False, holds=lambda look: False), True),
        (Claimed(idle=False, holds=lambda look: look % 2 == 0), False),
    ],
    ids=["run gone", "database away for a moment", "at work", "fenced while stuck", "fenced for one look only"],
)
def test_a_trainer_that_nobody_needs_becomes_free(
    temporal_address: str, monkeypatch: pytest.MonkeyPatch, trainer: Claimed, freed: bool
) -> None:
    monkeypatch.setattr(worker, "ORPHAN_CHECK_S", 0.005)

    async def scene() -> bool:
        client = await Client.connect(temporal_address)
        orphaned = asyncio.Event()
        watching = asyncio.create_task(worker._watch(client, trainer, f"gone-{uuid.uuid4().hex[:8]}", orphaned))
        async with asyncio.timeout(20):
            while not watching.done() and trainer.looks < 6:
                await asyncio.sleep(0.005)
        watching.cancel()
        return orphaned.is_set()

    assert asyncio.run(scene()) is freed
