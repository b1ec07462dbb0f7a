"""A blueprint that exists nowhere but in the database grows a run: strategist, forge and trainer each ask for it."""

import re
from pathlib import Path

import pytest
from local_stack import LocalStack

DOCUMENT = Path(__file__).parents[2] / "docs" / "blueprints.md"


@pytest.mark.slow
def test_a_submitted_blueprint_is_decided_on_built_grafted_and_reproduced(stack: LocalStack, tmp_path: Path) -> None:
    (text,) = re.findall(r"```json\n(.*?)```", DOCUMENT.read_text(), re.S)
    (tmp_path / "gated.json").write_text(text)
    assert stack.ok("blueprints", "submit", "gated.json", folder=tmp_path).out == "gated_branch version 1\n"
    named = ("--set", "tamiyo.blueprints=[gated_branch]", "--set", "run.max_epochs=24")
    document = stack.ok("start-run", "--quick-start", "digits", "--run-id", "gated-1", *named, "--json").document
    assert [each["blueprint"] for each in document["adaptations"]] == ["gated_branch"]
    assert document["adaptations"][0]["state"] == "fossilized"
    assert document["parameters"]["end"] == 870 + 2 * 64 * 16 + 16 * 10
    stack.ok("reproduce", "gated-1")
