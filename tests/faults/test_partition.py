"""The network between a trainer and the server is bad while both live, and Urza can still be reached: rows C4 and C6,
with a TCP proxy in the place of the filters that this platform's rights do not allow."""

import asyncio
import socket
import threading
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from tcp_proxy import TcpProxy
from tcp_proxy import Weather
from trainer_stage import EPOCHS
from trainer_stage import TrainerStage
from trainer_stage import assert_whole
from trainer_stage import digest as digest
from trainer_stage import trainer_stage

from esper.contracts.orders import RunRecord

pytestmark = [pytest.mark.temporal, pytest.mark.system, pytest.mark.timeout(400)]


@pytest.fixture
def play(temporal_address: str, tmp_path: Path) -> Callable[..., Any]:
    """A stage with warm trainers, each of which reaches the server through a proxy of its own; the test itself needs
    none. The scene is given the proxies by the trainers' process ids."""

    def playing(scene: Callable[[TrainerStage, Mapping[int, TcpProxy]], Any], *, trainers: int = 1) -> Any:
        async def whole() -> Any:
            with ExitStack() as stack:
                async with trainer_stage(tmp_path, temporal_address, trainers=0) as stage:
                    proxies = [stack.enter_context(TcpProxy(temporal_address)) for _ in range(trainers)]
                    of = {stage.spawn(address=proxy.address): proxy for proxy in proxies}
                    await stage.warm(trainers)
                    return await scene(stage, of)

        return asyncio.run(whole())

    return playing


@pytest.mark.slow
@pytest.mark.fault("C4", "I11")
def test_a_short_partition_costs_nothing(play: Callable[..., Any], digest: str) -> None:
    async def scene(on: TrainerStage, proxies: Mapping[int, TcpProxy]) -> RunRecord:
        handle = await on.start(EPOCHS, pace=0.3)
        proxy = proxies[await on.claimed()]
        await on.trained(handle.id, 1)
        proxy.blackhole()
        await asyncio.sleep(4)
        proxy.heal()
        return await asyncio.wait_for(handle.result(), 120)

    record = play(scene)
    assert_whole(record, digest)
    assert record.restarts == 0


@pytest.mark.slow
@pytest.mark.fault("C4", "I1", "I9", "I11")
@pytest.mark.parametrize("up", [True, False], ids=["both ways", "replies lost"])
def test_a_long_partition_gives_the_run_to_another_and_fences_the_old_owner(
    play: Callable[..., Any], digest: str, up: bool
) -> None:
    async def scene(on: TrainerStage, proxies: Mapping[int, TcpProxy]) -> tuple[RunRecord, list[int], list[str]]:
        handle = await on.start(EPOCHS, pace=0.5)
        cut_off = await on.claimed()
        proxy = proxies[cut_off]
        await on.trained(handle.id, 1)
        old = await on.library.lease(handle.id)
        assert old is not None
        proxy.blackhole(up=up)
        await on.claimed(other_than=cut_off)
        before = await on.heads_of(handle.id, old.lease_gen)
        # Still cut off: Urza alone tells it.
        await on.ended(cut_off)
        proxy.heal()
        on.obey("pace", "0")
        record = await asyncio.wait_for(handle.result(), 120)
        late = [step for step in await on.heads_of(handle.id, old.lease_gen) if step not in before]
        return record, late, on.said(cut_off)

    record, late, said = play(scene, trainers=2)
    assert_whole(record, digest)
    assert late == []
    assert any("LeaseLost" in line for line in said), said


@pytest.mark.slow
@pytest.mark.fault("C6", "I11")
def test_a_slow_network_in_small_pieces_that_drops_its_connections_costs_no_bit(
    play: Callable[..., Any], digest: str
) -> None:
    async def scene(on: TrainerStage, proxies: Mapping[int, TcpProxy]) -> RunRecord:
        handle = await on.start(EPOCHS, pace=0.2)
        proxy = proxies[await on.claimed()]
        proxy.up = proxy.down = Weather(delay_s=0.005, slice_bytes=64)
        for epoch in (1, 2, 3):
            await on.trained(handle.id, epoch)
            proxy.reset()
        proxy.heal()
        return await asyncio.wait_for(handle.result(), 180)

    assert_whole(play(scene), digest)


class Echo:
    """Says what it hears."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._echo, args=(connection,), daemon=True).start()

    def _echo(self, connection: socket.socket) -> None:
        with connection:
            try:
                while data := connection.recv(1024):
                    connection.sendall(data)
            except OSError:
                return

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def echo() -> Iterator[Echo]:
    made = Echo()
    yield made
    made.close()


def connected(proxy: TcpProxy) -> socket.socket:
    host, _, port = proxy.address.rpartition(":")
    made = socket.create_connection((host, int(port)), timeout=10)
    made.settimeout(10)
    return made


def test_the_proxy_passes_on_holds_back_slices_and_breaks_off(echo: Echo) -> None:
    with TcpProxy(echo.address) as proxy, connected(proxy) as client:
        client.sendall(b"one")
        assert client.recv(16) == b"one"
        proxy.blackhole(up=False)
        client.sendall(b"two")
        client.settimeout(0.3)
        with pytest.raises(TimeoutError):
            client.recv(16)
        client.settimeout(10)
        proxy.heal()
        assert client.recv(16) == b"two"
        proxy.down = Weather(delay_s=0.02, slice_bytes=2)
        client.sendall(b"three")
        assert client.recv(16) == b"th"
        assert proxy.connections == 1
        proxy.reset()
        with pytest.raises(ConnectionResetError):
            while client.recv(16):
                pass
        proxy.refuse = True
        with pytest.raises(ConnectionResetError), connected(proxy) as other:
            other.recv(16)
        assert proxy.connections == 0
