"""Handing a grown model back as ordinary PyTorch: folded where it can be, else torch's operations beside the host."""

from torch import nn

from esper.errors import GrowthError
from esper.runtime.kasmina.bank import Slot
from esper.runtime.kasmina.growing.between import pair_norms
from esper.runtime.kasmina.growing.fold import plan_fold
from esper.runtime.kasmina.growing.folding.changes import Fold
from esper.runtime.kasmina.growing.folding.obstacles import output_width
from esper.runtime.kasmina.growing.folding.users import other_users
from esper.runtime.kasmina.growing.folding.users import plan_padding
from esper.runtime.kasmina.growing.optimizer import Optimizers
from esper.runtime.kasmina.growth import fold_all
from esper.runtime.kasmina.keeping.plain_sites import make_plain
from esper.runtime.kasmina.keeping.plain_sites import site_obstacle
from esper.runtime.kasmina.layer import KasminaLayer
from esper.runtime.kasmina.layer import layer_forward
from esper.runtime.kasmina.layer import state_of
from esper.runtime.kasmina.replicas import refuse_replicated
from esper.runtime.kasmina.wrapping.morphable import M
from esper.runtime.kasmina.wrapping.morphable import model_state
from esper.runtime.kasmina.wrapping.morphable import settle
from esper.runtime.kasmina.wrapping.morphable import sites_of
from esper.runtime.kasmina.wrapping.morphable import strip
from esper.runtime.kasmina.wrapping.swap import swap
from esper.runtime.kasmina.wrapping.swap import swap_back
from esper.runtime.tezzeret.build import KernelModule


def unwrap(model: M, *, optimizer: Optimizers | None = None) -> M:
    """The original classes back, on the same object, with everything that was grown: no line of Esper runs in it.

    Blocks are folded into their hosts' weights where the algebra allows (float32 or wider, plain and untied
    weights; `widen` in any dtype). A single layer of torch's with a block that cannot be folded becomes a
    `torch.fx.GraphModule` of torch's own modules, with the same parameter names plus the block's; hooks move over. Any
    other module (a block, attention, a BatchNorm, a forward of its own) stays what it is and gets a forward hook that
    is generated in the same way: call it as it was called, with the same arguments by position and by name.
    Give the `optimizer` to train on: layers that become longer get new parameters, which it would not know.

    Raises SiteError ESP-314 (not wrapped), GrowthError ESP-440 (inside DistributedDataParallel), ESP-438 for what can
    not be made plain, with the site's name: a pair of layers whose weights were tied or parametrized since it was grown
    or whose units another block reads, a block that returns its output in a dataclass, and one whose arguments have not
    been seen. The model then is as it was; culling what is grown there is the way out.
    """
    state = model_state(model)
    if _grown(model):
        refuse_replicated(model, "unwrap what has grown")
    _check(model, optimizer)
    state.suspended = False
    fold_all(model, _grown(model), optimizer)
    for module, slot in reversed(_across(model)):
        first, second, norms, units = _pair(model, module, slot)
        for user, other in other_users(model, first, second, norms, units):
            padding = plan_padding(user, other, first, second, norms, units, optimizer)
            assert isinstance(padding, Fold)
            padding.apply(optimizer)
        fold_all(model, [(module, slot)], optimizer)
    settle(model)
    kept = {name: module for name, module in sites_of(model).items() if "kasmina" in module._modules}
    replaced = {}
    for module in kept.values():
        site = state_of(module)
        slots = [slot for slot in site.slots if slot.kernel is not None and slot.alpha != 0.0]
        swap_back(module, KasminaLayer)
        del module.__dict__["_kasmina"]
        replaced[id(module)] = make_plain(module, site, slots)
    for parent in list(model.modules()):
        for child, layer in list(parent._modules.items()):
            if id(layer) in replaced:
                parent._modules[child] = replaced[id(layer)]
    strip(model, kept)
    return model


def _grown(model: nn.Module) -> list[tuple[nn.Module, Slot]]:
    return [(m, slot) for m in sites_of(model).values() for slot in state_of(m).slots if slot.kernel is not None]


def _across(model: nn.Module) -> list[tuple[nn.Module, Slot]]:
    return [(m, slot) for m, slot in _grown(model) if slot.output_site not in (None, state_of(m).name)]


def _pair(model: nn.Module, first: nn.Module, slot: Slot) -> tuple[nn.Module, nn.Module, tuple[str, ...], int]:
    """The two layers that a block spans, the BatchNorms between them, and how many units it has."""
    assert isinstance(slot.kernel, KernelModule)
    chain = slot.kernel.chain()
    units = 0 if chain is None else output_width(chain[0][2])
    return first, sites_of(model)[str(slot.output_site)], pair_norms(slot.kernel.manifest.site), units


def _check(model: nn.Module, optimizer: Optimizers | None) -> None:
    """Everything that could stop `unwrap`, before it begins."""
    for module, slot in _across(model):
        plan = plan_fold(model, module, slot, optimizer, alone=True)
        obstacle = plan if isinstance(plan, str) else None
        if obstacle is None:
            first, second, norms, units = _pair(model, module, slot)
            users = other_users(model, first, second, norms, units)
            plans = [
                plan_padding(m, other, first, second, norms, units, optimizer)
                for m, other in users
                if not isinstance(plan_fold(model, m, other, optimizer, alone=True), Fold)
            ]
            obstacle = next((why for why in plans if isinstance(why, str)), None)
        if obstacle is not None:
            raise GrowthError(
                "ESP-438",
                f"the units between '{slot.seed.site}' and '{slot.output_site}' cannot become part of them: {obstacle}",
                hint="cull one of the two, or keep the model wrapped",
            )
    for module in {id(m): m for m, _ in _grown(model)}.values():
        site = state_of(module)
        staying = [
            slot
            for slot in site.slots
            if slot.kernel is not None
            and slot.output_site in (None, site.name)
            and not isinstance(plan_fold(model, module, slot, optimizer), Fold)
        ]
        if not staying:
            continue
        swap_back(module, KasminaLayer)
        try:
            obstacle = site_obstacle(module, site, staying)
        finally:
            swap(module, KasminaLayer, layer_forward)
        if obstacle is not None:
            raise GrowthError(
                "ESP-438",
                f"'{site.name}' cannot become plain PyTorch: {obstacle}",
                hint="cull what is grown there, or keep the model wrapped",
            )
