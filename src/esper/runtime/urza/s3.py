"""Objects in a bucket of any S3-compatible server, through boto3.

A conditional put that finds the key taken is success, because the key is the digest of the bytes: a lost
race wrote the same. Integrity is never left to the server (`objects.verified` runs on every read).
"""

import math
import re
import threading
from collections.abc import Iterator
from collections.abc import Mapping
from contextlib import closing
from contextlib import contextmanager
from datetime import UTC
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError
from botocore.exceptions import ClientError
from botocore.exceptions import FlexibleChecksumError
from botocore.exceptions import HTTPClientError
from botocore.exceptions import IncompleteReadError
from botocore.exceptions import NoCredentialsError
from botocore.exceptions import NoRegionError
from botocore.exceptions import PartialCredentialsError
from botocore.exceptions import TokenRetrievalError

from esper.contracts.assets import ArtifactRef
from esper.errors import ConfigurationError
from esper.errors import EsperError
from esper.errors import ObjectsUnavailable
from esper.runtime.urza.objects import ENDPOINT_VARIABLE
from esper.runtime.urza.objects import StoredObject
from esper.runtime.urza.objects import damaged_key
from esper.runtime.urza.objects import missing
from esper.runtime.urza.objects import object_key
from esper.runtime.urza.objects import reference
from esper.runtime.urza.objects import verified
from esper.runtime.urza.objects import wrong_bytes
from esper.runtime.urza.objects import wrong_size

MULTIPART_BYTES = 64 * 2**20
"""Larger objects go in parts, so that a slow line loses one part and not the whole."""

PART_BYTES = 32 * 2**20

ATTEMPTS = 4
"""Tries of what boto3 itself does not try again: a body that breaks off, a put that meets another put."""

YOUNG_S = 3600.0
"""A put finds its object there: if that is older than this, it is written again, as garbage collection spares the
young."""

_HEX = re.compile(r"[0-9a-f]{64}")
_BUCKET = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{1,254}$")
_TAKEN = {"PreconditionFailed", "412"}
_RACING = {"ConditionalRequestConflict", "409"}
_TOO_OLD = {"NotImplemented", "501"}
_NO_KEY = {"NoSuchKey", "404", "NotFound"}
_DENIED = {
    "AccessDenied",
    "403",
    "Forbidden",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
}


class S3Store:
    """A bucket and a prefix behind one client. `endpoint` is what people may see: no user, no password."""

    def __init__(
        self,
        client: Any,
        bucket: str,
        prefix: str,
        *,
        endpoint: str,
        multipart_bytes: int = MULTIPART_BYTES,
        part_bytes: int = PART_BYTES,
    ) -> None:
        self._client = client
        self._bucket = bucket
        self._prefix = prefix
        self._endpoint = endpoint
        self._multipart_bytes = multipart_bytes
        self._part_bytes = part_bytes

    def put(self, data: bytes) -> ArtifactRef:
        ref = reference(data)
        with self._explained("PutObject"):
            for attempt in range(1, ATTEMPTS + 1):
                try:
                    self._create(ref, data)
                    break
                except ClientError as error:
                    code = _code(error)
                    if code in _TAKEN:
                        self._heal(ref, data)
                        break
                    if code in _TOO_OLD:
                        if self._stored_size(ref) != ref.size_bytes:
                            self._write(ref, data, {})
                        break
                    if code not in _RACING or attempt == ATTEMPTS:
                        raise
        return ref

    def get(self, ref: ArtifactRef) -> bytes:
        with self._explained("GetObject"):
            return verified(self._read(ref), ref, self.describe())

    def peek(self, ref: ArtifactRef, count: int) -> bytes:
        if ref.size_bytes == 0 or count == 0:
            return b""
        with self._explained("GetObject"):
            try:
                asked = {"Bucket": self._bucket, "Key": self._key(ref), "Range": f"bytes=0-{count - 1}"}
                with closing(self._client.get_object(**asked)["Body"]) as body:
                    return bytes(body.read())
            except ClientError as error:
                if _code(error) in _NO_KEY:
                    raise missing(ref, self.describe()) from None
                raise

    def exists(self, ref: ArtifactRef) -> bool:
        with self._explained("HeadObject"):
            return self._stored_size(ref) is not None

    def delete(self, ref: ArtifactRef) -> None:
        with self._explained("DeleteObject"):
            self._client.delete_object(Bucket=self._bucket, Key=self._key(ref))

    def set_aside(self, ref: ArtifactRef) -> None:
        with self._explained("CopyObject"):
            if self._stored_size(ref) is None:
                return
            source = {"Bucket": self._bucket, "Key": self._key(ref)}
            # In parts where it is large: one copy request ends at 5 GB.
            self._client.copy(source, self._bucket, self._below(damaged_key(ref)))
        self.delete(ref)

    def objects(self) -> Iterator[StoredObject]:
        prefix = f"{self._prefix}/sha256/" if self._prefix else "sha256/"
        with self._explained("ListObjectsV2"):
            for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=prefix):
                for item in page.get("Contents", ()):
                    name = item["Key"].removeprefix(prefix)
                    if _HEX.fullmatch(name):
                        ref = ArtifactRef(digest=f"sha256:{name}", size_bytes=int(item["Size"]))
                        yield StoredObject(ref, _age(page, item["LastModified"]))

    def delete_older(self, ref: ArtifactRef, age_s: float) -> bool:
        """As the protocol says, in two requests: a put between them is lost, so let `age_s` be hours."""
        with self._explained("DeleteObject"):
            found = self._head(ref)
            if found is None or found.age_s < age_s:
                return False
        self.delete(ref)
        return True

    def put_back(self) -> int:
        # A collection deletes with one request and lays nothing aside.
        return 0

    def delete_unfinished(self, age_s: float) -> int:
        # An upload that broke off is no object; what it sent is the bucket's to forget (a rule of its lifecycle).
        return 0

    def describe(self) -> str:
        place = f"s3://{self._bucket}/{self._prefix}" if self._prefix else f"s3://{self._bucket}"
        return f"{place} at {self._endpoint}"

    def _key(self, ref: ArtifactRef) -> str:
        return self._below(object_key(ref))

    def _below(self, key: str) -> str:
        return f"{self._prefix}/{key}" if self._prefix else key

    def _create(self, ref: ArtifactRef, data: bytes) -> None:
        self._write(ref, data, {"IfNoneMatch": "*"})

    def _write(self, ref: ArtifactRef, data: bytes, condition: dict[str, str]) -> None:
        if len(data) > self._multipart_bytes:
            self._write_parts(ref, data, condition)
        else:
            self._client.put_object(Bucket=self._bucket, Key=self._key(ref), Body=data, **condition)

    def _write_parts(self, ref: ArtifactRef, data: bytes, condition: dict[str, str]) -> None:
        target = {"Bucket": self._bucket, "Key": self._key(ref)}
        upload = {**target, "UploadId": self._client.create_multipart_upload(**target)["UploadId"]}
        done = False
        try:
            parts = []
            for number in range(1, math.ceil(len(data) / self._part_bytes) + 1):
                body = data[(number - 1) * self._part_bytes : number * self._part_bytes]
                tag = self._client.upload_part(**upload, PartNumber=number, Body=body)["ETag"]
                parts.append({"PartNumber": number, "ETag": tag})
            self._client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts}, **condition)
            done = True
        finally:
            if not done:
                self._client.abort_multipart_upload(**upload)

    def _heal(self, ref: ArtifactRef, data: bytes) -> None:
        """The key is taken: by these bytes, unless somebody truncated them. Those, and old ones that garbage
        collection might take, are written again."""
        found = self._head(ref)
        if found is not None and (found.ref.size_bytes != ref.size_bytes or found.age_s > YOUNG_S):
            self._write(ref, data, {})

    def _stored_size(self, ref: ArtifactRef) -> int | None:
        found = self._head(ref)
        return None if found is None else found.ref.size_bytes

    def _head(self, ref: ArtifactRef) -> StoredObject | None:
        try:
            answer = self._client.head_object(Bucket=self._bucket, Key=self._key(ref))
            size = int(answer["ContentLength"])
            return StoredObject(
                ArtifactRef(digest=ref.digest, size_bytes=size), _age(answer, answer.get("LastModified"))
            )
        except ClientError as error:
            # A HEAD has no body, so a missing bucket looks like a missing key: ask for the bucket itself.
            if _code(error) not in _NO_KEY:
                raise
            self._client.head_bucket(Bucket=self._bucket)
            return None

    def _read(self, ref: ArtifactRef) -> bytes:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                answer = self._client.get_object(Bucket=self._bucket, Key=self._key(ref))
                with closing(answer["Body"]) as body:
                    if answer["ContentLength"] != ref.size_bytes:
                        raise wrong_size(ref, answer["ContentLength"], self.describe())
                    return bytes(body.read())
            except ClientError as error:
                if _code(error) in _NO_KEY:
                    raise missing(ref, self.describe()) from None
                raise
            except FlexibleChecksumError:
                # Where the server keeps a checksum of its own, boto3 finds the damage before we do.
                raise wrong_bytes(ref, "another checksum than the server noted", self.describe()) from None
            except (HTTPClientError, IncompleteReadError, OSError):
                # A body that breaks off or stalls comes after boto3's own retries, which see only the headers.
                if attempt == ATTEMPTS:
                    raise
        raise AssertionError("unreachable")

    @contextmanager
    def _explained(self, operation: str) -> Iterator[None]:
        try:
            yield
        except EsperError:
            raise
        except (ClientError, BotoCoreError, OSError) as error:
            raise _unavailable(error, operation, self._bucket, self._endpoint) from error


def _age(answer: Mapping[str, Any], modified: datetime | None) -> float:
    """Seconds since `modified`, by the clock of the server that both times come from. Where a server does not say,
    its objects are always young: never collected."""
    if modified is None:
        return 0.0
    date = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
    now = parsedate_to_datetime(date) if date else datetime.now(UTC)
    return (now - modified).total_seconds()


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _unavailable(error: Exception, operation: str, bucket: str, endpoint: str) -> ObjectsUnavailable:
    """The one place where a failure of the server becomes one of ours: endpoint, bucket, operation, no secret."""
    where = f"{operation} on bucket {bucket!r} at {endpoint}"
    if isinstance(error, NoCredentialsError | PartialCredentialsError | TokenRetrievalError):
        return ObjectsUnavailable("ESP-323", f"{where}: no credentials found", hint=_CREDENTIALS_HINT)
    if not isinstance(error, ClientError):
        hint = f"Check that the server runs and that {ENDPOINT_VARIABLE} is right"
        return ObjectsUnavailable("ESP-321", f"{where}: no answer ({type(error).__name__})", hint=hint)
    code = _code(error)
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    if code == "NoSuchBucket" or (error.operation_name == "HeadBucket" and status == 404):
        return ObjectsUnavailable("ESP-322", f"{where}: there is no such bucket", hint="Create it, or name another")
    if code == "RequestTimeTooSkewed":
        return ObjectsUnavailable("ESP-324", f"{where}: the clocks differ too much", hint="Set this machine's clock")
    if code in _DENIED or status == 403:
        return ObjectsUnavailable("ESP-323", f"{where}: access denied ({code})", hint=_CREDENTIALS_HINT)
    return ObjectsUnavailable("ESP-321", f"{where}: the server answered {status} {code}", hint="Try again later")


_CREDENTIALS_HINT = (
    "Check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the rights that they give; "
    "the workers of a local stack know those that `esper-cli up` was called with"
)

_CLIENTS: dict[str | None, Any] = {}
_CLIENTS_LOCK = threading.Lock()


def open_s3(bucket: str, prefix: str, *, endpoint: str | None) -> S3Store:
    """The store ``s3://bucket/prefix``; contacts nothing yet. Raises `ConfigurationError` (ESP-204)."""
    if not _BUCKET.match(bucket):
        shown = bucket if "@" not in bucket else "***"
        raise ConfigurationError(
            "ESP-204", f"urza.objects: {shown!r} is no bucket name", hint="Write `s3://bucket/prefix`"
        )
    client = _client(endpoint)
    return S3Store(client, bucket, prefix, endpoint=_without_secrets(client.meta.endpoint_url))


def _client(endpoint: str | None) -> Any:
    """One client a process and endpoint: making one costs 0.2 s, and clients may be shared by threads."""
    with _CLIENTS_LOCK:
        if endpoint not in _CLIENTS:
            _CLIENTS[endpoint] = _make_client(endpoint)
        return _CLIENTS[endpoint]


def _make_client(endpoint: str | None) -> Any:
    session = boto3.session.Session()
    try:
        if endpoint is None:
            return session.client("s3")
        # Servers other than AWS choke on the checksum headers that boto3 sends by default.
        config = Config(
            signature_version="s3v4",
            s3={"addressing_style": "path"},
            retries={"mode": "standard", "max_attempts": 5},
            connect_timeout=3,
            read_timeout=30,
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        region = session.region_name or "us-east-1"
        return session.client("s3", endpoint_url=endpoint, config=config, region_name=region)
    except (ValueError, NoRegionError, BotoCoreError) as error:
        what = "AWS" if endpoint is None else f"{ENDPOINT_VARIABLE} {_without_secrets(endpoint)!r}"
        raise ConfigurationError(
            "ESP-211", f"{what}: no S3 client can be made ({type(error).__name__})", hint="Write http://host:port"
        ) from error


def _without_secrets(endpoint: str) -> str:
    parts = urlsplit(endpoint)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
