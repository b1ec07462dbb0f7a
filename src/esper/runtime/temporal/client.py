"""The one way to a Temporal server: where it is, how to reach it, and what is wrong when it cannot be reached.

The address is the configuration's; else that of `TEMPORAL_ADDRESS` or a `temporal.toml` profile, read as
the `temporal` CLI reads them; else the local stack's. TLS, keys and the namespace come from the same files.
"""

import asyncio
import json
import logging
import os
import re
import socket
import ssl
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from temporalio.api.workflowservice.v1 import DescribeNamespaceRequest
from temporalio.api.workflowservice.v1 import GetSystemInfoRequest
from temporalio.client import Client
from temporalio.envconfig import ClientConfig
from temporalio.runtime import LogForwardingConfig
from temporalio.runtime import LoggingConfig
from temporalio.runtime import Runtime
from temporalio.runtime import TelemetryConfig
from temporalio.runtime import TelemetryFilter
from temporalio.service import RPCError
from temporalio.service import RPCStatusCode

from esper.contracts.config import TemporalConfig
from esper.errors import ConfigurationError
from esper.errors import TemporalUnavailable
from esper.runtime.home import stack_file
from esper.runtime.logs import redact
from esper.runtime.temporal.plugin import EsperPlugin
from esper.runtime.temporal.server import LEAST_SERVER

DEFAULT_NAMESPACE = "default"
CONNECT_SECONDS = 9.0
"""For everything together; a person waits at most ten seconds for the news."""
_TCP_SECONDS = 4.0
_PROBE_SECONDS = 2.0


@dataclass(frozen=True)
class ServerAddress:
    """Where the server is and who said so. `keywords` go to `Client.connect`; they may hold secrets."""

    address: str
    namespace: str
    origin: str
    local_stack: bool
    keywords: Mapping[str, Any]

    def __repr__(self) -> str:
        return f"ServerAddress({self.address!r}, {self.namespace!r}, {self.origin!r})"

    @property
    def loopback(self) -> bool:
        """Whether the server can only be on this host."""
        return is_loopback(self.address)


def is_loopback(address: str) -> bool:
    """Whether `host:port` is an address that only this host has."""
    host = address.rpartition(":")[0].strip("[]")
    return host == "localhost" or host.startswith("127.") or host == "::1"


def uses_local_stack(temporal: TemporalConfig, environment: Mapping[str, str]) -> bool:
    """True when nobody names a server, so that `start-run` must make sure of the local stack."""
    return _named_address(temporal, environment) is None


def find_address(temporal: TemporalConfig, home: Path, environment: Mapping[str, str]) -> ServerAddress:
    """Where `connect` will connect to. Nothing is contacted.

    Raises:
        TemporalUnavailable: ESP-301 when nobody names a server and the local stack is not up.
        ConfigurationError: ESP-202 a `temporal.toml` that cannot be read; ESP-213 one with a key that others can read.
    """
    named = _named_address(temporal, environment)
    if named is not None:
        return named
    address = _stack_address(home)
    if address is None:
        raise TemporalUnavailable(
            "ESP-301",
            "no Temporal server: the local stack is not up",
            hint="`esper-cli up` starts it, or set TEMPORAL_ADDRESS",
        )
    namespace = DEFAULT_NAMESPACE if temporal.namespace == "default" else temporal.namespace
    return ServerAddress(address, namespace, "the local stack", True, {})


async def connect(temporal: TemporalConfig, home: Path, environment: Mapping[str, str] | None = None) -> Client:
    """A client with Esper's plugin, connected to a server that answered, in a namespace that is there.

    A process that has called this ends with a flush and `os._exit`: ordinary finalisation was seen to hang.

    Raises:
        TemporalUnavailable: ESP-301 unknown host, refused or silent; ESP-302 TLS; ESP-303 no such namespace;
            ESP-304 the key is rejected; ESP-305 the server is too old; ESP-306 something else answers there.
    """
    where = find_address(temporal, home, os.environ if environment is None else environment)
    return await connect_to(where)


async def connect_to(where: ServerAddress) -> Client:
    """`connect`, to an address that is known already."""
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            await _reach(where)
            client = await _open(where)
            await _examine(client, where)
            return client
    except TimeoutError:
        raise TemporalUnavailable(
            "ESP-301", f"Temporal at {where.address} ({where.origin}) does not answer", hint="Is it the right address?"
        ) from None


def _named_address(temporal: TemporalConfig, environment: Mapping[str, str]) -> ServerAddress | None:
    config_file = _config_file(environment)
    try:
        keywords: dict[str, Any] = dict(
            ClientConfig.load_client_connect_config(
                # Empty ones count as unset, as for the temporal CLI.
                override_env_vars={name: value for name, value in environment.items() if value},
            )
        )
    except RuntimeError as error:
        raise ConfigurationError(
            "ESP-202",
            f"the Temporal settings cannot be read: {_one_line(redact(str(error)))}",
            hint=f"See TEMPORAL_* and {config_file}",
        ) from None
    _check_secrecy(config_file)
    address = keywords.pop("target_host", None)
    namespace = keywords.pop("namespace", None) or DEFAULT_NAMESPACE
    origin = "TEMPORAL_ADDRESS" if environment.get("TEMPORAL_ADDRESS") else f"a profile in {config_file}"
    if temporal.address != "default":
        address, origin = temporal.address, "temporal.address"
    if address is None:
        return None
    if temporal.namespace != "default":
        namespace = temporal.namespace
    if not re.fullmatch(r"(\[[^\]]+\]|[^:\s]+):\d{1,5}", address) or not 0 < int(address.rpartition(":")[2]) < 65536:
        raise ConfigurationError(
            "ESP-210", f"{origin} {redact(address)!r} is not host:port", hint="For example 127.0.0.1:7233"
        )
    return ServerAddress(address, namespace, origin, False, keywords)


def _one_line(text: str) -> str:
    """The first line of a parser's message and its last: between them it quotes the file."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return ": ".join(dict.fromkeys((lines[0], lines[-1]))) if lines else "no reason given"


def _config_file(environment: Mapping[str, str]) -> Path:
    """The `temporal.toml` that the SDK reads, wherever it is or would be."""
    given = environment.get("TEMPORAL_CONFIG_FILE")
    if given:
        return Path(given)
    fallback = Path(environment.get("HOME", "")) / ".config"
    return Path(environment.get("XDG_CONFIG_HOME") or fallback) / "temporalio" / "temporal.toml"


def _check_secrecy(config_file: Path) -> None:
    try:
        readable_by_others = bool(config_file.stat().st_mode & stat.S_IROTH) and config_file.is_file()
        holds_key = readable_by_others and re.search(r"(?m)^\s*api_key\s*=", config_file.read_text()) is not None
    except OSError:
        return
    if holds_key:
        raise ConfigurationError(
            "ESP-213", f"{config_file} holds an API key and everybody can read it", hint=f"chmod 600 {config_file}"
        )


def _stack_address(home: Path) -> str | None:
    try:
        return str(json.loads(stack_file(home).read_bytes())["temporal"]["address"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


async def _reach(where: ServerAddress) -> None:
    """The errors of the network have better words than the client's."""
    host, _, port = where.address.rpartition(":")
    try:
        async with asyncio.timeout(_TCP_SECONDS):
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
            writer.close()
            await writer.wait_closed()
    except socket.gaierror as error:
        why = f"unknown host ({error.strerror})"
    except TimeoutError:
        why = "nothing answers"
    except OSError as error:
        why = f"{os.strerror(error.errno).lower()}" if error.errno else "cannot be reached"
    else:
        return
    hint = (
        "`esper-cli up` starts the local stack" if where.local_stack else "Is the server up, and is this its address?"
    )
    raise TemporalUnavailable("ESP-301", f"Temporal at {where.address} ({where.origin}): {why}", hint=hint)


@cache
def _runtime() -> Runtime:
    """The SDK's own log goes where ours goes. By itself it writes to stdout, where a command's result is read."""
    forwarding = LogForwardingConfig(logging.getLogger("temporalio.core"))
    levels = TelemetryFilter(core_level="WARN", other_level="ERROR")
    return Runtime(telemetry=TelemetryConfig(logging=LoggingConfig(levels, forwarding)))


async def _open(where: ServerAddress) -> Client:
    try:
        return await Client.connect(
            where.address, namespace=where.namespace, plugins=[EsperPlugin()], runtime=_runtime(), **where.keywords
        )
    except RuntimeError as error:
        raise await _explain(where, error) from None
    except RPCError as error:
        raise _refused(where, error) from None


async def _explain(where: ServerAddress, error: RuntimeError) -> TemporalUnavailable:
    """Why a connection that TCP allowed failed: nearly always TLS on one side only."""
    text = str(error)
    if re.search(r"(?i)unauthenticated|permission ?denied", text):
        return _rejected(where)
    wants_tls = bool(where.keywords.get("tls"))
    speaks_tls = await asyncio.to_thread(_speaks_tls, where.address)
    at = f"Temporal at {where.address} ({where.origin})"
    if wants_tls and not speaks_tls:
        return TemporalUnavailable(
            "ESP-302", f"{at}: TLS is configured, the server does not speak it", hint="Set TEMPORAL_TLS=false"
        )
    if speaks_tls and not wants_tls:
        return TemporalUnavailable(
            "ESP-302", f"{at}: the server speaks TLS, none is configured", hint="Set TEMPORAL_TLS=true"
        )
    if speaks_tls:
        return TemporalUnavailable(
            "ESP-302", f"{at}: the TLS handshake failed", hint="Check TEMPORAL_TLS_* and the certificates they name"
        )
    return TemporalUnavailable(
        "ESP-306", f"{at}: something answers, but it is no Temporal server", hint="Is the port right?"
    )


def _speaks_tls(address: str) -> bool:
    host, _, port = address.rpartition(":")
    context = ssl.create_default_context()
    context.check_hostname = False
    # Only whether there is TLS is asked; nothing is sent and nothing believed.
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_SECONDS) as plain:
            context.wrap_socket(plain).close()
    except ssl.SSLError as error:
        # A server that asks for a client certificate does speak TLS; one that answers in plain text does not.
        return error.reason not in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "UNEXPECTED_EOF_WHILE_READING")
    except OSError:
        return False
    return True


async def _examine(client: Client, where: ServerAddress) -> None:
    try:
        system = await client.workflow_service.get_system_info(GetSystemInfoRequest())
        await client.workflow_service.describe_namespace(DescribeNamespaceRequest(namespace=where.namespace))
    except RPCError as error:
        raise _refused(where, error) from None
    version = re.match(r"(\d+)\.(\d+)", system.server_version)
    if version and tuple(int(number) for number in version.groups()) < LEAST_SERVER:
        raise TemporalUnavailable(
            "ESP-305",
            f"Temporal at {where.address} is version {system.server_version}",
            hint=f"Esper needs server {'.'.join(map(str, LEAST_SERVER))} or newer",
        )


def _refused(where: ServerAddress, error: RPCError) -> TemporalUnavailable:
    if error.status in (RPCStatusCode.UNAUTHENTICATED, RPCStatusCode.PERMISSION_DENIED):
        return _rejected(where)
    if error.status == RPCStatusCode.NOT_FOUND:
        return TemporalUnavailable(
            "ESP-303",
            f"Temporal at {where.address} has no namespace {where.namespace!r}",
            hint="Make it, or name another in temporal.namespace or TEMPORAL_NAMESPACE",
        )
    reason = redact(error.message)[:200]
    return TemporalUnavailable("ESP-306", f"Temporal at {where.address} refuses: {error.status.name.lower()}: {reason}")


def _rejected(where: ServerAddress) -> TemporalUnavailable:
    return TemporalUnavailable(
        "ESP-304",
        f"Temporal at {where.address} rejects our credentials for namespace {where.namespace!r}",
        hint="Check TEMPORAL_API_KEY or the client certificate, and that they belong to this namespace",
    )
