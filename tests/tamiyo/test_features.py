"""Tests of the pure description of the health graph."""

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.contracts.enums import AdaptationState
from esper.contracts.enums import SeedState
from esper.contracts.operational import HealthSignal
from esper.runtime.kasmina.health.scores import signals_by_site
from esper.runtime.tamiyo.features import MEASURED
from esper.runtime.tamiyo.features import NODE_FEATURES
from esper.runtime.tamiyo.features import RELATIONS
from esper.runtime.tamiyo.features import RUN_FEATURES
from esper.runtime.tamiyo.features import STRUCTURE
from esper.runtime.tamiyo.features import describe
from esper.runtime.tamiyo.slope import improvement_window
from esper.runtime.tamiyo.slope import losses
from esper.runtime.tamiyo.slope import relative_improvement

Factory = Callable[..., Any]

finite = st.floats(min_value=1e-6, max_value=1e6)
ratio = st.floats(min_value=0, max_value=1)


def test_every_row_has_one_value_for_every_named_feature(make_request: Factory) -> None:
    features = describe(make_request())
    assert features.sites == ("layers.0", "layers.2", "layers.4", "layers.6")
    assert {len(row) for row in features.nodes} == {len(NODE_FEATURES)}
    assert len(features.run_row) == len(RUN_FEATURES)
    assert len(set(NODE_FEATURES)) == len(NODE_FEATURES)


def test_what_was_not_measured_is_none_and_what_was_measured_as_zero_is_zero(make_request: Factory) -> None:
    features = describe(make_request(health={"layers.2": {"saturation": 0.0}}))
    assert features.node("layers.2", "saturation") == 0.0
    assert features.node("layers.2", "residual_gradient") is None
    assert [features.node("layers.0", name) for name in MEASURED] == [None] * len(MEASURED)
    assert all(features.node("layers.0", name) is not None for name in STRUCTURE)


def test_a_signal_of_no_rows_says_nothing(make_request: Factory) -> None:
    request = make_request()
    empty = HealthSignal(site="layers.0", epoch=1, step=1, rows_seen=0, saturation=1.0)
    report = request.report.model_copy(update={"health": (empty,)})
    features = describe(request.model_copy(update={"report": report}))
    assert features.node("layers.0", "saturation") is None


def test_the_signal_of_the_lowest_seed_speaks_for_the_site() -> None:
    signals = [
        HealthSignal(site="fc", seed=seed, epoch=1, step=1, rows_seen=8, saturation=seed / 10) for seed in (2, 1, 3)
    ]
    assert signals_by_site(signals)["fc"].saturation == 0.1


def test_edges_run_both_ways_and_widen_pairs_are_edges_of_their_own(make_request: Factory) -> None:
    edges = describe(make_request()).edges
    pairs = {
        name: {(edge.source, edge.target) for edge in edges if RELATIONS[edge.relation] == name} for name in RELATIONS
    }
    assert pairs["feeds"] == {(0, 1), (1, 2), (2, 3)}
    assert pairs["fed_by"] == {(1, 0), (2, 1), (3, 2)}
    assert pairs["widens_into"] == pairs["feeds"]
    assert pairs["widened_from"] == pairs["fed_by"]


def test_a_narrow_layer_is_seen_beside_its_neighbours(make_request: Factory) -> None:
    features = describe(make_request())
    assert features.node("layers.2", "log_width_to_previous") == pytest.approx(math.log(2 / 12))
    assert features.node("layers.2", "log_width_to_next") == pytest.approx(math.log(2 / 12))
    assert features.node("layers.0", "log_width_to_previous") == 0.0


def test_slots_and_pins_are_features(make_request: Factory) -> None:
    states = {"layers.0": [SeedState.FOSSILIZED, SeedState.DORMANT, SeedState.TRAINING, SeedState.DORMANT]}
    features = describe(make_request(states=states, pinned=["layers.4"]))
    assert features.node("layers.0", "free_slot_share") == 0.5
    assert features.node("layers.0", "grown_slot_share") == 0.5
    assert features.node("layers.4", "pinned") == 1.0
    assert features.node("layers.0", "pinned") == 0.0


def test_the_run_row_counts_what_became_of_adaptations(make_request: Factory, make_adaptation: Factory) -> None:
    record = [make_adaptation(1, AdaptationState.FOSSILIZED), make_adaptation(2, AdaptationState.CULLED)]
    features = describe(make_request(adaptations=record, max_adaptations=8))
    assert features.run("kept_share") == 0.5
    assert features.run("culled_share") == 0.5
    assert features.run("budget_left") == 0.75


def test_shares_are_the_same_for_gradients_of_another_scale(make_request: Factory) -> None:
    def shares(scale: float) -> list[float | None]:
        health = {
            f"layers.{2 * i}": {"gradient_norm": scale * (i + 1), "residual_gradient_norm": scale / (i + 1)}
            for i in range(4)
        }
        features = describe(make_request(health=health))
        names = ("gradient_share", "residual_gradient_share")
        return [features.node(site, name) for site in features.sites for name in names]

    assert shares(1.0) == pytest.approx(shares(1000.0))


@given(
    saturation=st.none() | st.floats(min_value=0, max_value=2),
    residual=st.none() | ratio,
    norm=st.none() | st.floats(min_value=0, max_value=1e300),
    weight_ratio=st.none() | st.floats(min_value=0, max_value=1e300),
    train_loss=st.floats(min_value=-1e30, max_value=1e30),
)
def test_features_are_finite_whatever_was_measured(
    make_request: Factory,
    saturation: float | None,
    residual: float | None,
    norm: float | None,
    weight_ratio: float | None,
    train_loss: float,
) -> None:
    measured = {
        "saturation": saturation,
        "residual_gradient": residual,
        "residual_gradient_norm": norm,
        "gradient_norm": norm,
        "activation_variance": norm,
        "update_to_weight": weight_ratio,
        "gradient_to_weight": weight_ratio,
    }
    features = describe(make_request(health={"layers.2": measured}, losses=(train_loss,) * 8))
    assert all(math.isfinite(value) for row in (*features.nodes, features.run_row) for value in row)


def test_losses_take_each_epoch_once_and_the_report_last(make_request: Factory) -> None:
    request = make_request(losses=(3.0, 2.0, 1.0), epoch=3)
    doubled = request.model_copy(update={"history": (*request.history, *request.history)})
    assert [point.train_loss for point in losses(doubled)] == [3.0, 2.0, 1.0]


@given(st.lists(finite, min_size=1, max_size=40), st.integers(min_value=1, max_value=6))
def test_relative_improvement_needs_two_windows(values: list[float], window: int) -> None:
    assert (relative_improvement(values, window) is None) == (len(values) < 2 * window)


@given(finite, st.floats(min_value=0.01, max_value=0.99), st.integers(min_value=1, max_value=6))
def test_relative_improvement_has_no_scale(level: float, drop: float, window: int) -> None:
    values = [level] * window + [level * (1 - drop)] * window
    assert relative_improvement(values, window) == pytest.approx(drop)


def test_a_window_is_a_fifteenth_of_the_run() -> None:
    assert [improvement_window(epochs) for epochs in (1, 5, 20, 30, 60, 1500)] == [1, 1, 1, 2, 4, 100]


def test_features_and_policies_load_neither_torch_nor_torch_geometric() -> None:
    code = "import sys, esper.runtime.tamiyo.policies; print(sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "'torch'" not in loaded
    assert "'torch_geometric'" not in loaded
    assert "'esper'" in loaded


def test_residual_pull_does_not_see_scale(make_request: Factory) -> None:
    """Scaling a layer up and the next one down, another probe batch, another loss: the same pull."""

    def pulls(rows: float, loss: float, layer: float) -> list[float | None]:
        health = {
            f"layers.{2 * i}": {
                "residual_gradient": 0.9,
                "residual_gradient_norm": loss * (i + 1) * math.sqrt(rows) / layer,
                "gradient_norm": loss / layer,
                "gradient_to_weight": loss / layer**2,
            }
            for i in range(4)
        }
        request = make_request(health=health)
        scaled = tuple(signal.model_copy(update={"rows_seen": round(rows)}) for signal in request.report.health)
        features = describe(request.model_copy(update={"report": request.report.model_copy(update={"health": scaled})}))
        return [features.node(site, "residual_pull") for site in features.sites]

    usual = pulls(512, 1.0, 1.0)
    assert usual[3] == pytest.approx(0.9)
    assert usual == sorted(usual)  # type: ignore[type-var]
    for other in (pulls(64, 1.0, 1.0), pulls(512, 100.0, 1.0), pulls(512, 1.0, 7.0)):
        assert other == pytest.approx(usual)


def test_a_convolution_counts_every_place(make_request: Factory) -> None:
    """Two sites with the same pull in each row: the one with 16 rows a sample moves the loss four times as far."""
    request = make_request(
        health={
            site: {
                "residual_gradient": 1.0,
                "residual_gradient_norm": 1.0,
                "gradient_norm": 1.0,
                "gradient_to_weight": 1.0,
            }
            for site in ("layers.0", "layers.2")
        }
    )
    nodes = list(request.report.graph.nodes)
    contract = nodes[0].contract.model_copy(
        update={"kind": "conv2d", "input_shape": (1, 4, 4), "output_shape": (3, 4, 4)}
    )
    nodes[0] = nodes[0].model_copy(update={"contract": contract, "widen_output": None})
    graph = request.report.graph.model_copy(update={"nodes": tuple(nodes)})
    features = describe(request.model_copy(update={"report": request.report.model_copy(update={"graph": graph})}))
    assert features.node("layers.0", "residual_pull") == pytest.approx(1.0)
    assert features.node("layers.2", "residual_pull") == pytest.approx(0.25)
    assert features.node("layers.0", "kind.conv2d") == 1.0


def test_the_validation_loss_is_compared_with_the_training_loss(make_request: Factory) -> None:
    request = make_request()
    assert describe(request).run("val_to_train") == pytest.approx(1.0)
    worse = request.report.metrics.model_copy(update={"val_loss": 1.5})
    overfit = request.model_copy(update={"report": request.report.model_copy(update={"metrics": worse})})
    assert describe(overfit).run("val_to_train") == pytest.approx((0.5 + 1.5) / (0.5 + 0.5))
    assert describe(make_request(losses=(-1.0,) * 8)).run("val_to_train") is None


def test_a_table_of_vectors_pulls_at_nothing_and_hides_no_other_pull(make_request: Factory) -> None:
    """What an embedding cannot follow is not a function of its ids, so no kernel that reads them could."""
    strong = {
        "residual_gradient": 0.9,
        "residual_gradient_norm": 100.0,
        "gradient_norm": 1.0,
        "gradient_to_weight": 0.1,
    }
    weak = strong | {"residual_gradient_norm": 1.0}
    request = make_request(health={"layers.0": strong, "layers.2": weak})
    graph = request.report.graph
    first = graph.nodes[0]
    table = first.model_copy(update={"contract": first.contract.model_copy(update={"kind": "embedding"})})
    nodes = (table, *graph.nodes[1:])
    report = request.report.model_copy(update={"graph": graph.model_copy(update={"nodes": nodes})})
    assert describe(request).node("layers.2", "residual_pull") < 0.1
    features = describe(request.model_copy(update={"report": report}))
    assert features.node("layers.0", "residual_pull") is None
    assert features.node("layers.2", "residual_pull") == pytest.approx(0.9)
