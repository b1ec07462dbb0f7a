import pytest
from hypothesis import given
from hypothesis import strategies

from esper.errors import ConfigurationError
from esper.runtime.yaml_document import MAX_DEPTH
from esper.runtime.yaml_document import Place
from esper.runtime.yaml_document import read_document
from esper.runtime.yaml_document import write_document


def refusal(content: bytes) -> ConfigurationError:
    with pytest.raises(ConfigurationError) as caught:
        read_document(content, "run.yaml")
    return caught.value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3), ("1e-05", 1e-5), ("5.0e-4", 5e-4), (".5", 0.5), ("no", "no"), ("yes", "yes"), ("on", "on"),
        ("true", True), ("False", False), ("012", 12), ("0o14", 12), ("0x1F", 31), ("0b11", 3), ("1:30", "1:30"),
        ("2026-01-01", "2026-01-01"), ("~", None), ("null", None), ("'1'", "1"), ("1_000", 1000), ("-3", -3), ("+3", 3),
        ("<<", "<<"), ("=", "="),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    read = read_document(text.encode(), "run.yaml").data
    assert (read, type(read)) == (value, type(value))


def test_every_key_has_its_place() -> None:
    document = read_document(b"run:\n  seed: 1\ntask: {name: digits}\nlist:\n  - a\n  - b\n", "run.yaml")
    assert document.places["run", "seed"] == Place("run.yaml", 2, 3)
    assert document.places["task", "name"] == Place("run.yaml", 3, 8)
    assert document.places["list", 1] == Place("run.yaml", 6, 5)


def test_an_empty_document_is_nothing() -> None:
    assert read_document(b"", "run.yaml").data is None
    assert read_document(b"# only a comment\n", "run.yaml").data is None


@pytest.mark.parametrize(
    ("content", "where", "why"),
    [
        (b"run:\n\tseed: 1\n", ":2:1:", "\\t"),
        (b"run: {seed: 1\n", ":2:1:", "expected"),
        (b"run: [1, 2\ntask: 3", ":2:", "expected"),
        (b"a: b: c", ":1:5:", "mapping values"),
        (b"\xef\xbb\xbfrun: {}\n", ":1:1:", "byte order mark"),
        ("run: {}\n".encode("utf-16"), ":1:1:", "UTF-16"),
        ("run: {}\n".encode("utf-16-le"), ":1:2:", "NUL"),
        (b"run:\n  \x00\x01", ":2:3:", "NUL"),
        (b"run:\n  name: \xff\xfe", ":2:9:", "0xff is not UTF-8"),
        (b"run:\n  name: a\x07b", ":2:10:", "U+0007"),
        (b"a: 1\nb: 2\na: 3\n", ":3:1:", "'a' given twice (lines 1, 3)"),
        (b"run: {seed: 1, seed: 2}", ":1:16:", "'seed' given twice"),
        (b"a: 1\n---\nb: 2\n", ":2:1:", "second document"),
        (b"? [a, b]\n: 1\n", ":1:3:", "plain name"),
        (b"seed: " + b"9" * 5000, ":1:7:", "number of this length"),
    ],
)
def test_what_is_not_yaml_is_refused_with_its_place(content: bytes, where: str, why: str) -> None:
    error = refusal(content)
    assert error.code == "ESP-202"
    assert f"run.yaml{where}" in error.message
    assert why in error.message


def test_a_syntax_error_shows_its_line_and_a_caret() -> None:
    lines = refusal(b"run:\n  seed: 1\ntask: b: c\n").message.splitlines()
    assert lines[1] == "  task: b: c"
    assert lines[2].index("^") == lines[1].index(": c")


def test_the_caret_of_a_long_line_stays_on_the_screen() -> None:
    lines = refusal(b"a: " + b"x" * 5000 + b": c").message.splitlines()
    assert len(lines[1]) < 120
    assert lines[2].index("^") < 120


BOMB = b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (BOMB, "anchors are not allowed (&a)"),
        (b"a: *missing", "aliases are not allowed"),
        (b"a: !!python/object/apply:os.system [ls]", "tags are not allowed"),
        (b"a: !!int 3", "tags are not allowed"),
        (b"%YAML 1.1\n---\na: no\n", "directives are not allowed"),
        (b"[" * 10_000 + b"]" * 10_000, "too deep (max 64 levels)"),
        (b"a: " + b"{a: " * 10_000, "too deep (max 64 levels)"),
        (b"a: " + b"x" * 1_000_001, "too large (max 1 MB)"),
        (b"[" + b"1," * 60_000 + b"1]", "too many values (max 50000)"),
    ],
)
def test_hostile_yaml_is_refused(content: bytes, why: str) -> None:
    error = refusal(content)
    assert error.code == "ESP-205"
    assert why in error.message


def test_the_deepest_allowed_document_is_read() -> None:
    document = read_document(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH, "run.yaml")
    assert document.data == nested_lists(MAX_DEPTH)
    assert refusal(b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1)).code == "ESP-205"


def nested_lists(depth: int) -> list[object]:
    nested: list[object] = []
    for _ in range(depth - 1):
        nested = [nested]
    return nested


@given(strategies.binary(max_size=200))
def test_any_bytes_are_read_or_refused(content: bytes) -> None:
    try:
        read_document(content, "run.yaml")
    except ConfigurationError as error:
        assert error.code in ("ESP-202", "ESP-205")
        assert "run.yaml" in error.message


@given(strategies.text(alphabet="abc:{}[]-'\"#&*!|>%@`,?\n \t01.e", max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        read_document(text.encode(), "run.yaml")
    except ConfigurationError as error:
        assert error.code in ("ESP-202", "ESP-205")


PLAIN = strategies.recursive(
    strategies.none()
    | strategies.booleans()
    | strategies.integers()
    | strategies.floats(allow_nan=False, allow_infinity=False)
    | strategies.text(max_size=20),
    lambda inner: (
        strategies.lists(inner, max_size=3) | strategies.dictionaries(strategies.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=10,
)


@given(PLAIN)
def test_what_is_written_is_read_back(data: object) -> None:
    assert read_document(write_document(data).encode(), "run.yaml").data == data
