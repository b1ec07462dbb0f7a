"""One forward as autograd and torch's functions show it: the calls of sites, and how each result was made.

Autograd knows which results lead to which; the functions are watched besides for what it does not know: which
function with which settings a node is, and who reads a result outside of the graph (`detach`, a comparison, `item`).
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from contextlib import ExitStack
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import field
from typing import Any

import torch
from torch import Tensor
from torch import nn
from torch.overrides import TorchFunctionMode

from esper.runtime.kasmina.layer import SiteState
from esper.runtime.kasmina.layer import state_of
from esper.runtime.kasmina.wrapping.calls import tensors_in
from esper.runtime.kasmina.wrapping.geometry import Shape
from esper.runtime.kasmina.wrapping.hosts import kind_named
from esper.runtime.kasmina.wrapping.morphable import recording
from esper.runtime.kasmina.wrapping.morphable import sites_of

Node = Any
"""A node of the autograd graph."""

_LOOKS = frozenset(
    [
        "dim",
        "size",
        "stride",
        "numel",
        "nelement",
        "ndimension",
        "__len__",
        "is_floating_point",
        "is_complex",
        "is_signed",
        "is_contiguous",
        "is_pinned",
        "is_inference",
        "is_same_size",
        "get_device",
        "element_size",
        "storage_offset",
        "data_ptr",
        "type",
        "register_hook",
        "retain_grad",
        "requires_grad_",
        "__hash__",
        "has_names",
        "_is_view",
        "is_shared",
    ]
)
"""Functions that look at a tensor and not at its numbers."""


@dataclass(eq=False)
class Call:
    """One call of one site. `started` and `ended` count the starts and ends of calls; `inputs` and `outputs` are
    the nodes of every tensor that went in and came out, `input_node` that of the tensor which kernels read."""

    site: str
    started: int
    inputs: tuple[Node, ...] = ()
    parent: "Call | None" = None
    ended: int = 0
    input_node: Node | None = None
    outputs: tuple[Node, ...] = ()
    input_shape: Shape = ()
    output_shape: Shape = ()
    reads_numbers: bool = True
    """False for ids: they come from no layer."""
    sources: list["Call"] = field(default_factory=list)
    """The single layers whose results went in."""
    beside: list["Call"] = field(default_factory=list)
    """The calls on the same level, of layers and of blocks, whose results went in."""
    depth: int = 0


@dataclass(frozen=True)
class Made:
    """How a result was made: by which function of torch from what. Tensors among the arguments stand as their ids."""

    function: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    below: tuple[Node, ...]


class _Functions(TorchFunctionMode):
    """Notes every function that reads a tensor of the autograd graph, or the weights of a site."""

    def __init__(self, calls: "_Calls", owners: Mapping[int, str]) -> None:
        super().__init__()
        self.made: dict[Node, Made] = {}
        self.unseen: dict[Node, int] = {}
        self.norm_calls: list[frozenset[int]] = []
        self.read_elsewhere: set[str] = set()
        self._calls = calls
        self._owners = owners

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        read = list(tensors_in((args, given)))
        below = _nodes(read)
        result = func(*args, **given)
        name = str(getattr(func, "__name__", func))
        results = list(tensors_in(result))
        if not results and (name in _LOOKS or name == "__get__"):
            return result
        if name == "batch_norm":
            self.norm_calls.append(frozenset(id(tensor) for tensor in read))
        for tensor in read:
            owner = self._owners.get(id(tensor))
            if owner is not None and self._calls.inside and owner != self._calls.innermost():
                self.read_elsewhere.add(owner)
        if not below:
            return result
        nodes = [tensor.grad_fn for tensor in results if tensor.grad_fn is not None]
        if len(nodes) < max(1, len(results)):
            # A result without a node, or none at all: something that autograd will not show.
            for node in below:
                self.unseen[node] = self.unseen.get(node, 0) + 1
        for node in nodes:
            if node not in below:
                self.made[node] = Made(name, _named(args[1:]), _named(given), below)
        return result


class _Calls:
    """Records every call of every site: the recorder of the layers, and the hooks around them."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.inside = False
        """Whether the model itself is being called, and not the loss."""
        self._clock = 0
        self._open: list[tuple[nn.Module, Call]] = []

    def innermost(self) -> str | None:
        """The site whose forward runs now."""
        return self._open[-1][1].site if self._open else None

    def enter(self, model: nn.Module, args: Any) -> None:
        self.inside = True

    def leave(self, model: nn.Module, args: Any, returned: Any) -> None:
        self.inside = False

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._open.append((module, self._started(module, _nodes((args, kwargs)))))

    def after(self, module: nn.Module, args: Any, kwargs: Any, returned: Any) -> None:
        while self._open:
            opened, call = self._open.pop()
            if opened is module:
                call.outputs = (*call.outputs, *(n for n in _nodes(returned) if n not in call.outputs))
                return

    def record(self, module: nn.Module, state: SiteState, x: Tensor, output: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not output.requires_grad:
            # A frozen layer on frozen inputs leaves no trace of its own. A clone, so that in-place layers may follow.
            output = output.detach().requires_grad_().clone()
        kind = kind_named(state.kind)
        opened = self._open[-1] if self._open and self._open[-1][0] is module else None
        state.called_directly = opened is None
        call = opened[1] if opened is not None else self._started(module, _nodes((x,)))
        self._clock += 1
        call.ended = self._clock
        call.input_node = x.grad_fn
        call.outputs = _nodes((output,))
        call.input_shape = kind.input_shape(module, x)
        call.output_shape = kind.output_shape(module, output)
        call.reads_numbers = x.is_floating_point()
        self.calls.append(call)
        return output

    def _started(self, module: nn.Module, inputs: tuple[Node, ...]) -> Call:
        self._clock += 1
        parent = self._open[-1][1] if self._open else None
        return Call(state_of(module).name, self._clock, inputs, parent)


@dataclass(frozen=True)
class Observation:
    """What one forward showed. `calls` are in the order in which they ended; `readers` counts the places where a
    node's result is read; `norm_calls` holds for each call of a batch norm the ids of the tensors that it read;
    `read_elsewhere` names the sites whose weights the model read outside of their own forward."""

    calls: tuple[Call, ...]
    made: Mapping[Node, Made]
    readers: Mapping[Node, int]
    norm_calls: tuple[frozenset[int], ...]
    read_elsewhere: frozenset[str]

    def makers(self) -> dict[Node, list[Call]]:
        """The calls that returned each node's result: an inner layer's may be its block's too."""
        found: dict[Node, list[Call]] = {}
        for call in self.calls:
            for node in call.outputs:
                found.setdefault(node, []).append(call)
        return found


def observed(model: nn.Module, run_forward: Callable[[], Any]) -> Observation:
    """Run a wrapped model once and see what it does. The caller sees to it that model and generators are left as they
    were."""
    sites = sites_of(model)
    calls = _Calls()
    owners = {id(p): name for name, module in sites.items() for p in _own_weights(module)}
    functions = _Functions(calls, owners)
    with ExitStack() as stack:
        for module in sites.values():
            stack.enter_context(_hooked(module, calls))
        stack.callback(model.register_forward_pre_hook(calls.enter).remove)
        stack.callback(model.register_forward_hook(calls.leave, always_call=True).remove)
        stack.enter_context(recording(model, calls))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(functions)
        returned = run_forward()
    return Observation(
        tuple(calls.calls),
        functions.made,
        _readers(calls.calls, functions, returned),
        tuple(functions.norm_calls),
        frozenset(functions.read_elsewhere),
    )


def _own_weights(module: nn.Module) -> list[nn.Parameter]:
    """A site's own parameters; those of an attention's output projection are its own too."""
    inner = [module.out_proj] if isinstance(module, nn.MultiheadAttention) else []
    return [p for part in (module, *inner) for p in part.parameters(recurse=False)]


@contextmanager
def _hooked(module: nn.Module, calls: _Calls) -> Iterator[None]:
    handles = (
        module.register_forward_pre_hook(calls.before, with_kwargs=True),
        module.register_forward_hook(calls.after, with_kwargs=True),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _readers(calls: list[Call], functions: _Functions, returned: Any) -> dict[Node, int]:
    """How many places read each node's result: other nodes, the caller, and what autograd does not show."""
    readers = dict(functions.unseen)
    roots = _nodes((returned,))
    for node in roots:
        readers[node] = readers.get(node, 0) + 1
    outputs = [node for call in calls for node in call.outputs]
    for node in walk([*roots, *outputs, *functions.made]):
        for below, _ in node.next_functions:
            if below is not None:
                readers[below] = readers.get(below, 0) + 1
    return readers


def walk(starts: list[Node], stop: Callable[[Node], object] = lambda node: False) -> Iterator[Node]:
    """Every node below `starts` once, those included; what lies below a node at which `stop` holds is left out."""
    seen: set[Node] = set()
    stack = list(starts)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        if not stop(node):
            stack.extend(below for below, _ in node.next_functions if below is not None)


def _nodes(value: Any) -> tuple[Node, ...]:
    """The nodes of all tensors in a value that have one, each once."""
    return tuple(dict.fromkeys(tensor.grad_fn for tensor in tensors_in(value) if tensor.grad_fn is not None))


def _named(value: Any) -> Any:
    """Arguments without holding a tensor alive: each stands as its id."""
    if isinstance(value, Tensor):
        return id(value)
    if isinstance(value, Mapping):
        return {key: _named(item) for key, item in value.items()}
    return tuple(_named(item) for item in value) if isinstance(value, tuple | list) else value
