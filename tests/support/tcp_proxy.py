"""A TCP proxy in threads of the test's own process that can be told to be a bad network.

For a platform where no packets can be filtered: a partition is a proxy that swallows, on either way or on both.
"""

import contextlib
import socket
import struct
import threading
import time
from dataclasses import dataclass
from dataclasses import replace
from types import TracebackType

_CHUNK = 65536
_POLL_S = 0.05
_RESET = struct.pack("ii", 1, 0)
"""Closing with this `SO_LINGER` sends RST."""


@dataclass(frozen=True)
class Weather:
    """What happens to the bytes of one way. `hold`: they are kept until that is over, as where packets are lost and
    sent again; `slice_bytes`: so many are sent at a time, `delay_s` seconds after each other."""

    delay_s: float = 0.0
    hold: bool = False
    slice_bytes: int = _CHUNK


class TcpProxy:
    """Listens on a port of its own on 127.0.0.1 and passes everything on to `target` (`host:port`).

    `up` is the weather from the client to the target, `down` the other way; both may be changed at any time. With
    `refuse`, new connections are reset.
    """

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = host, int(port)
        self.up = Weather()
        self.down = Weather()
        self.refuse = False
        self._closing = threading.Event()
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(_POLL_S)
        self._threads = [threading.Thread(target=self._accept, name="proxy", daemon=True)]
        self._threads[0].start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    @property
    def connections(self) -> int:
        with self._lock:
            return len(self._pairs)

    def blackhole(self, *, up: bool = True, down: bool = True) -> None:
        """Nothing arrives any more on these ways; connections stay open and look alive. New ones are accepted."""
        self.up = replace(self.up, hold=up)
        self.down = replace(self.down, hold=down)

    def heal(self) -> None:
        """Good weather again; what was held arrives now."""
        self.up = self.down = Weather()
        self.refuse = False

    def reset(self) -> None:
        """RST to both ends of every connection."""
        with self._lock:
            pairs = list(self._pairs)
        for pair in pairs:
            for end in pair:
                with contextlib.suppress(OSError):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            self._drop(pair)

    def close(self) -> None:
        self._closing.set()
        self.reset()
        for thread in self._threads:
            thread.join(10)
        self._listener.close()

    def __enter__(self) -> "TcpProxy":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                client, _ = self._listener.accept()
            except TimeoutError:
                continue
            client.settimeout(_POLL_S)
            try:
                if self.refuse:
                    raise ConnectionRefusedError
                server = socket.create_connection(self._target, timeout=5)
            except OSError:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                client.close()
                continue
            server.settimeout(_POLL_S)
            pair = client, server
            with self._lock:
                self._pairs.add(pair)
            for ends, way in ((pair, "up"), (pair[::-1], "down")):
                thread = threading.Thread(target=self._carry, args=(pair, *ends, way), name=f"proxy-{way}", daemon=True)
                self._threads.append(thread)
                thread.start()

    def _carry(
        self, pair: tuple[socket.socket, socket.socket], source: socket.socket, sink: socket.socket, way: str
    ) -> None:
        try:
            while not self._closing.is_set():
                try:
                    data = source.recv(_CHUNK)
                except TimeoutError:
                    continue
                if not data:
                    break
                self._deliver(data, sink, way)
        except OSError:
            pass
        finally:
            self._drop(pair)

    def _deliver(self, data: bytes, sink: socket.socket, way: str) -> None:
        while data:
            weather = self._weather(way)
            if weather.delay_s:
                self._closing.wait(weather.delay_s)
            while self._weather(way).hold and not self._closing.is_set():
                self._closing.wait(_POLL_S)
            piece, data = data[: weather.slice_bytes], data[weather.slice_bytes :]
            until = time.monotonic() + 30
            while piece:
                try:
                    piece = piece[sink.send(piece) :]
                except TimeoutError:
                    if time.monotonic() > until or self._closing.is_set():
                        raise OSError("nobody reads") from None

    def _weather(self, way: str) -> Weather:
        return self.up if way == "up" else self.down

    def _drop(self, pair: tuple[socket.socket, socket.socket]) -> None:
        with self._lock:
            self._pairs.discard(pair)
        for end in pair:
            # No `shutdown` before: it would send FIN where RST is wanted. Who reads it looks again every 50 ms.
            end.close()
