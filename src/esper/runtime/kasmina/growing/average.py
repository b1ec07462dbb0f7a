"""An average of weights (EMA, SWA) that grows with the model it follows.

torch's own `AveragedModel` pairs the parameters of model and average by position and stops silently at the shorter
list: after a graft it averages weights of different layers, and says so only where their shapes do not broadcast.
"""

import copy

from torch import nn
from torch.optim import swa_utils

from esper.errors import GrowthError
from esper.runtime.kasmina.bank import Slot
from esper.runtime.kasmina.growing.slots import plant
from esper.runtime.kasmina.growing.slots import uproot
from esper.runtime.kasmina.growth import fold_all
from esper.runtime.kasmina.layer import SiteState
from esper.runtime.kasmina.layer import state_of
from esper.runtime.kasmina.wrapping.morphable import MorphableModel
from esper.runtime.kasmina.wrapping.morphable import model_state
from esper.runtime.kasmina.wrapping.morphable import settle
from esper.runtime.kasmina.wrapping.morphable import sites_of
from esper.runtime.tezzeret.build import KernelModule

_OWN = ("kernel", "kernel_parts", "dtype", "newborn", "joined", "_looked_at")
"""What a slot of the average does not take over from the model's: its tensors, and what is known of them."""


class AveragedModel(swa_utils.AveragedModel):
    """`torch.optim.swa_utils.AveragedModel`, with the same arguments, for a model that grows.

    `update_parameters` first lets the average grow as the model did: the average of a newborn parameter begins at its
    present value, culled blocks go, and folded ones are folded by their own averages. Wrap the model before it is
    given here; a model that is not wrapped is averaged as torch does it.
    """

    def update_parameters(self, model: nn.Module) -> None:
        """Take the model's present weights into the average. Raises GrowthError ESP-437 where the two cannot be
        brought to one structure, before anything is averaged."""
        average = self.module
        if isinstance(model, MorphableModel) or isinstance(average, MorphableModel):
            _grow_alike(average, model)
        super().update_parameters(model)  # type: ignore[no-untyped-call,unused-ignore]


def _grow_alike(average: nn.Module, model: nn.Module) -> None:
    if not isinstance(model, MorphableModel) or not isinstance(average, MorphableModel):
        raise _refused("one of the two is wrapped and the other is not")
    mine, theirs = sites_of(average), sites_of(model)
    if mine.keys() != theirs.keys():
        raise _refused("the two have other sites")
    for name, module in theirs.items():
        _prove_alike(state_of(mine[name]), state_of(module))
    pairs = [
        (mine[name], slot, other)
        for name, module in theirs.items()
        for slot, other in zip(state_of(mine[name]).slots, state_of(module).slots, strict=True)
    ]
    if all(slot.seed is other.seed and slot.alpha == other.alpha for _, slot, other in pairs):
        return
    folds = []
    for module, slot, other in pairs:
        if slot.kernel is None or (other.kernel is not None and _is_same_block(slot, other)):
            continue
        if other.folded and _is_same_block(slot, other):
            folds.append((module, slot))
        else:
            uproot(module, slot)
    settle(average)
    fold_all(average, folds, None)
    for module, slot, other in pairs:
        if slot.kernel is None and isinstance(other.kernel, KernelModule):
            kernel = copy.deepcopy(other.kernel).to(next(average.parameters()).device).train(module.training)
            plant(module, slot, kernel, manifest=str(other.manifest), record=other.seed, alpha=other.alpha)
        # The record becomes one object for both: the next comparison is by identity.
        vars(slot).update({name: value for name, value in vars(other).items() if name not in _OWN})
    model_state(average).generation = model_state(model).generation
    settle(average)
    shapes = [[(name, p.shape) for name, p in each.named_parameters()] for each in (average, model)]
    if shapes[0] != shapes[1]:
        raise _refused("a block that was folded in the model cannot be folded in the average")


def _prove_alike(site: SiteState, other: SiteState) -> None:
    """An average may never have been called: what the first forward of the model showed holds for it too."""
    if other.proven and not site.proven:
        site.input_shape, site.output_shape, site.dtype = other.input_shape, other.output_shape, other.dtype
        site.settle()


def _is_same_block(slot: Slot, other: Slot) -> bool:
    return (slot.seed.generation, slot.seed.kernel) == (other.seed.generation, other.seed.kernel)


def _refused(why: str) -> GrowthError:
    return GrowthError(
        "ESP-437", f"the average cannot follow the growth of its model: {why}", hint="make a new AveragedModel(model)"
    )
