"""A secret that Esper was given is in no history, no log, no record and no artifact, also when things go wrong."""

import os
from pathlib import Path

import pytest
from checked_runs import SECRET_VARIABLES
from content_scan import secrets_in
from local_stack import LocalStack
from temporalio.api.failure.v1 import Failure
from temporalio.exceptions import ApplicationError

from esper.commands.actions import connections
from esper.errors import ConfigurationError
from esper.errors import DatabaseUnavailable
from esper.runtime.temporal.failures import from_failure
from esper.runtime.temporal.failures import to_failure
from esper.runtime.temporal.plugin import EsperPlugin
from esper.runtime.temporal.plugin import RedactedFailures

pytestmark = pytest.mark.fault("I12")

SECRETS = {name: f"planted-{name.lower()}-7Q3xZ" for name in SECRET_VARIABLES}

TALKATIVE = """
import logging
import os
import torch
from torch import nn
from torch.utils.data import TensorDataset
import esper


def task(fails=False):
    secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    logging.getLogger("my.code").warning("connecting with %s", secret)
    x = torch.randn(192, 4, generator=torch.Generator().manual_seed(0))

    def loss(model, batch):
        if fails:
            raise RuntimeError(f"the store refused {secret}: postgresql://me:{os.environ['PGPASSWORD']}@db/urza")
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    split = TensorDataset(x[:128], x[:128, :1]), TensorDataset(x[128:], x[128:, :1])
    return esper.Task(model=nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)), train=split[0],
                      validation=split[1], loss=loss)
"""

CONFIG = """
run: {name: talkative, max_epochs: 2}
task: {target: "talkative_task:task", arguments: {fails: %s}}
"""


@pytest.mark.parametrize(
    "database",
    ["postgresql+psycopg://me:geheim-geheim@db/urza", "postgresql://me@db/urza?password=geheim-geheim"],
)
def test_a_password_in_the_database_url_of_a_run_is_refused(database: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        connections.read_configuration("digits", None, [f"urza.database={database}"])
    assert refused.value.code == "ESP-204"
    assert "geheim" not in str(refused.value) and "PGPASSWORD" in str(refused.value)


def test_keys_in_the_address_of_a_bucket_are_refused() -> None:
    with pytest.raises(ConfigurationError) as refused:
        connections.store(connections.read_configuration("digits", None, ["urza.objects=s3://id:geheim@b"]).urza)
    assert "geheim" not in str(refused.value)


def test_a_failure_carries_no_secret_through_any_of_its_causes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    wire = Failure()
    try:
        try:
            raise OSError(f"refused: {SECRETS['AWS_SECRET_ACCESS_KEY']}")
        except OSError as cause:
            error = DatabaseUnavailable("ESP-333", "postgresql://me:geheim@db says no", hint=SECRETS["PGPASSWORD"])
            raise to_failure(error) from cause
    except ApplicationError as failure:
        converter = RedactedFailures()
        payloads = EsperPlugin().data_converter(None).payload_converter  # type: ignore[operator, misc, call-arg]
        converter.to_failure(failure, payloads, wire)
    text = wire.SerializeToString()
    assert list(secrets_in("the failure", text, (*SECRETS.values(), "geheim"))) == []
    assert b"says no" in text and b"refused: ***" in text
    back = from_failure(converter.from_failure(wire, payloads))
    assert isinstance(back, DatabaseUnavailable) and back.code == "ESP-333"


@pytest.mark.slow
@pytest.mark.system
@pytest.mark.timeout(600)
def test_planted_secrets_are_nowhere_after_real_runs(tmp_path: Path) -> None:
    """One run that ends well, and one whose own code shouts them."""
    (tmp_path / "talkative_task.py").write_text(TALKATIVE)
    stack = LocalStack(tmp_path / "home", **SECRETS)
    try:
        for run_id, fails in (("quiet", "false"), ("loud", "true")):
            (tmp_path / "run.yaml").write_text(CONFIG % fails)
            ended = stack.run("start-run", "--config", "run.yaml", "--run-id", run_id, "--json", folder=tmp_path)
            assert (ended.code == 0) is (fails == "false"), ended.err
            assert list(secrets_in("what was printed", (ended.out + ended.err).encode(), SECRETS.values())) == []
        replayed = stack.run("replay", "loud", "--json")
        assert replayed.code == 0, replayed.err
    finally:
        stack.run("down")
    found = []
    for folder, _, names in os.walk(tmp_path):
        for name in names:
            path = Path(folder) / name
            found += list(secrets_in(str(path), path.read_bytes(), SECRETS.values()))
    assert found == []
    logs = "".join(path.read_text() for path in (tmp_path / "home" / "logs").glob("trainer*.log"))
    assert "connecting with ***" in logs
