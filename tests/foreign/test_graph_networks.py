"""Graph networks of PyTorch Geometric: a convolution is a block, and samples are nodes."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from foreign_models import Foreign
from foreign_models import Growth
from foreign_world import evaluated
from foreign_world import gradients
from foreign_world import lines_of_esper
from foreign_world import loss_of
from foreign_world import new_parameters
from foreign_world import seeded
from foreign_world import step
from foreign_world import train
from foreign_world import trained
from foreign_world import wrapped
from torch import Tensor
from torch import nn
from torch.nn import functional
from torch_geometric.nn import BatchNorm
from torch_geometric.nn import GATConv
from torch_geometric.nn import GCNConv
from torch_geometric.nn import GINConv
from torch_geometric.nn import global_mean_pool
from torch_geometric.nn.models import GCN

import esper

Layer = Callable[[int, int], nn.Module]


class Network(nn.Module):
    """Two convolutions, a norm, a mean over the nodes of each graph, a linear layer."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.first, self.second = layer(4, 8), layer(8, 8)
        self.norm = BatchNorm(8)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor, graphs: int | None = None) -> Tensor:
        hidden = self.drop(self.first(x, edge_index).relu())
        hidden = self.norm(self.second(hidden, edge_index)).relu()
        return self.head(global_mean_pool(hidden, batch, graphs))


def gin(inputs: int, outputs: int) -> nn.Module:
    return GINConv(
        nn.Sequential(nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU(), nn.Linear(outputs, outputs)),
        train_eps=True,
    )


def three_graphs() -> dict[str, object]:
    generator = torch.Generator().manual_seed(11)
    edges = torch.randint(0, 4, (2, 30), generator=generator) + 4 * torch.randint(0, 3, (30,), generator=generator)
    x = torch.randn(12, 4, generator=generator)
    return {"x": x, "edge_index": edges, "batch": torch.arange(12) // 4, "graphs": 3}


def network(layer: Layer, *grows: Growth) -> Foreign:
    everywhere = (
        Growth("second", "bottleneck", "block"),
        Growth("second", "se_gate", "block"),
        Growth("norm.module", "scale_shift", "batch_norm", folds=True),
        Growth("head", "bottleneck", "linear"),
    )
    return Foreign(
        make=lambda: Network(layer),
        batch=three_graphs,
        loss=lambda output: functional.cross_entropy(output, torch.arange(3)),
        grows=(*everywhere, *grows),
        blocks=("second",),
    )


NETWORKS = {
    "gcn": network(GCNConv),
    "gat": network(lambda inputs, outputs: GATConv(inputs, outputs // 2, heads=2, dropout=0.1)),
    "gin": network(
        gin,
        Growth("first.nn.0", "lowrank", "linear", folds=True),
        Growth("second.nn.0", "widen", "linear", folds=True),
        Growth("second.nn.1", "scale_shift", "batch_norm", folds=True),
    ),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("targets", ["auto", "blocks"])
@pytest.mark.parametrize("name", NETWORKS)
def test_wrapped_network_takes_the_same_step_to_the_bit(name: str, targets: str, training: bool) -> None:
    foreign = NETWORKS[name]
    plain, ours = seeded(foreign), seeded(foreign)
    if targets == "blocks":
        wrapped(foreign, ours)
    else:
        esper.wrap(ours)
    left, right = step(plain, foreign, training=training), step(ours, foreign, training=training)
    assert list(left) == list(right)
    assert [key for key in left if not torch.equal(left[key], right[key])] == []


@pytest.mark.parametrize("name", NETWORKS)
def test_every_graft_keeps_outputs_and_old_gradients_to_the_bit(name: str) -> None:
    foreign = NETWORKS[name]
    model = wrapped(foreign)
    outputs, old = evaluated(model, foreign), gradients(model, foreign)
    for growth in foreign.grows:
        assert esper.graft(model, growth.site, growth.blueprint).birth_difference == 0.0
        assert torch.equal(outputs[0], evaluated(model, foreign)[0]), growth
        found = gradients(model, foreign)
        assert [key for key, value in old.items() if not torch.equal(value, found[key])] == [], growth


@pytest.mark.parametrize("name", NETWORKS)
def test_what_grew_learns_and_leaves_as_plain_torch(name: str, tmp_path: Path) -> None:
    foreign = NETWORKS[name]
    grown = trained(foreign)
    model, optimizer = grown.model, grown.optimizer
    assert loss_of(model, foreign) < grown.loss_at_birth
    now = new_parameters(model)
    assert [key for key, value in grown.born.items() if torch.equal(value, now[key])] == []
    (before,) = evaluated(model, foreign)
    made = esper.export(model, tmp_path / "weights", example_inputs=foreign.batch(), verify=True)
    assert made.comparison is not None and made.comparison.passed
    again = esper.load(tmp_path / "weights", seeded(foreign, seed=1))
    assert torch.equal(evaluated(again, foreign)[0], before)
    esper.export(model, tmp_path, format="python", example_inputs=foreign.batch(), name="network")
    source = tmp_path / "modeling_network.py"
    spec = importlib.util.spec_from_file_location(f"exported_{name}", source)
    assert spec is not None and spec.loader is not None
    written = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(written)
    tensors = {key: value for key, value in foreign.batch().items() if isinstance(value, Tensor)}
    with torch.no_grad():
        torch.testing.assert_close(written.load_model()(**tensors), before)
    esper.fossilize(model, optimizer=optimizer)
    seeds = [(site.name, seed) for site in esper.status(model).sites for seed in site.seeds if seed.blueprint]
    assert {site for site, seed in seeds if seed.folded} == {growth.site for growth in foreign.grows if growth.folds}
    esper.unwrap(model)
    torch.testing.assert_close(evaluated(model, foreign)[0], before, rtol=1e-5, atol=1e-5)
    assert lines_of_esper(lambda: train(model, foreign, optimizer, steps=1)) == set()


def test_a_number_of_graphs_that_is_read_off_the_data_is_refused_with_the_way_out(tmp_path: Path) -> None:
    foreign = NETWORKS["gcn"]
    model = wrapped(foreign)
    batch = {key: value for key, value in foreign.batch().items() if key != "graphs"}
    with pytest.raises(esper.GrowthError, match="data-dependent") as caught:
        esper.export(model, tmp_path, format="python", example_inputs=batch)
    assert caught.value.code == "ESP-438"
    assert caught.value.hint is not None and "safetensors" in caught.value.hint


def test_other_graphs_than_the_first_run_what_grew() -> None:
    foreign = NETWORKS["gat"]
    model = trained(foreign).model.eval()
    batch = foreign.batch()
    kept = batch["batch"] < 2
    edges = batch["edge_index"][:, (batch["edge_index"] < 8).all(dim=0)]
    with torch.no_grad():
        whole = model(**batch)
        part = model(batch["x"][kept], edges, batch["batch"][kept], 2)
        torch.testing.assert_close(part, whole[:2])
        with esper.dormant(model):
            assert not torch.allclose(model(**batch), whole, atol=1e-3)


def test_a_ready_made_network_grows_at_its_convolutions_when_they_are_named() -> None:
    torch.manual_seed(0)
    model = GCN(4, 8, 3, 3)
    given = {key: three_graphs()[key] for key in ("x", "edge_index")}
    plain = model(**given)
    with pytest.raises(esper.SiteError, match="has the shape of none of its inputs"):
        esper.wrap(model, ["convs.?"], example_inputs=given)
    esper.wrap(model, ["convs.1"], example_inputs=given)
    esper.graft(model, "convs.1", "bottleneck")
    assert torch.equal(model(**given), plain)
    esper.cull(model, "convs.1")
    assert type(esper.unwrap(model)) is GCN
