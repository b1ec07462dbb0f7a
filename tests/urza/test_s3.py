import http.server
import threading
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import pytest
from object_front import SECRET
from object_front import client_of

from esper.errors import IntegrityError
from esper.errors import ObjectsUnavailable
from esper.runtime.urza.locations import open_store
from esper.runtime.urza.objects import object_key
from esper.runtime.urza.objects import reference
from esper.runtime.urza.s3 import S3Store

DATA = b"weights " * 1000
SOON = {"read_timeout_s": 0.3, "connect_timeout_s": 1.0}


class HostileServer(http.server.ThreadingHTTPServer):
    """Answers every request as its script says: method to (status, headers, body) of the first call, second, ..."""

    def __init__(self, script: dict[str, list[tuple[int, dict[str, str], bytes]]]) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.script = script
        self.seen: list[str] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Answer(http.server.BaseHTTPRequestHandler):
    server: HostileServer
    # With it, a client that announces its body is told to go on.
    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.seen.append(self.command)
        answers = self.server.script[self.command]
        status, headers, body = answers.pop(0) if len(answers) > 1 else answers[0]
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "Connection": "close", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    do_GET = do_PUT = do_HEAD = do_DELETE = _answer

    def log_message(self, *_: Any) -> None:
        pass


def refusal(status: int, code: str) -> tuple[int, dict[str, str], bytes]:
    return status, {}, f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()


def found(size: int) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Length": str(size)}, b""


OK = (200, {"ETag": '"x"'}, b"")
NOT_THERE = (404, {}, b"")


@contextmanager
def hostile(**script: list[tuple[int, dict[str, str], bytes]]) -> Iterator[tuple[HostileServer, S3Store]]:
    server = HostileServer(script)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    client = client_of(server.endpoint, **SOON)
    try:
        yield server, S3Store(client, "bucket", "", endpoint=server.endpoint)
    finally:
        client.close()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.fault("D1", "D7")
@pytest.mark.parametrize(
    ("answer", "code", "word"),
    [
        (refusal(403, "AccessDenied"), "ESP-323", "access denied"),
        (refusal(403, "SignatureDoesNotMatch"), "ESP-323", "SignatureDoesNotMatch"),
        (refusal(404, "NoSuchBucket"), "ESP-322", "no such bucket"),
        (refusal(403, "RequestTimeTooSkewed"), "ESP-324", "clocks"),
        (refusal(503, "SlowDown"), "ESP-321", "503 SlowDown"),
        (refusal(500, "InternalError"), "ESP-321", "500"),
    ],
)
def test_what_the_server_refuses_is_said_with_place_and_operation(answer, code, word):
    with hostile(GET=[answer], PUT=[answer], DELETE=[answer]) as (server, store):
        calls: dict[str, Callable[[], Any]] = {
            "GetObject": lambda: store.get(reference(DATA)),
            "PutObject": lambda: store.put(DATA),
            "DeleteObject": lambda: store.delete(reference(DATA)),
        }
        for operation, call in calls.items():
            with pytest.raises(ObjectsUnavailable, match=word) as refused:
                call()
            assert refused.value.code == code
            for part in (operation, "'bucket'", server.endpoint):
                assert part in str(refused.value)
            assert SECRET not in str(refused.value)


def test_a_look_that_is_refused_is_not_an_absence():
    with hostile(HEAD=[(403, {}, b"")]) as (_, store), pytest.raises(ObjectsUnavailable, match="HeadObject") as refused:
        store.exists(reference(DATA))
    assert refused.value.code == "ESP-323"


@pytest.mark.fault("D1")
def test_a_server_that_is_not_there_is_named():
    with hostile() as (server, _):
        endpoint = server.endpoint
    store = S3Store(client_of(endpoint, **SOON), "bucket", "", endpoint=endpoint)
    with pytest.raises(ObjectsUnavailable, match="no answer") as refused:
        store.put(DATA)
    assert refused.value.code == "ESP-321"
    assert endpoint in str(refused.value)


def test_a_missing_bucket_is_not_a_missing_object(s3_client):
    store = open_store("s3://nowhere-at-all", default_folder=Path("unused"))
    for call in (lambda: store.exists(reference(DATA)), lambda: store.get(reference(DATA)), lambda: store.put(DATA)):
        with pytest.raises(ObjectsUnavailable, match="no such bucket") as refused:
            call()
        assert refused.value.code == "ESP-322"


def test_missing_credentials_are_said(s3_endpoint, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    client = boto3.session.Session().client("s3", endpoint_url=s3_endpoint, region_name="us-east-1")
    with pytest.raises(ObjectsUnavailable, match="no credentials") as refused:
        S3Store(client, "bucket", "", endpoint=s3_endpoint).put(DATA)
    assert refused.value.code == "ESP-323"
    client.close()


@pytest.mark.fault("D6")
def test_a_taken_key_is_success():
    with hostile(PUT=[refusal(412, "PreconditionFailed")], HEAD=[found(len(DATA))]) as (server, store):
        assert store.put(DATA) == reference(DATA)
    assert server.seen == ["PUT", "HEAD"]


@pytest.mark.fault("D6")
def test_a_put_that_meets_another_tries_again():
    with hostile(PUT=[refusal(409, "ConditionalRequestConflict"), OK]) as (server, store):
        store.put(DATA)
    assert server.seen == ["PUT", "PUT"]


@pytest.mark.fault("D6")
def test_a_put_that_always_meets_another_gives_up():
    always = [refusal(409, "ConditionalRequestConflict")]
    with hostile(PUT=always) as (server, store), pytest.raises(ObjectsUnavailable, match="409"):
        store.put(DATA)
    assert 1 < len(server.seen) < 10


@pytest.mark.parametrize(("there", "requests"), [(False, ["PUT", "HEAD", "HEAD", "PUT"]), (True, ["PUT", "HEAD"])])
def test_a_server_without_conditions_is_asked_first(there, requests):
    heads = [found(len(DATA))] if there else [NOT_THERE, OK]
    with hostile(PUT=[refusal(501, "NotImplemented"), OK], HEAD=heads) as (server, store):
        store.put(DATA)
    assert server.seen == requests


@pytest.mark.fault("D3")
def test_a_body_that_breaks_off_is_read_again():
    broken = (200, {"Content-Length": str(len(DATA))}, DATA[:100])
    with hostile(GET=[broken, broken, (200, {}, DATA)]) as (server, store):
        assert store.get(reference(DATA)) == DATA
    assert server.seen == ["GET"] * 3


@pytest.mark.fault("D3")
def test_a_body_that_always_breaks_off_is_an_error():
    always = [(200, {"Content-Length": str(len(DATA))}, DATA[:100])]
    with hostile(GET=always) as (server, store), pytest.raises(ObjectsUnavailable, match="GetObject") as refused:
        store.get(reference(DATA))
    assert refused.value.code == "ESP-321"
    assert 1 < len(server.seen) < 10


@pytest.mark.fault("D4")
def test_wrong_bytes_are_refused_and_not_asked_for_again():
    with hostile(GET=[(200, {}, b"x" + DATA[1:])]) as (server, store), pytest.raises(IntegrityError):
        store.get(reference(DATA))
    assert server.seen == ["GET"]


@pytest.fixture
def store_of_parts(s3_client, s3_endpoint) -> S3Store:
    s3_client.create_bucket(Bucket="parts")
    five = 5 * 2**20
    return S3Store(s3_client, "parts", "p", endpoint=s3_endpoint, multipart_bytes=five, part_bytes=five)


def test_a_large_object_goes_in_parts(store_of_parts, s3_client):
    data = bytes(range(256)) * (2**20 * 11 // 256) + b"tail"
    for _ in range(2):
        ref = store_of_parts.put(data)
    assert store_of_parts.get(ref) == data
    assert s3_client.head_object(Bucket="parts", Key=f"p/{object_key(ref)}")["ETag"].endswith('-3"')
    assert s3_client.list_multipart_uploads(Bucket="parts").get("Uploads", []) == []
    store_of_parts.delete(ref)
