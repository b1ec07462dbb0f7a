"""Pairs Linear -> activation -> Linear found by tracing: for a model whose dataflow has not been seen yet."""

from collections.abc import Mapping

import torch
from torch import fx
from torch import nn
from torch.nn import functional

from esper.runtime.kasmina.layer import KasminaLayer

_FUNCTIONS = {
    torch.relu: "relu",
    functional.relu: "relu",
    functional.gelu: "gelu",
    torch.tanh: "tanh",
    functional.tanh: "tanh",
    functional.silu: "silu",
    torch.sigmoid: "sigmoid",
    functional.sigmoid: "sigmoid",
}
_MODULES = {nn.ReLU: "relu", nn.GELU: "gelu", nn.Tanh: "tanh", nn.SiLU: "silu", nn.Sigmoid: "sigmoid"}
_METHODS = {"relu": "relu", "tanh": "tanh", "sigmoid": "sigmoid"}


class _SiteTracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, KasminaLayer) or super().is_leaf_module(m, module_qualified_name)


def traced_pairs(model: nn.Module) -> Mapping[str, tuple[str, str]] | None:
    """First layer -> (second layer, activation) of every pair whose hidden units nothing else reads.

    None where the model cannot be traced without inputs (control flow on values, for example).
    """
    try:
        graph = _SiteTracer().trace(model)
    except Exception:  # tracing runs the user's code on proxies: whatever it raises means that it cannot be traced
        return None
    modules = dict(model.named_modules(remove_duplicate=False))
    names = {id(module): name for name, module in model.named_modules()}
    calls: dict[str, int] = {}
    found: dict[str, tuple[str, str]] = {}
    for node in graph.nodes:
        if node.op == "call_module" and isinstance(modules[node.target], KasminaLayer):
            name = names[id(modules[node.target])]
            calls[name] = calls.get(name, 0) + 1
            second = _second(node, modules)
            if second is not None:
                found[name] = (names[id(modules[str(second[0].target)])], second[1])
    return {
        first: (second, activation)
        for first, (second, activation) in found.items()
        if calls[first] == calls[second] == 1 and first != second
    }


def _second(node: fx.Node, modules: Mapping[str, nn.Module]) -> tuple[fx.Node, str] | None:
    if len(node.users) != 1 or not isinstance(modules[str(node.target)], nn.Linear):
        return None
    (act,) = node.users
    activation = _activation(act, modules)
    if activation is None or len(act.users) != 1 or act.all_input_nodes != [node]:
        return None
    (second,) = act.users
    if second.op != "call_module" or not isinstance(modules[str(second.target)], KasminaLayer):
        return None
    return (second, activation) if isinstance(modules[str(second.target)], nn.Linear) else None


def _activation(node: fx.Node, modules: Mapping[str, nn.Module]) -> str | None:
    if node.kwargs.get("approximate", "none") != "none":
        return None
    if node.op == "call_module":
        module = modules[str(node.target)]
        if getattr(module, "approximate", "none") != "none":
            return None
        return _MODULES.get(type(module))
    if node.op == "call_function" and callable(node.target):
        return _FUNCTIONS.get(node.target)
    return _METHODS.get(str(node.target)) if node.op == "call_method" else None
