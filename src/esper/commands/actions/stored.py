"""Kernels and submitted blueprints: from Urza's tables, and the bytes of kernels from the store."""

import asyncio
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esper.commands.actions import connections
from esper.contracts.assets import Blueprint
from esper.contracts.assets import Certificate
from esper.contracts.assets import Kernel
from esper.errors import ConfigurationError
from esper.errors import EsperError
from esper.errors import IntegrityError
from esper.errors import NotFoundError
from esper.errors import UsageError
from esper.runtime.tezzeret.blueprints.documents import parse_document
from esper.runtime.tezzeret.blueprints.registry import list_blueprints
from esper.runtime.tezzeret.ir import MAX_JSON_BYTES
from esper.runtime.urza.library import Library
from esper.runtime.urza.objects import ObjectStore
from esper.runtime.urza.submitted import submitted_blueprints

ALL = 1_000_000_000
"""As many kernels as there are."""


@dataclass(frozen=True)
class Verified:
    """What checking one stored kernel found."""

    kernel: str
    error: EsperError | None = None

    @property
    def valid(self) -> bool:
        return self.error is None

    def to_json(self) -> dict[str, Any]:
        return {"kernel": self.kernel, "valid": self.valid, "error": self.error.to_json() if self.error else None}


async def all_kernels() -> list[Kernel]:
    """Oldest first."""
    async with connections.library() as library:
        return [] if library is None else list(reversed(await library.kernels(ALL)))


async def one_kernel(name: str) -> dict[str, Any]:
    """The kernel and its birth certificate. Raises `NotFoundError` (ESP-430)."""
    async with connections.library() as library:
        kernel = await _find(library, name)
    document = kernel.model_dump(mode="json")
    if kernel.certificate is not None:
        store = connections.store()
        data = await asyncio.to_thread(store.get, kernel.certificate)
        try:
            document["certificate"] = Certificate.model_validate_json(data).model_dump(mode="json")
        except ValueError as error:
            raise IntegrityError("ESP-403", f"the certificate of kernel {kernel.digest} cannot be read") from error
    return document


async def verify_kernels(name: str | None) -> list[Verified]:
    """Read one kernel or all from the store and check size, digest, schema, contract and finiteness."""
    async with connections.library() as library:
        if name is None:
            found = [] if library is None else list(reversed(await library.kernels(ALL)))
        else:
            found = [await _find(library, name)]
    store = connections.store()
    return [await asyncio.to_thread(_verify, store, kernel) for kernel in found]


def raise_damage(results: list[Verified]) -> None:
    """Damage ends the command with exit 4, naming the first and counting the others."""
    damaged = [result.error for result in results if result.error is not None]
    if damaged:
        first, others = damaged[0], len(damaged) - 1
        more = f" ({others} more damaged)" if others else ""
        raise type(first)(first.code, f"{first.message}{more}", hint=first.hint)


def submitted() -> tuple[Blueprint, ...]:
    """What was submitted to the database of the environment, of each name the newest first."""
    return submitted_blueprints(connections.database_url(None), default_file=connections.home() / "urza.db")


async def submit(file: str) -> Blueprint:
    """Read, check and store a blueprint. Raises `ConfigurationError` (ESP-201), `BlueprintError` (ESP-410..423),
    `DatabaseUnavailable`, `ConflictError` (ESP-504: that version has other content)."""
    try:
        # One byte more than may be: what is too large is said by the reader, and never read to its end.
        with sys.stdin.buffer if file == "-" else Path(file).expanduser().open("rb") as stream:
            data = stream.read(MAX_JSON_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigurationError("ESP-201", f"blueprint {file!r} cannot be read: {reason}") from None
    list_blueprints()
    blueprint = parse_document(data)
    async with connections.opened_library(connections.settings().urza) as library:
        return await library.submit_blueprint(blueprint)


def flat(document: dict[str, Any], prefix: str = "") -> list[tuple[str, object]]:
    """Nested keys as dotted names, for people."""
    pairs: list[tuple[str, object]] = []
    for key, value in document.items():
        if isinstance(value, dict) and value:
            pairs += flat(value, f"{prefix}{key}.")
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, list) else value
            pairs.append((f"{prefix}{key}", shown if shown != {} else None))
    return pairs


async def _find(library: Library | None, name: str) -> Kernel:
    wanted = name.removeprefix("sha256:").lower()
    if not wanted or len(wanted) > 64 or any(letter not in "0123456789abcdef" for letter in wanted):
        raise UsageError(
            "ESP-430", f"kernel {name!r}: is not a digest, sha256: and 64 hex digits or the beginning of one"
        )
    kernels = [] if library is None else await library.kernels(ALL)
    matches = [kernel for kernel in kernels if kernel.digest.removeprefix("sha256:").startswith(wanted)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise UsageError("ESP-430", f"kernel {name!r}: {len(matches)} kernels begin so", hint="Give more digits")
    raise NotFoundError("ESP-430", f"there is no kernel {name!r}", hint="`esper-cli kernels list` shows all")


def _verify(store: ObjectStore, kernel: Kernel) -> Verified:
    from esper.runtime.tezzeret.artifact import KernelFiles
    from esper.runtime.tezzeret.artifact import verify

    try:
        verify(KernelFiles(manifest=store.get(kernel.manifest), weights=store.get(kernel.weights)), kernel.digest)
        if kernel.certificate is not None:
            Certificate.model_validate_json(store.get(kernel.certificate))
    except IntegrityError as error:
        return Verified(kernel.digest, error)
    except ValueError:
        return Verified(kernel.digest, IntegrityError("ESP-403", f"the certificate of {kernel.digest} cannot be read"))
    return Verified(kernel.digest)
