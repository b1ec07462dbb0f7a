import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies

from esper.runtime.logs import configure_logging
from esper.runtime.logs import log_path
from esper.runtime.logs import read_logs
from esper.runtime.logs import redact
from esper.runtime.logs import run_context


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    for handler in handlers:
        root.removeHandler(handler)
    yield
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(level)


def test_a_line_says_who_and_for_which_run(tmp_path: Path) -> None:
    path = configure_logging(tmp_path, "trainer")
    with run_context("run-1", "trace-9"):
        logging.getLogger("esper.x").info("step %d", 3, extra={"fields": {"epoch": 7}})
    logging.getLogger("esper.x").warning("outside")
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert first["message"] == "step 3"
    assert (first["run_id"], first["trace_id"], first["role"], first["epoch"]) == ("run-1", "trace-9", "trainer", 7)
    assert first["time"].endswith("+00:00")
    assert "run_id" not in second
    assert path == log_path(tmp_path, "trainer", first["pid"])


def test_a_run_is_found_in_the_logs_of_all_processes_in_order(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    lines = [
        {"time": "2026-01-01T00:00:02", "run_id": "a", "message": "two"},
        {"time": "2026-01-01T00:00:01", "run_id": "a", "message": "one"},
        {"time": "2026-01-01T00:00:03", "run_id": "b", "message": "other"},
    ]
    for number, line in enumerate(lines):
        (logs / f"trainer-{number}.log").write_text(json.dumps(line) + '\n{"cut off')
    (logs / "trainer-7.log.1").write_text(json.dumps({"time": "2025", "run_id": "a", "message": "zero"}) + "\n[1]\n")
    (logs / "broken.log").write_bytes(b"\xff\xfe\n")
    assert [line["message"] for line in read_logs(tmp_path, "a")] == ["zero", "one", "two"]
    assert len(list(read_logs(tmp_path))) == 4
    assert list(read_logs(tmp_path / "nowhere", "a")) == []


def test_an_exception_is_kept_in_its_line(tmp_path: Path) -> None:
    path = configure_logging(tmp_path, "forge")
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("esper").exception("it failed")
    (line,) = path.read_text().splitlines()
    assert "ValueError: broken" in json.loads(line)["exception"]


def test_verbose_also_tells_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(tmp_path, "trainer", verbose=1)
    logging.getLogger("esper").info("password=hunter2 seen")
    logging.getLogger("esper").debug("detail")
    captured = capsys.readouterr()
    assert "password=*** seen" in captured.err
    assert "detail" not in captured.err
    assert captured.out == ""


def test_context_belongs_to_its_thread(tmp_path: Path) -> None:
    path = configure_logging(tmp_path, "trainer")
    with run_context("run-1"):
        thread = threading.Thread(target=logging.getLogger("esper").info, args=("elsewhere",))
        thread.start()
        thread.join()
    assert "run_id" not in json.loads(path.read_text())


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql+psycopg://me:hunter2@host/db", "postgresql+psycopg://me:***@host/db"),
        ("postgresql://me@host/db", "postgresql://me@host/db"),
        ("api_key = 'abc123'", "api_key = '***'"),
        ('{"password": "abc123"}', '{"password": "***"}'),
        ("AWS_SECRET_ACCESS_KEY=abc/123+x", "AWS_SECRET_ACCESS_KEY=***"),
        ("Authorization: Bearer abcdefgh.ijk", "Authorization: Bearer ***"),
        ("lr=0.01 at fc1", "lr=0.01 at fc1"),
    ],
)
def test_what_looks_like_a_secret_is_replaced(text: str, shown: str) -> None:
    assert redact(text) == shown


def test_the_value_of_a_secret_variable_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEMPORAL_API_KEY", "zyx-very-secret")
    assert redact("sent zyx-very-secret to it") == "sent *** to it"


@given(strategies.text(alphabet="abcdefghij0123456789", min_size=8, max_size=20))
def test_no_password_of_an_address_survives(secret: str) -> None:
    assert secret not in redact(f"cannot open postgresql+psycopg://me:{secret}@db.example:5432/esper: refused")
