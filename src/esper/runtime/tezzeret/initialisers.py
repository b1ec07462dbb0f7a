"""First weights of a kernel: a small registry of initialisers.

All but two keep the model's function exactly, because the last operation with parameters begins at zero (`gradmax`:
the first one). `random`, and `net2net` across a pair, do not; they say so (`FirstWeights.preserves`, in the manifest),
fail the birth certificate, and are for comparison at alpha 0 only. Everything is float64 on the CPU, drawn from one
generator: equal input gives equal weights.
"""

import difflib
import math
from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from esper.errors import BlueprintError
from esper.runtime.tezzeret import alignment
from esper.runtime.tezzeret.ir import INPUT
from esper.runtime.tezzeret.ir import TypedGraph
from esper.runtime.tezzeret.ir import TypedNode
from esper.runtime.tezzeret.ir import shown
from esper.runtime.tezzeret.module import MODULES
from esper.runtime.tezzeret.operations.table import OPERATIONS
from esper.runtime.tezzeret.samples import SiteSamples

DEFAULT = "residual"
NOISE = 0.1
"""Of a copied row's root mean square: two units that are alike would stay alike."""
STEEP_AT_ZERO = ("gelu", "silu", "tanh")
"""Activations with f(0) = 0 and a slope there: a unit whose incoming weights are all zero can still learn."""

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class HostWeights:
    """What `net2net` copies. `weight` (outputs, inputs, *window) and `bias` (outputs,) are those of the layer that is
    read; `outgoing` (outputs, units, *window) is the weight of the second layer of a pair, None for one site."""

    weight: Tensor
    bias: Tensor | None = None
    outgoing: Tensor | None = None


@dataclass(frozen=True)
class Birth:
    """What an initialiser is told."""

    typed: TypedGraph
    samples: SiteSamples | None
    host: HostWeights | None
    generator: torch.Generator

    @property
    def trainable(self) -> tuple[TypedNode, ...]:
        """Nodes with parameters, in order."""
        return tuple(node for node in self.typed.nodes if node.tensors())

    def readers(self, node: TypedNode) -> tuple[TypedNode, ...]:
        """Nodes that read a node."""
        return tuple(other for other in self.typed.nodes if node.id in other.inputs)

    def activation_after(self, node: TypedNode) -> str | None:
        """The non-linearity that reads a node."""
        following = (other for other in self.readers(node) if other.op == "activation")
        return next((str(other.attributes.name) for other in following), None)


@dataclass(frozen=True)
class FirstWeights:
    """Parameters as `<node>.<tensor>`, float64; the initialiser that really gave them; whether the kernel's output is
    exactly zero with them."""

    tensors: Tensors
    initialisation: str
    preserves: bool = True


Initialiser = Callable[[Birth], FirstWeights]

_INITIALISERS: dict[str, Initialiser] = {}


def register_initialiser(name: str) -> Callable[[Initialiser], Initialiser]:
    """Register a function as an initialiser. Raises BlueprintError ESP-428 when the name is taken."""

    def register(function: Initialiser) -> Initialiser:
        if name in _INITIALISERS:
            raise BlueprintError("ESP-428", f"initialiser '{name}' is registered already")
        _INITIALISERS[name] = function
        return function

    return register


def list_initialisers() -> tuple[str, ...]:
    """Names of all initialisers, the default first."""
    return (DEFAULT, *sorted(name for name in _INITIALISERS if name != DEFAULT))


def first_weights(
    typed: TypedGraph,
    *,
    seed: int,
    samples: SiteSamples | None,
    initialiser: str = DEFAULT,
    host: HostWeights | None = None,
) -> FirstWeights:
    """First weights of a checked graph. Raises BlueprintError ESP-428: an unknown initialiser (with near names), or
    one that lacks samples, host weights or a kernel of the form that it needs."""
    function = _INITIALISERS.get(initialiser)
    if function is None:
        near = difflib.get_close_matches(initialiser, _INITIALISERS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(list_initialisers())}"
        raise BlueprintError("ESP-428", f"unknown initialiser {shown(initialiser)}", hint=hint)
    return function(Birth(typed, samples, host, torch.Generator(device="cpu").manual_seed(seed)))


@register_initialiser("kaiming")
def kaiming(birth: Birth) -> FirstWeights:
    """Zero last operation, all others Kaiming uniform (He et al., arXiv 1502.01852) with biases zero."""
    return FirstWeights(_drawn(birth, {}), "kaiming")


@register_initialiser("residual")
def residual(birth: Birth) -> FirstWeights:
    """As `kaiming`, with the first operation aligned with the residual functional gradient of the samples (TINY,
    arXiv 2405.19816; SENN, arXiv 2307.04526).

    That is done for up(act(down(x))), where the positions of the gradient are those of `down`; parameter-free nodes
    may stand before. Any other kernel, and samples that say nothing, leave Kaiming weights, and the manifest then
    says `kaiming`.
    """
    parts = _up_and_down(birth) if birth.samples is not None else None
    found = _aligned(birth, parts[0]) if parts is not None else None
    if parts is None or found is None:
        return kaiming(birth)
    return FirstWeights(_drawn(birth, {parts[0].id: found}), "residual")


@register_initialiser("gradmax")
def gradmax(birth: Birth) -> FirstWeights:
    """The incoming weights are zero and the outgoing ones those that make the next gradient largest: the leading left
    singular vectors of G^T [X, 1] (GradMax, arXiv 2201.05125, section 3.1), scaled as Kaiming columns. A baseline.

    Beyond the rank of that matrix columns are Kaiming draws. Needs samples, and an activation with f(0) = 0 and a
    slope there, or none: behind a ReLU such a unit never learns.
    """
    parts = _up_and_down(birth)
    if parts is None:
        _refuse_form("gradmax", "up(act(down(x)))")
    down, up, activation = parts
    if birth.samples is None:
        raise BlueprintError("ESP-428", "initialiser 'gradmax': it needs samples of the site", hint="probe the site")
    if activation is not None and activation not in STEEP_AT_ZERO:
        raise BlueprintError(
            "ESP-428",
            f"initialiser 'gradmax': behind {activation} a unit with zero incoming weights never learns or is not zero",
            hint=f"give an activation of {', '.join(STEEP_AT_ZERO)}",
        )
    shapes = up.tensors()
    outputs, units = shapes["weight"][:2]
    rows = _rows(birth, down)
    if rows is None or math.prod(shapes["weight"]) != outputs * units:
        raise BlueprintError(
            "ESP-428", "initialiser 'gradmax': the gradient is not at the places that the first operation gives"
        )
    ones = torch.ones((rows.x.shape[0], 1), dtype=torch.float64, device="cpu")
    inputs = torch.cat((rows.x, ones), dim=1) if "bias" in down.tensors() else rows.x
    left, strengths, _ = torch.linalg.svd(rows.g.T @ inputs, full_matrices=False)
    strong = int((strengths > 1e-9 * strengths.amax()).sum()) if bool(strengths.any()) else 0
    count = min(units, strong)
    weight = alignment.kaiming_uniform((outputs, units), 1.0, birth.generator)
    weight[:, :count] = left[:, :count] * math.sqrt(outputs / units)
    tensors = {f"{node.id}.{name}": _zeros(shape) for node in (down, up) for name, shape in node.tensors().items()}
    tensors[f"{up.id}.weight"] = weight.reshape(shapes["weight"])
    return FirstWeights(tensors, "gradmax")


@register_initialiser("net2net")
def net2net(birth: Birth) -> FirstWeights:
    """The incoming weights are copies of the host's own rows, with 10 % of noise (Net2WiderNet, arXiv 1511.05641,
    section 2.4). A baseline.

    Across a pair the outgoing weights are half of the copied units', as Net2Net splits them. Net2Net also halves the
    units that it copied; a kernel that only adds cannot, so the function is *not* preserved. At one site nothing goes
    out yet: zero, and the function is preserved. Needs the host's weights.
    """
    host, trainable = birth.host, birth.trainable
    if len(trainable) < 2 or trainable[0].inputs != (INPUT,) or len(trainable[0].tensors()["weight"]) < 2:
        _refuse_form("net2net", "up(...(down(x)))")
    down, up = trainable[0], trainable[-1]
    if host is None:
        raise BlueprintError("ESP-428", "initialiser 'net2net': it needs the host's weights", hint="give host=")
    shapes = down.tensors()
    units = shapes["weight"][0]
    if down.op == "embedding" or tuple(host.weight.shape[1:]) != shapes["weight"][1:]:
        raise BlueprintError(
            "ESP-428",
            f"initialiser 'net2net': the host's weight {tuple(host.weight.shape)} has no rows for "
            f"node '{down.id}', {shapes['weight']}",
        )
    available = host.weight.shape[0]
    order = torch.randperm(available, generator=birth.generator, device="cpu")
    chosen = order.repeat(math.ceil(units / available))[:units]
    weight = host.weight.detach().cpu().double()[chosen]
    size = weight.square().mean().sqrt()
    noise = torch.randn(weight.shape, generator=birth.generator, dtype=torch.float64, device="cpu")
    given = {down.id: {"weight": weight + NOISE * size * noise}}
    if "bias" in shapes:
        given[down.id]["bias"] = _zeros((units,)) if host.bias is None else host.bias.detach().cpu().double()[chosen]
    if host.outgoing is not None:
        needed = up.tensors()["weight"]
        if tuple(host.outgoing.shape) != (needed[0], available, *needed[2:]):
            raise BlueprintError(
                "ESP-428",
                f"initialiser 'net2net': the outgoing weight {tuple(host.outgoing.shape)} does not go with "
                f"node '{up.id}', {needed}",
            )
        given[up.id] = {"weight": host.outgoing.detach().cpu().double()[:, chosen] / 2.0}
    return FirstWeights(_drawn(birth, given), "net2net", preserves=host.outgoing is None)


@register_initialiser("random")
def random(birth: Birth) -> FirstWeights:
    """Everything drawn, also the last operation: the function is *not* preserved. A baseline."""
    if not birth.trainable:
        return FirstWeights({}, "random")
    last = birth.trainable[-1]
    return FirstWeights(_drawn(birth, {last.id: _random(birth, last)}), "random", preserves=False)


def _drawn(birth: Birth, given: Mapping[str, Tensors]) -> Tensors:
    """`given` by node, the last operation zero, norms neutral, all other matrices Kaiming."""
    tensors: Tensors = {}
    for node in birth.trainable:
        values = given.get(node.id)
        if values is None:
            values = _zero(node) if node is birth.trainable[-1] else _kaiming(birth, node)
        tensors |= {f"{node.id}.{name}": value for name, value in values.items()}
    return tensors


def _kaiming(birth: Birth, node: TypedNode) -> Tensors:
    activation = birth.activation_after(node)
    gain = 1.0 if activation is None else alignment.GAINS[activation]
    operation = OPERATIONS[node.op]
    values: Tensors = {}
    for name, shape in node.tensors().items():
        if len(shape) > 1:
            values[name] = alignment.kaiming_uniform(shape, gain, birth.generator, operation.fan_in(shape))
        else:
            values[name] = _zeros(shape) + operation.neutral.get(name, 0.0)
    return _without_padding(node, values)


def _random(birth: Birth, node: TypedNode) -> Tensors:
    values = _kaiming(birth, node)
    for name, value in values.items():
        if value.dim() == 1:
            drawn = torch.rand(value.shape, generator=birth.generator, dtype=torch.float64, device="cpu")
            values[name] = (2.0 * drawn - 1.0) / math.sqrt(value.numel())
    return values


def _zero(node: TypedNode) -> Tensors:
    return {name: _zeros(shape) for name, shape in node.tensors().items()}


def _without_padding(node: TypedNode, values: Tensors) -> Tensors:
    padding = getattr(node.attributes, "padding_idx", None)
    if padding is not None:
        values["weight"][padding] = 0.0
    return values


def _up_and_down(birth: Birth) -> tuple[TypedNode, TypedNode, str | None] | None:
    """(down, up, the activation between) of a kernel that ends in up(act(down(...))), where nothing before `down` has
    parameters and `act` may be missing; None for another form."""
    if len(birth.trainable) != 2:
        return None
    down, up = birth.trainable
    readers = birth.readers(down)
    if len(readers) == 1 and readers[0].op == "activation":
        readers = birth.readers(readers[0])
    return (down, up, birth.activation_after(down)) if readers == (up,) and up.id == birth.typed.output else None


def _refuse_form(name: str, form: str) -> NoReturn:
    raise BlueprintError(
        "ESP-428",
        f"initialiser '{name}': it needs a kernel of the form {form}",
        hint=f"take '{DEFAULT}' for this blueprint",
    )


def _aligned(birth: Birth, node: TypedNode) -> Tensors | None:
    shapes = node.tensors()
    rows = _rows(birth, node)
    if rows is None:
        return None
    activation = birth.activation_after(node)
    units = shapes["weight"][0]
    found = alignment.aligned_rows(rows, min(units, alignment.MAX_ALIGNED), activation, birth.generator)
    if found is None:
        return None
    weight, bias = found[0].reshape(-1, *shapes["weight"][1:]), found[1]
    others = units - weight.shape[0]
    if others:
        gain = 1.0 if activation is None else alignment.GAINS[activation]
        rest = alignment.kaiming_uniform((others, *weight.shape[1:]), gain, birth.generator)
        weight, bias = torch.cat((weight, rest)), torch.cat((bias, _zeros((others,))))
    return {"weight": weight} | ({"bias": bias} if "bias" in shapes else {})


def _rows(birth: Birth, node: TypedNode) -> alignment.Rows | None:
    """What a node reads and the gradient behind it as matrices; None where their places are not the same or the
    operation has no rows."""
    assert birth.samples is not None
    x, g = _read_by(birth, node), birth.samples.g.detach().cpu()
    output = birth.typed.output_shape
    if node.op == "linear" and node.output[:-1] == output[:-1]:
        return alignment.linear_rows(x, g, birth.generator)
    if node.op in ("conv1d", "conv2d") and node.attributes.groups == 1 and node.output[1:] == output[1:]:
        return alignment.convolution_rows(x, g, node.attributes, birth.generator)
    return None


def _read_by(birth: Birth, node: TypedNode) -> Tensor:
    """What a node reads of the samples, through the parameter-free nodes before it."""
    assert birth.samples is not None
    values = {INPUT: birth.samples.x.detach().cpu()}
    if node.inputs != (INPUT,):
        values[INPUT] = values[INPUT].double()
        for before in birth.typed.nodes[: birth.typed.nodes.index(node)]:
            module = MODULES[before.op](before, torch.float64)
            values[before.id] = module(*[values[name] for name in before.inputs])
    return values[node.inputs[0]]


def _zeros(shape: tuple[int, ...]) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64, device="cpu")
