"""A real S3 server with a front door that can be told to misbehave: the faults that a network cannot make."""

import http.client
import http.server
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import boto3
from botocore.config import Config
from moto.server import ThreadedMotoServer

from esper.runtime.urza.s3 import S3Store

SECRET = "geheim"
BUCKET = "weights"
STALL_S = 1.5
"""Longer than the read time-out of `client_of`."""


class Front(http.server.ThreadingHTTPServer):
    """Passes every request on, unless `fault` says otherwise: the name of a fault, or a status and an S3 error code.

    `stall` and `truncate` send half of an object; `swallow` has the server do what was asked and does not answer.
    """

    daemon_threads = True

    def __init__(self, server: str) -> None:
        super().__init__(("127.0.0.1", 0), _Door)
        self.server = urlsplit(server)
        self.fault: str | tuple[int, str] | None = None
        self.times: int | None = None
        """How often the fault is made before it heals by itself; `None`: until it is told to."""
        self.refused = 0
        self._lock = threading.Lock()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def take_fault(self, method: str) -> str | tuple[int, str] | None:
        with self._lock:
            if self.fault in ("stall", "truncate") and method != "GET":
                return None
            if self.fault is not None and self.times is not None:
                self.times -= 1
                if self.times < 0:
                    self.fault = self.times = None
            self.refused += self.fault is not None
            return self.fault

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gives up is what is asked for."""


class _Door(http.server.BaseHTTPRequestHandler):
    server: Front
    protocol_version = "HTTP/1.1"

    def _pass_on(self) -> None:
        body = self._body()
        fault = self.server.take_fault(self.command)
        self.close_connection = True
        if isinstance(fault, tuple):
            self._answer(fault[0], {}, f"<Error><Code>{fault[1]}</Code><Message>no</Message></Error>".encode())
            return
        inner = http.client.HTTPConnection(self.server.server.netloc, timeout=30)
        headers = {name: value for name, value in self.headers.items() if name not in ("Expect", "Transfer-Encoding")}
        inner.request(self.command, self.path, body, headers | {"Content-Length": str(len(body))})
        answer = inner.getresponse()
        data = answer.read()
        inner.close()
        if fault == "swallow":
            time.sleep(STALL_S)
            return
        kept = {name: value for name, value in answer.getheaders() if name.lower() not in ("connection", "server")}
        self._answer(answer.status, kept, data, cut=fault)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, status: int, headers: dict[str, str], body: bytes, cut: object = None) -> None:
        self.send_response_only(status)
        lengths = {"Content-Length": str(len(body))} if self.command != "HEAD" else {}
        for name, value in (headers | {"Connection": "close"} | lengths).items():
            self.send_header(name, value)
        self.end_headers()
        if cut is None:
            self.wfile.write(body)
            return
        self.wfile.write(body[: len(body) // 2])
        self.wfile.flush()
        if cut == "stall":
            time.sleep(STALL_S)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _pass_on

    def log_message(self, *_: Any) -> None:
        pass


def client_of(endpoint: str, *, read_timeout_s: float = 0.8, connect_timeout_s: float = 2.0) -> Any:
    """As Esper's own client, but in a hurry: one try, and no time-out of many seconds."""
    config = Config(
        s3={"addressing_style": "path"},
        retries={"mode": "standard", "total_max_attempts": 1},
        connect_timeout=connect_timeout_s,
        read_timeout=read_timeout_s,
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id="visible",
        aws_secret_access_key=SECRET,
        config=config,
    )


@contextmanager
def running_front() -> Iterator[Front]:
    """A server with one bucket, and its front door."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    front = Front(f"http://{host}:{port}")
    thread = threading.Thread(target=front.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    client = client_of(front.endpoint, read_timeout_s=60)
    client.create_bucket(Bucket=BUCKET)
    client.close()
    try:
        yield front
    finally:
        front.shutdown()
        thread.join()
        front.server_close()
        server.stop()


def store_at(endpoint: str) -> S3Store:
    return S3Store(client_of(endpoint), BUCKET, "", endpoint=endpoint)
