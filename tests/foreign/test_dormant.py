"""Models that others wrote, wrapped: nothing about them changes by a bit until something is grown."""

import pytest
import torch
from foreign_models import FOREIGN
from foreign_world import evaluated
from foreign_world import seeded
from foreign_world import step
from foreign_world import wrapped

import esper


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("targets", ["auto", "blocks"])
@pytest.mark.parametrize("name", FOREIGN)
def test_wrapped_model_takes_the_same_step_to_the_bit(name: str, targets: str, training: bool) -> None:
    foreign = FOREIGN[name]
    plain, ours = seeded(foreign), seeded(foreign)
    random_state, objects = torch.get_rng_state(), list(ours.parameters())
    if targets == "blocks":
        wrapped(foreign, ours)
    else:
        # Proven by the first forward of the step.
        esper.wrap(ours)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(a is b for a, b in zip(ours.parameters(), objects, strict=True))
    assert type(ours).__name__ == type(plain).__name__
    left, right = step(plain, foreign, training=training), step(ours, foreign, training=training)
    assert list(left) == list(right)
    assert [key for key in left if not torch.equal(left[key], right[key])] == []
    for a, b in zip(evaluated(plain, foreign), evaluated(ours, foreign), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", FOREIGN)
def test_unwrapped_dormant_model_has_its_own_classes_again(name: str) -> None:
    foreign = FOREIGN[name]
    ours = seeded(foreign)
    classes = [type(module) for module in ours.modules()]
    attributes = [sorted(vars(module)) for module in ours.modules()]
    esper.unwrap(wrapped(foreign, ours))
    assert [type(module) for module in ours.modules()] == classes
    assert [sorted(vars(module)) for module in ours.modules()] == attributes
