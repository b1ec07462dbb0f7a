"""Plain data against the configuration contract: every mistake at once, each where it was written.

pydantic finds the mistakes; what was expected is said from the contract's own JSON schema, so a range
or a vocabulary is written down once, in `esper.contracts.config`.
"""

from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import JsonValue
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from pydantic_core import to_json

from esper.contracts.config import EsperConfig
from esper.errors import BlueprintError
from esper.errors import ConfigurationError
from esper.errors import EsperError
from esper.errors import by_code
from esper.runtime.logs import redact
from esper.runtime.tamiyo.policies import list_policies
from esper.runtime.tezzeret.blueprints.registry import get_blueprint
from esper.runtime.tezzeret.blueprints.registry import list_blueprints
from esper.runtime.yaml_document import KeyPath
from esper.runtime.yaml_document import Place
from esper.runtime.yaml_document import near


@dataclass(frozen=True)
class Problem:
    """One mistake: `what` names the key, `place` where it stands (`None`: nowhere, it is missing)."""

    code: str
    what: str
    place: Place | None
    why: str
    hint: str | None = None

    def __str__(self) -> str:
        where = f" at {self.place}" if self.place is not None else ""
        return f"{self.what}{where}: {self.why}" if self.why else f"{self.what}{where}"


_NAME_FORM = "letters, digits, - and _, beginning with a letter or digit, 40 at most"
_FORMS: Mapping[KeyPath, tuple[str, str, str | None]] = {
    ("run", "name"): ("ESP-204", _NAME_FORM, None),
    ("run", "device"): (
        "ESP-315",
        "one of auto, cpu, cuda, cuda:N, mps",
        "`esper-cli doctor` lists them",
    ),
    ("task", "target"): (
        "ESP-310",
        "package.module:function",
        "Name a function of your own code that returns esper.Task, or take a packaged task with task.name",
    ),
}
"""Code, form and hint of keys whose pattern says less to a person than words do."""


def validate(
    data: Mapping[str, JsonValue], places: Mapping[KeyPath, Place], found: Sequence[Problem] = ()
) -> EsperConfig:
    """The configuration that `data` describes; `found` are mistakes that are known already.

    Raises:
        ConfigurationError: one error for all mistakes. ESP-203 unknown keys, ESP-204 values, ESP-212 values
            from the environment; several mistakes have the code of the first and one line each.
        TargetError, DeviceError: ESP-310, ESP-315 where that is the only mistake.
    """
    problems = [*found, *_name_problems(data, places)]
    try:
        # Through JSON, because strict validation of Python objects refuses text for enums and lists for tuples.
        config = EsperConfig.model_validate_json(to_json(data, inf_nan_mode="constants"))
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False)
        problems = [*_problems(errors, data, places), *problems]
    else:
        if not problems:
            return config
    raise as_error(problems)


def as_error(problems: Sequence[Problem]) -> EsperError:
    """One error for them all, in the order of their places."""
    ordered = sorted(
        problems, key=lambda problem: (problem.place.line, problem.place.column) if problem.place else (0, 0)
    )
    first = ordered[0]
    if len(ordered) == 1:
        return by_code(first.code)(first.code, str(first), hint=first.hint)
    lines = [f"  [{problem.code}] {problem}{f'. {problem.hint}' if problem.hint else ''}" for problem in ordered]
    code = first.code if by_code(first.code) is ConfigurationError else "ESP-204"
    return ConfigurationError(code, "\n".join([f"{len(ordered)} mistakes in the configuration:", *lines]))


def known_keys(prefix: Sequence[str] = ()) -> list[str]:
    """The keys that the contract knows below a path of keys; `[]` where anything or nothing goes."""
    schema = _schema_at(tuple(prefix))
    return sorted({key for option in _options(schema) for key in option.get("properties", {})})


def key_paths() -> list[KeyPath]:
    """Every key of the configuration, sections and keys alike, parents before children."""

    def below(path: tuple[str, ...]) -> Iterable[KeyPath]:
        for key in known_keys(path):
            yield (*path, key)
            yield from below((*path, key))

    return list(below(()))


def _problems(
    errors: Iterable[ErrorDetails], data: Mapping[str, JsonValue], places: Mapping[KeyPath, Place]
) -> list[Problem]:
    by_path: dict[KeyPath, ErrorDetails] = {}
    for error in errors:
        # The members of a union report one error each, under names that are no keys.
        missing = error["type"] == "missing"
        existing = _existing(error["loc"][:-1] if missing else error["loc"], data)
        by_path.setdefault((*existing, error["loc"][-1]) if missing else existing, error)
    # Where one member of a union was meant and has a mistake inside, what the other members say is noise.
    outer = {path[:length] for path in by_path for length in range(len(path))}
    return [_problem(path, error, data, places) for path, error in by_path.items() if path not in outer]


def _problem(
    path: KeyPath, error: ErrorDetails, data: Mapping[str, JsonValue], places: Mapping[KeyPath, Place]
) -> Problem:
    name, place = dotted(path), _place(path, places)
    if error["type"] == "extra_forbidden":
        hint = near(str(path[-1]), known_keys([str(part) for part in path[:-1]]))
        return Problem("ESP-203", f"unknown key {name}", place, "", hint)
    code = "ESP-212" if place is not None and place.source.startswith("environment") else "ESP-204"
    if error["type"] == "missing":
        hint = "Give task.name or task.target, or take a --quick-start" if path == ("task",) else None
        return Problem(code, f"{name} is missing", place, "", hint)
    if error["type"] == "value_error":
        return Problem(code, name, place, error["msg"].removeprefix("Value error, "))
    value = _value(path, data)
    if path in _FORMS and isinstance(value, str):
        form_code, form, hint = _FORMS[path]
        return Problem(form_code, name, place, f"must be {form}, not {_shown(value)}", hint)
    expected = " or ".join(dict.fromkeys(_describe(option) for option in _options(_schema_at(path))))
    return Problem(code, name, place, f"must be {expected}, not {_shown(value)}", _value_hint(value, path))


def _name_problems(data: Mapping[str, JsonValue], places: Mapping[KeyPath, Place]) -> list[Problem]:
    """Names from registries that can be known without torch."""
    tamiyo = data.get("tamiyo")
    if not isinstance(tamiyo, dict):
        return []
    blueprints = tamiyo.get("blueprints")
    named: list[tuple[KeyPath, JsonValue, str, list[str]]] = [
        (("tamiyo", "policy"), tamiyo.get("policy"), "policy", list(list_policies()))
    ]
    if isinstance(blueprints, list):
        known = _known_blueprints(blueprints)
        named += [(("tamiyo", "blueprints", i), name, "blueprint", known) for i, name in enumerate(blueprints)]
    return [
        Problem("ESP-204", dotted(path), _place(path, places), f"there is no {kind} {_shown(name)}", near(name, known))
        for path, name, kind, known in named
        if isinstance(name, str) and name not in known
    ]


def _known_blueprints(named: Sequence[JsonValue]) -> list[str]:
    """All names that there are; what was submitted is asked for a name that nobody knows."""
    for name in named:
        if isinstance(name, str):
            with suppress(BlueprintError):
                get_blueprint(name)
    return [blueprint.name for blueprint in list_blueprints()]


def dotted(path: KeyPath) -> str:
    """`("a", "b", 0)` as people write it: `a.b[0]`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.removeprefix(".") or "the configuration"


def _existing(location: Sequence[str | int], data: JsonValue | Mapping[str, JsonValue]) -> KeyPath:
    path: list[str | int] = []
    here: Any = data
    for part in location:
        if isinstance(here, Mapping) and part in here:
            here = here[str(part)]
        elif isinstance(here, list) and isinstance(part, int) and part < len(here):
            here = here[part]
        else:
            continue
        path.append(part)
    return tuple(path)


def _value(path: KeyPath, data: Mapping[str, JsonValue]) -> JsonValue:
    here: Any = data
    for part in path:
        here = here[part]
    return here  # type: ignore[no-any-return]


def _place(path: KeyPath, places: Mapping[KeyPath, Place]) -> Place | None:
    for length in range(len(path), -1, -1):
        if path[:length] in places:
            return places[path[:length]]
    return None


def _shown(value: JsonValue) -> str:
    text = redact(to_json(value, inf_nan_mode="constants").decode())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _value_hint(value: JsonValue, path: KeyPath) -> str | None:
    if isinstance(value, str):
        choices = [choice for option in _options(_schema_at(path)) for choice in option.get("enum", [])]
        if choices:
            return near(value, [str(choice) for choice in choices])
        try:
            float(value)
        except ValueError:
            return None
        return f"It is text: write {value} without quotes"
    kinds = {option.get("type") for option in _options(_schema_at(path))}
    if isinstance(value, int | float) and "string" in kinds and not kinds & {"integer", "number"}:
        return f"It is a number: write '{value}' in quotes"
    return None


@cache
def _schema() -> dict[str, Any]:
    return EsperConfig.model_json_schema()


def _options(schema: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What a schema allows, references followed and unions spread."""
    if "$ref" in schema:
        return _options(_schema()["$defs"][schema["$ref"].rsplit("/", 1)[-1]])
    if "anyOf" in schema:
        return [option for member in schema["anyOf"] for option in _options(member)]
    return [schema]


def _schema_at(path: KeyPath) -> Mapping[str, Any]:
    here: Mapping[str, Any] = _schema()
    for part in path:
        following: list[Mapping[str, Any]] = []
        for option in _options(here):
            if isinstance(part, int) and "items" in option:
                following.append(option["items"])
            elif part in option.get("properties", {}):
                following.append(option["properties"][part])
        here = {"anyOf": following} if len(following) != 1 else following[0]
    return here


def _describe(schema: Mapping[str, Any]) -> str:
    if "enum" in schema:
        return f"one of {', '.join(str(choice) for choice in schema['enum'])}"
    if "const" in schema:
        return str(schema["const"])
    match schema.get("type"):
        case "integer":
            return f"a whole number{_range(schema)}"
        case "number":
            return f"a finite number{_range(schema)}"
        case "string":
            return f"text that matches {schema['pattern']}" if "pattern" in schema else "text"
        case "array":
            return "a list that is not empty" if schema.get("minItems") else "a list"
        case "object":
            keys = ", ".join(schema.get("properties", {}))
            return f"a mapping with the keys {keys}" if keys else "a mapping"
        case "null":
            return "null"
    return "a plain value"


def _range(schema: Mapping[str, Any]) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and high is not None:
        return f" from {low} to {high}"
    limits = (
        (">=", low),
        (">", schema.get("exclusiveMinimum")),
        ("<=", high),
        ("<", schema.get("exclusiveMaximum")),
    )
    said = [f"{sign} {limit}" for sign, limit in limits if limit is not None]
    return f" {' and '.join(said)}" if said else ""
