"""What has been measured, kept on disk, so that a benchmark that was interrupted goes on where it stood."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parent.parent / "src" / "esper"
CACHE = HERE.parent / ".cache"
DECISIVE = ("contracts", "configs", "runtime/kasmina", "runtime/tezzeret", "runtime/tolaria", "runtime/tamiyo")
"""The parts of Esper that decide what a run ends in."""


def code_digest() -> str:
    """Of the code that decides results: a number measured with other code is not taken for one of this code."""
    files = [path for part in DECISIVE for path in (SOURCE / part).rglob("*") if path.suffix in (".py", ".yaml")]
    digest = hashlib.sha256()
    for path in sorted([*files, HERE / "arms.py", HERE / "home.py"]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


class Store:
    """One JSON document a measurement, in a folder for each benchmark and each state of the code."""

    def __init__(self, name: str) -> None:
        self.code = code_digest()
        self.folder = CACHE / f"{name}-{self.code}"
        self.folder.mkdir(parents=True, exist_ok=True)
        (CACHE / ".gitignore").write_text("*\n")

    def get(self, key: str) -> Any:
        """The document, or None when it has not been measured."""
        path = self._path(key)
        return json.loads(path.read_text()) if path.exists() else None

    def put(self, key: str, document: Any) -> None:
        path = self._path(key)
        draft = path.with_name(f".{path.name}.{os.getpid()}.part")
        draft.write_text(json.dumps(document))
        draft.replace(path)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.json"
