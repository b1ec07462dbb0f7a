"""Models that others wrote, grown at a site of every kind: exact at birth, learning, and gone again exactly."""

import pytest
import torch
from foreign_models import FOREIGN
from foreign_world import evaluated
from foreign_world import gradients
from foreign_world import loss_of
from foreign_world import new_parameters
from foreign_world import seeded
from foreign_world import trained
from foreign_world import wrapped

import esper


@pytest.mark.parametrize("name", FOREIGN)
def test_every_graft_keeps_outputs_and_old_gradients_to_the_bit(name: str) -> None:
    foreign = FOREIGN[name]
    model = wrapped(foreign)
    optimizer = torch.optim.AdamW(model.parameters())
    kinds = {site.name: site.kind for site in esper.status(model).sites}
    outputs, old = evaluated(model, foreign), gradients(model, foreign)
    for growth in foreign.grows:
        assert kinds[growth.site] == growth.kind
        made = esper.graft(model, growth.site, growth.blueprint, optimizer=optimizer, **growth.hyperparameters)
        assert made.birth_difference == 0.0
        for before, now in zip(outputs, evaluated(model, foreign), strict=True):
            assert torch.equal(before, now), growth
        found = gradients(model, foreign)
        assert [key for key, value in old.items() if not torch.equal(value, found[key])] == [], growth
    trainable = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert all(id(p) in trainable for p in model.parameters())


@pytest.mark.parametrize("name", FOREIGN)
def test_what_grew_learns_and_leaves_no_trace_when_it_is_culled(name: str) -> None:
    foreign = FOREIGN[name]
    grown = trained(foreign)
    assert loss_of(grown.model, foreign) < grown.loss_at_birth
    now = new_parameters(grown.model)
    assert [key for key, value in grown.born.items() if torch.equal(value, now[key])] == []
    assert all(bool(torch.isfinite(value).all()) for value in now.values())
    for site in {growth.site for growth in foreign.grows}:
        esper.cull(grown.model, site, optimizer=grown.optimizer)
    plain = seeded(foreign)
    plain.load_state_dict(grown.model.state_dict())
    for left, right in zip(evaluated(plain, foreign), evaluated(grown.model, foreign), strict=True):
        assert torch.equal(left, right)
    assert sum(len(group["params"]) for group in grown.optimizer.param_groups) == len(list(plain.parameters()))
