"""Where objects are kept, from what a configuration says: a folder or a bucket."""

import os
from pathlib import Path
from urllib.parse import unquote
from urllib.parse import urlsplit

from esper.errors import ConfigurationError
from esper.runtime.urza.objects import ENDPOINT_VARIABLE
from esper.runtime.urza.objects import FolderStore
from esper.runtime.urza.objects import ObjectStore


def open_store(location: str, *, default_folder: Path) -> ObjectStore:
    """The store that `urza.objects` names; contacts nothing yet.

    `location` is ``default`` (then `default_folder`), a folder, a ``file://`` URL, or ``s3://bucket/prefix``
    (the server: environment variable ``ESPER_S3_ENDPOINT_URL``, else AWS). Raises `ConfigurationError` (ESP-204).
    """
    if location == "default":
        return FolderStore(default_folder)
    parts = urlsplit(location)
    if parts.scheme == "s3":
        if "@" in parts.netloc:
            raise _unknown_location(location)
        # Importing boto3 costs half a second, which nobody with a folder should pay.
        from esper.runtime.urza.s3 import open_s3

        return open_s3(parts.netloc, parts.path.strip("/"), endpoint=os.environ.get(ENDPOINT_VARIABLE) or None)
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost") or not parts.path:
            raise _unknown_location(location)
        return FolderStore(Path(unquote(parts.path)))
    if "://" in location or not location.strip():
        raise _unknown_location(location)
    return FolderStore(Path(location).expanduser())


def _unknown_location(location: str) -> ConfigurationError:
    shown = location if "@" not in location else f"{location.split('://', 1)[0]}://***"
    return ConfigurationError(
        "ESP-204",
        f"urza.objects: {shown!r} is no place for objects",
        hint="Write `default`, a folder, `file:///folder` or `s3://bucket/prefix`",
    )
