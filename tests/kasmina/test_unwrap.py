"""Unwrapping: ordinary PyTorch again, with everything that was grown and the names that it had."""

import collections
import copy
import dataclasses
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import fx
from torch import nn

import esper
from esper.contracts.enums import SeedState
from esper.runtime.kasmina.keeping.manifest import growth_manifest
from esper.runtime.kasmina.wrapping.morphable import sites_of

Named = collections.namedtuple("Named", ["hidden", "weights"])


@dataclasses.dataclass
class Output:
    hidden: Tensor


class Block(nn.Module):
    """A residual block; `form` says how it returns its output."""

    def __init__(self, form: str = "tensor") -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 5)
        self.fc2 = nn.Linear(5, 6)
        self.form = form

    def forward(self, mask: Any, x: Tensor, *, scale: float = 1.0) -> Any:
        y = x + scale * self.fc2(torch.relu(self.fc1(x)))
        return {
            "tensor": y,
            "tuple": (None, y, 3),
            "list": [y, {"a": 1}],
            "dict": {"length": 2, "hidden": y},
            "named": Named(y, None),
            "nested": ("first", {"inner": [y]}),
            "dataclass": Output(y),
        }[self.form]


READ: dict[str, Callable[[Any], Tensor]] = {
    "tensor": lambda out: out,
    "tuple": lambda out: out[1],
    "list": lambda out: out[0],
    "dict": lambda out: out["hidden"],
    "named": lambda out: out.hidden,
    "nested": lambda out: out[1]["inner"][0],
    "dataclass": lambda out: out.hidden,
}


class Zoo(nn.Module):
    """Hosts of every kind, called in every way."""

    def __init__(self, form: str = "tensor") -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.image = nn.Conv2d(6, 6, 1)
        self.bn = nn.BatchNorm1d(6)
        self.gn = nn.GroupNorm(2, 6)
        self.ln = nn.LayerNorm(6)
        self.first = nn.MultiheadAttention(6, 2, batch_first=True)
        self.later = nn.MultiheadAttention(6, 3)
        self.block = Block(form)
        self.head = nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = self.image(x.transpose(1, 2).unsqueeze(2)).squeeze(2)
        x = self.gn(self.bn(self.conv(x))).transpose(1, 2)
        x = self.ln(x)
        x = x + self.first(query=x, key=x, value=x, need_weights=False)[0]
        y = x.transpose(0, 1)
        x = x + self.later(y, y, y)[0].transpose(0, 1)
        x = READ[self.block.form](self.block(None, x=x, scale=0.5))
        return self.head(x).mean(1)


IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [0, 1, 1, 3]])


def grown(model: nn.Module, x: Tensor, grafts: list[tuple[str, str]], targets: Any = "auto") -> nn.Module:
    torch.manual_seed(2)
    esper.wrap(model, targets, example_inputs=x)
    for site, blueprint in grafts:
        made = esper.graft(model, site, blueprint)
        for parameter in sites_of(model)[site].kasmina[str(made.seed)].parameters():
            nn.init.normal_(parameter, std=0.2)
    return model


def assert_plain(model: nn.Module) -> None:
    for module in model.modules():
        assert not any(cls.__module__.startswith("esper") for cls in type(module).__mro__)
        for hook in module._forward_hooks.values():
            assert isinstance(hook.__self__, fx.GraphModule)
        assert not any(type(value).__module__.startswith("esper") for value in module.__dict__.values())


EVERYWHERE = ["scale_shift", "norm_gate", "se_gate", "depth_block"]
SITES = {
    "embed": ["lowrank", *EVERYWHERE],
    "conv": ["bottleneck", *EVERYWHERE],
    "image": ["bottleneck", "conv_bottleneck", "depthwise", *EVERYWHERE],
    "bn": ["bottleneck", *EVERYWHERE],
    "gn": ["bottleneck", *EVERYWHERE],
    "ln": ["bottleneck", *EVERYWHERE],
    "first": ["bottleneck", "attention", *EVERYWHERE],
    "later": ["bottleneck", "attention", *EVERYWHERE],
    "block": ["bottleneck", "attention", *EVERYWHERE],
    "head": ["bottleneck", *EVERYWHERE],
}
HOOKED = {"bn", "first", "later", "block"}


@pytest.mark.parametrize("site", SITES)
def test_every_kind_of_site_becomes_plain(site: str) -> None:
    model = Zoo()
    esper.wrap(model, ["block"] if site == "block" else "auto", example_inputs=IDS, seeds_per_layer=8)
    torch.manual_seed(2)
    for blueprint in SITES[site]:
        made = esper.graft(model, site, blueprint)
        for parameter in sites_of(model)[site].kasmina[str(made.seed)].parameters():
            nn.init.normal_(parameter, std=0.2)
    model.eval()
    before = model(IDS)
    host = {n for n in model.state_dict() if ".kasmina." not in n}
    plain = esper.unwrap(model)
    assert_plain(plain)
    torch.testing.assert_close(plain(IDS), before, rtol=1e-5, atol=1e-5)
    assert host <= set(plain.state_dict())
    assert isinstance(plain.get_submodule(site), fx.GraphModule) == (site not in HOOKED)
    plain.train()(IDS).sum().backward()
    assert all(p.grad is not None for n, p in plain.named_parameters() if ".kasmina." in n)
    esper.wrap(plain)


@pytest.mark.parametrize("form", ["tensor", "tuple", "list", "dict", "named", "nested"])
def test_outputs_in_containers_keep_everything_beside_them(form: str) -> None:
    model = grown(Zoo(form), IDS, [("block", "bottleneck"), ("block", "scale_shift")], ["block"]).eval()
    before, whole = model(IDS), model.block(None, x=torch.ones(1, 4, 6))
    plain = esper.unwrap(model)
    torch.testing.assert_close(plain(IDS), before)
    now = plain.block(None, x=torch.ones(1, 4, 6))
    assert type(now) is type(whole)
    torch.testing.assert_close(READ[form](now), READ[form](whole))
    if form == "tuple":
        assert (now[0], now[2], len(now)) == (None, 3, 3)
    if form == "dict":
        assert list(now) == ["length", "hidden"]
    copied = copy.deepcopy(plain)
    assert copied.block.kasmina is not plain.block.kasmina
    torch.testing.assert_close(copied(IDS), before)


def test_names_of_parameters_stay_and_user_hooks_see_the_grown_output() -> None:
    model = grown(Zoo(), IDS, [("first", "bottleneck"), ("block", "bottleneck")], [nn.MultiheadAttention, "block"])
    names = set(model.state_dict())
    seen: list[Tensor] = []
    model.block.register_forward_hook(lambda module, args, output: seen.append(output))
    model(IDS)
    plain = esper.unwrap(model)
    plain(IDS)
    assert set(plain.state_dict()) == names
    torch.testing.assert_close(seen[1], seen[0])
    plain.load_state_dict(plain.state_dict(), strict=True)


def test_unwrapped_blocks_train_on_with_their_optimizer() -> None:
    model = esper.wrap(Zoo(), ["block", "block.*", "head"], example_inputs=IDS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    esper.graft(model, "block", "bottleneck", optimizer=optimizer)
    esper.graft(model, "block.fc1", "widen", optimizer=optimizer)
    esper.graft(model, "block.fc2", "bottleneck", optimizer=optimizer)

    def step(net: nn.Module) -> float:
        optimizer.zero_grad()
        loss = (net(IDS) - 1.0).square().mean()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    for _ in range(3):
        step(model)
    before = model(IDS)
    plain = esper.unwrap(model, optimizer=optimizer)
    torch.testing.assert_close(plain(IDS), before)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in plain.parameters()}
    assert plain.block.fc1.out_features == 15
    losses = [step(plain) for _ in range(5)]
    assert losses[-1] < losses[0]


def test_a_transformer_encoder_layer_is_plain_in_both_modes() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.encoder(x)

    x = torch.randn(2, 5, 8)
    model = esper.wrap(Encoder(), ["encoder.layers.0", "encoder.layers.1.self_attn"], example_inputs=x)
    for site in ("encoder.layers.0", "encoder.layers.1.self_attn"):
        esper.graft(model, site, "attention")
        nn.init.normal_(model.get_submodule(site).kasmina["0"].up.weight, std=0.3)
    before = {training: model.train(training)(x) for training in (True, False)}
    plain = esper.unwrap(model)
    for training in (True, False):
        torch.testing.assert_close(plain.train(training)(x), before[training], rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(plain.train(training)(x), before[training], rtol=1e-5, atol=1e-5)


def test_a_forward_of_its_own_stays_its_own() -> None:
    class Moody(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            scale = 2.0 if self.training and input.sum() > -1e9 else 1.0
            return scale * super().forward(input)

    x = torch.randn(3, 4)
    model = grown(nn.Sequential(Moody(4, 4)), x, [("0", "bottleneck")])
    before = {training: model.train(training)(x) for training in (True, False)}
    plain = esper.unwrap(model)
    assert type(plain[0]) is Moody
    for training in (True, False):
        torch.testing.assert_close(plain.train(training)(x), before[training])


class Direct(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm.forward(x)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.b = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.norm(self.a(x))))


def tie(model: Any) -> None:
    model.b.weight = model.a.weight


@pytest.mark.parametrize(
    ("make", "x", "grafts", "targets", "spoil", "told"),
    [
        (lambda: Zoo("dataclass"), IDS, [("block", "bottleneck")], ["block"], None, "returns a dataclass"),
        (Direct, torch.randn(4, 6), [("norm", "bottleneck")], "auto", None, "forward is called directly"),
        (Pair, torch.randn(4, 6), [("a", "widen")], "auto", tie, "tied"),
        (Pair, torch.randn(4, 6), [("a", "widen"), ("norm", "norm_gate")], "auto", None, "cannot be made wider"),
    ],
    ids=["dataclass", "called directly", "tied since", "a norm across the units"],
)
def test_what_cannot_be_plain_is_refused_by_name_and_nothing_changes(
    make: Any, x: Tensor, grafts: Any, targets: Any, spoil: Any, told: str
) -> None:
    model = grown(make(), x, grafts, targets).eval()
    if spoil is not None:
        spoil(model)
    before, names, manifest = model(x), list(model.state_dict()), growth_manifest(model)
    with pytest.raises(esper.GrowthError, match=told) as caught:
        esper.unwrap(model)
    assert caught.value.code == "ESP-438"
    assert f"'{grafts[0][0]}'" in caught.value.message
    assert caught.value.hint is not None
    assert torch.equal(model(x), before)
    assert list(model.state_dict()) == names
    assert growth_manifest(model) == manifest
    seeds = [seed for site in esper.status(model).sites for seed in site.seeds if seed.blueprint is not None]
    assert {seed.state for seed in seeds} == {SeedState.TRAINING}


def test_blocks_beside_a_widened_pair_grow_with_it() -> None:
    x = torch.randn(4, 6)
    grafts = [("a", "widen"), ("a", "bottleneck"), ("b", "bottleneck"), ("norm", "bottleneck"), ("norm", "scale_shift")]
    model = grown(Pair(), x, grafts).eval()
    before = model(x)
    plain = esper.unwrap(model)
    torch.testing.assert_close(plain(x), before, rtol=1e-5, atol=1e-5)
    assert plain.norm.num_features == 16


NETWORK = """
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, mask, *, x):
            return (x + torch.tanh(self.fc(x)), mask)

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4)
            self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
            self.block = Block()

        def forward(self, x):
            x = self.norm(x)
            x = x + self.attention(x, x, x)[0]
            return self.block(None, x=x)[0]
"""

READER = """
    import sys
    sys.modules["esper"] = None  # from here on every import of it fails
    import copy
    import torch
    model = torch.load("model.pt", weights_only=False)
    x, expected = torch.load("batch.pt")
    for net in (model, copy.deepcopy(model)):
        assert torch.equal(net(x), expected), (net(x) - expected).abs().max()
        net(x).square().mean().backward()
        assert all(p.grad is not None for name, p in net.named_parameters() if "kasmina" in name)
    assert not any(name == "esper" or name.startswith("esper.") for name, m in sys.modules.items() if m is not None)
    print(sorted(model.state_dict()))
"""


def test_hooked_sites_run_where_esper_cannot_be_imported(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "plain_blocks.py").write_text(textwrap.dedent(NETWORK))
    (tmp_path / "reader.py").write_text(textwrap.dedent(READER))
    monkeypatch.syspath_prepend(str(tmp_path))
    x = torch.randn(3, 4, 6)
    grafts = [("norm", "se_gate"), ("attention", "attention"), ("block", "bottleneck"), ("block", "norm_gate")]
    network = __import__("plain_blocks").Plain()
    plain = esper.unwrap(grown(network, x, grafts, ["norm", "attention", "block"]).eval())
    torch.save(plain, tmp_path / "model.pt")
    torch.save((x, plain(x).detach()), tmp_path / "batch.pt")
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [sys.executable, "reader.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "attention.kasmina.0.heads.weight" in done.stdout
