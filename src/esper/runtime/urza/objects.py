"""Bytes under their own digest: the store of kernels, checkpoints, histories and output files.

An object is named by the sha256 of its bytes (key ``sha256/<hex>``), never changes, and is verified on
every read. So writing twice is writing once, and nobody ever gets bytes other than those asked for.
"""

import errno
import hashlib
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from esper.contracts.assets import ArtifactRef
from esper.errors import IntegrityError
from esper.errors import ObjectsUnavailable
from esper.runtime.atomic_file import is_full
from esper.runtime.atomic_file import sync_folder
from esper.runtime.atomic_file import write_atomically
from esper.runtime.failpoints import hit

ENDPOINT_VARIABLE = "ESPER_S3_ENDPOINT_URL"


@dataclass(frozen=True)
class StoredObject:
    """An object as it lies there. `age_s`: seconds since it was last put, by the clock of the store."""

    ref: ArtifactRef
    age_s: float


class ObjectStore(Protocol):
    """A content-addressed store. Every method blocks, may be called from any thread, and is safe twice.

    All raise `ObjectsUnavailable` (ESP-321..324) when the store cannot do its work.
    """

    def put(self, data: bytes) -> ArtifactRef:
        """Store `data` under its digest unless it is there already; durable when this returns, and young again."""
        ...

    def get(self, ref: ArtifactRef) -> bytes:
        """The bytes of `ref`, size and digest checked; `IntegrityError` (ESP-401) if missing or other bytes."""
        ...

    def peek(self, ref: ArtifactRef, count: int) -> bytes:
        """The first `count` bytes of `ref` at most, which nobody has checked; `IntegrityError` (ESP-401) if missing."""
        ...

    def exists(self, ref: ArtifactRef) -> bool:
        """True when an object lies under the digest. Says nothing of its bytes."""
        ...

    def delete(self, ref: ArtifactRef) -> None:
        """Remove the object; a missing one is no error."""
        ...

    def set_aside(self, ref: ArtifactRef) -> None:
        """Quarantine a damaged object: its bytes stay, below ``damaged/``, where nobody reads them and no collection
        comes, and its name is free for the right bytes. A missing one is no error."""
        ...

    def objects(self) -> Iterator[StoredObject]:
        """Every object that lies in the store, in no particular order; none that was set aside."""
        ...

    def delete_older(self, ref: ArtifactRef, age_s: float) -> bool:
        """Remove the object if it was not put in the last `age_s` seconds, and say whether it went."""
        ...

    def put_back(self) -> int:
        """Give their names back to objects that a collection was killed over, and make them young; returns how many."""
        ...

    def delete_unfinished(self, age_s: float) -> int:
        """Remove what writers that were killed left behind at least `age_s` seconds ago; returns how many files."""
        ...

    def describe(self) -> str:
        """Where it is, for people; never a secret."""
        ...


def reference(data: bytes) -> ArtifactRef:
    """The address of `data`: its sha256 and its size in bytes."""
    return ArtifactRef(digest=f"sha256:{hashlib.sha256(data).hexdigest()}", size_bytes=len(data))


def object_key(ref: ArtifactRef) -> str:
    """``sha256/<hex>``: derived from the digest alone, never from a name that somebody chose."""
    return ref.digest.replace(":", "/", 1)


def damaged_key(ref: ArtifactRef) -> str:
    """``damaged/<hex>.<nonce>``: a new name at every call, so that no find takes the place of an earlier one."""
    return f"damaged/{ref.digest.partition(':')[2]}.{secrets.token_hex(8)}"


def verified(data: bytes, ref: ArtifactRef, where: str) -> bytes:
    """`data` if it is what `ref` names; else `IntegrityError` (ESP-401), with what was expected and found."""
    if len(data) != ref.size_bytes:
        raise wrong_size(ref, len(data), where)
    found = hashlib.sha256(data).hexdigest()
    if f"sha256:{found}" != ref.digest:
        raise wrong_bytes(ref, f"the digest sha256:{found[:12]}...", where)
    return data


def wrong_bytes(ref: ArtifactRef, found: str, where: str) -> IntegrityError:
    """The error for an object whose bytes have `found` instead of what they should (ESP-401)."""
    return IntegrityError(
        "ESP-401", f"object {ref.digest} in {where} is damaged: its bytes have {found}", hint=_DAMAGE_HINT
    )


def wrong_size(ref: ArtifactRef, size: int, where: str) -> IntegrityError:
    """The error for an object of the wrong size in bytes (ESP-401)."""
    return IntegrityError(
        "ESP-401",
        f"object {ref.digest} in {where} is damaged: {ref.size_bytes} bytes were expected, {size} are there",
        hint=_DAMAGE_HINT,
    )


def missing(ref: ArtifactRef, where: str) -> IntegrityError:
    """The error for an object that should be in the store and is not (ESP-401)."""
    return IntegrityError("ESP-401", f"object {ref.digest} is missing from {where}", hint=_MISSING_HINT)


_DAMAGE_HINT = "Restore it from a copy; a run goes on from its last whole checkpoint"
_MISSING_HINT = "Check that `urza.objects` names the store that the run wrote to"


ASIDE_S = 0.02
"""Seconds after which a file that garbage collection only looked at is surely back, if the collection lives."""

_COLLECTED = ".collected"
_NAME = re.compile(r"[0-9a-f]{64}")


class FolderStore:
    """Objects as plain files ``<folder>/sha256/<hex>``. The folder is made at the first `put`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()

    def put(self, data: bytes) -> ArtifactRef:
        ref = reference(data)
        path = self._path(ref)
        with self._explained("write", ref):
            # A damaged object is healed here: the right bytes are at hand, and nothing else may bear this name.
            whole = _holds(path, data)
            if whole is False:
                self.set_aside(ref)
            if not (whole and _made_young(path)):
                if not path.parent.is_dir():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    sync_folder(path.parent.parent)
                write_atomically(path, data)
        return ref

    def get(self, ref: ArtifactRef) -> bytes:
        with self._explained("read", ref):
            data = self._read(ref)
            if data is None:
                # `delete_older` may have laid it aside for a blink, to see whether somebody has put it again.
                time.sleep(ASIDE_S)
                data = self._read(ref)
            if data is None and self._put_back_one(ref):
                data = self._read(ref)
            if data is None:
                raise missing(ref, self.describe())
        return verified(data, ref, self.describe())

    def _read(self, ref: ArtifactRef) -> bytes | None:
        try:
            with self._path(ref).open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size != ref.size_bytes:
                    raise wrong_size(ref, size, self.describe())
                return file.read()
        except FileNotFoundError:
            return None

    def peek(self, ref: ArtifactRef, count: int) -> bytes:
        with self._explained("read", ref):
            try:
                with self._path(ref).open("rb") as file:
                    return file.read(count)
            except FileNotFoundError:
                raise missing(ref, self.describe()) from None

    def exists(self, ref: ArtifactRef) -> bool:
        with self._explained("look up", ref):
            return self._path(ref).is_file() or self._put_back_one(ref)

    def delete(self, ref: ArtifactRef) -> None:
        with self._explained("delete", ref):
            self._path(ref).unlink(missing_ok=True)

    def set_aside(self, ref: ArtifactRef) -> None:
        aside = self._folder / damaged_key(ref)
        with self._explained("set aside", ref), suppress(FileNotFoundError):
            if self._path(ref).is_file():
                aside.parent.mkdir(exist_ok=True)
                self._path(ref).rename(aside)
                sync_folder(aside.parent)

    def objects(self) -> Iterator[StoredObject]:
        now = time.time()
        for path in (self._folder / "sha256").glob("*"):
            if _NAME.fullmatch(path.name):
                with suppress(FileNotFoundError):
                    found = path.stat()
                    ref = ArtifactRef(digest=f"sha256:{path.name}", size_bytes=found.st_size)
                    yield StoredObject(ref, now - found.st_mtime)

    def delete_older(self, ref: ArtifactRef, age_s: float) -> bool:
        path = self._path(ref)
        aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}{_COLLECTED}")
        with self._explained("delete", ref), suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime < age_s:
                return False
            # Whoever puts it from here on finds no file and writes one; whoever did so just before made this one young.
            path.rename(aside)
            hit("collect.set_aside")
            if time.time() - aside.stat().st_mtime < age_s:
                _give_back(aside, path)
                return False
            aside.unlink()
            return True
        return False

    def put_back(self) -> int:
        back = 0
        for aside in (self._folder / "sha256").glob(f".*{_COLLECTED}"):
            name = aside.name[1:].partition(".")[0]
            if _NAME.fullmatch(name):
                back += self._put_back_one(ArtifactRef(digest=f"sha256:{name}", size_bytes=0))
        return back

    def _put_back_one(self, ref: ArtifactRef) -> bool:
        path = self._path(ref)
        with self._explained("put back", ref):
            return any([_give_back(aside, path) for aside in path.parent.glob(f".{path.name}.*{_COLLECTED}")])

    def delete_unfinished(self, age_s: float) -> int:
        deleted = 0
        for path in (self._folder / "sha256").glob(".*.partial"):
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime >= age_s:
                    path.unlink()
                    deleted += 1
        return deleted

    def describe(self) -> str:
        return str(self._folder)

    def _path(self, ref: ArtifactRef) -> Path:
        return self._folder / object_key(ref)

    @contextmanager
    def _explained(self, operation: str, ref: ArtifactRef) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise _folder_error(error, operation, ref, self._folder) from error


def _folder_error(error: OSError, operation: str, ref: ArtifactRef, folder: Path) -> ObjectsUnavailable:
    reason = error.strerror or type(error).__name__
    what = f"cannot {operation} object {ref.digest} ({ref.size_bytes} bytes) in {folder}: {reason}"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return ObjectsUnavailable("ESP-323", what, hint="Give this user the right to read and write there")
    if is_full(error):
        return ObjectsUnavailable("ESP-321", what, hint=f"Free at least {ref.size_bytes} bytes there")
    return ObjectsUnavailable("ESP-321", what, hint="Check the folder, or set `urza.objects` to another place")


def _give_back(aside: Path, path: Path) -> bool:
    """Whether the file that a collection laid aside has its name again, or another of its bytes has it."""
    try:
        # As if it were put again: whoever wants it may only be about to record that it does.
        os.utime(aside)
        if path.is_file():
            aside.unlink()
        else:
            aside.replace(path)
    except FileNotFoundError:
        return False
    return True


def _made_young(path: Path) -> bool:
    """Whether the file is there still: garbage collection leaves alone what is young from now on."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _holds(path: Path, data: bytes) -> bool | None:
    """Whether the file has exactly these bytes; `None` when there is none."""
    try:
        return path.stat().st_size == len(data) and path.read_bytes() == data
    except FileNotFoundError:
        return None
