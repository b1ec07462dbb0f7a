"""YAML 1.2 read as plain data with the position of every key, and nothing that a stranger's file could abuse.

Two passes: the events are checked first (no alias, anchor, tag, directive or second document, bounded size
and depth), so that nothing is built from a hostile file; then nodes become plain data, with duplicate keys
refused. Errors say file:line:column and show the line with a caret.
"""

import difflib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from typing import NoReturn

from pydantic import JsonValue
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.events import AliasEvent
from ruamel.yaml.events import DocumentStartEvent
from ruamel.yaml.events import MappingEndEvent
from ruamel.yaml.events import MappingStartEvent
from ruamel.yaml.events import NodeEvent
from ruamel.yaml.events import SequenceEndEvent
from ruamel.yaml.events import SequenceStartEvent
from ruamel.yaml.nodes import MappingNode
from ruamel.yaml.nodes import Node
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.nodes import SequenceNode
from ruamel.yaml.reader import ReaderError

from esper.errors import ConfigurationError

MAX_BYTES = 1_000_000
MAX_DEPTH = 64
MAX_VALUES = 50_000
"""Keys and values together: a second or two of reading."""

_ONE_LINE = 2**31
"""A width at which nothing is broken: folding a text between two escapes puts a space into it (ruamel.yaml 0.18)."""

KeyPath = tuple[str | int, ...]

_BYTE_ORDER_MARKS = {
    b"\xef\xbb\xbf": "a UTF-8 byte order mark",
    b"\xff\xfe": "a UTF-16 byte order mark",
    b"\xfe\xff": "a UTF-16 byte order mark",
}


@dataclass(frozen=True)
class Place:
    """Where something stands in its source; line and column count from 1, or are 0 in a source of one line."""

    source: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.line else self.source


@dataclass(frozen=True)
class Document:
    """Plain data and where each of its keys and items stands, by path from the root (the root's path is empty)."""

    data: JsonValue
    places: Mapping[KeyPath, Place]


def write_document(data: JsonValue) -> str:
    """Plain data as YAML that `read_document` reads back to the same."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.allow_unicode = False
    yaml.width = _ONE_LINE
    stream = io.StringIO()
    yaml.dump(data, stream)
    return stream.getvalue()


def read_document(content: bytes, source: str) -> Document:
    """Read one YAML document; an empty one has the data `None`.

    Raises:
        ConfigurationError: ESP-202 what is no YAML 1.2 in UTF-8 or has duplicate keys; ESP-205 what is refused
            although it is YAML: aliases, anchors, tags, directives, too much or too deep.
    """
    if len(content) > MAX_BYTES:
        raise ConfigurationError("ESP-205", f"{source}: too large (max 1 MB)")
    text = _decode(content, source)
    try:
        _check_events(text, source)
        node = YAML(typ="safe", pure=True).compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line, mark.column) if mark is not None else (0, 0)
        _refuse("ESP-202", error.problem or error.context or "not YAML", text, source, line, column)
    except ReaderError as error:
        _refuse(
            "ESP-202",
            f"character U+{_ordinal(error.character):04X} is not text",
            text,
            source,
            *_position(text, error.position),
        )
    places: dict[KeyPath, Place] = {}
    return Document(data=None if node is None else _plain(node, (), text, source, places), places=places)


def near(name: str, known: list[str]) -> str | None:
    """A hint that names the nearest known names, or all of them when none is near; `None` without any."""
    if not known:
        return None
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f"Did you mean {' or '.join(close)}?" if close else f"Known: {', '.join(known)}"


def _decode(content: bytes, source: str) -> str:
    for mark, name in _BYTE_ORDER_MARKS.items():
        if content.startswith(mark):
            raise ConfigurationError(
                "ESP-202", f"{source}:1:1: starts with {name}", hint="Save it as UTF-8 without one"
            )
    if b"\x00" in content:
        before = content[: content.index(b"\x00")]
        line, column = before.count(b"\n") + 1, len(before) - before.rfind(b"\n")
        raise ConfigurationError(
            "ESP-202", f"{source}:{line}:{column}: a NUL byte: this is binary or UTF-16, not UTF-8 text"
        )
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        before = content[: error.start]
        line, column = before.count(b"\n") + 1, len(before) - before.rfind(b"\n")
        raise ConfigurationError(
            "ESP-202",
            f"{source}:{line}:{column}: byte 0x{content[error.start]:02x} is not UTF-8",
            hint="Save it as UTF-8",
        ) from None


def _check_events(text: str, source: str) -> None:
    depth = documents = values = 0
    for event in YAML(typ="safe", pure=True).parse(text):
        at = (event.start_mark.line, event.start_mark.column)
        if isinstance(event, AliasEvent):
            _refuse("ESP-205", f"aliases are not allowed (*{event.anchor})", text, source, *at)
        values += isinstance(event, NodeEvent)
        if values > MAX_VALUES:
            _refuse("ESP-205", f"too many values (max {MAX_VALUES})", text, source, *at)
        if isinstance(event, NodeEvent) and event.anchor is not None:
            _refuse("ESP-205", f"anchors are not allowed (&{event.anchor})", text, source, *at)
        if getattr(event, "tag", None) is not None:
            _refuse("ESP-205", f"tags are not allowed ({event.tag})", text, source, *at)
        if isinstance(event, DocumentStartEvent):
            documents += 1
            if event.version is not None or event.tags:
                _refuse("ESP-205", "directives are not allowed", text, source, *at)
            if documents > 1:
                _refuse("ESP-202", "a second document begins here", text, source, *at)
        if isinstance(event, MappingStartEvent | SequenceStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                _refuse("ESP-205", f"too deep (max {MAX_DEPTH} levels)", text, source, *at)
        if isinstance(event, MappingEndEvent | SequenceEndEvent):
            depth -= 1


def _plain(node: Node, path: KeyPath, text: str, source: str, places: dict[KeyPath, Place]) -> JsonValue:
    places.setdefault(path, Place(source, node.start_mark.line + 1, node.start_mark.column + 1))
    if isinstance(node, MappingNode):
        result: dict[str, JsonValue] = {}
        for key, value in node.value:
            at = (key.start_mark.line, key.start_mark.column)
            if not isinstance(key, ScalarNode):
                _refuse("ESP-202", "a key must be a plain name", text, source, *at)
            child = (*path, str(key.value))
            if key.value in result:
                lines = f"lines {places[child].line}, {at[0] + 1}"
                _refuse("ESP-202", f"key {key.value!r} given twice ({lines})", text, source, *at)
            places[child] = Place(source, at[0] + 1, at[1] + 1)
            result[key.value] = _plain(value, child, text, source, places)
        return result
    if isinstance(node, SequenceNode):
        return [_plain(item, (*path, index), text, source, places) for index, item in enumerate(node.value)]
    return _scalar(node, text, source)


def _scalar(node: Any, text: str, source: str) -> JsonValue:
    kind = node.tag.rsplit(":", 1)[-1]
    try:
        match kind:
            case "int":
                return _integer(node.value)
            case "float":
                return _float(node.value)
            case "bool":
                return bool(node.value.lower() == "true")
            case "null":
                return None
    except ValueError:
        _refuse(
            "ESP-202",
            "a number of this length cannot be read",
            text,
            source,
            node.start_mark.line,
            node.start_mark.column,
        )
    return str(node.value)


def _integer(value: str) -> int:
    sign, digits = (-1, value[1:]) if value.startswith("-") else (1, value.removeprefix("+"))
    digits = digits.replace("_", "")
    for prefix, base in (("0b", 2), ("0o", 8), ("0x", 16)):
        if digits.startswith(prefix):
            return sign * int(digits[2:], base)
    return sign * int(digits)


def _float(value: str) -> float:
    value = value.replace("_", "").lower()
    return float(value.replace(".inf", "inf").replace(".nan", "nan"))


def _position(text: str, offset: int) -> tuple[int, int]:
    before = text[:offset]
    return before.count("\n"), offset - (before.rfind("\n") + 1)


def _ordinal(character: Any) -> int:
    return ord(character) if isinstance(character, str) else int(character)


def _refuse(code: str, why: str, text: str, source: str, line: int, column: int) -> NoReturn:
    lines = text.splitlines()
    shown = lines[line] if line < len(lines) else ""
    start = max(0, column - 60)
    # A tab is as wide as the terminal likes; as one space the caret stands where it must.
    excerpt = shown[start : start + 100].replace("\t", " ")
    raise ConfigurationError(code, f"{source}:{line + 1}:{column + 1}: {why}\n  {excerpt}\n  {' ' * (column - start)}^")
