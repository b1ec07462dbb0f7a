"""`docker-compose.yml` says what the code and the documentation say; no engine is needed to know that."""

import re
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from esper.runtime.temporal.server import RETENTION_DAYS
from esper.runtime.temporal.server import server_command

ROOT = Path(__file__).parents[2]
ON_ITS_OWN_MACHINE = {"--ip", "--ui-ip", "--port", "--ui-port", "--db-filename"}


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    document = YAML(typ="safe", pure=True).load((ROOT / "docker-compose.yml").read_text())
    assert set(document) == {"name", "services", "volumes"}
    used = {
        volume.partition(":")[0] for service in document["services"].values() for volume in service.get("volumes", ())
    }
    assert used == set(document["volumes"])
    return document["services"]


def test_every_image_is_of_a_stated_version(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert re.fullmatch(r"[a-z/]+:\d+(\.\d+)*(-alpine)?", service["image"]), name


def test_every_port_is_bound_to_loopback(services: dict[str, Any]) -> None:
    for name, service in services.items():
        for port in service.get("ports", ()):
            assert re.fullmatch(r"127\.0\.0\.1:(\d+):\1", port), name


def beside_places(command: list[str]) -> list[str]:
    """A command line in sorted pieces, without addresses, ports and files."""
    pieces = [piece for part in command for piece in (part.split("=", 1) if part.startswith("--") else [part])]
    places = {index for index, piece in enumerate(pieces) if piece in ON_ITS_OWN_MACHINE}
    return sorted(piece for index, piece in enumerate(pieces) if not {index, index - 1} & places)


def test_the_server_is_started_as_the_local_stack_starts_it(services: dict[str, Any]) -> None:
    ours = server_command(Path("temporal"), port=1, ui_port=2, database=Path("x"))[1:]
    assert beside_places(services["temporal"]["command"]) == beside_places(ours)
    assert f"--retention={RETENTION_DAYS}d" in services["retention"]["command"]


def test_the_documentation_names_its_ports_and_passwords(services: dict[str, Any]) -> None:
    text = (ROOT / "docs" / "configuration.md").read_text()
    database, s3 = services["database"]["environment"], services["s3"]["environment"]
    address = f"{database['POSTGRES_USER']}@127.0.0.1:5432/{database['POSTGRES_DB']}"
    assert f"postgresql+psycopg://{address} PGPASSWORD={database['POSTGRES_PASSWORD']}\n" in text
    assert f"s3://{s3['S3_BUCKET']}/" in text
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        assert re.search(rf"\b{name}={re.escape(s3[name])}\b", text), name
    for port in ("7233", "5432", "8333"):
        assert any(f"127.0.0.1:{port}:{port}" in service.get("ports", ()) for service in services.values())
        assert f"127.0.0.1:{port}" in text
