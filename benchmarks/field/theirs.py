"""Growth by gromo, called as its own tutorial does it (GrowingContainer tutorial, gromo 0.1.0).

Statistics of the activations and of the loss's gradient over the rows; the best new units and the best change of the
old weights from them (TINY, arXiv 2405.19816); a line search for their scale on the same rows; then they are applied.
"""

import copy
import warnings
from collections.abc import Sequence

import torch
from benchmarks.field.work import WEIGHT_DECAY
from benchmarks.field.work import Learner
from benchmarks.field.work import Rows
from gromo.containers.sequential_growing_container import SequentialGrowingModel
from gromo.modules.conv2d_growing_module import FullConv2dGrowingModule
from gromo.modules.growing_module import GrowingModule
from gromo.modules.linear_growing_module import LinearGrowingModule
from torch import Tensor
from torch import nn
from torch.nn import functional

SCALES = (0.0, 0.1, 0.5, 1.0)
"""Of the line search, as in the tutorial."""
MORE_SCALES = (*SCALES, 2.0, 4.0, 8.0, 16.0, 32.0)
"""In the tutorial's the largest one is often the best; units that are too small then die in the next steps."""
CHUNK = 500


class Pair(SequentialGrowingModel):
    """A host of `work` whose first two layers are gromo's, with the host's weights."""

    def __init__(self, host: nn.Sequential, places: tuple[int, int]) -> None:
        super().__init__(in_features=1, out_features=10)
        self.first = _growing(host[0], places, post_layer_function=copy.deepcopy(host[1]), name="first")
        self.second = _growing(host[2], places, previous_module=self.first, name="second")
        self.rest = copy.deepcopy(host[3:])
        self._growable_layers = [self.second]
        self.set_growing_layers("all")

    def forward(self, x: Tensor) -> Tensor:
        rest: Tensor = self.rest(self.second(self.first(x)))
        return rest

    def extended_forward(self, x: Tensor, mask: object = None) -> Tensor:
        """With the proposed units at the scale that is being tried."""
        hidden, extension = self.first.extended_forward(x)
        hidden, _ = self.second.extended_forward(hidden, extension)
        rest: Tensor = self.rest(hidden)
        return rest


def take_over(learner: Learner, rows: Rows) -> Learner:
    """The host's learner as gromo's; its parameters are others, so the optimizer is a new one."""
    host = learner.model
    if not isinstance(host, nn.Sequential):
        raise TypeError(f"a host is a sequence, not a {type(host).__name__}")
    model = Pair(host, (int(rows[0].shape[-2]) if rows[0].dim() > 2 else 1, int(rows[0].shape[-1])))
    with torch.no_grad():
        torch.testing.assert_close(model(rows[0][:2]), host(rows[0][:2]))
    return Learner(model, _optimizer(model, learner))


def grow(learner: Learner, rows: Rows, added: int, scales: Sequence[float] = SCALES) -> int:
    """Grow a learner of `take_over`; returns the units that were added, which may be fewer."""
    model = learner.model
    if not isinstance(model, Pair):
        raise TypeError(f"this {type(model).__name__} is none of gromo's")
    model.eval()
    before = int(model.first.layer.weight.shape[0])
    with warnings.catch_warnings():
        # It says of a covariance that it is singular, or by rounding not symmetric, and goes on.
        warnings.filterwarnings("ignore", module=r"gromo\.")
        _propose(model, rows, added)
        model.set_scaling_factor(_best_scale(model, rows, scales))
        model.apply_change()
    learner.optimizer = _optimizer(model, learner)
    return int(model.first.layer.weight.shape[0]) - before


def _propose(model: Pair, rows: Rows, added: int) -> None:
    x, y = rows
    model.init_computation()
    for inputs, labels in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
        model.zero_grad()
        # Its statistics count the rows themselves and want the sum.
        functional.cross_entropy(model(inputs), labels, reduction="sum").backward()
        model.update_computation()
    model.compute_optimal_updates(maximum_added_neurons=added)
    model.reset_computation()
    model.dummy_select_update()


@torch.no_grad()
def _best_scale(model: Pair, rows: Rows, scales: Sequence[float]) -> float:
    tried: dict[float, float] = {}
    for scale in scales:
        model.set_scaling_factor(scale)
        tried[scale] = float(functional.cross_entropy(model.extended_forward(rows[0]), rows[1]))
    return min(tried, key=lambda scale: tried[scale])


def _optimizer(model: nn.Module, learner: Learner) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=learner.optimizer.param_groups[0]["lr"], weight_decay=WEIGHT_DECAY)


def _growing(layer: nn.Module, places: tuple[int, int], **options: object) -> GrowingModule:
    if isinstance(layer, nn.Linear):
        made = LinearGrowingModule(layer.in_features, layer.out_features, **options)
    elif isinstance(layer, nn.Conv2d):
        made = FullConv2dGrowingModule(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            padding=layer.padding,
            input_size=places,
            **options,
        )
    else:
        raise TypeError(f"no growing module for a {type(layer).__name__}")
    made.layer.load_state_dict(layer.state_dict())
    return made
