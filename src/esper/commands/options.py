"""The arguments and options that several commands share, each said once."""

import json
import math
import re
from typing import Annotated

import typer

from esper.errors import ConfigurationError

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="The run id.")]
SiteArgument = Annotated[str, typer.Argument(metavar="SITE", help="The dotted module name of a site.")]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")]
QuickStartOption = Annotated[
    str | None, typer.Option("--quick-start", metavar="NAME", help="A packaged configuration, such as digits.")
]
ConfigOption = Annotated[str | None, typer.Option("--config", metavar="FILE", help="A YAML file.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one key, such as optimizer.lr=0.01. May be repeated."),
]
DatabaseOption = Annotated[
    str | None,
    typer.Option("--database", metavar="URL", help="The Urza database (default: that of ESPER_HOME)."),
]
RunIdOption = Annotated[
    str | None, typer.Option("--run-id", metavar="ID", help="Default: <name>-<UTC time>-<4 hex digits>.")
]
DetachFlag = Annotated[bool, typer.Option("--detach", "-d", help="Return as soon as the run has begun.")]
DecisionOption = Annotated[
    str, typer.Option("--decision", metavar="wait|SITE:BLUEPRINT", help="What is decided on that epoch instead.")
]
EpochOption = Annotated[int, typer.Option("--epoch", metavar="N", min=1, help="The epoch that was decided on.")]
AcceptDriftFlag = Annotated[
    bool,
    typer.Option("--accept-drift", help="Go on although configuration, model or data are not as they were; recorded."),
]
OutputOption = Annotated[str | None, typer.Option("--output", metavar="DIR", help="Default: results/<run id>.")]


def parse_adaptation_id(run: str, text: str) -> str:
    """`a3` or `<run>/a3` as the full id. Raises `ConfigurationError` (ESP-209) for anything else."""
    full = text if "/" in text else f"{run}/{text}"
    if not re.fullmatch(re.escape(run) + r"/a[1-9][0-9]{0,6}", full):
        raise ConfigurationError(
            "ESP-209",
            f"adaptation {text!r} is not one of run {run!r}: an id is {run}/a<number>",
            hint=f"`esper-cli history {run}` lists them",
        )
    return full


def parse_decision(text: str) -> tuple[str, str] | None:
    """`SITE:BLUEPRINT` as a pair, `wait` as None. Raises `ConfigurationError` (ESP-209) for anything else."""
    if text == "wait":
        return None
    site, colon, blueprint = text.rpartition(":")
    if not colon or not site or not blueprint:
        raise ConfigurationError(
            "ESP-209", f"decision {text!r} is neither wait nor SITE:BLUEPRINT", hint="Write layers.0:bottleneck"
        )
    return site, blueprint


def parse_hyperparameters(values: list[str]) -> dict[str, int | float | str | bool]:
    """`NAME=VALUE` pairs; numbers and true/false are read as JSON reads them, anything else is text.

    Raises `ConfigurationError` (ESP-204) for a pair without a name or a value that is not a plain scalar.
    """
    parsed: dict[str, int | float | str | bool] = {}
    for pair in values:
        name, equals, text = pair.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigurationError("ESP-204", f"hyperparameter {pair!r}: is not NAME=VALUE", hint="Write rank=16")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        if not isinstance(value, (int, float, str, bool)) or (isinstance(value, float) and not math.isfinite(value)):
            raise ConfigurationError(
                "ESP-204", f"hyperparameter {name}: {text!r} is not a number, a word or true/false"
            )
        parsed[name] = value
    return parsed
