"""Tests of the health graph as a PyTorch Geometric `Data`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esper.contracts.operational import LayerGraph
from esper.runtime.tamiyo.features import MEASURED
from esper.runtime.tamiyo.features import NODE_FEATURES
from esper.runtime.tamiyo.features import RELATIONS
from esper.runtime.tamiyo.features import RUN_FEATURES
from esper.runtime.tamiyo.features import RUN_MEASURED
from esper.runtime.tamiyo.features import RUN_STRUCTURE
from esper.runtime.tamiyo.features import STRUCTURE
from esper.runtime.tamiyo.features import describe
from esper.runtime.tamiyo.graph import build_graph
from esper.runtime.tamiyo.policies import get_policy

Factory = Callable[..., Any]
ratio = st.none() | st.floats(min_value=0, max_value=1)


def test_data_has_the_shapes_and_types_that_it_promises(make_request: Factory) -> None:
    data = build_graph(make_request()).data
    assert data.validate(raise_on_error=True)
    assert data.x.shape == (4, len(NODE_FEATURES))
    assert data.edge_index.shape == (2, 12)
    assert data.edge_type.shape == (12,)
    assert data.edge_attr.shape == (12, 1)
    assert data.u.shape == (1, len(RUN_FEATURES))
    assert (data.x.dtype, data.u.dtype, data.edge_attr.dtype) == (torch.float64,) * 3
    assert (data.edge_index.dtype, data.edge_type.dtype) == (torch.int64,) * 2
    assert int(data.edge_type.max()) < len(RELATIONS)
    assert data.num_nodes == 4


def test_every_edge_has_its_reverse(make_request: Factory) -> None:
    data = build_graph(make_request()).data
    assert not data.is_directed()


@pytest.mark.parametrize("sites", [0, 1])
def test_a_graph_without_edges_is_still_a_graph(make_request: Factory, sites: int) -> None:
    request = make_request(widths=(8, 4))
    nodes = request.report.graph.nodes[:sites]
    report = request.report.model_copy(update={"graph": LayerGraph(nodes=nodes, edges=())})
    data = build_graph(request.model_copy(update={"report": report})).data
    assert data.x.shape == (sites, len(NODE_FEATURES))
    assert data.edge_index.shape == (2, 0)
    assert data.edge_attr.shape == (0, 1)


@given(st.lists(st.tuples(ratio, ratio, ratio), min_size=4, max_size=4))
def test_the_graph_gives_to_the_bit_what_the_features_say(
    make_request: Factory, measured: list[tuple[float | None, ...]]
) -> None:
    names = ("saturation", "residual_gradient", "dead_neuron_ratio")
    health = {f"layers.{2 * i}": dict(zip(names, values, strict=True)) for i, values in enumerate(measured)}
    request = make_request(health=health)
    pure, graph = describe(request), build_graph(request)
    for site in pure.sites:
        for feature in (*STRUCTURE, *MEASURED):
            assert graph.node(site, feature) == pure.node(site, feature)
    for feature in (*RUN_STRUCTURE, *RUN_MEASURED):
        assert graph.run(feature) == pure.run(feature)


@given(st.lists(st.tuples(ratio, ratio), min_size=4, max_size=4), st.integers(min_value=1, max_value=30))
def test_a_decision_through_the_graph_equals_one_on_the_pure_features(
    make_request: Factory, measured: list[tuple[float | None, ...]], epoch: int
) -> None:
    names = ("saturation", "residual_gradient")
    health = {
        f"layers.{2 * i}": {
            "activation_variance": 1.0,
            "residual_gradient_norm": 1.0,
            **dict(zip(names, values, strict=True)),
        }
        for i, values in enumerate(measured)
    }
    request = make_request(health=health, epoch=epoch)
    policy = get_policy("heuristic")
    assert policy.decide(request, build_graph(request)) == policy.decide(request, describe(request))


def test_a_decision_follows_the_numbers_in_the_graph(make_request: Factory) -> None:
    """The graph is read, not carried along: another number in `x` is another decision."""
    request = make_request()
    graph = build_graph(request)
    policy = get_policy("heuristic")
    assert policy.decide(request, graph).code == "below_threshold"
    row = graph.data.sites.index("layers.4")
    graph.data.x[row, NODE_FEATURES.index("pair_saturation")] = 0.99
    decision = policy.decide(request, graph)
    assert (decision.code, decision.site, decision.blueprint) == ("grow", "layers.4", "widen")
