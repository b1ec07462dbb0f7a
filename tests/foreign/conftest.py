"""Every model here is made from a configuration: nothing may be looked for elsewhere."""

import socket
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection to anywhere is an error."""

    def refuse(self: socket.socket, address: Any) -> None:
        raise AssertionError(f"a test of a foreign model connects to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
