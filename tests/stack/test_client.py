import asyncio
import contextlib
import os
import socketserver
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC
from datetime import datetime
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from temporalio.api.workflowservice.v1 import GetSystemInfoResponse
from temporalio.service import RPCError
from temporalio.service import RPCStatusCode

from esper.contracts.config import TemporalConfig
from esper.errors import EsperError
from esper.runtime.home import stack_file
from esper.runtime.temporal import client as client_module
from esper.runtime.temporal.client import ServerAddress
from esper.runtime.temporal.client import connect
from esper.runtime.temporal.client import find_address
from esper.runtime.temporal.client import uses_local_stack

NO_FILE = {"TEMPORAL_CONFIG_FILE": os.devnull}


def failure(home: Path, temporal: TemporalConfig | None = None, **environment: str) -> EsperError:
    began = time.monotonic()
    with pytest.raises(EsperError) as caught:
        asyncio.run(connect(temporal or TemporalConfig(), home, {**NO_FILE, **environment}))
    assert time.monotonic() - began < 60
    return caught.value


def free_address() -> str:
    return "127.0.0.1:1"


def test_the_address_is_the_configurations_then_the_environments_then_the_stacks(tmp_path: Path) -> None:
    stack_file(tmp_path).write_text('{"temporal": {"address": "127.0.0.1:7000"}}')
    toml = tmp_path / "temporal.toml"
    toml.write_text(
        '[profile.default]\naddress = "cluster:7233"\nnamespace = "team"\n[profile.other]\naddress = "b:1"\n'
    )
    file = {"TEMPORAL_CONFIG_FILE": str(toml)}

    def address(temporal: TemporalConfig, environment: dict[str, str]) -> tuple[str, str, bool]:
        found = find_address(temporal, tmp_path, environment)
        assert uses_local_stack(temporal, environment) is found.local_stack
        return found.address, found.namespace, found.loopback

    assert address(TemporalConfig(), NO_FILE) == ("127.0.0.1:7000", "default", True)
    assert address(TemporalConfig(), file) == ("cluster:7233", "team", False)
    assert address(TemporalConfig(), {**file, "TEMPORAL_PROFILE": "other"}) == ("b:1", "default", False)
    assert address(TemporalConfig(), {**file, "TEMPORAL_ADDRESS": "localhost:2"}) == ("localhost:2", "team", True)
    assert address(TemporalConfig(), {**file, "TEMPORAL_ADDRESS": ""}) == ("cluster:7233", "team", False)
    assert address(TemporalConfig(address="c:3", namespace="n"), file) == ("c:3", "n", False)


def test_without_server_and_stack_the_way_to_one_is_said(tmp_path: Path) -> None:
    error = failure(tmp_path)
    assert (error.code, error.exit_code) == ("ESP-301", 3)
    assert "esper-cli up" in (error.hint or "")


@pytest.mark.parametrize("address", ["nowhere", "host:", ":1", "host:99999", "ho st:1", "http://host:1/x"])
def test_an_address_is_host_and_port(tmp_path: Path, address: str) -> None:
    error = failure(tmp_path, TEMPORAL_ADDRESS=address)
    assert (error.code, error.exit_code) == ("ESP-210", 2)
    assert "TEMPORAL_ADDRESS" in error.message


def test_a_refused_connection_is_named_with_its_address(tmp_path: Path) -> None:
    error = failure(tmp_path, TEMPORAL_ADDRESS=free_address())
    assert (error.code, error.exit_code) == ("ESP-301", 3)
    assert "127.0.0.1:1" in error.message
    assert "refused" in error.message


def test_an_unknown_host_is_named(tmp_path: Path) -> None:
    error = failure(tmp_path, TEMPORAL_ADDRESS="no-such-host.invalid:7233")
    assert error.code == "ESP-301"
    assert "no-such-host.invalid:7233" in error.message


@contextmanager
def listener(answer: bytes, context: ssl.SSLContext | None = None) -> Iterator[str]:
    """Something that listens, answers whatever it is sent, and is no Temporal server."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError):
                stream = context.wrap_socket(self.request, server_side=True) if context is not None else self.request
                with stream:
                    stream.recv(100)
                    stream.sendall(answer)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> ssl.SSLContext:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(datetime.now(UTC) - timedelta(days=1))
    signed = builder.not_valid_after(datetime.now(UTC) + timedelta(days=1)).sign(key, hashes.SHA256())
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(private + signed.public_bytes(serialization.Encoding.PEM))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    context.set_alpn_protocols(["h2"])
    return context


def test_something_else_on_the_port_is_told_apart(tmp_path: Path) -> None:
    with listener(b"HTTP/1.1 400 Bad Request\r\n\r\n") as address:
        error = failure(tmp_path, TEMPORAL_ADDRESS=address)
    assert error.code == "ESP-306"
    assert address in error.message


def test_tls_that_the_server_does_not_speak(tmp_path: Path) -> None:
    with listener(b"HTTP/1.1 400 Bad Request\r\n\r\n") as address:
        error = failure(tmp_path, TEMPORAL_ADDRESS=address, TEMPORAL_TLS="true", TEMPORAL_API_KEY="my-secret-key")
    assert error.code == "ESP-302"
    assert "does not speak it" in error.message
    assert "my-secret-key" not in str(error)


def test_tls_that_only_the_server_speaks(tmp_path: Path, certificate: ssl.SSLContext) -> None:
    with listener(b"", certificate) as address:
        error = failure(tmp_path, TEMPORAL_ADDRESS=address)
    assert error.code == "ESP-302"
    assert "the server speaks TLS" in error.message


def test_a_certificate_that_is_not_trusted(tmp_path: Path, certificate: ssl.SSLContext) -> None:
    with listener(b"", certificate) as address:
        error = failure(tmp_path, TEMPORAL_ADDRESS=address, TEMPORAL_TLS="true")
    assert error.code == "ESP-302"
    assert "handshake failed" in error.message


@pytest.mark.temporal
def test_a_namespace_that_is_not_there(shared_home: Path) -> None:
    error = failure(shared_home, TemporalConfig(namespace="nobodys"))
    assert (error.code, error.exit_code) == ("ESP-303", 3)
    assert "'nobodys'" in error.message


@pytest.mark.temporal
def test_a_client_of_the_stack_has_our_converter(shared_home: Path) -> None:
    connected = asyncio.run(connect(TemporalConfig(), shared_home, NO_FILE))
    assert connected.namespace == "default"
    assert "Pydantic" in connected.data_converter.payload_converter_class.__name__


WHERE = ServerAddress("cloud:7233", "team", "TEMPORAL_ADDRESS", False, {"api_key": "my-secret-key"})


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (RPCStatusCode.UNAUTHENTICATED, "ESP-304"),
        (RPCStatusCode.PERMISSION_DENIED, "ESP-304"),
        (RPCStatusCode.NOT_FOUND, "ESP-303"),
        (RPCStatusCode.UNIMPLEMENTED, "ESP-306"),
    ],
)
def test_every_refusal_of_a_server_has_its_own_words(status: RPCStatusCode, code: str) -> None:
    error = client_module._refused(WHERE, RPCError("password=my-other-secret", status, b""))
    assert error.code == code
    assert "cloud:7233" in error.message
    assert "secret" not in str(error)


class _OldServer:
    """A server older than any that can be had here."""

    @property
    def workflow_service(self) -> "_OldServer":
        return self

    async def get_system_info(self, request: object) -> GetSystemInfoResponse:
        return GetSystemInfoResponse(server_version="1.29.4")

    async def describe_namespace(self, request: object) -> None:
        return None


def test_a_server_that_is_too_old_is_refused() -> None:
    with pytest.raises(EsperError) as caught:
        asyncio.run(client_module._examine(_OldServer(), WHERE))  # type: ignore[arg-type]
    assert caught.value.code == "ESP-305"
    assert "1.29.4" in caught.value.message
    assert "1.30" in (caught.value.hint or "")


def test_no_secret_is_shown_by_an_address() -> None:
    assert "secret" not in repr(WHERE)


def test_a_config_file_that_is_no_toml_is_named(tmp_path: Path) -> None:
    toml = tmp_path / "temporal.toml"
    toml.write_text("[profile.default\n")
    error = failure(tmp_path, TEMPORAL_CONFIG_FILE=str(toml))
    assert error.code == "ESP-202"
    assert str(toml) in str(error)


def test_a_key_that_everybody_can_read_is_refused(tmp_path: Path) -> None:
    toml = tmp_path / "temporal.toml"
    toml.write_text('[profile.default]\naddress = "a:1"\napi_key = "my-secret-key"\n')
    toml.chmod(0o644)
    error = failure(tmp_path, TEMPORAL_CONFIG_FILE=str(toml))
    assert error.code == "ESP-213"
    assert "chmod 600" in (error.hint or "")
    assert "my-secret-key" not in str(error)
    toml.chmod(0o600)
    assert find_address(TemporalConfig(), tmp_path, {"TEMPORAL_CONFIG_FILE": str(toml)}).keywords["api_key"]
