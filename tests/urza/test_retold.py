"""Runs that were told again enter a new database whole or not at all, and never one that has runs."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from esper.commands.actions.retold_runs import Remains
from esper.commands.actions.retold_runs import put_together
from esper.contracts.enums import AdaptationState
from esper.contracts.enums import KernelState
from esper.errors import NotFoundError
from esper.errors import RunConflict
from esper.runtime.temporal.retelling import ToldRun
from esper.runtime.temporal.retelling import identify
from esper.runtime.temporal.retelling import retell
from esper.runtime.urza.library import Library
from esper.runtime.urza.objects import FolderStore
from esper.runtime.urza.retold import RetoldRun

pytestmark = pytest.mark.fault("E2", "I1", "I2", "I9")

HISTORIES = Path(__file__).parent.parent / "replay" / "histories"

Play = Callable[..., Any]


@pytest.fixture
def retold(tmp_path: Path) -> Callable[[str], tuple[ToldRun, RetoldRun]]:
    def read(scene: str) -> tuple[ToldRun, RetoldRun]:
        documents = [json.loads(path.read_text()) for path in HISTORIES.glob(f"{scene}.*.json")]
        told = retell([(identify(document), document) for document in documents])
        return told, put_together(told, Remains(FolderStore(tmp_path / "objects")), None, ()).run

    return read


@pytest.mark.parametrize("scene", ["grow_and_keep", "kill_and_resume", "quarantine", "long_run", "cull_by_hand"])
def test_what_was_told_is_read_back(play: Play, retold: Callable[..., tuple[ToldRun, RetoldRun]], scene: str) -> None:
    told, run = retold(scene)

    async def scenario(library: Library) -> None:
        assert await library.enter_retold([run]) == {}
        record = await library.run(told.run_id)
        assert told.record is not None
        assert record.outcome is told.record.outcome and record.finished == told.record.finished
        assert await library.lease(told.run_id) is None
        assert (await library.claim(told.run_id, "queue")).lease_gen > told.lease_gen
        assert await library.reports(told.run_id) == run.reports
        assert await library.facts(told.run_id) == run.facts
        assert await library.decisions(told.run_id) == run.decisions
        assert await library.heads(told.run_id) == run.heads
        states = {adaptation.state for adaptation in await library.adaptations(told.run_id)}
        assert states <= {AdaptationState.FOSSILIZED, AdaptationState.FAILED}
        for digest in {fact.delivery.kernel for fact in run.facts if fact.delivery is not None}:
            quarantined = scene == "quarantine"
            wanted = KernelState.QUARANTINED if quarantined else KernelState.CERTIFIED
            assert (await library.kernel(digest)).state is wanted

    play(scenario)


def test_nothing_is_written_over_and_a_run_that_is_refused_leaves_nothing(
    play: Play, retold: Callable[..., tuple[ToldRun, RetoldRun]]
) -> None:
    (_, good), (_, bad) = retold("wait_only"), retold("grow_and_keep")
    twice = replace(bad, facts=(*bad.facts, bad.facts[0]))

    async def scenario(library: Library) -> None:
        refused = await library.enter_retold([twice, good])
        assert list(refused) == [bad.record.run_id]
        with pytest.raises(NotFoundError):
            await library.run(bad.record.run_id)
        assert await library.kernels() == ()
        assert (await library.run(good.record.run_id)).outcome is good.record.outcome
        with pytest.raises(RunConflict, match="holds 1 runs: it is not overwritten") as conflict:
            await library.enter_retold([bad])
        assert conflict.value.code == "ESP-504"
        with pytest.raises(NotFoundError):
            await library.run(bad.record.run_id)

    play(scenario)
