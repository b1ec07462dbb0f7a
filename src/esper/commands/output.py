"""The printing rules of every command: data on stdout, talk on stderr, one JSON document under `--json`.

Nothing here needs colour or a wide character set: a terminal that has neither reads the same words.
"""

import json
import os
import sys
from collections.abc import Sequence
from typing import Any
from typing import TextIO

import typer

from esper.errors import ConfigurationError
from esper.errors import EsperError

COLUMN_GAP = "  "


def prepare_streams() -> None:
    """Let neither a closed stream nor a character that the terminal cannot show end a command."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def speaks_unicode(stream: TextIO) -> bool:
    """Whether the stream's encoding can hold every character."""
    return (getattr(stream, "encoding", None) or "ascii").lower().replace("_", "-").startswith("utf")


def write(text: str) -> None:
    """One piece of data on stdout. A reader that went away (`| head`) ends the command quietly, as success."""
    try:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        silence_stdout()
        raise typer.Exit(0) from None
    except OSError as error:
        silence_stdout()
        reason = error.strerror or type(error).__name__
        raise ConfigurationError("ESP-208", f"stdout cannot be written: {reason}") from error


def silence_stdout() -> None:
    """Point stdout at nowhere, so that no later flush meets the closed pipe again."""
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.close(sink)


def say(text: str) -> None:
    """Talk: for the person, never for the program that reads our output."""
    try:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
    except BrokenPipeError:
        return


def write_json(document: Any) -> None:
    """The one JSON document of a command."""
    write(json.dumps(document, indent=2, ensure_ascii=not speaks_unicode(sys.stdout), allow_nan=False))


def write_table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Aligned columns on a terminal; tab-separated values without headings elsewhere, for `cut` and `awk`."""
    cells = [["" if value is None else str(value) for value in row] for row in rows]
    if not sys.stdout.isatty():
        for row in cells:
            write("\t".join(cell.replace("\t", " ").replace("\n", " ") for cell in row))
        return
    widths = [max(len(row[column]) for row in [list(headings), *cells]) for column in range(len(headings))]
    for row in [[heading.upper() for heading in headings], *cells]:
        write(COLUMN_GAP.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def write_pairs(pairs: Sequence[tuple[str, object]]) -> None:
    """One aligned `name  value` a line; an unknown value is a dash."""
    width = max(len(name) for name, _ in pairs)
    for name, value in pairs:
        write(f"{name.ljust(width)}  {'-' if value is None else value}")


def error_text(error: EsperError) -> str:
    """`error[ESP-NNN]: <what> at <where>: <why>. <what to do>`."""
    return f"error[{error.code}]: {error}"


def report_error(error: EsperError, *, as_json: bool) -> None:
    """The error on stderr, in the form that was asked for."""
    if as_json:
        say(json.dumps({"error": error.to_json()}, ensure_ascii=not speaks_unicode(sys.stderr)))
    else:
        say(error_text(error))


def number(value: float | int | None, digits: int = 4) -> str:
    """A measured number as people read it; a dash when there is none."""
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value}"
    return f"{value:.{digits}g}"
