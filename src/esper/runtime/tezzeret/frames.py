"""Messages between a process and a child of the forge: one JSON object and byte strings, on a socket.

Nothing is pickled in either direction.
"""

import json
import socket
import struct
import time
from collections.abc import Sequence
from typing import Any

from esper.runtime.tezzeret.ir import canonical_json

MAX_FRAME_BYTES = 2**31
MAX_BLOBS = 8
_LENGTH = struct.Struct(">Q")

Message = tuple[dict[str, Any], list[bytes]]


def send_message(
    channel: socket.socket, header: dict[str, Any], blobs: Sequence[bytes] = (), *, deadline: float | None = None
) -> None:
    """Send one message. `deadline` is in `time.monotonic` seconds; past it TimeoutError, as from the socket."""
    _send_frame(channel, canonical_json({"blobs": len(blobs), "header": header}), deadline)
    for blob in blobs:
        _send_frame(channel, blob, deadline)


def receive_message(channel: socket.socket, *, deadline: float | None = None) -> Message:
    """Receive one message. Raises TimeoutError past the deadline, EOFError when the other side has gone, ValueError
    when what it sent is not a message."""
    envelope = json.loads(_receive_frame(channel, deadline))
    count = envelope["blobs"]
    if not 0 <= count <= MAX_BLOBS:
        raise ValueError(f"{count} byte strings in one message, the limit is {MAX_BLOBS}")
    return envelope["header"], [_receive_frame(channel, deadline) for _ in range(count)]


def _send_frame(channel: socket.socket, data: bytes, deadline: float | None) -> None:
    _arm(channel, deadline)
    channel.sendall(_LENGTH.pack(len(data)))
    _arm(channel, deadline)
    channel.sendall(data)


def _receive_frame(channel: socket.socket, deadline: float | None) -> bytes:
    (length,) = _LENGTH.unpack(_receive_exactly(channel, _LENGTH.size, deadline))
    if length > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {length} bytes, the limit is {MAX_FRAME_BYTES}")
    return _receive_exactly(channel, length, deadline)


def _receive_exactly(channel: socket.socket, length: int, deadline: float | None) -> bytes:
    data = bytearray()
    while len(data) < length:
        _arm(channel, deadline)
        part = channel.recv(min(length - len(data), 1 << 20))
        if not part:
            raise EOFError("the other side has gone")
        data += part
    return bytes(data)


def _arm(channel: socket.socket, deadline: float | None) -> None:
    if deadline is None:
        channel.settimeout(None)
        return
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("past the deadline")
    channel.settimeout(left)
