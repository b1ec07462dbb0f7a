"""A branch of a run at one epoch: what of its records a new run begins with, and the checkpoint under its own name.

The records are those of the parent as they stood when that epoch ended; what was decided on the epoch itself, and
after it, is left out. An order that was on its way is an order of the branch, and is forged again for it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from typing import TypeVar

from esper.contracts.assets import ArtifactRef
from esper.contracts.base import Contract
from esper.contracts.config import EsperConfig
from esper.contracts.enums import STATE_AFTER
from esper.contracts.enums import AdaptationState
from esper.contracts.enums import FactKind
from esper.contracts.operational import Adaptation
from esper.contracts.operational import AdaptationDecision
from esper.contracts.operational import EpochReport
from esper.contracts.operational import HeadRef
from esper.contracts.operational import JudgeReport
from esper.contracts.orders import Lineage
from esper.runtime.tezzeret.ir import canonical_json
from esper.runtime.tolaria.checkpoint import Get
from esper.runtime.tolaria.checkpoint import Put
from esper.runtime.tolaria.checkpoint import fingerprint
from esper.runtime.tolaria.checkpoint import identity_of
from esper.runtime.tolaria.checkpoint import read_manifest
from esper.runtime.tolaria.live.run_state import RunState
from esper.runtime.urza.branches import Branch

ContractT = TypeVar("ContractT", bound=Contract)

_ADAPTATION_FIELDS = frozenset({"adaptation_id", "held_adaptation"})


@dataclass(frozen=True)
class ParentRecords:
    """What Urza holds of the run that is branched; `head` is where the epoch ended."""

    run_id: str
    head: HeadRef
    manifest: ArtifactRef
    reports: Sequence[EpochReport]
    decisions: Sequence[AdaptationDecision]
    adaptations: Sequence[Adaptation]


def branch_off(
    parent: ParentRecords,
    epoch: int,
    run_id: str,
    config: EsperConfig,
    *,
    decision: AdaptationDecision | None,
    get: Get,
    put: Put,
) -> Branch:
    """The branch of `parent` after `epoch`; `put` stores its checkpoint. `decision`, if given, is what is decided on
    that epoch in place of what a policy would. Raises `IntegrityError` (ESP-401..408) when the checkpoint is gone or
    damaged."""
    original = read_manifest(parent.manifest, get)
    manifest = _renamed(original, parent.run_id, run_id)
    recipe = fingerprint(config, identity_of(original))
    manifest = manifest.model_copy(update={"fingerprint": recipe})
    stored = put(canonical_json(manifest.model_dump(mode="json")))
    state = manifest.state
    decisions = tuple(_renamed(d, parent.run_id, run_id) for d in parent.decisions if d.epoch < epoch)
    adaptations = (_renamed(a, parent.run_id, run_id) for a in parent.adaptations if a.epoch < epoch)
    return Branch(
        run_id=run_id,
        config=config,
        lineage=Lineage(
            parent=parent.run_id,
            epoch=epoch,
            head=parent.head.digest,
            decision=None if decision is None else decision.kind,
        ),
        head=HeadRef(digest=stored.digest, parent=None, step=parent.head.step, epoch=parent.head.epoch),
        manifest=stored,
        facts=state.executed,
        reports=tuple(_renamed(r, parent.run_id, run_id) for r in parent.reports if r.epoch <= epoch),
        decisions=decisions if decision is None else (*decisions, _renamed(decision, parent.run_id, run_id)),
        adaptations=tuple(_as_of(adaptation, state) for adaptation in adaptations),
        judgements=state.judgements,
    )


def _as_of(adaptation: Adaptation, state: RunState) -> Adaptation:
    """An adaptation as it stood at a checkpoint: ordered, and then what was executed."""
    changes: dict[str, Any] = {"state": AdaptationState.ORDERED, "kernel": None, "judge_step": None, "judge": None}
    for fact in state.executed:
        if fact.adaptation_id != adaptation.adaptation_id or fact.kind not in STATE_AFTER:
            continue
        changes["state"] = STATE_AFTER[fact.kind]
        if fact.kind is FactKind.GRAFT:
            kernel = None if fact.delivery is None else fact.delivery.kernel
            changes |= {"kernel": kernel, "apply_step": fact.apply_step, "judge_step": fact.judge_step}
        elif fact.reason:
            changes["reason"] = fact.reason
    judged: JudgeReport | None = next(
        (report for report in state.judgements if report.adaptation_id == adaptation.adaptation_id), None
    )
    return adaptation.model_copy(update=changes | ({} if judged is None else {"judge": judged}))


def _renamed(record: ContractT, parent: str, child: str) -> ContractT:
    """The same record of another run: its id, and the ids of its adaptations."""

    def rename(value: Any, key: str | None = None) -> Any:
        if isinstance(value, dict):
            return {name: rename(item, name) for name, item in value.items()}
        if isinstance(value, list):
            return [rename(item, key) for item in value]
        if key == "run_id" and value == parent:
            return child
        if key in _ADAPTATION_FIELDS and isinstance(value, str) and value.startswith(f"{parent}/"):
            return f"{child}/{value.removeprefix(f'{parent}/')}"
        return value

    return type(record).model_validate_json(json.dumps(rename(record.model_dump(mode="json"))))
