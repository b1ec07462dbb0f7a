"""The Temporal server as a process of the local stack: how it is started, where it answers."""

import os
from collections.abc import Mapping
from pathlib import Path

from esper.runtime.children import Child
from esper.runtime.children import start_child
from esper.runtime.home import logs_folder
from esper.runtime.home import temporal_database
from esper.runtime.temporal.client import DEFAULT_NAMESPACE
from esper.runtime.temporal.client import ServerAddress
from esper.runtime.temporal.server import server_command

SERVER_GRACE_S = 10.0
"""From SIGTERM to SIGKILL."""


def start_server(
    program: Path, version: str, home: Path, *, port: int, ui_port: int, environment: Mapping[str, str]
) -> Child | None:
    """Start it on the database of `home`; what it prints goes to `logs/temporal.out`. `None` when it was gone at
    once."""
    command = server_command(program, port=port, ui_port=ui_port, database=temporal_database(home, version))
    # The server reads the same TEMPORAL_* and temporal.toml as a client would; none is meant for it.
    plain = without_temporal(environment)
    return start_child(
        ("temporal",), command, environment=plain, folder=home, output=logs_folder(home) / "temporal.out"
    )


def local_address(port: int) -> ServerAddress:
    """Where the server of the local stack answers."""
    return ServerAddress(f"127.0.0.1:{port}", DEFAULT_NAMESPACE, "the local stack", True, {})


def without_temporal(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without any setting of a Temporal client."""
    kept = {name: value for name, value in environment.items() if not name.startswith("TEMPORAL_")}
    # A profile of the user's would bring the TLS and keys of another server.
    return kept | {"TEMPORAL_CONFIG_FILE": os.devnull}
