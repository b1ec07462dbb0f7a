"""The tables of Urza. A contract is kept whole as JSON; beside it stand only the columns that are filtered on.

JSON is kept as text (on PostgreSQL too: JSONB turns -0.0 into 0 and 1e22 into an integer, and a record
must come back as it was written). Steps and lease generations order things; times never do.
"""

import json
from enum import StrEnum
from typing import Any
from typing import Generic
from typing import TypeVar

from pydantic import JsonValue
from sqlalchemy import JSON
from sqlalchemy import BigInteger
from sqlalchemy import Column
from sqlalchemy import Dialect
from sqlalchemy import Enum
from sqlalchemy import ForeignKey
from sqlalchemy import Integer
from sqlalchemy import MetaData
from sqlalchemy import String
from sqlalchemy import Table
from sqlalchemy import Text
from sqlalchemy import TypeDecorator
from sqlalchemy import UniqueConstraint

from esper.contracts.assets import Blueprint
from esper.contracts.assets import Kernel
from esper.contracts.base import Contract
from esper.contracts.config import EsperConfig
from esper.contracts.enums import AdaptationState
from esper.contracts.enums import FactKind
from esper.contracts.enums import KernelState
from esper.contracts.enums import Outcome
from esper.contracts.enums import Verdict
from esper.contracts.operational import Adaptation
from esper.contracts.operational import AdaptationDecision
from esper.contracts.operational import EpochReport
from esper.contracts.operational import Fact
from esper.contracts.operational import JudgeReport
from esper.contracts.orders import FinishedRun
from esper.contracts.orders import Lineage

ContractT = TypeVar("ContractT", bound=Contract)

DIGEST_LENGTH = 71
RUN_ID_LENGTH = 64
ADAPTATION_ID_LENGTH = 128
NAME_LENGTH = 512


class Document(TypeDecorator[ContractT], Generic[ContractT]):
    """A contract as JSON: validated strictly whenever it is read."""

    impl = JSON
    cache_ok = True

    def __init__(self, contract: type[ContractT]) -> None:
        super().__init__(none_as_null=True)
        self.contract = contract

    def process_bind_param(self, value: ContractT | None, dialect: Dialect) -> JsonValue:
        return None if value is None else value.model_dump(mode="json")

    def process_result_value(self, value: Any, dialect: Dialect) -> ContractT | None:
        # From JSON, not from the parsed form: in strict mode only JSON may bring a list for a tuple.
        return None if value is None else self.contract.model_validate_json(json.dumps(value))


def _one_of(kind: type[StrEnum], name: str) -> Enum:
    return Enum(
        kind,
        name=name,
        native_enum=False,
        create_constraint=True,
        length=32,
        values_callable=lambda members: [member.value for member in members],
    )


def _run_id(*, primary_key: bool = False) -> Column[str]:
    of_run = ForeignKey("runs.run_id")
    return Column(
        "run_id", String(RUN_ID_LENGTH), of_run, primary_key=primary_key, index=not primary_key, nullable=False
    )


metadata = MetaData(
    naming_convention={
        "ix": "ix_%(column_0_label)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)

runs = Table(
    "runs",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("run_id", String(RUN_ID_LENGTH), nullable=False, unique=True),
    Column("config", Document(EsperConfig), nullable=False),
    Column("outcome", _one_of(Outcome, "outcome"), nullable=False),
    Column("created", String(64), nullable=False),
    Column("lease_gen", BigInteger, nullable=False, server_default="0"),
    Column("task_queue", Text),
    Column("head", String(DIGEST_LENGTH)),
    Column("device", Text),
    Column("threads", Integer),
    Column("parameters_start", BigInteger),
    Column("finished", Document(FinishedRun)),
    Column("restarts", Integer, nullable=False, server_default="0"),
    Column("warnings", JSON, nullable=False),
    Column("failure", JSON(none_as_null=True)),
    Column("lineage", Document(Lineage)),
)

heads = Table(
    "heads",
    metadata,
    _run_id(primary_key=True),
    Column("digest", String(DIGEST_LENGTH), primary_key=True),
    Column("number", Integer, nullable=False),
    Column("parent", String(DIGEST_LENGTH)),
    Column("step", BigInteger, nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("manifest_bytes", BigInteger, nullable=False),
    Column("lease_gen", BigInteger, nullable=False),
    UniqueConstraint("run_id", "number"),
)

rewinds = Table(
    "rewinds",
    metadata,
    _run_id(primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("from_head", String(DIGEST_LENGTH), nullable=False),
    Column("to_head", String(DIGEST_LENGTH), nullable=False),
    Column("lease_gen", BigInteger, nullable=False),
    Column("reason", Text, nullable=False),
)

facts = Table(
    "facts",
    metadata,
    _run_id(primary_key=True),
    Column("seq", Integer, primary_key=True, autoincrement=False),
    Column("adaptation_id", String(ADAPTATION_ID_LENGTH), nullable=False),
    Column("kind", _one_of(FactKind, "kind"), nullable=False),
    # What the fact decides: a graft and a missed delivery decide the same, so there can be only one of them.
    Column("decides", String(32), nullable=False),
    Column("apply_step", BigInteger, nullable=False),
    Column("fact", Document(Fact), nullable=False),
    UniqueConstraint("run_id", "adaptation_id", "decides"),
)

markers = Table(
    "markers",
    metadata,
    _run_id(primary_key=True),
    Column("adaptation_id", String(ADAPTATION_ID_LENGTH), primary_key=True),
    Column("kernel", String(DIGEST_LENGTH), nullable=False),
    # The lease under which the kernel is being executed for the first time; none while it is not.
    Column("opened", BigInteger),
    Column("crashes", Integer, nullable=False),
)

reports = Table(
    "reports",
    metadata,
    _run_id(primary_key=True),
    Column("epoch", BigInteger, primary_key=True, autoincrement=False),
    Column("step", BigInteger, nullable=False),
    Column("report", Document(EpochReport), nullable=False),
)

decisions = Table(
    "decisions",
    metadata,
    _run_id(primary_key=True),
    Column("epoch", BigInteger, primary_key=True, autoincrement=False),
    Column("decision", Document(AdaptationDecision), nullable=False),
)

adaptations = Table(
    "adaptations",
    metadata,
    Column("adaptation_id", String(ADAPTATION_ID_LENGTH), primary_key=True),
    _run_id(),
    Column("number", Integer, nullable=False),
    Column("state", _one_of(AdaptationState, "state"), nullable=False),
    Column("adaptation", Document(Adaptation), nullable=False),
)

judgements = Table(
    "judgements",
    metadata,
    Column("adaptation_id", String(ADAPTATION_ID_LENGTH), primary_key=True),
    _run_id(),
    Column("verdict", _one_of(Verdict, "verdict"), nullable=False),
    Column("report", Document(JudgeReport), nullable=False),
)

divergences = Table(
    "divergences",
    metadata,
    _run_id(primary_key=True),
    Column("record", String(32), primary_key=True),
    Column("key", String(ADAPTATION_ID_LENGTH), primary_key=True),
    # Of the record that came second, so that the same one, written twice, is one divergence.
    Column("digest", String(DIGEST_LENGTH), primary_key=True),
    Column("second", JSON, nullable=False),
)

blueprints = Table(
    "blueprints",
    metadata,
    Column("name", String(NAME_LENGTH), primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("blueprint", Document(Blueprint), nullable=False),
)

kernels = Table(
    "kernels",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("digest", String(DIGEST_LENGTH), nullable=False, unique=True),
    Column("blueprint", String(NAME_LENGTH), nullable=False),
    Column("state", _one_of(KernelState, "state"), nullable=False),
    Column("kernel", Document(Kernel), nullable=False),
)

builds = Table(
    "builds",
    metadata,
    Column("adaptation_id", String(ADAPTATION_ID_LENGTH), primary_key=True),
    _run_id(),
    Column("kernel", String(DIGEST_LENGTH), ForeignKey("kernels.digest"), nullable=False, index=True),
)

histories = Table(
    "histories",
    metadata,
    _run_id(primary_key=True),
    Column("workflow_id", String(NAME_LENGTH), primary_key=True),
    Column("temporal_run_id", String(64), primary_key=True),
    Column("sequence", Integer, nullable=False),
    Column("digest", String(DIGEST_LENGTH), nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
)
