"""Structured logs: one JSON object a line in `ESPER_HOME/logs/<role>-<pid>.log`, found again by run.

Each line has `time` (ISO 8601, UTC), `level`, `logger`, `role`, `pid`, `message`, and `run_id` and
`trace_id` where it belongs to a run; keys given by `extra={"fields": {...}}` join them. Secrets never
reach a file: what looks like one, and the values of the variables that hold one, are replaced.
"""

import contextlib
import json
import logging
import logging.handlers
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextvars import ContextVar
from datetime import UTC
from datetime import datetime
from pathlib import Path
from typing import Any

SECRET_VARIABLES = ("TEMPORAL_API_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "PGPASSWORD")
"""Environment variables whose value is a secret."""

MAX_FILE_BYTES = 20_000_000
KEPT_FILES = 2

_REPLACEMENT = "***"
_URL_PASSWORD = re.compile(r"(?P<head>[A-Za-z][A-Za-z0-9+.-]*://[^\s:/@]*:)[^\s@]+@")
_NAMED_SECRET = re.compile(
    r"(?i)(?P<head>(?:api[_-]?key|secret(?:[_-]?access[_-]?key)?|password|passwd|session[_-]?token|access[_-]?token)"
    r"[\"']?\s*[=:]\s*[\"']?)[^\s\"',;&]+"
)
_BEARER = re.compile(r"(?i)(?P<head>bearer\s+)[A-Za-z0-9._~+/-]{8,}=*")

_run: ContextVar[str | None] = ContextVar("esper_run", default=None)
_trace: ContextVar[str | None] = ContextVar("esper_trace", default=None)


def redact(text: str) -> str:
    """`text` without passwords in addresses, keys and tokens by their names, and the values of `SECRET_VARIABLES`."""
    for pattern in (_URL_PASSWORD, _NAMED_SECRET, _BEARER):
        end = "@" if pattern is _URL_PASSWORD else ""
        text = pattern.sub(lambda match, end=end: f"{match['head']}{_REPLACEMENT}{end}", text)  # type: ignore[misc]
    for name in SECRET_VARIABLES:
        value = os.environ.get(name, "")
        if len(value) >= 6:
            text = text.replace(value, _REPLACEMENT)
    return text


@contextlib.contextmanager
def run_context(run_id: str, trace_id: str | None = None) -> Iterator[None]:
    """What is logged inside belongs to this run; the trace id is the run id unless a message brought another.

    Holds for the current thread or task and what it calls (`asyncio.to_thread` carries it along).
    """
    run_token, trace_token = _run.set(run_id), _trace.set(trace_id or run_id)
    try:
        yield
    finally:
        _run.reset(run_token)
        _trace.reset(trace_token)


class JsonLines(logging.Formatter):
    """A record as one line of JSON, redacted."""

    def __init__(self, role: str) -> None:
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "role": self._role,
            "pid": record.process,
            "message": record.getMessage(),
        }
        if (run_id := _run.get()) is not None:
            line |= {"run_id": run_id, "trace_id": _trace.get()}
        line |= getattr(record, "fields", {})
        if record.exc_info and record.exc_info[0] is not None:
            line["exception"] = "".join(traceback.format_exception(*record.exc_info))
        return redact(json.dumps(line, default=str, ensure_ascii=False))


class OneLine(logging.Formatter):
    """A record for a person on stderr, redacted."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def log_path(home: Path, role: str, pid: int) -> Path:
    """Where the process `pid` with that role logs; several roles are joined by `+`."""
    return home / "logs" / f"{role}-{pid}.log"


def configure_logging(home: Path, role: str, *, verbose: int = 0) -> Path:
    """Send this process's logs to its own file, and with `verbose` (1: info, 2: debug) to stderr as well.

    Replaces the handlers of the root logger. Returns the file.
    """
    path = log_path(home, role, os.getpid())
    path.parent.mkdir(parents=True, exist_ok=True)
    file_handler = logging.handlers.RotatingFileHandler(
        path, maxBytes=MAX_FILE_BYTES, backupCount=KEPT_FILES, encoding="utf-8", delay=True
    )
    file_handler.setFormatter(JsonLines(role))
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    root.addHandler(file_handler)
    root.setLevel(logging.DEBUG if verbose >= 2 else logging.INFO)
    # The SDK and SQLAlchemy tell their own life at INFO; a run's story would drown in it.
    for library in ("temporalio", "sqlalchemy", "botocore", "alembic"):
        logging.getLogger(library).setLevel(logging.DEBUG if verbose >= 2 else logging.WARNING)
    if verbose:
        stderr_handler = logging.StreamHandler(sys.stderr)
        stderr_handler.setFormatter(OneLine())
        root.addHandler(stderr_handler)
    return path


def read_logs(home: Path, run_id: str | None = None) -> Iterator[dict[str, Any]]:
    """The lines of all processes that belong to a run (`None`: all lines), in the order of their times.

    A line that was cut off by a crash is left out.
    """
    lines: list[dict[str, Any]] = []
    for path in (home / "logs").glob("*.log*"):
        # Bytes, because a crash may have cut a character in two.
        for raw in path.read_bytes().splitlines():
            try:
                line = json.loads(raw)
            except ValueError:
                continue
            if isinstance(line, dict) and (run_id is None or line.get("run_id") == run_id):
                lines.append(line)
    yield from sorted(lines, key=lambda line: str(line.get("time", "")))
