"""The kinds of module that seeds can stand beside: one entry of `HOST_KINDS` for each, and nothing else knows them."""

from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from typing import Literal

import torch
from pydantic import JsonValue
from torch import Tensor
from torch import nn

from esper.contracts.assets import SiteContract
from esper.runtime.kasmina.digest import dtype_name
from esper.runtime.kasmina.wrapping import geometry
from esper.runtime.kasmina.wrapping.calls import argument
from esper.runtime.kasmina.wrapping.calls import same_shape
from esper.runtime.kasmina.wrapping.geometry import Frame
from esper.runtime.kasmina.wrapping.geometry import Shape

Axis = Literal["first", "last"]


@dataclass(frozen=True)
class HostKind:
    """What growth must know of one type of module.

    `name` is unique, `form` is what blueprints look at (`SiteContract.kind`); `argument` names the argument that is
    `x` (None: the one that has the output's shape). `frame(module)` says how samples lie in its tensors,
    `attributes(module)` its geometry as JSON, `channels(module, output shape)` where the channels of one sample are.
    `flops(module, input, output)` are the forward floating point operations of one sample (two per
    multiply-accumulate). `to_input_rows` and `to_output_rows` lay a batch out as the rows of the matrix product that
    the module is: (rows, fan in) and (rows, fan out), in the same order of rows.
    """

    name: str
    form: str
    title: str
    matches: Callable[[nn.Module], bool]
    argument: str | None
    frame: Callable[[Any], Frame]
    attributes: Callable[[Any], dict[str, JsonValue]]
    channels: Callable[[Any, Shape], Axis]
    flops: Callable[[Any, Shape, Shape], int]
    to_input_rows: Callable[[Any, Tensor], Tensor]
    to_output_rows: Callable[[Any, Tensor], Tensor]

    def chosen_input(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> Tensor | None:
        """`x` of one call: what a kernel beside this module reads."""
        if self.argument is None:
            return same_shape(args, kwargs, output)
        return argument(self.argument, args, kwargs)

    def input_samples(self, module: nn.Module, x: Tensor) -> Tensor:
        """x as (batch, *sample), a view, whatever axis the batch is on and where there is none."""
        frame = self.frame(module)
        return frame.samples(x, frame.input_dims)

    def output_samples(self, module: nn.Module, output: Tensor) -> Tensor:
        """The output as (batch, *sample), a view."""
        frame = self.frame(module)
        return frame.samples(output, frame.output_dims)

    def input_shape(self, module: nn.Module, x: Tensor) -> Shape:
        """The shape of one sample of the input."""
        return tuple(self.input_samples(module, x).shape[1:])

    def output_shape(self, module: nn.Module, output: Tensor) -> Shape:
        """The shape of one sample of the output."""
        return tuple(self.output_samples(module, output).shape[1:])

    def input_rows(self, module: nn.Module, x: Tensor) -> Tensor:
        """(rows, fan in): what each row of the module's matrix product reads."""
        return self.to_input_rows(module, self.input_samples(module, x))

    def output_rows(self, module: nn.Module, output: Tensor) -> Tensor:
        """(rows, fan out), in the order of `input_rows`."""
        return self.to_output_rows(module, self.output_samples(module, output))

    def contract(
        self, name: str, module: nn.Module, input_shape: Shape, output_shape: Shape, dtype: str | None = None
    ) -> SiteContract:
        """What a kernel that reads this module's input and adds to its output must fit. `dtype` counts where the
        module has no floating weights: that of the output which was seen. Raises ValueError where neither is known."""
        weight = host_tensor(module)
        known = dtype_name(weight.dtype) if weight is not None else dtype
        if known is None:
            raise ValueError(f"'{name}' has no weights, and its output has not been seen")
        return SiteContract(
            site=name,
            output_site=name,
            kind=self.form,
            input_shape=input_shape,
            output_shape=output_shape,
            dtype=known,
            attributes={**self.attributes(module), "channel_axis": self.channels(module, output_shape)},
        )


def own_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters of a module and of all inside it, by name, without what was grown beside any of them."""
    grown = {id(p) for part in module.modules() for p in _grown_at(part)}
    return [(name, p) for name, p in module.named_parameters() if id(p) not in grown]


def private_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """`own_parameters` without those of other sites inside."""
    inside = {id(p) for m in module.modules() if m is not module and "_kasmina" in m.__dict__ for p in m.parameters()}
    return [(name, p) for name, p in own_parameters(module) if id(p) not in inside]


def _grown_at(module: nn.Module) -> list[nn.Parameter]:
    container = module._modules.get("kasmina") if "_kasmina" in module.__dict__ else None
    return [] if container is None else list(container.parameters())


def host_tensor(module: nn.Module) -> Tensor | None:
    """A module's weight as its forward sees it (behind a parametrization: what that computes), else its first
    floating parameter or buffer; None where it has none."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.is_floating_point():
        return weight
    found: Tensor | None = next((p for _, p in own_parameters(module) if p.is_floating_point()), None)
    if found is None:
        buffers = ((n, b) for n, b in module.named_buffers() if "kasmina" not in n.split("."))
        found = next((b for _, b in buffers if b.is_floating_point()), None)
    return found


def host_device(model: nn.Module, module: nn.Module) -> torch.device:
    """Where what is grown beside a module must be; for one without tensors the device of the model's first."""
    tensor = host_tensor(module)
    if tensor is None:
        tensor = next(iter((*model.parameters(), *model.buffers())), torch.empty(0))
    return tensor.device


def host_weight(module: nn.Module) -> Tensor:
    """The layer's weight as its forward sees it. Raises TypeError for a module without one."""
    weight = module.weight
    if not isinstance(weight, Tensor):
        raise TypeError(f"the weight of {type(module).__name__} is no tensor")
    return weight


def _first(module: nn.Module, shape: Shape) -> Axis:
    return "first"


def _last(module: nn.Module, shape: Shape) -> Axis:
    return "last"


def _block_axis(module: nn.Module, shape: Shape) -> Axis:
    convolutional = any(isinstance(part, nn.modules.conv._ConvNd) for part in module.modules())
    return "first" if len(shape) >= 3 or (convolutional and len(shape) >= 2) else "last"


def _block_rows(module: nn.Module, t: Tensor) -> Tensor:
    rows = geometry.rows_first if _block_axis(module, tuple(t.shape[1:])) == "first" else geometry.rows_last
    return rows(module, t)


def _computes(module: nn.Module) -> bool:
    """Whether a module has a forward at all: a list of modules has none."""
    return isinstance(module, torch.jit.ScriptModule) or type(module).forward is not nn.Module.forward


def _is(*types: type[nn.Module]) -> Callable[[nn.Module], bool]:
    return lambda module: isinstance(module, types)


def _is_transformers_conv1d(module: nn.Module) -> bool:
    return any(c.__name__ == "Conv1D" and c.__module__.startswith("transformers.") for c in type(module).__mro__)


def _framed(dims: int, output_dims: int | None = None) -> Callable[[Any], Frame]:
    frame = Frame(dims, dims if output_dims is None else output_dims)
    return lambda module: frame


def _no_flops(module: nn.Module, input_shape: Shape, output_shape: Shape) -> int:
    return 0


_MATRIX: dict[str, Any] = {
    "channels": _last,
    "frame": _framed(1),
    "flops": geometry.linear_flops,
    "to_input_rows": geometry.rows_last,
    "to_output_rows": geometry.rows_last,
}
_CONVOLUTION: dict[str, Any] = {
    "argument": "input",
    "attributes": geometry.conv_attributes,
    "channels": _first,
    "flops": geometry.conv_flops,
    "to_input_rows": geometry.conv_input_rows,
    "to_output_rows": geometry.rows_first,
}
_CHANNEL_NORM: dict[str, Any] = {
    "argument": "input",
    "channels": _first,
    "frame": _framed(1),
    "flops": _no_flops,
    "to_input_rows": geometry.rows_first,
    "to_output_rows": geometry.rows_first,
}

LAYER_KINDS: tuple[HostKind, ...] = (
    HostKind(
        name="linear",
        form="linear",
        title="Linear",
        matches=_is(nn.Linear),
        argument="input",
        attributes=geometry.linear_attributes,
        **_MATRIX,
    ),
    HostKind(
        name="transformers_conv1d",
        form="linear",
        title="Conv1D of transformers",
        matches=_is_transformers_conv1d,
        argument="x",
        attributes=geometry.transposed_attributes,
        **_MATRIX,
    ),
    HostKind(name="conv1d", form="conv1d", title="Conv1d", matches=_is(nn.Conv1d), frame=_framed(2), **_CONVOLUTION),
    HostKind(name="conv2d", form="conv2d", title="Conv2d", matches=_is(nn.Conv2d), frame=_framed(3), **_CONVOLUTION),
    HostKind(
        name="embedding",
        form="embedding",
        title="Embedding",
        matches=_is(nn.Embedding),
        argument="input",
        frame=_framed(0, 1),
        attributes=geometry.embedding_attributes,
        channels=_last,
        flops=_no_flops,
        to_input_rows=geometry.one_hot_rows,
        to_output_rows=geometry.rows_last,
    ),
    HostKind(
        name="layer_norm",
        form="layer_norm",
        title="LayerNorm",
        matches=_is(nn.LayerNorm),
        argument="input",
        frame=lambda module: Frame(len(module.normalized_shape), len(module.normalized_shape)),
        attributes=geometry.layer_norm_attributes,
        channels=_last,
        flops=_no_flops,
        to_input_rows=geometry.rows_last,
        to_output_rows=geometry.rows_last,
    ),
    HostKind(
        name="group_norm",
        form="group_norm",
        title="GroupNorm",
        matches=_is(nn.GroupNorm),
        attributes=geometry.group_norm_attributes,
        **_CHANNEL_NORM,
    ),
    HostKind(
        name="batch_norm",
        form="batch_norm",
        title="BatchNorm",
        matches=_is(nn.modules.batchnorm._BatchNorm),
        attributes=geometry.batch_norm_attributes,
        **_CHANNEL_NORM,
    ),
    HostKind(
        name="attention",
        form="attention",
        title="MultiheadAttention",
        matches=_is(nn.MultiheadAttention),
        argument="query",
        frame=lambda module: Frame(2, 2, 0 if module.batch_first else 1),
        attributes=geometry.attention_attributes,
        channels=_last,
        flops=geometry.attention_flops,
        to_input_rows=geometry.rows_last,
        to_output_rows=geometry.rows_last,
    ),
)
"""The layers that `target_layers="auto"` finds."""

BLOCK = HostKind(
    name="block",
    form="block",
    title="any block whose output has the shape of one of its inputs",
    matches=_computes,
    argument=None,
    frame=geometry.block_frame,
    attributes=lambda module: {},
    channels=_block_axis,
    flops=geometry.block_flops,
    to_input_rows=_block_rows,
    to_output_rows=_block_rows,
)
"""Any other module: a site only where it is named, and only where its output has the shape of one of its inputs."""

HOST_KINDS: tuple[HostKind, ...] = (*LAYER_KINDS, BLOCK)
_BY_NAME = {kind.name: kind for kind in HOST_KINDS}


def layer_kind(module: nn.Module) -> HostKind | None:
    """The kind of a single layer, or None for every other module."""
    return next((kind for kind in LAYER_KINDS if kind.matches(module)), None)


def host_kind(module: nn.Module) -> HostKind | None:
    """The kind of a module, or None where nothing could be grown (it computes nothing of its own)."""
    return next((kind for kind in HOST_KINDS if kind.matches(module)), None)


def kind_named(name: str) -> HostKind:
    """The kind of that name, as a site's state carries it. Raises KeyError for one that is not in the table."""
    return _BY_NAME[name]


def is_uninitialised(module: nn.Module) -> bool:
    """True for a module with lazy parts that have not seen their first input."""
    return any(isinstance(p, torch.nn.UninitializedParameter) for p in module.parameters())
