import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import esper
from esper.contracts.enums import SeedState
from esper.runtime.kasmina.keeping.manifest import growth_manifest
from esper.runtime.kasmina.keeping.manifest import rebuild
from esper.runtime.tezzeret.artifact import digest_of
from esper.runtime.tezzeret.ir import canonical_json

OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
}


def step(model: nn.Module, x: torch.Tensor, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    optimizer.zero_grad()
    loss = (model(x) - 1.0).square().mean()
    loss.backward()
    optimizer.step()
    return loss


def grown(zoo: Any, name: str, grafts: list[tuple[str, str]], kind: str = "adamw") -> tuple[Any, Any, Any]:
    model, x = zoo.make(name)
    esper.wrap(model, example_inputs=x)
    model.eval()
    optimizer = OPTIMIZERS[kind](model.parameters())
    for _ in range(2):
        step(model, x, optimizer)
    for site, blueprint in grafts:
        esper.graft(model, site, blueprint, optimizer=optimizer)
    for _ in range(3):
        step(model, x, optimizer)
    return model, x, optimizer


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize(
    ("name", "site", "blueprint"),
    [("mlp", "fc1", "widen"), ("mlp", "fc2", "lowrank"), ("cnn", "conv2", "lowrank"), ("cnn", "head", "lowrank")],
)
def test_folded_model_computes_the_same_and_trains_on(
    zoo: Any, kind: str, name: str, site: str, blueprint: str
) -> None:
    model, x, optimizer = grown(zoo, name, [(site, blueprint)], kind)
    held = model(x)
    before = model(x)
    names = [n for n in model.state_dict() if ".kasmina." not in n]
    (seed,) = esper.fossilize(model, site, optimizer=optimizer)
    assert seed.state is SeedState.FOSSILIZED
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-6)
    assert list(model.state_dict()) == names
    assert esper.status(model).grown_parameters == 0
    parameters = list(model.parameters())
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in parameters}
    assert {id(p) for p in optimizer.state} <= {id(p) for p in parameters}
    for parameter, state in optimizer.state.items():
        assert all(v.shape in (parameter.shape, torch.Size([])) for v in state.values() if isinstance(v, torch.Tensor))
    digest = esper.weights_digest(model)
    assert held.requires_grad
    assert torch.isfinite(step(model, x, optimizer))
    assert esper.weights_digest(model) != digest
    with pytest.raises(esper.GrowthError, match="folded"):
        esper.cull(model, site, seed=0)


def test_folding_widen_continues_adam_as_if_it_had_stayed(zoo: Any) -> None:
    """The first update after the fold is the one the separate block would have got."""
    ends = []
    for fold in (False, True):
        model, x, optimizer = grown(zoo, "mlp", [("fc1", "widen")], "adamw")
        esper.fossilize(model, "fc1", optimizer=optimizer, fold=fold)
        before = model.fc1.weight[5:].detach().clone() if fold else model.fc1.kasmina["0"].down.weight.detach().clone()
        step(model, x, optimizer)
        after = model.fc1.weight[5:] if fold else model.fc1.kasmina["0"].down.weight
        ends.append(after.detach() - before)
    ratio = float(ends[1].norm() / ends[0].norm())
    assert ratio == pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize("kind", ["sgd", "rmsprop", "adagrad"])
def test_folding_widen_changes_no_later_step_of_other_optimizers(zoo: Any, kind: str) -> None:
    ends = []
    for fold in (False, True):
        model, x, optimizer = grown(zoo, "mlp", [("fc1", "widen")], kind)
        esper.fossilize(model, "fc1", optimizer=optimizer, fold=fold)
        for _ in range(4):
            step(model, x, optimizer)
        ends.append(model(x))
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)


def test_widen_folds_into_layers_without_bias(zoo: Any) -> None:
    model = zoo.mlp(bias=False)
    x = torch.randn(8, 6)
    esper.wrap(model, example_inputs=x)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    step(model, x, optimizer)
    esper.graft(model, "fc1", "widen", optimizer=optimizer)
    for _ in range(3):
        step(model, x, optimizer)
    before = model(x)
    esper.fossilize(model, optimizer=optimizer)
    torch.testing.assert_close(model(x), before)
    assert model.fc1.bias.shape == (15,)
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}
    step(model, x, optimizer)


@pytest.mark.parametrize(
    ("name", "site", "blueprint"),
    [("mlp", "fc1", "bottleneck"), ("tied", "first", "lowrank"), ("normed", "fc1", "lowrank")],
)
def test_what_cannot_be_folded_stays_a_plain_module(zoo: Any, name: str, site: str, blueprint: str) -> None:
    model, x, optimizer = grown(zoo, name, [(site, blueprint)])
    before = model(x)
    esper.fossilize(model, optimizer=optimizer)
    assert torch.equal(model(x), before)
    seed = esper.status(model).sites[0].seeds[0]
    assert (seed.state, seed.folded) == (SeedState.FOSSILIZED, False)
    assert esper.fossilize(model) == ()
    esper.cull(model, site, optimizer=optimizer)
    assert esper.status(model).grown_parameters == 0


def test_half_precision_is_never_folded_by_a_sum(zoo: Any) -> None:
    model, x = zoo.make("mlp")
    model.bfloat16()
    esper.wrap(model, example_inputs=x.bfloat16())
    esper.graft(model, "fc1", "lowrank")
    esper.fossilize(model)
    assert not esper.status(model).sites[0].seeds[0].folded


def test_folding_longer_parameters_asks_for_their_optimizer(zoo: Any) -> None:
    model, _, _ = grown(zoo, "mlp", [("fc1", "widen")])
    with pytest.raises(esper.GrowthError, match="optimizer=") as caught:
        esper.fossilize(model)
    assert caught.value.code == "ESP-433"
    assert esper.status(model).sites[0].seeds[0].state is SeedState.TRAINING
    assert esper.fossilize(model, fold=False)[0].state is SeedState.FOSSILIZED


EVERYTHING = [("fc1", "bottleneck"), ("fc1", "widen"), ("fc2", "bottleneck"), ("fc2", "widen"), ("fc3", "lowrank")]


def test_saved_model_comes_back_whole(zoo: Any, tmp_path: Path) -> None:
    model, x, optimizer = grown(zoo, "mlp", EVERYTHING)
    esper.fossilize(model, "fc3", optimizer=optimizer)
    folder = tmp_path / "deep" / "model"
    esper.save(model, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["growth.json", "model.safetensors"]
    base, _ = zoo.make("mlp", seed=9)
    back = esper.load(folder, base)
    assert back is base
    assert torch.equal(back(x), model(x))
    assert esper.weights_digest(back) == esper.weights_digest(model)
    assert esper.status(back) == esper.status(model)
    assert growth_manifest(back) == growth_manifest(model)
    esper.graft(back, "fc2", "bottleneck")
    esper.save(back, folder)
    assert len(esper.status(esper.load(folder, zoo.make("mlp")[0])).sites) == 3


@pytest.mark.parametrize(("name", "site"), [("cnn", "conv2"), ("tied", "second"), ("normed", "fc1")])
def test_saving_keeps_buffers_ties_and_parametrizations(zoo: Any, tmp_path: Path, name: str, site: str) -> None:
    model, x, _ = grown(zoo, name, [(site, "bottleneck")])
    esper.save(model, tmp_path)
    back = esper.load(tmp_path, zoo.make(name, seed=4)[0]).eval()
    assert torch.equal(back(x), model(x))
    if name == "tied":
        assert back.first.weight is back.second.weight


@pytest.mark.parametrize("bias", [True, False])
def test_folded_widths_survive_a_save(zoo: Any, tmp_path: Path, bias: bool) -> None:
    model, x = zoo.mlp(bias=bias), torch.randn(8, 6)
    esper.wrap(model, example_inputs=x)
    esper.graft(model, "fc1", "widen", units=4)
    nn.init.normal_(model.fc1.kasmina["0"].up.weight)
    esper.fossilize(model)
    esper.save(model, tmp_path)
    back = esper.load(tmp_path, zoo.mlp(bias=bias))
    assert (back.fc1.out_features, back.fc2.in_features) == (9, 9)
    assert torch.equal(back(x), model(x))


@pytest.mark.parametrize("file", ["growth.json", "model.safetensors"])
def test_one_flipped_bit_is_refused(zoo: Any, tmp_path: Path, file: str) -> None:
    model, _, _ = grown(zoo, "mlp", [("fc1", "bottleneck")])
    esper.save(model, tmp_path)
    path = tmp_path / file
    intact = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(len(intact) * 8, (40,), generator=generator).tolist()
    for place in [0, len(intact) * 8 - 1, *places]:
        damaged = bytearray(intact)
        damaged[place // 8] ^= 1 << (place % 8)
        path.write_bytes(bytes(damaged))
        base = zoo.make("mlp")[0]
        with pytest.raises(esper.IntegrityError) as caught:
            esper.load(tmp_path, base)
        assert caught.value.code in ("ESP-401", "ESP-407")
        assert not isinstance(base, esper.MorphableModel)
    path.write_bytes(intact[:-1])
    with pytest.raises(esper.IntegrityError):
        esper.load(tmp_path, zoo.make("mlp")[0])
    path.unlink()
    with pytest.raises(esper.IntegrityError, match="cannot be read"):
        esper.load(tmp_path, zoo.make("mlp")[0])


def test_another_architecture_is_refused_untouched(zoo: Any, tmp_path: Path) -> None:
    model, _, _ = grown(zoo, "mlp", [("fc1", "bottleneck")])
    esper.save(model, tmp_path)
    for base, told in (
        (zoo.mlp(hidden=7), "fc1"),
        (zoo.cnn(), "lacks"),
        (zoo.mlp().double(), "float32"),
        (nn.Sequential(), "also has"),
    ):
        with pytest.raises(esper.IntegrityError, match=told) as caught:
            esper.load(tmp_path, base)
        assert caught.value.code == "ESP-408"
        assert not isinstance(base, esper.MorphableModel)


def test_a_forged_document_with_right_digests_is_still_checked(zoo: Any, tmp_path: Path) -> None:
    model, _, _ = grown(zoo, "mlp", [("fc1", "bottleneck")])
    esper.save(model, tmp_path)
    body = json.loads((tmp_path / "growth.json").read_bytes())
    del body["digest"]
    seed = body["growth"]["sites"][0]["seeds"][0]
    seed["kernel_manifest"] = seed["kernel_manifest"].replace('"rank":32', '"rank":31')
    body["digest"] = digest_of(canonical_json(body))
    (tmp_path / "growth.json").write_bytes(canonical_json(body))
    with pytest.raises(esper.IntegrityError, match="kernel manifest") as caught:
        esper.load(tmp_path, zoo.make("mlp")[0])
    assert caught.value.code == "ESP-404"


def test_saving_refuses_what_would_need_pickling(zoo: Any, tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"secret": object()}

    model = esper.wrap(nn.Sequential(Extra(2, 2)))
    with pytest.raises(esper.GrowthError, match="without pickling") as caught:
        esper.save(model, tmp_path / "out")
    assert caught.value.code == "ESP-438"
    (tmp_path / "file").write_text("")
    with pytest.raises(esper.ConfigurationError, match="cannot save"):
        esper.save(esper.wrap(zoo.mlp()), tmp_path / "file")


def test_rebuilt_structure_takes_a_state_dict_and_refuses_others(zoo: Any) -> None:
    model, x, _ = grown(zoo, "mlp", EVERYTHING)
    fresh, _ = zoo.make("mlp", seed=3)
    esper.wrap(fresh)
    rebuild(fresh, growth_manifest(model))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))
    with pytest.raises(esper.IntegrityError, match="fresh base"):
        rebuild(fresh, growth_manifest(model))
    with pytest.raises(esper.IntegrityError, match="another architecture"):
        rebuild(esper.wrap(zoo.cnn()), growth_manifest(model))
    with pytest.raises(esper.IntegrityError, match="has parameters"):
        rebuild(esper.wrap(zoo.mlp(hidden=9)), growth_manifest(model))


@pytest.mark.parametrize(
    ("name", "grafts", "graphs"),
    [
        ("mlp", EVERYTHING, {"fc1", "fc2"}),
        ("mlp", [("fc1", "widen"), ("fc2", "widen")], set()),
        ("cnn", [("conv1", "bottleneck"), ("conv2", "lowrank"), ("head", "bottleneck")], {"conv1", "head"}),
        ("normed", [("fc1", "bottleneck"), ("fc2", "bottleneck")], {"fc1", "fc2"}),
        ("tied", [("first", "lowrank")], {"first"}),
    ],
)
def test_unwrapped_model_is_plain_and_computes_the_same(
    zoo: Any, name: str, grafts: list[tuple[str, str]], graphs: set[str]
) -> None:
    model, x, optimizer = grown(zoo, name, grafts)
    calls: list[str] = []
    model.get_submodule(grafts[0][0]).register_forward_hook(lambda module, args, output: calls.append("hook"))
    host = {n: p for n, p in model.named_parameters() if ".kasmina." not in n}
    before = model(x)
    plain = esper.unwrap(model, optimizer=optimizer)
    assert plain is model
    calls.clear()
    torch.testing.assert_close(plain(x), before, rtol=1e-5, atol=1e-6)
    assert calls == ["hook"]
    found = {n for n, m in plain.named_modules() if isinstance(m, torch.fx.GraphModule)}
    assert found == graphs
    assert set(host) <= {n for n, _ in plain.named_parameters()}
    for module in plain.modules():
        assert not any(cls.__module__.startswith("esper") for cls in type(module).__mro__)
        assert not any(type(value).__module__.startswith("esper") for value in module.__dict__.values())
    assert not isinstance(plain, esper.MorphableModel)
    digest = esper.weights_digest(plain)
    assert torch.isfinite(step(plain, x, optimizer))
    assert esper.weights_digest(plain) != digest
    esper.wrap(plain)


PLAIN = """
    import torch
    from torch import nn

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 3, 3)
            self.fc1 = nn.Linear(12, 5)
            self.fc2 = nn.Linear(5, 2)

        def forward(self, x):
            return self.fc2(torch.relu(self.fc1(torch.relu(self.conv(x)).flatten(1))))
"""

READER = """
    import sys
    sys.modules["esper"] = None  # from here on every import of it fails
    import torch
    model = torch.load("model.pt", weights_only=False)
    x, expected = torch.load("batch.pt")
    assert torch.equal(model(x), expected), (model(x) - expected).abs().max()
    loss = model(x).square().mean()
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert not any(name == "esper" or name.startswith("esper.") for name, m in sys.modules.items() if m is not None)
    print(sorted(model.state_dict()))
"""


def test_unwrapped_model_runs_where_esper_cannot_be_imported(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "plain_network.py").write_text(textwrap.dedent(PLAIN))
    (tmp_path / "reader.py").write_text(textwrap.dedent(READER))
    monkeypatch.syspath_prepend(str(tmp_path))
    network = __import__("plain_network").Plain()
    x = torch.randn(6, 1, 4, 4)
    model = esper.wrap(network, example_inputs=x)
    for site, blueprint in (("conv", "bottleneck"), ("fc1", "widen"), ("fc1", "bottleneck"), ("fc2", "lowrank")):
        made = esper.graft(model, site, blueprint)
        nn.init.normal_(model.get_submodule(site).kasmina[str(made.seed)].up.weight, std=0.1)
    plain = esper.unwrap(model)
    torch.save(plain, tmp_path / "model.pt")
    torch.save((x, plain(x).detach()), tmp_path / "batch.pt")
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [sys.executable, "reader.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "conv.kasmina.0.down.weight" in done.stdout
