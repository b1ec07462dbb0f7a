"""One forward and backward of a probe batch that sees every site, and leaves the model as it was, to the bit.

From it come the signals that decide where to grow and the samples that new weights are aligned with. Nothing is
drawn from any random generator that lives on.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import nn

from esper.contracts.enums import SeedState
from esper.contracts.operational import HealthSignal
from esper.runtime.kasmina.layer import SiteState
from esper.runtime.kasmina.layer import state_of
from esper.runtime.kasmina.wrapping.hosts import kind_named
from esper.runtime.kasmina.wrapping.morphable import recording
from esper.runtime.kasmina.wrapping.morphable import sites_of
from esper.runtime.kasmina.wrapping.undisturbed import undisturbed
from esper.runtime.tezzeret.build import SiteSamples

MAX_SAMPLES = 512
"""Samples of the batch that are kept of each site: its first ones."""
MAX_ROWS = 2048
"""Rows of the matrix product that the statistics are taken over; a convolution has one for each place."""
MAX_UNITS = 1024
"""Units that spectra and correlations are taken over, evenly chosen where a layer has more."""


@dataclass(frozen=True)
class ProbeResult:
    """What one probe saw. `samples[site]` has x (samples, *input shape) and g (samples, *output shape) on the CPU,
    with at most `MAX_SAMPLES` samples; sites that no gradient reached have none."""

    signals: tuple[HealthSignal, ...]
    samples: dict[str, SiteSamples]
    loss: float


class _Capture:
    def __init__(self, max_samples: int) -> None:
        self.max_samples = max_samples
        self.x: dict[str, list[Tensor]] = {}
        self.y: dict[str, list[Tensor]] = {}
        self.g: dict[str, dict[int, Tensor]] = {}

    def record(self, module: nn.Module, state: SiteState, x: Tensor, output: Tensor) -> Tensor:
        name, dims = state.name, kind_named(state.kind).sample_dims
        call = len(self.x.setdefault(name, []))
        # Clones: layers behind this one may work in place.
        self.x[name].append(self._kept(x, dims).clone())
        self.y.setdefault(name, []).append(self._kept(output, dims).clone())
        if output.requires_grad:
            gradients = self.g.setdefault(name, {})

            def keep(gradient: Tensor) -> None:
                gradients[call] = self._kept(gradient, dims).clone()

            output.register_hook(keep)  # type: ignore[no-untyped-call]
        return output

    def _kept(self, tensor: Tensor, dims: int) -> Tensor:
        batch = tensor.detach() if tensor.dim() > dims else tensor.detach().unsqueeze(0)
        return batch[: self.max_samples]


def probe(
    model: nn.Module,
    loss_closure: Callable[[], Tensor],
    *,
    epoch: int = 0,
    step: int = 0,
    max_samples: int = MAX_SAMPLES,
) -> ProbeResult:
    """Run `loss_closure` (a forward that returns a scalar loss) once, with its backward, and read every site.

    A signal that cannot be known from this batch is None: the residual gradient needs twice as many rows as the
    layer has inputs, the saturation as many as it has units. Random generators, BatchNorm buffers, gradients and
    training flags are restored; hooks on the accumulation of gradients do not fire.
    """
    capture = _Capture(max_samples)
    sites = sites_of(model)
    with undisturbed(model), recording(model, capture), torch.enable_grad():
        loss = loss_closure()
        parameters = [p for p in model.parameters() if p.requires_grad]
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
    gradients = {id(p): g for p, g in zip(parameters, found, strict=True) if g is not None}
    signals, samples = [], {}
    for name, module in sites.items():
        if name not in capture.x:
            continue
        caught = capture.g.get(name, {})
        calls = [call for call in range(len(capture.x[name])) if call in caught]
        used = calls or range(len(capture.x[name]))
        x = torch.cat([capture.x[name][call] for call in used])[:max_samples]
        y = torch.cat([capture.y[name][call] for call in used])[:max_samples]
        g = torch.cat([caught[call] for call in calls])[:max_samples] if calls else None
        signals.append(_signal(name, module, x, y, g, gradients, epoch, step))
        if g is not None:
            samples[name] = SiteSamples(x.cpu(), g.cpu())
    return ProbeResult(tuple(signals), samples, float(loss.detach()))


def _signal(
    name: str,
    module: nn.Module,
    x: Tensor,
    y: Tensor,
    g: Tensor | None,
    gradients: dict[int, Tensor],
    epoch: int,
    step: int,
) -> HealthSignal:
    kind = kind_named(state_of(module).kind)
    rows_of_y = kind.output_rows(module, y)
    places = max(1, rows_of_y.shape[0] // y.shape[0])
    some = _evenly(y.shape[0], math.ceil(4 * MAX_ROWS / places))
    y_rows = _rows(kind.output_rows(module, y[some]))
    share, norm = None, None
    if g is not None:
        x_rows = _rows(kind.input_rows(module, x[some]))
        g_rows = _rows(kind.output_rows(module, g[some]))
        share, norm = residual_gradient(x_rows, g_rows)
    host = [p for n, p in module.named_parameters() if not n.startswith("kasmina.")]
    newborn = [
        p
        for slot in state_of(module).slots
        if slot.kernel is not None and slot.seed.state is SeedState.TRAINING
        for p in slot.kernel.parameters()
    ]
    gradient_norm, weight_norm = _norm([gradients.get(id(p)) for p in host]), _norm(host)
    incumbent, fresh = _root_mean_square(host, gradients), _root_mean_square(newborn, gradients)
    finite = bool(torch.isfinite(y_rows).all())
    return HealthSignal(
        site=name,
        epoch=epoch,
        step=step,
        rows_seen=int(y_rows.shape[0]),
        activation_mean=float(y_rows.mean()) if finite else None,
        activation_variance=float(y_rows.var(unbiased=False)) if finite else None,
        dead_neuron_ratio=float((y_rows.amax(0) <= 0).double().mean()) if finite else None,
        average_correlation=_average_correlation(y_rows) if finite else None,
        gradient_norm=_known(gradient_norm),
        error_count=0 if finite else 1,
        saturation=saturation(y_rows) if finite else None,
        residual_gradient=share,
        residual_gradient_norm=norm,
        gradient_to_weight=_ratio(gradient_norm, weight_norm),
        newborn_to_incumbent_gradient=_ratio(fresh, incumbent),
    )


def saturation(y: Tensor) -> float | None:
    """exp(entropy(s / sum s)) / width for the singular values s of centred pre-activations y (rows, units); NORTH
    (arXiv 2202.08539). 1: every unit carries its own direction. None with fewer rows than units."""
    y = y[:, _evenly(y.shape[1], MAX_UNITS)]
    if y.shape[0] < y.shape[1]:
        return None
    centred = y - y.mean(0)
    # The Gram matrix in float64 costs half of the singular value decomposition; what it loses of the smallest
    # values (below 1e-8 of the largest) weighs nothing in the entropy.
    s = torch.linalg.eigvalsh(centred.T @ centred).clamp_min(0.0).sqrt()
    total = float(s.sum())
    if total == 0.0:
        return 0.0
    p = s / total
    entropy = -float(torch.xlogy(p, p).sum())
    return math.exp(entropy) / y.shape[1]


def residual_gradient(x: Tensor, g: Tensor) -> tuple[float | None, float | None]:
    """The share of the energy of g (rows, fan out) that no affine function of x (rows, fan in) explains, and the
    Frobenius norm of that rest (TINY, arXiv 2405.19816; SENN, arXiv 2307.04526). None with too few rows."""
    rows, width = x.shape
    if rows < 2 * (width + 1) or not bool(torch.isfinite(x).all() and torch.isfinite(g).all()):
        return None, None
    energy = float(g.square().sum())
    if energy == 0.0:
        return 0.0, 0.0
    design = torch.cat([x, torch.ones(rows, 1, dtype=x.dtype)], dim=1)
    # gelsy pivots: inputs that never vary (an image's border) make the design rank-deficient.
    solution = torch.linalg.lstsq(design, g, driver="gelsy").solution
    rest = float((g - design @ solution).square().sum())
    return min(1.0, rest / energy), math.sqrt(rest)


def _rows(rows: Tensor) -> Tensor:
    return rows[_evenly(rows.shape[0], MAX_ROWS)].detach().cpu().double()


def _evenly(count: int, most: int) -> Tensor:
    """At most `most` indices below `count`, evenly spread, ascending."""
    if count <= most:
        return torch.arange(count)
    return torch.arange(most) * count // most


def _average_correlation(y: Tensor) -> float | None:
    """The mean Pearson correlation between two different units; None with fewer than two that vary."""
    y = y[:, _evenly(y.shape[1], MAX_UNITS)]
    centred = y - y.mean(0)
    scale = centred.square().sum(0).sqrt()
    standard = centred[:, scale > 0] / scale[scale > 0]
    units = standard.shape[1]
    if units < 2:
        return None
    total = float(standard.sum(1).square().sum())
    return max(-1.0, min(1.0, (total - units) / (units * (units - 1))))


def _norm(tensors: list[Tensor | None] | list[nn.Parameter]) -> float:
    squares = [float(t.detach().double().square().sum()) for t in tensors if t is not None]
    return math.sqrt(sum(squares)) if squares else math.nan


def _root_mean_square(parameters: list[nn.Parameter], gradients: dict[int, Tensor]) -> float:
    count = sum(p.numel() for p in parameters if id(p) in gradients)
    return _norm([gradients.get(id(p)) for p in parameters]) / math.sqrt(count) if count else math.nan


def _ratio(above: float, below: float) -> float | None:
    return _known(above / below) if below > 0 else None


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
