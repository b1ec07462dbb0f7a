"""Growth under DistributedDataParallel, on two real processes: through one call, or not at all."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import esper

CHILD = Path(__file__).parent / "replica_child.py"


@pytest.fixture
def ranks(tmp_path: Path) -> Any:
    def run(scenario: str) -> list[dict[str, Any]]:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        children = [
            subprocess.Popen(
                [sys.executable, str(CHILD), str(rank), str(tmp_path / "meeting"), scenario],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for rank in range(2)
        ]
        ended = [child.communicate(timeout=200) for child in children]
        assert [child.returncode for child in children] == [0, 0], ended
        return [json.loads(out.splitlines()[-1]) for out, _ in ended]

    return run


def test_one_call_leaves_all_ranks_identical(ranks):
    first, second = ranks("together")
    assert (first["rank"], second["rank"]) == (0, 1)
    for moment in ("kernel", "born", "grown", "culled"):
        assert first[moment] == second[moment], moment
    assert first["born"] != first["grown"]
    assert len(first["born"]) == len(first["culled"]) + 3


def test_growth_inside_the_wrapper_is_refused_with_the_way_out(ranks):
    for rank in ranks("alone"):
        assert len(rank["told"]) == 3
        assert all(told.startswith("ESP-440") and "grow_replicas" in told for told in rank["told"])
        assert rank["grown"] == 0


def test_growth_is_taken_back_and_unwrapped_on_all_ranks_or_on_none(ranks):
    for rank in ranks("taken back"):
        assert len(rank["told"]) == 2
        assert all(told.startswith("ESP-440") and "grow_replicas" in told for told in rank["told"])
        assert rank["grown"] > 0
        assert rank["back"]
        assert rank["again"]


def test_a_model_without_a_wrapper_is_refused_by_name():
    with pytest.raises(esper.GrowthError, match="no DistributedDataParallel") as refusal:
        esper.grow_replicas(nn.Linear(2, 2), lambda model: None)
    assert refusal.value.code == "ESP-440"


def test_ranks_that_grow_differently_are_told(ranks):
    assert [rank["code"] for rank in ranks("differently")] == ["ESP-440", "ESP-440"]


def test_a_refusal_on_one_rank_hangs_none(ranks):
    assert [rank["code"] for rank in ranks("one refuses")] == ["ESP-421", "ESP-440"]
