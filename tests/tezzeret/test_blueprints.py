import subprocess
import sys

import pytest

from esper.contracts.assets import SiteContract
from esper.contracts.operational import LayerGraph
from esper.contracts.operational import SiteNode
from esper.errors import BlueprintError
from esper.runtime.tezzeret.blueprints.registry import cost
from esper.runtime.tezzeret.blueprints.registry import get_blueprint
from esper.runtime.tezzeret.blueprints.registry import host_graph
from esper.runtime.tezzeret.blueprints.registry import kernel_graph
from esper.runtime.tezzeret.blueprints.registry import list_blueprints
from esper.runtime.tezzeret.blueprints.registry import register_blueprint
from esper.runtime.tezzeret.blueprints.registry import resolve_hyperparameters
from esper.runtime.tezzeret.blueprints.registry import site_contract_for


def node(name: str, shapes: tuple[int, int], widen_output: str | None = None, **more) -> SiteNode:
    contract = SiteContract(
        site=name,
        output_site=name,
        kind=more.pop("kind", "linear"),
        input_shape=(shapes[0],),
        output_shape=(shapes[1],),
        dtype=more.pop("dtype", "float32"),
        attributes=more.pop("attributes", {}),
    )
    return SiteNode(
        contract=contract, parameter_count=1, flops_per_sample=1, depth=0, widen_output=widen_output, seeds=()
    )


def refused(call, *arguments) -> BlueprintError:
    with pytest.raises(BlueprintError) as caught:
        call(*arguments)
    return caught.value


NAMES = [
    "attention",
    "bottleneck",
    "conv_bottleneck",
    "depth_block",
    "depthwise",
    "lowrank",
    "noop",
    "norm_gate",
    "scale_shift",
    "se_gate",
    "widen",
]


def test_the_packaged_blueprints_are_registered():
    found = {blueprint.name: blueprint for blueprint in list_blueprints()}
    assert [name for name in found if name in NAMES] == NAMES
    assert [name for name in NAMES if found[name].capacity_free] == ["lowrank", "noop"]
    assert found["widen"].host_kinds == ("linear", "conv1d", "conv2d")
    assert found["depth_block"].host_kinds == ("*",)


def test_blueprints_are_weighed_without_torch():
    modules = "esper.runtime.tezzeret.blueprints.registry, esper.runtime.tezzeret.manifest"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_unknown_blueprint_lists_a_near_name(linear_site):
    for call in (get_blueprint, lambda name: cost(name, linear_site, {})):
        error = refused(call, "botleneck")
        assert error.code == "ESP-421"
        assert error.hint == "did you mean 'bottleneck'?"
    assert refused(get_blueprint, "zzz").hint == f"known are {', '.join(NAMES)}"


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"rnak": 4}, "did you mean 'rank'?"),
        ({"zzz": 4}, "known are rank, activation"),
        ({"rank": 0}, "not in 1 to 65536"),
        ({"rank": -1}, "not in 1 to"),
        ({"rank": 10**9}, "not in 1 to"),
        ({"rank": 4.0}, "is float, must be int"),
        ({"rank": True}, "is bool, must be int"),
        ({"rank": "4"}, "is str, must be int"),
        ({"activation": "rellu"}, "did you mean 'relu'?"),
        ({"activation": 3}, "known are relu, gelu"),
    ],
)
def test_a_bad_hyperparameter_is_refused_by_name(linear_site, given, part):
    error = refused(resolve_hyperparameters, "bottleneck", linear_site, given)
    assert error.code == "ESP-422"
    assert part in str(error)


def test_defaults_depend_on_the_site_as_documented(linear_site, conv2d_site, pair_site):
    assert resolve_hyperparameters("bottleneck", linear_site, {}) == {"rank": 32, "activation": "relu"}
    assert resolve_hyperparameters("bottleneck", conv2d_site, {"activation": "gelu"}) == {
        "rank": 16,
        "activation": "gelu",
    }
    assert resolve_hyperparameters("lowrank", conv2d_site, {}) == {"rank": 8}
    assert resolve_hyperparameters("widen", pair_site, {}) == {"units": 10, "activation": "tanh"}
    wide = pair_site.model_copy(update={"attributes": {"width": 24}})
    assert resolve_hyperparameters("widen", wide, {}) == {"units": 24, "activation": "relu"}


def test_widen_reads_the_first_layer_and_adds_to_the_second():
    first = node("a", (8, 3), widen_output="b", attributes={"pair_activation": "gelu"})
    graph = LayerGraph(nodes=(first, node("b", (3, 5))), edges=())
    contract = site_contract_for("widen", first, graph)
    assert contract is not None
    assert (contract.site, contract.output_site) == ("a", "b")
    assert (contract.input_shape, contract.output_shape) == ((8,), (5,))
    assert contract.attributes == {"pair_activation": "gelu", "width": 3}
    assert cost("widen", contract, {}) == (8 * 10 + 10 + 10 * 5, 2 * (8 * 10 + 10 * 5))


def test_a_blueprint_that_does_not_fit_gives_no_contract():
    first = node("a", (8, 3), widen_output="b")
    graph = LayerGraph(nodes=(first, node("b", (3, 5))), edges=())
    assert site_contract_for("widen", graph.nodes[1], graph) is None
    assert site_contract_for("widen", first, LayerGraph(nodes=(first,), edges=())) is None
    assert (
        site_contract_for("widen", first, LayerGraph(nodes=(first, node("b", (3, 5), dtype="float64")), edges=()))
        is None
    )
    assert site_contract_for("bottleneck", first, graph) == first.contract
    assert site_contract_for("bottleneck", node("c", (8, 3), kind="embedding"), graph) is None
    assert site_contract_for("bottleneck", node("c", (8, 3), dtype="int8"), graph) is None


def test_a_site_that_does_not_fit_is_refused_with_its_reason(linear_site, pair_site, conv2d_site):
    assert "needs a pair" in refused(kernel_graph, "widen", linear_site, {}).message
    assert "not a pair" in refused(kernel_graph, "bottleneck", pair_site, {}).message
    assert "its kind is 'linear'" in refused(kernel_graph, "depthwise", linear_site, {}).message
    assert "the contract reads the input" in refused(kernel_graph, "scale_shift", conv2d_site, {}).message
    odd = linear_site.model_copy(update={"input_shape": (3, 12)})
    assert "differ before the last dimension" in refused(kernel_graph, "bottleneck", odd, {}).message
    assert refused(kernel_graph, "bottleneck", odd, {}).code == "ESP-423"


def test_a_geometry_that_does_not_give_the_host_s_output_is_refused(conv2d_site):
    other = conv2d_site.model_copy(update={"output_shape": (5, 7, 8)})
    error = refused(kernel_graph, "bottleneck", other, {})
    assert error.code == "ESP-414"
    assert "'up': gives (5, 8, 8)" in error.message
    broken = conv2d_site.model_copy(update={"attributes": {"kernel_size": "os.system"}})
    assert refused(kernel_graph, "bottleneck", broken, {}).code == "ESP-417"


def test_a_host_s_reference_is_its_own_geometry(linear_site, conv2d_site):
    assert host_graph(linear_site).nodes[0].attributes == {"out_features": 7, "bias": False}
    assert host_graph(conv2d_site).nodes[0].attributes["kernel_size"] == [3, 3]
    assert refused(host_graph, linear_site.model_copy(update={"kind": "embedding"})).code == "ESP-423"


def test_a_name_is_registered_once():
    again = register_blueprint("lowrank", description="", formula="", host_kinds=("linear",), defaults={})
    assert refused(again, lambda site, hyperparameters: None).code == "ESP-421"
