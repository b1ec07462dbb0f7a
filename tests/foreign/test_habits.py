"""What the owners of these models do with them goes on working while something is grown in them."""

import copy
from pathlib import Path

import pytest
import torch
from foreign_models import FOREIGN
from foreign_models import Encoder
from foreign_models import gpt2
from foreign_world import evaluated
from foreign_world import seeded
from foreign_world import wrapped
from torch import Tensor
from torch import nn
from transformers import GPT2Config
from transformers import GPT2LMHeadModel

import esper

PLACEWISE = (
    ("transformer.wte", "lowrank"),
    ("transformer.h.0.attn.c_attn", "lowrank"),
    ("transformer.h.0.mlp", "bottleneck"),
    ("transformer.h.1", "norm_gate"),
    ("transformer.h.1", "se_gate"),
)
"""Blueprints that look at each place of a sequence by itself."""


def stir(model: nn.Module) -> None:
    """Random weights for everything that was grown, as if it had learned something."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "kasmina" in name.split("."):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def grown_gpt2() -> nn.Module:
    model = wrapped(FOREIGN["gpt2"]).eval()
    for site, blueprint in PLACEWISE:
        esper.graft(model, site, blueprint)
    stir(model)
    return model


def test_generation_with_a_cache_is_that_of_the_grown_model() -> None:
    model = grown_gpt2()
    asked = torch.tensor([[3, 7, 3, 22], [3, 21, 19, 15]])
    how = {"attention_mask": torch.ones_like(asked), "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    told = model.generate(asked, **how)
    expected = asked
    with torch.no_grad():
        for _ in range(6):
            following = model(input_ids=expected, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            expected = torch.cat([expected, following], dim=1)
        assert torch.equal(told, expected)
        with esper.dormant(model):
            assert not torch.equal(told, model.generate(asked, **how))


def test_asking_for_hidden_states_and_attentions_changes_nothing() -> None:
    torch.manual_seed(0)
    model = gpt2(attn_implementation="eager")
    given = {"input_ids": FOREIGN["gpt2"].batch()["input_ids"]}
    asked = given | {"output_hidden_states": True, "output_attentions": True}
    plain = copy.deepcopy(model).eval()
    esper.wrap(model.eval(), ["transformer.h.?"], example_inputs=given)
    with torch.no_grad():
        for left, right in zip(plain(**asked).hidden_states, model(**asked).hidden_states, strict=True):
            assert torch.equal(left, right)
        esper.graft(model, "transformer.h.0", "bottleneck")
        stir(model)
        answer = model(**asked)
        assert torch.equal(answer.hidden_states[0], plain(**asked).hidden_states[0])
        assert not torch.allclose(answer.hidden_states[1], plain(**asked).hidden_states[1])
        assert [attention.shape for attention in answer.attentions] == [(3, 2, 7, 7)] * 2
        torch.testing.assert_close(answer.logits, model(**given).logits)


def test_checkpointed_blocks_give_the_same_gradients_when_grown() -> None:
    model = grown_gpt2().train()
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.activation_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(5)
        model(**FOREIGN["gpt2"].batch(), use_cache=False).loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() == dict(model.named_parameters()).keys()
    assert [name for name, value in found[0].items() if not torch.equal(value, found[1][name])] == []


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(**FOREIGN["gpt2"].batch()).logits
    return found


def test_a_wrapped_model_is_stored_under_its_own_architecture(tmp_path: Path) -> None:
    model = wrapped(FOREIGN["gpt2"])
    model.save_pretrained(tmp_path)
    assert model.config.architectures == ["GPT2LMHeadModel"]
    again, told = GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told.values())
    assert type(again) is GPT2LMHeadModel
    assert torch.equal(logits(again), logits(model))


def test_what_was_folded_goes_the_way_of_transformers(tmp_path: Path) -> None:
    model = gpt2(activation_function="relu")
    optimizer = torch.optim.AdamW(model.parameters())
    esper.wrap(model, example_inputs=FOREIGN["gpt2"].batch())
    esper.graft(model, "transformer.h.1.attn.c_attn", "lowrank", optimizer=optimizer)
    for layer in (0, 1):
        esper.graft(model, f"transformer.h.{layer}.mlp.c_fc", "widen", optimizer=optimizer, units=8)
    stir(model)
    before = logits(model)
    esper.fossilize(model, optimizer=optimizer)
    esper.unwrap(model)
    # The one width that the configuration has for all layers.
    model.config.n_inner = model.transformer.h[0].mlp.c_fc.nf
    assert model.config.n_inner == 72
    model.save_pretrained(tmp_path)
    again, told = GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told.values())
    assert torch.equal(logits(again), logits(model))
    torch.testing.assert_close(logits(again), before)


def test_what_stays_a_block_is_told_by_transformers_and_kept_by_esper(tmp_path: Path) -> None:
    model = grown_gpt2()
    model.save_pretrained(tmp_path)
    assert model.config.architectures == ["GPT2LMHeadModel"]
    _, told = GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert {name for name, _ in model.named_parameters() if "kasmina" in name} == set(told["unexpected_keys"])
    esper.save(model, tmp_path / "grown")
    again = esper.load(tmp_path / "grown", GPT2LMHeadModel(GPT2Config.from_pretrained(tmp_path)))
    assert torch.equal(logits(again), logits(model))


def test_an_activation_that_no_kernel_has_is_refused_between_two_layers() -> None:
    model = wrapped(FOREIGN["gpt2"])
    digest = esper.weights_digest(model)
    with pytest.raises(esper.GrowthError, match=r"transformer\.h\.0\.mlp\.c_fc") as caught:
        esper.graft(model, "transformer.h.0.mlp.c_fc", "widen")
    assert caught.value.code == "ESP-434"
    assert esper.weights_digest(model) == digest
    assert esper.status(model).grown_parameters == 0


def test_the_fast_path_of_evaluation_gives_the_grown_result() -> None:
    torch.manual_seed(0)
    model = Encoder().eval()
    x = FOREIGN["encoder"].batch()["x"]
    with torch.no_grad():
        fused = model(x)
    esper.wrap(model, example_inputs=x)
    for site, blueprint in (("encoder.layers.0.linear1", "widen"), ("encoder.layers.1.self_attn", "bottleneck")):
        esper.graft(model, site, blueprint)
    stir(model)
    slow = model(x).detach()
    with torch.no_grad():
        torch.testing.assert_close(model(x), slow)
        assert not torch.allclose(fused, slow, atol=1e-3)
        with esper.dormant(model):
            assert torch.equal(model(x), fused)


def test_a_recurrent_model_may_be_called_step_by_step() -> None:
    foreign = FOREIGN["lstm"]
    model = wrapped(foreign).eval()
    for growth in foreign.grows:
        esper.graft(model, growth.site, growth.blueprint)
    stir(model)
    ids, state, found = foreign.batch()["ids"], None, []
    with torch.no_grad():
        for place in range(ids.shape[1]):
            answer = model(ids[:, place : place + 1], state)
            state = answer["state"]
            found.append(answer["logits"])
        torch.testing.assert_close(torch.cat(found, dim=1), model(ids)["logits"])


def test_an_expert_that_sees_no_rows_grows_and_stays_what_it_was() -> None:
    foreign = FOREIGN["mixture"]
    model = wrapped(foreign)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    before = evaluated(model, foreign)
    for site, blueprint in (("experts.2", "bottleneck"), ("experts.2.up", "widen"), ("experts.2.down", "se_gate")):
        esper.graft(model, site, blueprint, optimizer=optimizer)
    for left, right in zip(before, evaluated(model, foreign), strict=True):
        assert torch.equal(left, right)
    foreign.loss(model(**foreign.batch())).backward()
    optimizer.step()
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    assert not model.experts[2].kasmina["0"].up.weight.any()
    plain = seeded(foreign)
    assert not plain(**foreign.batch())["sizes"][0][2:].any()
