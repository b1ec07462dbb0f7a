import json

import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from esper.errors import BlueprintError
from esper.runtime.tezzeret.ir import MAX_JSON_BYTES
from esper.runtime.tezzeret.ir import MAX_NODES
from esper.runtime.tezzeret.ir import canonical_json
from esper.runtime.tezzeret.ir import check_graph
from esper.runtime.tezzeret.ir import flops_per_sample
from esper.runtime.tezzeret.ir import parameter_count
from esper.runtime.tezzeret.ir import parse_graph


def linear(node_id="down", source="x", out=4, bias=True, **more):
    attributes = {"out_features": out, "bias": bias} | more
    return {"id": node_id, "op": "linear", "inputs": [source], "attributes": attributes}


def relu(node_id="act", source="down"):
    return {"id": node_id, "op": "activation", "inputs": [source], "attributes": {"name": "relu"}}


def graph(*nodes, outputs=("up",), inputs=None):
    return {"schema_version": 1, "inputs": inputs or {"x": [6]}, "nodes": list(nodes), "outputs": list(outputs)}


def conv2d(node_id="up", source="x", **more):
    attributes = {
        "out_channels": 4,
        "kernel_size": [3, 3],
        "stride": [1, 1],
        "padding": [1, 1],
        "dilation": [1, 1],
        "groups": 1,
        "padding_mode": "zeros",
        "bias": True,
    } | more
    return {"id": node_id, "op": "conv2d", "inputs": [source], "attributes": attributes}


GOOD = graph(linear(), relu(), linear("up", "act", 3, bias=False))


def refused(document: object) -> BlueprintError:
    source = document if isinstance(document, bytes | dict) else json.dumps(document).encode()
    with pytest.raises(BlueprintError) as caught:
        parse_graph(source, max_parameters=10**9)
    return caught.value


def test_a_good_graph_is_read_from_bytes_and_from_a_mapping():
    parsed = parse_graph(GOOD)
    assert parsed == parse_graph(json.dumps(GOOD).encode())
    assert parameter_count(parsed) == 6 * 4 + 4 + 4 * 3
    assert flops_per_sample(parsed) == 2 * (6 * 4 + 4 * 3)
    assert parse_graph(canonical_json(parsed.model_dump(mode="json"))) == parsed


def test_order_of_nodes_does_not_matter_to_typing():
    shuffled = graph(linear("up", "act", 3, bias=False), relu(), linear())
    typed = check_graph(parse_graph(shuffled))
    assert [node.id for node in typed.nodes] == ["down", "act", "up"]
    assert typed.output_shape == (3,)


BAD_GRAPHS = {
    "unknown operation": (graph(linear() | {"op": "liner"}, outputs=["down"]), "ESP-410", "did you mean 'linear'"),
    "import as operation": (graph(linear() | {"op": "os.system"}, outputs=["down"]), "ESP-410", "'down'"),
    "dunder operation": (graph(linear() | {"op": "__class__"}, outputs=["down"]), "ESP-410", "known are linear"),
    "cycle": (graph(linear("up", "back"), linear("back", "up"), linear("in", "x")), "ESP-411", "'up'"),
    "self loop": (graph(linear("up", "up"), linear("in", "x")), "ESP-411", "'up'"),
    "dangling input": (graph(linear("up", "nowhere")), "ESP-412", "'nowhere'"),
    "dangling output": (graph(linear(), outputs=["up"]), "ESP-412", "'up'"),
    "no input": (graph(linear("up") | {"inputs": []}), "ESP-412", "takes 1 input, 0 given"),
    "two inputs of one node": (graph(linear("up") | {"inputs": ["x", "x"]}), "ESP-412", "2 given"),
    "two outputs": (graph(linear("up"), linear(), outputs=["up", "down"]), "ESP-413", "2 outputs"),
    "no output": (graph(linear("up"), outputs=[]), "ESP-413", "0 outputs"),
    "two graph inputs": (graph(linear("up"), inputs={"x": [6], "y": [6]}), "ESP-413", "exactly one"),
    "other graph input": (graph(linear("up"), inputs={"y": [6]}), "ESP-413", "'y'"),
    "shape mismatch": (graph(conv2d()), "ESP-414", "'up': conv2d needs (channels, height, width)"),
    "kernel wider than image": (graph(conv2d(padding=[0, 0]), inputs={"x": [3, 2, 9]}), "ESP-414", "reaches over 3"),
    "groups do not divide": (graph(conv2d(groups=2), inputs={"x": [3, 8, 8]}), "ESP-414", "groups 2"),
    "same with stride": (graph(conv2d(padding="same", stride=[2, 2]), inputs={"x": [3, 8, 8]}), "ESP-414", "'same'"),
    "reflect too wide": (
        graph(conv2d(padding=[8, 8], padding_mode="reflect"), inputs={"x": [3, 8, 8]}),
        "ESP-414",
        "reflect padding 8",
    ),
    "no nodes": (graph(outputs=["up"]), "ESP-415", "0 nodes"),
    "many nodes": (graph(*[linear(f"n{i}") for i in range(MAX_NODES + 1)]), "ESP-415", f"1 to {MAX_NODES}"),
    "hundred thousand nodes": ({"nodes": [0] * 100_000}, "ESP-415", "100000 nodes"),
    "ten billion parameters": (
        graph(linear("up", out=100_000), inputs={"x": [100_000]}),
        "ESP-416",
        "'up': the graph has 10000100000 parameters, the budget is 1000000000",
    ),
    "negative dimension": (graph(linear("up", out=-4)), "ESP-417", "'up': attribute 'out_features'"),
    "zero dimension": (graph(linear("up", out=0)), "ESP-417", "'up'"),
    "huge dimension": (graph(linear("up", out=10**10)), "ESP-417", "'up'"),
    "boolean dimension": (graph(linear("up", out=True)), "ESP-417", "'up'"),
    "fractional dimension": (graph(linear("up", out=4.5)), "ESP-417", "'up'"),
    "text dimension": (graph(linear("up", out="4")), "ESP-417", "'up'"),
    "unknown attribute": (graph(linear("up", device="cuda")), "ESP-417", "'device'"),
    "missing attribute": (graph(linear("up") | {"attributes": {}}), "ESP-417", "'up'"),
    "unknown activation": (
        graph(linear(), relu("up") | {"attributes": {"name": "__import__"}}),
        "ESP-417",
        "'up'",
    ),
    "NaN constant": (graph(linear("up", out=float("nan"))), "ESP-417", "(node 'up')"),
    "infinite constant": (graph(linear("up", scale=float("inf"))), "ESP-417", "(node 'up')"),
    "negative input shape": (graph(linear("up"), inputs={"x": [-6]}), "ESP-417", "input shape"),
    "too many dimensions": (graph(linear("up"), inputs={"x": [1] * 9}), "ESP-417", "9 dimensions"),
    "no dimension to multiply": (graph(linear("up"), inputs={"x": []}), "ESP-414", "'up': linear needs"),
    "too many elements": (graph(linear("up"), inputs={"x": [2**20, 2**20, 6]}), "ESP-417", "elements"),
    "too many elements inside": (graph(linear("up", out=2**20), inputs={"x": [2**20, 6]}), "ESP-417", "'up'"),
    "double id": (graph(linear("up"), linear("up")), "ESP-418", "'up': the id is given twice"),
    "id of the input": (graph(linear("x"), outputs=["x"]), "ESP-418", "'x'"),
    "path as id": (graph(linear("../../x"), outputs=["../../x"]), "ESP-418", "'../../x'"),
    "escaped path as id": (graph(linear("%2e%2e"), outputs=["%2e%2e"]), "ESP-418", "%2e%2e"),
    "NUL in id": (graph(linear("a\0b"), outputs=["a\0b"]), "ESP-418", r"a\x00b"),
    "look-alike id": (graph(linear("dоwn"), outputs=["dоwn"]), "ESP-418", r"d\u043ewn"),
    "long id": (graph(linear("a" * 4096), outputs=["a" * 4096]), "ESP-418", "..."),
    "dotted id": (graph(linear("a.b"), outputs=["a.b"]), "ESP-418", "'a.b'"),
    "empty id": (graph(linear(""), outputs=[""]), "ESP-418", "''"),
    "unknown key": (graph(linear("up")) | {"code": "import os"}, "ESP-419", "'code'"),
    "unknown key of a node": (graph(linear("up") | {"module": "os"}), "ESP-419", "(node 'up')"),
    "other schema": (graph(linear("up")) | {"schema_version": 2}, "ESP-419", "schema_version"),
    "no inputs": ({"schema_version": 1, "nodes": [linear("up")], "outputs": ["up"]}, "ESP-419", "inputs"),
    "nodes of text": (graph("up"), "ESP-419", "nodes.0"),
}


@pytest.mark.fault("B2", "B3")
@pytest.mark.parametrize("name", BAD_GRAPHS)
def test_a_bad_graph_is_refused_by_rule_and_node(name):
    document, code, part = BAD_GRAPHS[name]
    error = refused(document)
    assert error.code == code
    assert part in str(error)
    assert str(error).isprintable()
    assert len(str(error)) < 600


BAD_BYTES = {
    "not an object": (b"[1, 2]", "must be an object"),
    "trailing bytes": (json.dumps(GOOD).encode() + b" {}", "not JSON"),
    "invalid UTF-8": (b'{"nodes": "\xff"}', "not UTF-8 at byte 11"),
    "UTF-16": (json.dumps(GOOD).encode("utf-16"), "not UTF-8"),
    "lone surrogate": (b'{"name": "\\ud800"}', "lone surrogate"),
    "too large": (b" " * (MAX_JSON_BYTES + 1), "the limit is"),
    "too deep": (b"[" * 10_000 + b"]" * 10_000, "nested deeper than 64"),
    "too deep in objects": (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, "nested deeper than 64"),
    "doubled key": (b'{"nodes": [], "nodes": []}', "given twice"),
    "NaN": (b'{"a": NaN}', "NaN"),
    "overflow": (b'{"a": 1e999}', "infinity"),
    "empty": (b"", "not JSON"),
}


@pytest.mark.fault("B2", "B3")
@pytest.mark.parametrize("name", BAD_BYTES)
def test_bytes_that_are_no_graph_are_refused(name):
    data, part = BAD_BYTES[name]
    error = refused(data)
    assert error.code == "ESP-420"
    assert part in error.message


def test_brackets_in_strings_are_not_depth():
    error = refused(json.dumps({"name": "[" * 200 + '\\"' + "{" * 200}).encode())
    assert error.code == "ESP-419"


def test_a_mapping_that_is_no_json_is_refused():
    assert refused({"nodes": object()}).code == "ESP-420"


def test_canonical_json_has_one_spelling():
    assert canonical_json({"b": [1, 2.5], "a": "é"}) == '{"a":"é","b":[1,2.5]}'.encode()
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"a": float("nan")})


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["x", "up"])
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner)
)
mutations = st.dictionaries(
    st.sampled_from(["schema_version", "inputs", "nodes", "outputs", "extra"]),
    anything | st.lists(st.dictionaries(st.sampled_from(["id", "op", "inputs", "attributes"]), anything), max_size=3),
    min_size=1,
)


@pytest.mark.fault("B3")
@settings(max_examples=60, deadline=None)
@given(mutations)
def test_any_mutation_is_either_a_graph_or_a_clear_error(change):
    try:
        parse_graph(GOOD | change, max_parameters=10**6)
    except BlueprintError as error:
        assert "ESP-410" <= error.code <= "ESP-420"


@pytest.mark.fault("B3")
@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_clear_error(data):
    assert refused(data).code in {"ESP-419", "ESP-420"}
