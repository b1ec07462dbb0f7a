"""Why the weights of a layer, or the units between two layers, cannot be changed for all that read them."""

from torch import nn
from torch.nn.utils import parametrize

from esper.runtime.kasmina.growing.between import FORMS
from esper.runtime.kasmina.growing.pairs import traced_reads
from esper.runtime.kasmina.layer import state_of
from esper.runtime.kasmina.wrapping.hosts import kind_named
from esper.runtime.kasmina.wrapping.hosts import layer_kind
from esper.runtime.kasmina.wrapping.morphable import has_seeds
from esper.runtime.kasmina.wrapping.morphable import model_state
from esper.runtime.kasmina.wrapping.swap import plain_class

_PLAIN_FORWARDS = tuple(
    kind.forward
    for kind in (
        nn.Linear,
        nn.Conv1d,
        nn.Conv2d,
        nn.Embedding,
        nn.LayerNorm,
        nn.GroupNorm,
        nn.BatchNorm2d,
        nn.MultiheadAttention,
    )
)


def weight_obstacle(model: nn.Module, module: nn.Module) -> str | None:
    """Why a layer's weights cannot be changed for all that read them; None where they can."""
    if parametrize.is_parametrized(module):
        return "its weights are parametrized"
    if not computes_plainly(module):
        return f"{plain_class(module).__name__} computes its own forward"
    own = {id(p) for p in module.parameters(recurse=False)}
    for other in model.modules():
        if other is not module and any(id(p) in own for p in other.parameters(recurse=False)):
            return "its weights are tied to another layer's"
    if not isinstance(module, nn.MultiheadAttention) and "weight" not in module._parameters:
        return "its weights are computed anew before each call"
    if not has_seeds(module):
        return None
    state = model_state(model)
    if state.read_elsewhere is None:
        state.read_elsewhere = traced_reads(model)
    if state.read_elsewhere is None and isinstance(module, nn.Embedding):
        return "it is not known whether its weights are read elsewhere too (wrap with example_inputs= to see)"
    if state_of(module).name in (state.read_elsewhere or ()):
        return "its weights are also read outside of its own forward"
    return None


def computes_plainly(module: nn.Module) -> bool:
    """Whether a layer's forward is that of its kind, and not one of a subclass."""
    cls = plain_class(module)
    if cls.forward in _PLAIN_FORWARDS:
        return True
    kind = layer_kind(module)
    return kind is not None and kind.name == "transformers_conv1d" and cls.__name__ == "Conv1D"


def pair_obstacle(model: nn.Module, first: nn.Module, second: nn.Module, norms: tuple[str, ...] = ()) -> str | None:
    """Why no units can be added between two layers, with the BatchNorms of these names between them; None where
    they can."""
    for module in (first, second):
        name = state_of(module).name
        if kind_named(state_of(module).kind).form not in FORMS:
            return f"'{name}' is a {plain_class(module).__name__}"
        obstacle = weight_obstacle(model, module)
        if obstacle is not None:
            return f"'{name}' cannot take them: {obstacle}"
        if isinstance(module, nn.Conv1d | nn.Conv2d) and module.groups != 1:
            return f"'{name}' has {module.groups} groups, and the new units belong to none of them"
    modules = dict(model.named_modules())
    width = output_width(first)
    for name in norms:
        norm = modules.get(name)
        if not isinstance(norm, nn.modules.batchnorm._BatchNorm):
            return f"'{name}' is no BatchNorm of this model"
        if norm.num_features != width:
            return f"'{name}' has {norm.num_features} features and not {width}"
        obstacle = weight_obstacle(model, norm)
        if obstacle is not None:
            return f"'{name}' cannot take them: {obstacle}"
    return None


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear layer's weight is (in, out), as in the Conv1D of `transformers`."""
    kind = layer_kind(module)
    return kind is not None and kind.name == "transformers_conv1d"


def output_width(module: nn.Module) -> int:
    """Units that a linear layer or a convolution computes."""
    weight = module._parameters["weight"]
    assert weight is not None
    return int(weight.shape[1 if is_transposed(module) else 0])
