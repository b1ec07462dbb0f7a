"""`ESPER_HOME`: the one folder of a local Esper, and the names of everything in it."""

import os
from collections.abc import Mapping
from pathlib import Path

import platformdirs

from esper.contracts.config import UrzaConfig
from esper.errors import ConfigurationError


def find_home(environment: Mapping[str, str]) -> Path:
    """The absolute path of the home; it need not exist and nothing is written.

    Raises:
        ConfigurationError: ESP-208 when no path can be found or it is that of something else; ESP-211 when
            `ESPER_HOME` is set to nothing.
    """
    given = environment.get("ESPER_HOME")
    if given is None:
        home = Path(platformdirs.user_data_dir("esper", appauthor=False))
        if not home.is_absolute() or home.parts[1:2] == ("~",):
            raise _no_home("neither ESPER_HOME nor HOME is set", "Set ESPER_HOME to a folder that Esper may write to")
        return home
    if not given.strip():
        raise ConfigurationError(
            "ESP-211", "environment variable ESPER_HOME is empty", hint="Unset it or give it a folder"
        )
    try:
        home = Path(given).expanduser().absolute()
        is_other = home.exists() and not home.is_dir()
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise _no_home(f"ESPER_HOME {given!r} cannot be used: {reason}") from None
    if is_other:
        raise _no_home(f"ESPER_HOME {given!r} is not a folder")
    return home


def make_home(environment: Mapping[str, str]) -> Path:
    """The home, made if it is missing, readable by its owner only, and proven to be writable.

    Raises:
        ConfigurationError: ESP-208, ESP-211.
    """
    home = find_home(environment)
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        for folder in (logs_folder(home), workers_folder(home)):
            folder.mkdir(exist_ok=True)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise _no_home(f"home folder '{home}' cannot be made: {reason}") from None
    if not os.access(home, os.W_OK | os.X_OK):
        raise _no_home(f"home folder '{home}' is not writable")
    return home


def temporal_database(home: Path, server_version: str) -> Path:
    """The dev server's database; another server version has another one, since it would not open this."""
    return home / f"temporal-{server_version}.db"


def urza_database_url(home: Path) -> str:
    """The default Urza database: SQLite in this home."""
    return f"sqlite+aiosqlite:///{home / 'urza.db'}"


def objects_folder(home: Path) -> Path:
    """The default object store."""
    return home / "objects"


def logs_folder(home: Path) -> Path:
    """Where every process of the stack logs."""
    return home / "logs"


def stack_file(home: Path) -> Path:
    """What runs, as `runtime.stack` writes it."""
    return home / "stack.json"


def workers_folder(home: Path) -> Path:
    """Where workers tell the supervisor how they are; see `worker_files`."""
    return home / "workers"


def resolve_urza(urza: UrzaConfig, home: Path) -> UrzaConfig:
    """The same with `default` replaced by the places in this home."""
    return UrzaConfig(
        database=urza_database_url(home) if urza.database == "default" else urza.database,
        objects=str(objects_folder(home)) if urza.objects == "default" else urza.objects,
    )


def _no_home(why: str, hint: str = "Set ESPER_HOME to a folder that you may write to") -> ConfigurationError:
    return ConfigurationError("ESP-208", why, hint=hint)
