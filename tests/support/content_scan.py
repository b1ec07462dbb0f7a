"""What no stored byte may be: a secret, a tensor in text, or something that runs when it is loaded (I12)."""

import base64
import binascii
import json
import re
from collections.abc import Iterable
from collections.abc import Iterator
from typing import Any

LARGEST_PAYLOAD = 128 * 1024
"""Bytes of one payload of a history: a decision record has about 20 KB, the state of a continued run at most 64."""

LARGEST_TEXT = 2_048
"""Characters of base64 in a row. Digests, delivery ids and task tokens are far shorter, tensors are far longer."""

_RUNS = {
    b"\x80\x02": "a pickle",
    b"\x80\x03": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
    b"PK\x03\x04": "a zip archive, as torch.save writes it",
    b"\x7fELF": "machine code",
    b"\x93NUMPY": "a NumPy file",
}
_BASE64 = re.compile(rb"[A-Za-z0-9+/_-]{%d,}={0,2}" % LARGEST_TEXT)


def secrets_in(name: str, data: bytes, secrets: Iterable[str]) -> Iterator[str]:
    """Planted secrets that stand in the bytes, as they are or as base64."""
    for secret in secrets:
        plain = secret.encode()
        if plain in data or any(form in data for form in _base64_forms(plain)):
            yield f"{name} holds the secret {secret[:3]}..."


def _base64_forms(plain: bytes) -> Iterator[bytes]:
    """What of a base64 text is the same wherever in it the bytes begin."""
    for shift in range(3):
        coded = base64.b64encode(b"\0" * shift + plain)
        inner = coded[4 if shift else 0 : -4]
        if len(inner) >= 8:
            yield inner


def runnable(name: str, data: bytes) -> Iterator[str]:
    """Bytes that a loader would run, by how they begin. A pickle of protocol 2-5 is also looked for in a safetensors
    file's place: the first bytes of a real one are the length of its header."""
    for magic, what in _RUNS.items():
        if data.startswith(magic) and not _is_safetensors(data):
            yield f"{name} is {what}"


def _is_safetensors(data: bytes) -> bool:
    length = int.from_bytes(data[:8], "little")
    return 2 <= length <= len(data) - 8 and data[8:9] == b"{"


def tensors_in_text(name: str, data: bytes) -> Iterator[str]:
    """Long base64 in a text."""
    found = _BASE64.search(data)
    if found is not None:
        yield f"{name} holds {len(found.group())} characters of base64 in a row"


def payloads(history: Any) -> Iterator[bytes]:
    """Every payload in the JSON of a Temporal history, decoded."""
    if isinstance(history, dict):
        if isinstance(history.get("data"), str) and "metadata" in history:
            try:
                yield base64.b64decode(history["data"], validate=True)
            except binascii.Error:
                yield history["data"].encode()
        for value in history.values():
            yield from payloads(value)
    elif isinstance(history, list):
        for value in history:
            yield from payloads(value)


def faults_of_history(name: str, data: bytes, secrets: Iterable[str]) -> Iterator[str]:
    """What is wrong with the stored JSON of a history: payloads that are too large, tensors, pickles or secrets."""
    yield from secrets_in(name, data, secrets)
    for payload in payloads(json.loads(data)):
        if len(payload) > LARGEST_PAYLOAD:
            yield f"{name} has a payload of {len(payload)} bytes"
        yield from runnable(f"a payload of {name}", payload)
        yield from tensors_in_text(f"a payload of {name}", payload)
        yield from secrets_in(f"a payload of {name}", payload, secrets)
