"""The standard library's own source as text to learn from: which part of it is read, how it is split and encoded."""

import hashlib
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from esper.errors import DataUnavailable

Split = tuple[Tensor, Tensor]

MODULES = (
    *("argparse", "ast", "base64", "bdb", "calendar", "codecs", "configparser", "contextlib", "csv", "dataclasses"),
    *("difflib", "dis", "doctest", "enum", "fractions", "ftplib", "functools", "gettext", "gzip", "heapq", "imaplib"),
    *("inspect", "ipaddress", "mailbox", "mimetypes", "optparse", "os", "pdb", "pickle", "platform", "plistlib"),
    *("posixpath", "random", "selectors", "shutil", "smtplib", "socket", "socketserver", "statistics", "subprocess"),
    *("tarfile", "tempfile", "textwrap", "tokenize", "traceback", "typing", "weakref", "webbrowser"),
)
"""Sorted. Each is one file of Python 3.11 to 3.14. Of every six, four train, the third validates, the sixth tests."""

CHARACTERS_OF_EACH = 12_288
"""From the beginning of each file: no long module outweighs the others."""

ALPHABET = "\n" + "".join(chr(code) for code in range(32, 127))
VOCABULARY = len(ALPHABET) + 1
"""Printable ASCII and the line feed, each a symbol of its own; every other character is symbol 0."""

_VALIDATES, _TESTS, _CYCLE = 2, 5, 6


@dataclass(frozen=True)
class SourceText:
    """The beginnings of the modules of each split, by module name; `digest` is over all names and texts."""

    train: dict[str, str]
    validation: dict[str, str]
    test: dict[str, str]

    @property
    def digest(self) -> str:
        """`sha256:<hex>` over `name\\0text\\0` of every module in UTF-8, in the order of names: another Python
        version is another data set."""
        every = {**self.train, **self.validation, **self.test}
        content = "".join(f"{name}\0{text}\0" for name, text in sorted(every.items()))
        return f"sha256:{hashlib.sha256(content.encode()).hexdigest()}"


def read_source_text(folder: Path | None = None) -> SourceText:
    """Read `MODULES` from the running Python's standard library, or from a folder that holds the same files.

    Raises `DataUnavailable` (ESP-207), naming the file, where a Python has no source (zipped or compiled library).
    """
    where = Path(sysconfig.get_paths()["stdlib"]) if folder is None else folder.expanduser()
    texts = [(name, _beginning(where / f"{name}.py")) for name in MODULES]

    def part(*positions: int) -> dict[str, str]:
        return {name: text for number, (name, text) in enumerate(texts) if number % _CYCLE in positions}

    trains = (position for position in range(_CYCLE) if position not in (_VALIDATES, _TESTS))
    return SourceText(train=part(*trains), validation=part(_VALIDATES), test=part(_TESTS))


def encode(text: str) -> Tensor:
    """Text to symbols: int64, shape (characters,), each in 0..`VOCABULARY` - 1."""
    return torch.tensor([ALPHABET.find(character) + 1 for character in text], dtype=torch.int64)


def windows(texts: Sequence[str], context: int) -> Split:
    """Symbols and their successors, both int64 (rows, context); rows do not overlap, and none runs over two texts."""
    inputs, targets = [], []
    for text in texts:
        symbols = encode(text)
        rows = max(0, len(symbols) - 1) // context
        inputs.append(symbols[: rows * context].reshape(rows, context))
        targets.append(symbols[1 : rows * context + 1].reshape(rows, context))
    return torch.cat(inputs), torch.cat(targets)


def _beginning(file: Path) -> str:
    hint = (
        "Use a Python whose standard library lies on the disk as .py files, or name a folder that holds "
        "them (Lib/ of a CPython source release) with --set task.path=FOLDER"
    )
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
        raise DataUnavailable("ESP-207", f"source text: {str(file)!r}: {reason}", hint=hint) from error
    if not text.strip():
        raise DataUnavailable("ESP-207", f"source text: {str(file)!r} is empty", hint=hint)
    return text[:CHARACTERS_OF_EACH]
