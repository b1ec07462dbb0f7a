"""What Esper was built for, held against what is installed. Nothing is imported to find out."""

import re
from importlib import metadata

from esper.errors import EnvironmentTooOld

LEAST = {"torch": (2, 10), "temporalio": (1, 30)}
"""The oldest versions that Esper was built for."""


def installed(name: str) -> str | None:
    """The version of a distribution; `None` when it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check_version(name: str) -> str:
    """The installed version of `name`. Raises `EnvironmentTooOld` (ESP-101) when it is missing or too old."""
    version, least = installed(name), ".".join(map(str, LEAST[name]))
    hint = f"pip install '{name}>={least}'"
    if version is None:
        raise EnvironmentTooOld("ESP-101", f"{name} is not installed; Esper needs {least} or newer", hint=hint)
    if numbers(version) < LEAST[name]:
        raise EnvironmentTooOld("ESP-101", f"{name} {version} is too old; Esper needs {least} or newer", hint=hint)
    return version


def numbers(version: str) -> tuple[int, ...]:
    """`2.15.0+cu128` as (2, 15, 0)."""
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:3])
