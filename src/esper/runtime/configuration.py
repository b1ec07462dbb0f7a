"""The configuration of a run, from what a person wrote: `--set` over environment over file over default.

Environment: `ESPER_<SECTION>_<KEY>`, where the key is its dotted path in capitals with `_` for each dot
(`ESPER_RUN_MAX_EPOCHS`, `ESPER_OPTIMIZER_SCHEDULE_NAME`). Values are YAML, as after `--set`. A name that
begins with a section and matches no key is a mistake; `NOT_KEYS` and names without a section are not
configuration. A variable of Esper's that is set to nothing is a mistake too: unset it.
"""

import difflib
import os
import re
import shutil
from collections.abc import Mapping
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from esper.contracts.base import RUN_ID_PATTERN
from esper.contracts.config import EsperConfig
from esper.errors import ConfigurationError
from esper.runtime.validation import Problem
from esper.runtime.validation import key_paths
from esper.runtime.validation import known_keys
from esper.runtime.validation import validate
from esper.runtime.yaml_document import MAX_BYTES
from esper.runtime.yaml_document import Document
from esper.runtime.yaml_document import KeyPath
from esper.runtime.yaml_document import Place
from esper.runtime.yaml_document import near
from esper.runtime.yaml_document import read_document
from esper.runtime.yaml_document import write_document

PREFIX = "ESPER_"
NOT_KEYS = ("ESPER_HOME", "ESPER_TEMPORAL_CLI", "ESPER_S3_ENDPOINT_URL")
"""Variables of Esper's that are not keys, although one looks like it."""

REFERENCE = "reference"
_LEAST_FREE_BYTES = 16_000_000
_RESERVED_NAMES = re.compile(r"(?i)con|prn|aux|nul|com[1-9]|lpt[1-9]")


def load_config(
    source: Path | None,
    *,
    quick_start: str | None = None,
    overrides: Sequence[str] = (),
    environment: Mapping[str, str],
) -> EsperConfig:
    """Read and check everything; nothing is written and nothing is contacted.

    Args:
        source: a YAML file, or the name of a packaged configuration such as `development`.
        quick_start: the name of a packaged quick start; excludes `source`.
        overrides: `section.key=value` texts, the last one wins.
        environment: normally `os.environ`.

    Raises:
        ConfigurationError: ESP-201 no such file; ESP-202 not YAML; ESP-203 unknown keys; ESP-204 values; ESP-205
            refused YAML; ESP-206 quick starts; ESP-211 and ESP-212 the environment.
    """
    if source is not None and quick_start is not None:
        raise ConfigurationError(
            "ESP-206",
            "--quick-start and --config exclude each other",
            hint="Give one, and change keys of it with --set",
        )
    layers: list[Document] = []
    if quick_start is not None:
        layers.append(_read_quick_start(quick_start))
    if source is not None:
        layers.append(_read_source(source))
    variables, problems = _environment_layers(environment)
    layers += variables
    return _merged([*layers, *(_override(text) for text in overrides)], problems)


def with_values(config: EsperConfig, overrides: Sequence[str]) -> EsperConfig:
    """`config` with some keys changed, as `--set` writes them. Raises `ConfigurationError` (ESP-203..205)."""
    own = read_document(dump_config(config).encode(), "the run's configuration")
    return _merged([own, *(_override(text) for text in overrides)], [])


def _merged(layers: Sequence[Document], problems: list[Problem]) -> EsperConfig:
    data: dict[str, JsonValue] = {}
    places: dict[KeyPath, Place] = {}
    for layer in layers:
        _lay_over(data, places, layer)
    return validate({key: {} if value is None else value for key, value in data.items()}, places, problems)


def list_quick_starts() -> tuple[str, ...]:
    """The names that `--quick-start` takes."""
    return tuple(name.removeprefix("quick_starts/") for name in _packaged() if name.startswith("quick_starts/"))


def list_packaged() -> tuple[str, ...]:
    """The packaged configurations that `--config` takes by name, such as `experiments/cifar10`."""
    return tuple(name for name in _packaged() if name != REFERENCE and not name.startswith("quick_starts/"))


def reference_text() -> str:
    """The reference configuration: every key with its default and what it means."""
    return _packaged()[REFERENCE].decode()


def dump_config(config: EsperConfig) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal one."""
    return write_document(config.model_dump(mode="json"))


def config_schema() -> dict[str, Any]:
    """The JSON schema of the configuration, for editors."""
    return EsperConfig.model_json_schema()


def check_run_id(run_id: str) -> str:
    """Return `run_id` if it can name a run, a folder and a workflow.

    Raises:
        ConfigurationError: ESP-209.
    """
    shown = repr(run_id if len(run_id) <= 80 else f"{run_id[:77]}...")
    if not re.fullmatch(RUN_ID_PATTERN, run_id):
        raise ConfigurationError(
            "ESP-209",
            f"run id {shown} must match {RUN_ID_PATTERN.strip('^$')}",
            hint="Use letters, digits, - and _, 64 at most",
        )
    if _RESERVED_NAMES.fullmatch(run_id):
        raise ConfigurationError(
            "ESP-209", f"run id {shown} is a reserved file name on some systems", hint="Choose another"
        )
    return run_id


def check_current_folder() -> None:
    """Nothing if the folder that we were started in is still there; else torch would end the process while it loads.

    Raises:
        ConfigurationError: ESP-208.
    """
    try:
        Path.cwd()
    except FileNotFoundError:
        raise ConfigurationError(
            "ESP-208", "the current folder is gone", hint="Go to a folder that is there and try again"
        ) from None


def check_output(folder: Path) -> Path:
    """Return the absolute path of an output folder that can be written later; nothing is written now.

    Raises:
        ConfigurationError: ESP-208: a file, not empty, not writable, on a full disk, in a loop of links.
    """
    try:
        if folder.is_symlink() and not folder.exists():
            raise _path_error(folder, "is a link that leads nowhere")
        path = folder.resolve(strict=False)
        if path.is_file() or (path.exists() and not path.is_dir()):
            raise _path_error(folder, "is a file")
        if path.is_dir() and next(path.iterdir(), None) is not None:
            raise _path_error(folder, "is not empty", "Give another --output, or empty it")
        existing = next(parent for parent in (path, *path.parents) if parent.exists())
        if not existing.is_dir():
            raise _path_error(folder, f"{existing} is a file")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise _path_error(folder, f"{existing} is not writable")
        disk = shutil.disk_usage(existing)
        if not disk.total:
            raise _path_error(folder, f"{existing} is not on a disk")
        if disk.free < _LEAST_FREE_BYTES:
            raise _path_error(folder, "the disk is full", "Free some space, or give another --output")
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise _path_error(folder, reason[:1].lower() + reason[1:]) from None
    return path


def _path_error(folder: Path, why: str, hint: str = "Give another --output") -> ConfigurationError:
    return ConfigurationError("ESP-208", f"output folder '{folder}': {why}", hint=hint)


def _read_quick_start(name: str) -> Document:
    if name not in list_quick_starts():
        raise ConfigurationError(
            "ESP-206",
            f"unknown quick start {name!r}",
            hint=_nearest(name, list_quick_starts(), "Quick starts"),
        )
    return read_document(_packaged()[f"quick_starts/{name}"], f"quick start {name}")


def _read_source(source: Path) -> Document:
    packaged = source.as_posix().removesuffix(".yaml")
    content = _read_file(source) if source.exists() or packaged not in list_packaged() else _packaged()[packaged]
    document = read_document(content, str(source))
    if document.data is None:
        raise ConfigurationError(
            "ESP-201", f"config '{source}' is empty", hint="`esper-cli config init` writes one to start from"
        )
    if not isinstance(document.data, dict):
        raise ConfigurationError(
            "ESP-204",
            f"config '{source}' must be a mapping of sections",
            hint=f"Sections: {', '.join(known_keys())}",
        )
    return document


def _read_file(source: Path) -> bytes:
    try:
        with source.open("rb") as stream:
            # One byte more than allowed is enough to know that it is too large, however large it is.
            return stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        hint = _nearest(source.as_posix(), list_packaged(), "Packaged configurations")
        raise ConfigurationError("ESP-201", f"config '{source}': no such file", hint=hint) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigurationError("ESP-201", f"config '{source}': cannot be read: {reason}") from None


def _environment_layers(environment: Mapping[str, str]) -> tuple[list[Document], list[Problem]]:
    variables = {PREFIX + "_".join(str(part) for part in path).upper(): path for path in key_paths() if len(path) > 1}
    sections = tuple(f"{PREFIX}{section.upper()}_" for section in known_keys())
    layers: list[Document] = []
    problems: list[Problem] = []
    for name in sorted(name for name in environment if name.startswith(PREFIX)):
        place = Place(f"environment variable {name}", 0, 0)
        if not environment[name].strip():
            problems.append(
                Problem("ESP-211", f"environment variable {name}", None, "is empty", "Unset it or give it a value")
            )
        elif name in variables:
            layers.append(_nested(variables[name], environment[name], place))
        elif name not in NOT_KEYS and name.startswith(sections):
            hint = near(name, list(variables))
            problems.append(
                Problem("ESP-203", f"environment variable {name}", None, "names no key of the configuration", hint)
            )
    return layers, problems


def _override(text: str) -> Document:
    key, equals, value = text.partition("=")
    path = tuple(key.strip().split("."))
    if not equals or not all(path):
        raise ConfigurationError(
            "ESP-204", f"--set {text!r} is not section.key=value", hint="For example --set optimizer.lr=0.01"
        )
    return _nested(path, value, Place(f"--set {key}", 0, 0))


def _nested(path: KeyPath, text: str, place: Place) -> Document:
    value = read_document(text.encode("utf-8", "surrogateescape"), place.source)
    data: JsonValue = value.data
    for part in reversed(path):
        data = {str(part): data}
    places = {path[:length]: place for length in range(len(path) + 1)}
    places |= {(*path, *below): place for below in value.places}
    return Document(data, places)


def _lay_over(data: dict[str, JsonValue], places: dict[KeyPath, Place], layer: Document) -> None:
    def merge(below: dict[str, JsonValue], above: dict[str, JsonValue], path: KeyPath) -> None:
        for key, value in above.items():
            here = (*path, key)
            old = below.get(key)
            if isinstance(old, dict) and isinstance(value, dict):
                merge(old, value, here)
                continue
            for stale in [known for known in places if known[: len(here)] == here]:
                del places[stale]
            below[key] = value
            places.update({known: place for known, place in layer.places.items() if known[: len(here)] == here})

    if isinstance(layer.data, dict):
        merge(data, layer.data, ())
    if () in layer.places:
        places.setdefault((), layer.places[()])


def _packaged() -> dict[str, bytes]:
    root = files("esper") / "configs"
    found: dict[str, bytes] = {}
    for entry in sorted(root.iterdir(), key=lambda entry: entry.name):
        if entry.is_file() and entry.name.endswith(".yaml"):
            found[entry.name.removesuffix(".yaml")] = entry.read_bytes()
        elif entry.is_dir():
            inner = sorted(entry.iterdir(), key=lambda file: file.name)
            found |= {
                f"{entry.name}/{file.name.removesuffix('.yaml')}": file.read_bytes() for file in inner if file.is_file()
            }
    return found


def _nearest(name: str, known: Sequence[str], title: str) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    guess = f"Did you mean {close[0]}? " if close else ""
    return f"{guess}{title}: {', '.join(known)}"
