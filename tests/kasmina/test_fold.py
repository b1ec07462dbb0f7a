"""Folding: what was grown becomes part of its host's weights, within rounding, or stays for a reason that is told."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor
from torch import nn
from torch.nn.utils import prune

import esper
from esper.runtime.kasmina.lineage import layer_graph
from esper.runtime.kasmina.wrapping.morphable import sites_of

Model = Callable[[], nn.Module]


class Net(nn.Module):
    """conv -> norm -> relu -> pool -> conv, then a linear pair; everything that folds has a place in it."""

    def __init__(self, bias: bool = False, affine: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 3, 3, padding=1, bias=bias)
        self.norm = nn.BatchNorm2d(3, affine=affine)
        self.pool = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(3, 4, 3, padding=1, stride=2)
        self.group = nn.GroupNorm(2, 4)
        self.fc1 = nn.Linear(16, 5)
        self.norm1 = nn.BatchNorm1d(5)
        self.fc2 = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.norm(self.conv1(x))))
        x = torch.tanh(self.group(self.conv2(x))).flatten(1)
        return self.fc2(torch.tanh(self.norm1(self.fc1(x))))


class Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6, padding_idx=0)
        self.conv = nn.Conv1d(6, 6, 3, padding=2, dilation=2, padding_mode="circular")
        self.mix = nn.Conv1d(6, 6, 3, padding=1)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 3, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).transpose(1, 2)
        x = self.mix(torch.relu(self.conv(x))).transpose(1, 2)
        return self.head(self.norm(x)).mean(1)


def batch(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    if isinstance(model, Sequence):
        return torch.randint(0, 11, (7, 5), generator=generator)
    return torch.randn((7, 2, 8, 8), generator=generator)


def step(model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    (model(x) - 1.0).square().mean().backward()
    optimizer.step()


def grown(make: Model, grafts: list[tuple[str, str]], optimizer_of: Any = None) -> tuple[Any, Tensor, Any]:
    torch.manual_seed(1)
    model = make()
    x = batch(model)
    esper.wrap(model, example_inputs=x)
    optimizer = (optimizer_of or (lambda p: torch.optim.AdamW(p, lr=0.01)))(model.parameters())
    for _ in range(2):
        step(model, x, optimizer)
    for site, blueprint in grafts:
        esper.graft(model, site, blueprint, optimizer=optimizer)
    for _ in range(4):
        step(model, x, optimizer)
    return model, x, optimizer


FOLDED: list[tuple[Model, str, str]] = [
    (Net, "conv1", "widen"),
    (lambda: Net(bias=True), "conv1", "widen"),
    (lambda: Net(affine=False), "conv1", "widen"),
    (Net, "fc1", "widen"),
    (Sequence, "conv", "widen"),
    (Net, "conv2", "lowrank"),
    (Sequence, "conv", "lowrank"),
    (Sequence, "embed", "lowrank"),
    (Sequence, "head", "lowrank"),
    (Net, "conv1", "scale_shift"),
    (Net, "norm", "scale_shift"),
    (Net, "group", "scale_shift"),
    (Net, "fc1", "scale_shift"),
    (Sequence, "embed", "scale_shift"),
    (Sequence, "norm", "scale_shift"),
    (Sequence, "head", "scale_shift"),
    (Sequence, "mix", "scale_shift"),
    (Net, "fc1", "noop"),
]


@pytest.mark.parametrize(
    ("make", "site", "blueprint"), FOLDED, ids=[f"{s}-{b}-{i}" for i, (_, s, b) in enumerate(FOLDED)]
)
def test_folded_model_computes_the_same_and_trains_on(make: Model, site: str, blueprint: str) -> None:
    model, x, optimizer = grown(make, [(site, blueprint)])
    model.eval()
    before = model(x)
    esper.fossilize(model, site, optimizer=optimizer)
    seed = next(s for s in esper.status(model).sites if s.name == site).seeds[0]
    assert seed.folded, seed.stays
    assert seed.fold_difference is not None
    assert seed.fold_difference < 1e-5
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-6)
    assert esper.status(model).grown_parameters == 0
    parameters = {id(p) for p in model.parameters()}
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == parameters
    assert {id(p) for p in optimizer.state} <= parameters
    for parameter, state in optimizer.state.items():
        assert all(v.shape in (parameter.shape, torch.Size([])) for v in state.values() if isinstance(v, Tensor))
    model.train()
    digest = esper.weights_digest(model)
    step(model, x, optimizer)
    assert esper.weights_digest(model) != digest


def test_widened_convolutions_take_norm_buffers_and_settings_with_them() -> None:
    model, x, optimizer = grown(Net, [("conv1", "widen")])
    own = model.conv1.kasmina["0"]
    statistics = own.norm.running_mean.clone(), own.norm.running_var.clone()
    esper.fossilize(model, "conv1", optimizer=optimizer)
    assert (model.conv1.out_channels, model.norm.num_features, model.conv2.in_channels) == (13, 13, 13)
    assert torch.equal(model.norm.running_mean[3:], statistics[0])
    assert torch.equal(model.norm.running_var[3:], statistics[1])
    graph = layer_graph(model, lambda: model(x))
    shapes = {n.contract.site: (n.contract.input_shape, n.contract.output_shape) for n in graph.nodes}
    assert shapes["conv1"] == ((2, 8, 8), (13, 8, 8))
    assert shapes["norm"] == ((13, 8, 8), (13, 8, 8))
    assert shapes["conv2"] == ((13, 4, 4), (4, 2, 2))
    esper.graft(model, "conv1", "widen", optimizer=optimizer)
    esper.graft(model, "norm", "bottleneck", optimizer=optimizer)
    step(model, x, optimizer)


@pytest.mark.parametrize("targets", ["auto", [nn.Conv2d, nn.Linear]], ids=["norms are sites", "norms are none"])
def test_folded_widths_with_norms_survive_a_save(tmp_path: Any, targets: Any) -> None:
    model = esper.wrap(Net(), targets, example_inputs=batch(Net()))
    for site in ("conv1", "fc1"):
        esper.graft(model, site, "widen")
        nn.init.normal_(model.get_submodule(site).kasmina["0"].up.weight)
    x = batch(model)
    model(x)
    esper.fossilize(model)
    esper.save(model.eval(), tmp_path)
    back = esper.load(tmp_path, Net()).eval()
    assert torch.equal(back(x), model(x))
    assert esper.status(back) == esper.status(model)
    assert back.norm.num_features == 13


def test_norms_in_training_mode_see_the_same_statistics_before_and_after() -> None:
    """Batch statistics are of each unit: concatenating the norms changes nothing in training mode either."""
    model, x, optimizer = grown(Net, [("conv1", "widen"), ("fc1", "widen")])
    before = model(x)
    esper.fossilize(model, optimizer=optimizer)
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "optimizer_of",
    [
        lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
        lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
        lambda p: torch.optim.NAdam(p, lr=0.01),
        lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
        lambda p: torch.optim.Adagrad(p, lr=0.01),
    ],
    ids=["sgd", "adam", "nadam", "rmsprop", "adagrad"],
)
def test_a_folded_pair_of_convolutions_goes_on_as_it_would_have(optimizer_of: Any) -> None:
    ends = []
    for fold in (False, True):
        model, x, optimizer = grown(Net, [("conv1", "widen")], optimizer_of)
        esper.fossilize(model, "conv1", optimizer=optimizer, fold=fold)
        for _ in range(2):
            step(model, x, optimizer)
        ends.append(model.eval()(x))
    torch.testing.assert_close(ends[1], ends[0], rtol=0.05, atol=0.05)


GEOMETRIES = st.fixed_dictionaries(
    {
        "kernel_size": st.tuples(st.integers(1, 3), st.integers(1, 3)),
        "stride": st.tuples(st.integers(1, 2), st.integers(1, 3)),
        "padding": st.tuples(st.integers(0, 2), st.integers(0, 2)),
        "dilation": st.tuples(st.integers(1, 2), st.integers(1, 2)),
        "padding_mode": st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
        "bias": st.booleans(),
    }
)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(first=GEOMETRIES, second=GEOMETRIES, blueprint=st.sampled_from(["widen", "lowrank", "scale_shift"]))
def test_any_geometry_folds_into_itself(first: Any, second: Any, blueprint: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, **first), nn.BatchNorm2d(3), nn.SiLU(), nn.Conv2d(3, 2, **second)).double()
    x = torch.randn(3, 2, 24, 23, dtype=torch.float64)
    esper.wrap(model, example_inputs=x)
    made = esper.graft(model, "0", blueprint)
    for parameter in model[0].kasmina[str(made.seed)].parameters():
        nn.init.normal_(parameter, std=0.3)
    model.eval()
    before = model(x)
    esper.fossilize(model)
    assert esper.status(model).sites[0].seeds[0].folded
    torch.testing.assert_close(model(x), before)


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
        self.fc1 = conv1d(5, 6)
        self.fc2 = conv1d(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


@pytest.mark.parametrize(("site", "blueprint"), [("fc1", "widen"), ("fc1", "lowrank"), ("fc2", "scale_shift")])
def test_transposed_weights_fold_too(site: str, blueprint: str) -> None:
    torch.manual_seed(0)
    model, x = Transposed(), torch.randn(9, 6)
    esper.wrap(model, example_inputs=x)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    step(model, x, optimizer)
    esper.graft(model, site, blueprint, optimizer=optimizer)
    for _ in range(3):
        step(model, x, optimizer)
    before = model(x)
    esper.fossilize(model, optimizer=optimizer)
    assert esper.status(model).grown_parameters == 0
    torch.testing.assert_close(model(x), before)
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}
    if blueprint == "widen":
        assert model.fc1.weight.shape == (6, 15)
        assert (model.fc1.nf, model.fc2.nx) == (15, 15)
    step(model, x, optimizer)


class Odd(nn.Module):
    """Hosts that nothing can be folded into."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4, max_norm=1.0)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.plain = nn.LayerNorm(4, elementwise_affine=False)
        self.grouped = nn.Conv1d(4, 4, 1, groups=2)
        self.table = nn.Embedding(9, 4)
        self.fc = nn.Linear(4, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.table(ids)
        x = self.plain(x + self.attention(x, x, x, need_weights=False)[0])
        x = self.fc(self.grouped(x.transpose(1, 2)).transpose(1, 2))
        return x @ self.table.weight.T


@pytest.mark.parametrize(
    ("site", "blueprint", "told"),
    [
        ("embed", "lowrank", "max_norm"),
        ("table", "lowrank", "read outside of its own forward"),
        ("attention", "attention", "ties the width of its heads to embed_dim"),
        ("attention", "scale_shift", "attention has no weights of its own"),
        ("plain", "scale_shift", "no weights that could be scaled"),
        ("grouped", "lowrank", "2 groups"),
        ("fc", "bottleneck", "relu stands between"),
        ("fc", "norm_gate", "layer_norm stands between"),
        ("fc", "depth_block", "layer_norm stands between"),
    ],
)
def test_what_cannot_be_folded_stays_and_says_why(site: str, blueprint: str, told: str) -> None:
    model = Odd()
    ids = torch.randint(0, 9, (3, 5))
    esper.wrap(model, example_inputs=ids)
    esper.graft(model, site, blueprint)
    for parameter in sites_of(model)[site].kasmina.parameters():
        nn.init.normal_(parameter, std=0.1)
    before = model(ids)
    esper.fossilize(model)
    seed = next(s for s in esper.status(model).sites if s.name == site).seeds[0]
    assert not seed.folded
    assert seed.stays is not None
    assert told in seed.stays
    assert torch.equal(model(ids), before)


def test_weights_that_are_computed_before_each_call_are_no_host() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    prune.random_unstructured(model[0], "weight", 0.5)
    x = torch.randn(3, 4)
    esper.wrap(model, example_inputs=x)
    esper.graft(model, "0", "lowrank")
    esper.fossilize(model)
    assert "computed anew" in str(esper.status(model).sites[0].seeds[0].stays)
    with pytest.raises(esper.GrowthError, match="computed anew"):
        esper.graft(model, "0", "widen")


@pytest.mark.parametrize("traceable", [True, False])
def test_reads_of_an_embedding_elsewhere_are_found_without_example_inputs(traceable: bool) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(9, 4)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.table(ids)
            return x @ self.table.weight.T if traceable or x.sum() > -1e9 else x

    model = esper.wrap(Tied())
    model(torch.tensor([[1, 2]]))
    esper.graft(model, "table", "lowrank")
    esper.fossilize(model)
    told = "read outside of its own forward" if traceable else "not known whether"
    assert told in str(esper.status(model).sites[0].seeds[0].stays)


def test_a_scale_waits_for_what_it_also_scales() -> None:
    model, x, optimizer = grown(Net, [("fc1", "bottleneck"), ("fc1", "scale_shift")])
    before = model(x)
    esper.fossilize(model, optimizer=optimizer)
    seeds = next(s for s in esper.status(model).sites if s.name == "fc1").seeds
    assert "also scales what seed 0 adds" in str(seeds[1].stays)
    assert torch.equal(model(x), before)
    model, x, optimizer = grown(Net, [("fc1", "lowrank"), ("fc1", "scale_shift"), ("fc1", "widen")])
    before = model(x)
    esper.fossilize(model, optimizer=optimizer)
    assert esper.status(model).grown_parameters == 0
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)


def test_blocks_at_a_norm_hold_the_width_between_two_layers() -> None:
    model, x, optimizer = grown(Net, [("conv1", "widen"), ("norm", "se_gate")])
    before = model(x)
    esper.fossilize(model, optimizer=optimizer)
    seeds = next(s for s in esper.status(model).sites if s.name == "conv1").seeds
    assert "another block" in str(seeds[0].stays)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_appended_and_never_summed(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).to(dtype)
    x = torch.randn(8, 6).to(dtype)
    esper.wrap(model, example_inputs=x)
    for blueprint in ("widen", "lowrank", "scale_shift"):
        esper.graft(model, "0", blueprint)
    esper.fossilize(model)
    seeds = esper.status(model).sites[0].seeds
    assert [seed.folded for seed in seeds[:3]] == [False, False, False]
    assert "would lose a part" in str(seeds[1].stays)
    esper.cull(model, "0", seed=1)
    esper.cull(model, "0", seed=2)
    esper.graft(model, "0", "widen")
    before = model(x)
    esper.fossilize(model)
    assert any(seed.folded for seed in esper.status(model).sites[0].seeds)
    torch.testing.assert_close(model(x), before, rtol=0.05, atol=0.05)


def test_a_refused_optimizer_state_leaves_all_as_it_was() -> None:
    """All or nothing: the state of the very last parameter cannot be joined, and nothing has been changed."""
    model, _, optimizer = grown(Net, [("conv1", "widen")])
    optimizer.state[model.conv1.kasmina["0"].up.weight]["exp_avg"] = torch.zeros(1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    groups = [list(group["params"]) for group in optimizer.param_groups]
    esper.fossilize(model, "conv1", optimizer=optimizer)
    seed = esper.status(model).sites[0].seeds[0]
    assert not seed.folded
    assert "exp_avg" in str(seed.stays)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(
        a is b
        for old, g in zip(groups, optimizer.param_groups, strict=True)
        for a, b in zip(old, g["params"], strict=True)
    )


def test_factored_state_of_a_transposed_host_is_joined_as_that_of_a_plain_one() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D

    def trained(transposed: bool) -> tuple[nn.Module, torch.optim.Optimizer, torch.Tensor]:
        torch.manual_seed(0)
        x = torch.randn(16, 6)
        plain = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
        model: nn.Module = plain
        if transposed:
            model = nn.Sequential(conv1d(4, 6), nn.ReLU(), conv1d(3, 4))
            for index in (0, 2):
                model[index].weight.data.copy_(plain[index].weight.data.T)
                model[index].bias.data.copy_(plain[index].bias.data)
        esper.wrap(model, example_inputs=x)
        optimizer = torch.optim.Adafactor(model.parameters(), lr=0.01)
        for step in range(6):
            if step == 3:
                esper.graft(model, "0", "widen", optimizer=optimizer, units=5)
            optimizer.zero_grad()
            (model(x) - x[:, :3]).square().mean().backward()
            optimizer.step()
        esper.fossilize(model, optimizer=optimizer)
        return model, optimizer, x

    (model, optimizer, x), (plain, reference, _) = trained(True), trained(False)
    assert model[0].weight.shape == (6, 9) and plain[0].weight.shape == (9, 6)
    torch.testing.assert_close(model(x), plain(x))
    for index in (0, 2):
        state, expected = optimizer.state[model[index].weight], reference.state[plain[index].weight]
        torch.testing.assert_close(state["row_var"], expected["col_var"].T)
        torch.testing.assert_close(state["col_var"], expected["row_var"].T)
