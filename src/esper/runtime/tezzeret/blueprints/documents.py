"""Blueprints as data: a JSON document whose graph is a template, checked when it is submitted and whenever it is built.

An attribute of a node may be `"$in"` or `"$out"`, the channels of what the kernel reads and of the site's output, or
`"$name"`, the hyperparameter `name` of `defaults`. No string of a document is ever imported or evaluated. Codes:

    ESP-410..418 the graph (`ir`)   ESP-419 not of the schema   ESP-420 not JSON as it must be
    ESP-421 the name is taken       ESP-423 a kind of site that no blueprint knows
"""

import difflib
from collections.abc import Mapping
from typing import Annotated
from typing import Literal
from typing import NoReturn

from pydantic import Field
from pydantic import JsonValue
from pydantic import StringConstraints
from pydantic import ValidationError

from esper.contracts.assets import Blueprint
from esper.contracts.assets import Hyperparameters
from esper.contracts.assets import SiteContract
from esper.contracts.base import Contract
from esper.contracts.base import first_problem
from esper.errors import BlueprintError
from esper.runtime.tezzeret.blueprints.parts import channels
from esper.runtime.tezzeret.blueprints.parts import channels_first
from esper.runtime.tezzeret.blueprints.registering import TABLE
from esper.runtime.tezzeret.blueprints.registering import register_blueprint
from esper.runtime.tezzeret.ir import INPUT
from esper.runtime.tezzeret.ir import MAX_NODES
from esper.runtime.tezzeret.ir import KernelGraph
from esper.runtime.tezzeret.ir import KernelNode
from esper.runtime.tezzeret.ir import canonical_json
from esper.runtime.tezzeret.ir import check_graph
from esper.runtime.tezzeret.ir import shown
from esper.runtime.tezzeret.ir import strict_json

SHAPES: Mapping[str, tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]] = {
    "linear": (((16,), (24,)),),
    "conv1d": (((16, 12), (24, 12)),),
    "conv2d": (((16, 12, 12), (24, 12, 12)),),
    "embedding": (((), (24,)),),
    "layer_norm": (((16,), (16,)),),
    "group_norm": (((16, 12, 12), (16, 12, 12)),),
    "batch_norm": (((16, 12, 12), (16, 12, 12)), ((16,), (16,))),
    "attention": (((12, 16), (12, 16)),),
    "block": (((12, 16), (12, 16)), ((16,), (16,)), ((16, 12, 12), (16, 12, 12))),
}
"""Of every kind of site, shapes of one sample (what is read, what is added to) on which a template is tried: it must
give the output's shape on one of them. Input and output channels differ where they may."""


class Template(Contract):
    """A graph in which attributes may be names: of channels, or of hyperparameters."""

    nodes: tuple[KernelNode, ...]
    outputs: tuple[str, ...]


class BlueprintDocument(Contract):
    """What a person submits."""

    schema_version: Literal[1] = 1
    name: Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
    version: Annotated[int, Field(ge=1)] = 1
    description: str
    formula: str = ""
    host_kinds: Annotated[tuple[str, ...], Field(min_length=1)]
    reads: Literal["input", "output"] = "input"
    defaults: Hyperparameters = Field(default_factory=dict)
    graph: Template


def parse_document(data: bytes) -> Blueprint:
    """A submitted document as a blueprint that keeps every rule. Raises BlueprintError ESP-410..423."""
    document = strict_json(data, where="blueprint")
    graph = document.get("graph")
    nodes = graph.get("nodes") if isinstance(graph, dict) else None
    if isinstance(nodes, list) and not 1 <= len(nodes) <= MAX_NODES:
        _refuse("ESP-415", f"graph: {len(nodes)} nodes, there must be 1 to {MAX_NODES}")
    try:
        read = BlueprintDocument.model_validate_json(canonical_json(document))
    except ValidationError as error:
        place, problem = first_problem(error)
        _refuse("ESP-419", f"blueprint at {shown(place or 'blueprint')}: {problem}")
    if read.name in TABLE and TABLE[read.name].blueprint.graph is None:
        _refuse("ESP-421", f"blueprint '{read.name}' is known already", hint="Give it another name")
    for kind in read.host_kinds:
        _try_on(kind, read)
    return Blueprint(
        name=read.name,
        version=read.version,
        description=read.description,
        formula=read.formula,
        host_kinds=read.host_kinds,
        defaults=read.defaults,
        reads=read.reads,
        graph=read.graph.model_dump(mode="json"),
    )


def learn(blueprint: Blueprint) -> None:
    """Register a submitted blueprint in this process, unless one of that name is known."""
    if blueprint.graph is None or blueprint.name in TABLE:
        return
    template = Template.model_validate_json(canonical_json(blueprint.graph))

    def made(site: SiteContract, hyperparameters: Hyperparameters) -> KernelGraph:
        return filled(template, site, hyperparameters)

    register_blueprint(
        blueprint.name,
        description=blueprint.description,
        formula=blueprint.formula,
        host_kinds=blueprint.host_kinds,
        defaults=blueprint.defaults,
        reads=blueprint.reads,
        version=blueprint.version,
        graph=blueprint.graph,
    )(made)


def filled(template: Template, site: SiteContract, hyperparameters: Mapping[str, JsonValue]) -> KernelGraph:
    """The template for one site. Raises BlueprintError ESP-417 for a name of neither channels nor `defaults`."""
    known: dict[str, JsonValue] = dict(hyperparameters)
    known["out"] = channels(site) if site.output_shape else 1
    if site.input_shape:
        known["in"] = site.input_shape[0 if channels_first(site) else -1]
    nodes = tuple(
        node.model_copy(update={"attributes": {key: _value(node, v, known) for key, v in node.attributes.items()}})
        for node in template.nodes
    )
    return KernelGraph(inputs={INPUT: site.input_shape}, nodes=nodes, outputs=template.outputs)


def _value(node: KernelNode, value: JsonValue, known: Mapping[str, JsonValue]) -> JsonValue:
    if isinstance(value, list):
        return [_value(node, item, known) for item in value]
    if not isinstance(value, str) or not value.startswith("$"):
        return value
    name = value.removeprefix("$")
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean '${near[0]}'?" if near else f"known are {', '.join(f'${name}' for name in known)}"
        _refuse("ESP-417", f"node {shown(node.id)}: {shown(value)} names nothing", hint=hint)
    return known[name]


def _try_on(kind: str, read: BlueprintDocument) -> None:
    """Refuse a template that gives the output's shape on none of the shapes of that kind, with the first reason."""
    if kind not in SHAPES:
        near = difflib.get_close_matches(kind, SHAPES, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(SHAPES)}"
        _refuse("ESP-423", f"blueprint '{read.name}': unknown kind of site {shown(kind)}", hint=hint)
    first: BlueprintError | None = None
    for reads, adds in SHAPES[kind]:
        site = SiteContract(
            site="probe",
            output_site="probe",
            kind=kind,
            input_shape=adds if read.reads == "output" else reads,
            output_shape=adds,
            dtype="float32",
            reads=read.reads,
        )
        try:
            typed = check_graph(filled(read.graph, site, read.defaults))
            if typed.output_shape == adds:
                return
            raise BlueprintError(
                "ESP-414",
                f"node {shown(read.graph.outputs[0])}: gives {typed.output_shape} for a site of kind '{kind}' "
                f"that reads {site.input_shape} and puts out {adds}",
                hint='"$in" and "$out" stand for the channels of a site',
            )
        except BlueprintError as error:
            first = first or error
    if first is not None:
        raise first


def _refuse(code: str, message: str, *, hint: str | None = None) -> NoReturn:
    raise BlueprintError(code, message, hint=hint)
