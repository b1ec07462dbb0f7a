"""`config`: write one to start from, show what one resolves to, check one, print its schema."""

from pathlib import Path
from typing import Annotated

import typer

from esper.commands import options
from esper.commands import output
from esper.errors import ConfigurationError

config = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Write, show and check configurations.")


@config.command("init")
def init(
    file: Annotated[str, typer.Argument(metavar="[FILE]", help="Where to write it.")] = "esper.yaml",
) -> int:
    """Write a configuration with every key, its default and what it means. An existing file is left alone."""
    from esper.runtime.configuration import reference_text

    path = Path(file)
    try:
        with path.open("x", encoding="utf-8") as stream:
            stream.write(reference_text())
    except FileExistsError:
        raise ConfigurationError("ESP-208", f"config {file!r}: exists already", hint="Name another file") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigurationError("ESP-208", f"config {file!r} cannot be written: {reason}") from None
    output.write(str(path))
    return 0


@config.command("show")
def show(
    quick_start: options.QuickStartOption = None,
    file: options.ConfigOption = None,
    values: options.SetOption = None,
    as_json: options.JsonFlag = False,
) -> int:
    """The resolved configuration: every key with the value that a run would use."""
    import os

    from esper.runtime.configuration import dump_config
    from esper.runtime.configuration import list_packaged
    from esper.runtime.configuration import list_quick_starts
    from esper.runtime.configuration import load_config

    if quick_start is None and file is None:
        raise ConfigurationError(
            "ESP-206",
            "give --quick-start or --config",
            hint=f"Quick starts: {', '.join(list_quick_starts())}. Packaged: {', '.join(list_packaged())}",
        )
    resolved = load_config(
        Path(file) if file is not None else None,
        quick_start=quick_start,
        overrides=values or [],
        environment=os.environ,
    )
    if as_json:
        output.write_json(resolved.model_dump(mode="json"))
    else:
        output.write(dump_config(resolved).rstrip("\n"))
    return 0


@config.command("validate")
def validate(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A YAML file.")],
    values: options.SetOption = None,
    as_json: options.JsonFlag = False,
) -> int:
    """Check a configuration; all its errors at once."""
    import os

    from esper.runtime.configuration import load_config

    load_config(Path(file), overrides=values or [], environment=os.environ)
    if as_json:
        output.write_json({"file": file, "valid": True})
    else:
        output.write(f"{file}: valid")
    return 0


@config.command("schema")
def schema() -> int:
    """The JSON schema of the configuration, for completion and checks in an editor."""
    from esper.runtime.configuration import config_schema

    output.write_json(config_schema())
    return 0
