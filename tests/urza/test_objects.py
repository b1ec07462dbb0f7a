import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from esper.errors import ConfigurationError
from esper.errors import IntegrityError
from esper.errors import ObjectsUnavailable
from esper.runtime.urza.locations import open_store
from esper.runtime.urza.objects import FolderStore
from esper.runtime.urza.objects import ObjectStore
from esper.runtime.urza.objects import object_key
from esper.runtime.urza.objects import reference

DATA = b"weights " * 1000


class Place:
    """A store and a back door to it, so that a test can look behind and do damage."""

    def __init__(self, store: ObjectStore) -> None:
        self.store = store

    def keys(self) -> list[str]:
        raise NotImplementedError

    def overwrite(self, key: str, data: bytes) -> None:
        raise NotImplementedError

    def content(self, key: str) -> bytes:
        raise NotImplementedError


class FolderPlace(Place):
    def __init__(self, folder: Path) -> None:
        super().__init__(open_store(str(folder), default_folder=folder / "unused"))
        self.folder = folder

    def keys(self) -> list[str]:
        return [str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file()]

    def overwrite(self, key: str, data: bytes) -> None:
        (self.folder / key).write_bytes(data)

    def content(self, key: str) -> bytes:
        return (self.folder / key).read_bytes()


class S3Place(Place):
    def __init__(self, client, bucket: str) -> None:
        super().__init__(open_store(f"s3://{bucket}/team/a", default_folder=Path("unused")))
        self.client, self.bucket = client, bucket

    def keys(self) -> list[str]:
        found = self.client.list_objects_v2(Bucket=self.bucket).get("Contents", [])
        return [entry["Key"].removeprefix("team/a/") for entry in found]

    def overwrite(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=f"team/a/{key}", Body=data)

    def content(self, key: str) -> bytes:
        return self.client.get_object(Bucket=self.bucket, Key=f"team/a/{key}")["Body"].read()


_buckets = iter(range(1_000_000))


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "folder":
        return FolderPlace(tmp_path / "objects")
    client = request.getfixturevalue("s3_client")
    bucket = f"bucket-{next(_buckets)}"
    client.create_bucket(Bucket=bucket)
    return S3Place(client, bucket)


@pytest.mark.parametrize("data", [b"", b"x", DATA])
def test_what_was_put_is_got(place, data):
    ref = place.store.put(data)
    assert ref == reference(data)
    assert place.store.exists(ref)
    assert place.store.get(ref) == data


def test_putting_twice_is_putting_once(place):
    assert place.store.put(DATA) == place.store.put(DATA)
    assert place.keys() == [object_key(reference(DATA))]


def test_concurrent_puts_of_one_object_are_one(place):
    with ThreadPoolExecutor(8) as pool:
        refs = set(pool.map(lambda _: place.store.put(DATA).digest, range(8)))
    assert refs == {reference(DATA).digest}
    assert place.keys() == [object_key(reference(DATA))]
    assert place.store.get(reference(DATA)) == DATA


def flipped(data: bytes) -> bytes:
    return data[:100] + bytes([data[100] ^ 1]) + data[101:]


@pytest.mark.parametrize(
    ("damage", "word"),
    [(flipped, "digest"), (lambda data: data[:-1], "bytes were expected"), (lambda data: b"", "bytes were expected")],
    ids=["flipped bit", "truncated", "empty"],
)
def test_damaged_bytes_are_refused(place, damage, word):
    ref = place.store.put(DATA)
    place.overwrite(object_key(ref), damage(DATA))
    with pytest.raises(IntegrityError, match=word) as refused:
        place.store.get(ref)
    assert refused.value.code == "ESP-401"
    assert ref.digest in str(refused.value)
    assert place.store.describe() in str(refused.value)


@pytest.mark.fault("D5")
def test_swapped_objects_are_refused(place):
    first, second = b"kernel A", b"kernel B"
    one, two = place.store.put(first), place.store.put(second)
    place.overwrite(object_key(one), second)
    place.overwrite(object_key(two), first)
    for ref in (one, two):
        with pytest.raises(IntegrityError):
            place.store.get(ref)


def test_a_size_that_lies_is_refused(place):
    ref = place.store.put(DATA)
    with pytest.raises(IntegrityError, match="bytes were expected"):
        place.store.get(ref.model_copy(update={"size_bytes": 1}))


@pytest.mark.fault("D3")
def test_a_truncated_object_is_healed_by_the_next_put(place):
    ref = place.store.put(DATA)
    place.overwrite(object_key(ref), DATA[:10])
    place.store.put(DATA)
    assert place.store.get(ref) == DATA


def test_a_missing_object_is_said_to_be_missing(place):
    ref = reference(b"never put")
    assert not place.store.exists(ref)
    with pytest.raises(IntegrityError, match="is missing from") as refused:
        place.store.get(ref)
    assert refused.value.code == "ESP-401"


def test_the_beginning_of_an_object_is_read_alone(place):
    ref, empty = place.store.put(b"0123456789"), place.store.put(b"")
    assert [place.store.peek(ref, count) for count in (0, 4, 10, 99)] == [b"", b"0123", b"0123456789", b"0123456789"]
    assert place.store.peek(empty, 16) == b""
    with pytest.raises(IntegrityError, match="missing"):
        place.store.peek(reference(b"never put"), 4)


def test_deleting_twice_is_deleting_once(place):
    ref = place.store.put(DATA)
    for _ in range(2):
        place.store.delete(ref)
        assert not place.store.exists(ref)


def test_objects_are_listed_with_their_age_and_only_old_ones_go(place):
    refs = {place.store.put(DATA), place.store.put(b"other")}
    place.overwrite("sha256/not-a-digest", b"foreign")
    listed = list(place.store.objects())
    assert {each.ref for each in listed} == refs
    assert all(-5.0 < each.age_s < 3600.0 for each in listed)
    young, *_ = refs
    assert not place.store.delete_older(young, 3600.0)
    assert place.store.exists(young)
    assert place.store.delete_older(young, -3600.0)
    assert not place.store.exists(young) and not place.store.delete_older(young, -3600.0)


@pytest.mark.fault("D4")
def test_a_damaged_object_is_set_aside_whole_and_its_name_is_free(place):
    ref = place.store.put(DATA)
    place.overwrite(object_key(ref), flipped(DATA))
    place.store.set_aside(ref)
    (kept,) = place.keys()
    assert kept.startswith(f"damaged/{ref.digest.removeprefix('sha256:')}.")
    assert place.content(kept) == flipped(DATA)
    assert not place.store.exists(ref) and list(place.store.objects()) == []
    place.store.set_aside(ref)
    assert place.keys() == [kept]
    place.store.put(DATA)
    assert place.store.get(ref) == DATA and sorted(place.keys()) == [kept, object_key(ref)]


@pytest.mark.fault("D4")
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=2000), position=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_any_flipped_bit_is_refused(tmp_path, data, position, bit):
    store = FolderStore(tmp_path)
    ref = store.put(data)
    assert store.get(ref) == data
    if data:
        damaged = bytearray(data)
        damaged[position % len(data)] ^= 1 << bit
        (tmp_path / object_key(ref)).write_bytes(damaged)
        with pytest.raises(IntegrityError):
            store.get(ref)


def test_a_flipped_bit_in_a_folder_is_healed_by_the_next_put(tmp_path):
    store = FolderStore(tmp_path)
    ref = store.put(DATA)
    (tmp_path / object_key(ref)).write_bytes(flipped(DATA))
    store.put(DATA)
    assert store.get(ref) == DATA


@pytest.mark.fault("D9")
@pytest.mark.parametrize("failing", ["fsync", "write"])
def test_a_put_that_fails_leaves_nothing_behind(tmp_path, monkeypatch, failing):
    store = FolderStore(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    if failing == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(ObjectsUnavailable, match="No space left") as refused:
        store.put(DATA)
    assert refused.value.code == "ESP-321"
    assert str(len(DATA)) in str(refused.value.hint)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    monkeypatch.undo()
    assert store.get(store.put(DATA)) == DATA


def test_a_folder_that_is_a_file_is_refused_by_name(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    store = FolderStore(tmp_path / "file")
    with pytest.raises(ObjectsUnavailable, match=re.escape(str(tmp_path / "file"))):
        store.put(DATA)


@pytest.mark.fault("D7")
def test_a_read_only_folder_is_refused_by_name(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ObjectsUnavailable, match="Permission denied") as refused:
        FolderStore(tmp_path / "objects").put(DATA)
    assert refused.value.code == "ESP-323"


def test_a_location_is_a_folder_a_file_url_or_a_bucket(tmp_path, monkeypatch):
    monkeypatch.setenv("ESPER_S3_ENDPOINT_URL", "http://somebody:geheim@127.0.0.1:9000")
    default = tmp_path / "objects"
    assert open_store("default", default_folder=default).describe() == str(default)
    assert open_store(f"file://{tmp_path}/a%20b", default_folder=default).describe() == f"{tmp_path}/a b"
    assert open_store("/data", default_folder=default).describe() == "/data"
    assert open_store("s3://b1", default_folder=default).describe() == "s3://b1 at http://127.0.0.1:9000"
    assert open_store("s3://b1/x/", default_folder=default).describe() == "s3://b1/x at http://127.0.0.1:9000"


@pytest.mark.parametrize("location", ["", "gs://bucket", "s3://", "s3://a b/c", "file://host/x", "s3://u:geheim@b/c"])
def test_other_locations_are_refused(tmp_path, monkeypatch, location):
    monkeypatch.delenv("ESPER_S3_ENDPOINT_URL", raising=False)
    with pytest.raises(ConfigurationError, match=r"urza\.objects") as refused:
        open_store(location, default_folder=tmp_path)
    assert refused.value.code == "ESP-204"
    assert "geheim" not in str(refused.value)


def test_an_endpoint_that_is_no_url_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ESPER_S3_ENDPOINT_URL", "no url")
    with pytest.raises(ConfigurationError, match="ESPER_S3_ENDPOINT_URL"):
        open_store("s3://bucket", default_folder=tmp_path)


def test_without_an_endpoint_it_is_aws(tmp_path, monkeypatch):
    monkeypatch.delenv("ESPER_S3_ENDPOINT_URL", raising=False)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
    assert "amazonaws.com" in open_store("s3://bucket", default_folder=tmp_path).describe()


def test_a_folder_user_never_loads_boto3():
    code = (
        "import sys; from pathlib import Path; from esper.runtime.urza.locations import open_store;"
        "open_store('default', default_folder=Path('x')); assert 'boto3' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
