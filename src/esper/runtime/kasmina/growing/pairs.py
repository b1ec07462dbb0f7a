"""The pairs of layers between which units can be added: as the lineage of a forward showed them, else by tracing."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any

from torch import fx
from torch import nn

from esper.runtime.kasmina.growing.between import FORMS
from esper.runtime.kasmina.growing.between import MIXING_FUNCTIONS
from esper.runtime.kasmina.growing.between import Pair
from esper.runtime.kasmina.growing.between import PairsFound
from esper.runtime.kasmina.growing.between import Step
from esper.runtime.kasmina.growing.between import pair_between
from esper.runtime.kasmina.growing.between import pair_of
from esper.runtime.kasmina.layer import KasminaLayer
from esper.runtime.kasmina.layer import state_of
from esper.runtime.kasmina.wrapping.hosts import kind_named
from esper.runtime.kasmina.wrapping.morphable import has_seeds
from esper.runtime.kasmina.wrapping.morphable import model_state
from esper.runtime.kasmina.wrapping.morphable import sites_of
from esper.runtime.kasmina.wrapping.swap import plain_class

MAX_STEPS = 24
"""So many operations behind a layer are looked through for the next one."""


def known_pairs(model: nn.Module) -> PairsFound:
    """The pairs of a wrapped model: by its last layer graph where it has one, else by tracing."""
    state = model_state(model)
    if state.graph is None:
        return traced_pairs(model)
    pairs = {}
    for node in state.graph.nodes:
        pair = pair_of(node)
        if pair is not None:
            pairs[node.contract.site] = pair
    return PairsFound(pairs, state.pair_refusals)


_NOT_SEEN = "what follows it is not known: the model cannot be traced, wrap it with example_inputs="


def traced_pairs(model: nn.Module) -> PairsFound:
    """The pairs whose hidden units nothing else reads, by symbolic tracing: for a model that has not been run.

    Nothing is found where the model cannot be traced without inputs (control flow on values, for example).
    """
    tracer = _SiteTracer()
    try:
        graph = tracer.trace(model)
    except Exception:  # tracing runs the user's code on proxies: whatever it raises means that it cannot be traced
        return PairsFound({}, dict.fromkeys(sites_of(model), _NOT_SEEN))
    modules = dict(model.named_modules(remove_duplicate=False))
    names = {id(module): name for name, module in model.named_modules()}
    calls: dict[str, int] = {}
    found: dict[str, Pair | str] = {}
    read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    for node in graph.nodes:
        if node.op == "call_module":
            name = names[id(modules[str(node.target)])]
            calls[name] = calls.get(name, 0) + 1
        site = _site(node, modules)
        if site is None:
            continue
        name = state_of(site).name
        if kind_named(state_of(site).kind).form in FORMS:
            found[name] = _following(node, site, modules, names, tracer.borders)
    for name, pair in found.items():
        if not isinstance(pair, Pair):
            continue
        again = next((part for part in (name, pair.second, *pair.norms) if calls[part] != 1), None)
        if again is not None:
            found[name] = f"'{again}' is called more than once"
        elif obstacle := next((part for part in (name, pair.second, *pair.norms) if part in read), None):
            found[name] = f"the weights of '{obstacle}' are also read outside of its own forward"
    return PairsFound(
        {name: pair for name, pair in found.items() if isinstance(pair, Pair)},
        {name: reason for name, reason in found.items() if isinstance(reason, str)},
    )


def traced_reads(model: nn.Module) -> frozenset[str] | None:
    """Sites whose weights are read outside of their own forward, by symbolic tracing; None where it is not possible."""
    try:
        graph = _SiteTracer().trace(model)
    except Exception:  # as in `traced_pairs`
        return None
    modules = dict(model.named_modules(remove_duplicate=False))
    owners = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    read = (modules[owner] for owner in owners if owner in modules)
    return frozenset(state_of(module).name for module in read if has_seeds(module))


class _SiteTracer(fx.Tracer):
    """Goes into everything but single layers that are sites and modules that torch itself cannot trace."""

    def __init__(self) -> None:
        super().__init__()
        self.borders: dict[fx.Node, str] = {}
        """What enters or leaves a block that is a site, and the block's name."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, KasminaLayer):
            return not _holds_sites(m)
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            return True
        return super().is_leaf_module(m, module_qualified_name) and not isinstance(m, _TRANSPARENT)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if not isinstance(m, KasminaLayer) or not _holds_sites(m):
            return super().call_module(m, forward, args, kwargs)
        plain = plain_class(m).forward
        result = plain(m, *args, **kwargs)
        for node in _nodes((*args, *kwargs.values(), result)):
            self.borders[node] = state_of(m).name
        return result


_TRANSPARENT = (
    nn.ReLU,
    nn.GELU,
    nn.Tanh,
    nn.SiLU,
    nn.Sigmoid,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Identity,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.Softmax,
)
"""Modules that are one of torch's functions: traced as that, so that one table tells what stands between layers."""


def _following(
    node: fx.Node,
    first: nn.Module,
    modules: Mapping[str, nn.Module],
    names: Mapping[int, str],
    borders: Mapping[fx.Node, str],
) -> Pair | str:
    """The pair that the call at `node` begins, or why it begins none."""
    steps: list[Step] = []
    for _ in range(MAX_STEPS):
        if len(node.users) != 1:
            return "what it returns, or what is made of that, is read in more than one place"
        if node in borders:
            return f"the units behind it enter or leave '{borders[node]}', where something could be grown"
        (user,) = node.users
        if user.op == "output":
            return "what it returns leaves the model"
        site = _site(user, modules)
        if site is not None and kind_named(state_of(site).kind).form in FORMS:
            if site is first:
                return "it is followed by itself"
            return pair_between(steps, first, site, _hidden_dims(first), dict(modules))
        if user.all_input_nodes != [node]:
            return f"something else goes into '{_function(user, modules)}' behind it"
        norm = modules[str(user.target)] if user.op == "call_module" else None
        steps.append(
            Step(
                function=_function(user, modules),
                args=tuple(user.args[1:]),
                kwargs=user.kwargs,
                norm=names[id(norm)] if isinstance(norm, nn.modules.batchnorm._BatchNorm) else None,
            )
        )
        node = user
    return f"no layer of its kind follows within {MAX_STEPS} operations"


def _hidden_dims(first: nn.Module) -> int:
    shape = state_of(first).output_shape
    return 1 if shape is None else len(shape)


def _site(node: fx.Node, modules: Mapping[str, nn.Module]) -> nn.Module | None:
    found = modules[str(node.target)] if node.op == "call_module" else None
    return found if isinstance(found, KasminaLayer) else None


def _function(node: fx.Node, modules: Mapping[str, nn.Module]) -> str:
    """The name of torch's function that a node is."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            return "batch_norm"
        form = kind_named(state_of(module).kind).form if isinstance(module, KasminaLayer) else ""
        return form if form in MIXING_FUNCTIONS else plain_class(module).__name__
    return str(getattr(node.target, "__name__", node.target))


def _holds_sites(module: nn.Module) -> bool:
    return any(isinstance(part, KasminaLayer) for part in module.modules() if part is not module)


def _nodes(value: Any) -> Iterator[fx.Node]:
    if isinstance(value, fx.Proxy):
        yield value.node
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _nodes(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _nodes(item)
