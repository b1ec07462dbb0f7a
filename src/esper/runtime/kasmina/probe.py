"""One forward and backward of a probe batch that sees every site, and leaves the model as it was, to the bit.

From it come the signals that decide where to grow and the samples that new weights are aligned with. Nothing is
drawn from any random generator that lives on. Taking (`capture`) is on the thread that trains; measuring what was
taken may happen on any other, while training goes on.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import nn

from esper.contracts.operational import HealthSignal
from esper.runtime.kasmina.health.capture import MAX_ROWS
from esper.runtime.kasmina.health.capture import CallRecorder
from esper.runtime.kasmina.health.capture import SiteCapture
from esper.runtime.kasmina.health.rows import FEEDS_ACTIVATION
from esper.runtime.kasmina.health.rows import evenly
from esper.runtime.kasmina.health.statistics import residual_gradient
from esper.runtime.kasmina.health.statistics import signal_to_noise
from esper.runtime.kasmina.health.statistics import spread
from esper.runtime.kasmina.health.window import finite
from esper.runtime.kasmina.health.window import quotient
from esper.runtime.kasmina.wrapping.morphable import recording
from esper.runtime.kasmina.wrapping.morphable import sites_of
from esper.runtime.kasmina.wrapping.undisturbed import undisturbed
from esper.runtime.tezzeret.samples import SiteSamples

MAX_SAMPLES = 512
"""Samples of the batch that are kept of each site: its first ones."""

_WEIGHTS_READ_ROWS = frozenset({"linear", "conv1d", "conv2d", "embedding"})
"""Forms whose weight gradient is the product of the rows they read and the gradient of those they give."""


@dataclass(frozen=True)
class ProbeResult:
    """What one probe saw. `samples[site]` has x (samples, *input shape) and g (samples, *output shape) on the CPU,
    with at most `MAX_SAMPLES` samples; sites that no gradient reached have none."""

    signals: tuple[HealthSignal, ...]
    samples: dict[str, SiteSamples]
    loss: float


@dataclass(frozen=True)
class ProbeCapture:
    """What a probe has taken, on the device. Everything below is a pure function of it."""

    sites: tuple[SiteCapture, ...]
    loss: Tensor

    def samples(self, *, outputs: bool = False) -> dict[str, SiteSamples]:
        """Of every site that a gradient reached, on the CPU; with `outputs` also what the sites gave (y)."""
        return {
            site.site: SiteSamples(site.x.cpu(), site.g.cpu(), site.y.cpu() if outputs else None)
            for site in self.sites
            if site.g is not None
        }

    def signals(self, *, epoch: int = 0, step: int = 0) -> tuple[HealthSignal, ...]:
        """One signal a site, in the order of the sites. A signal that cannot be known from this batch is None."""
        return tuple(_signal(site, epoch, step) for site in self.sites)


def capture(model: nn.Module, loss_closure: Callable[[], Tensor], *, max_samples: int = MAX_SAMPLES) -> ProbeCapture:
    """Run `loss_closure` (a forward that returns a scalar loss) once, with its backward, and copy what every site saw.

    Random generators, BatchNorm buffers, gradients and training flags are restored; hooks on the accumulation of
    gradients do not fire. Nothing that was seen is brought to the CPU.
    """
    recorder = CallRecorder(max_samples)
    sites = sites_of(model)
    with undisturbed(model), recording(model, recorder), torch.enable_grad():
        loss = loss_closure()
        parameters = [p for p in model.parameters() if p.requires_grad]
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
    gradients = {id(p): g for p, g in zip(parameters, found, strict=True) if g is not None}
    with torch.no_grad():
        taken = [recorder.taken(module, gradients) for module in sites.values()]
    return ProbeCapture(tuple(site for site in taken if site is not None), loss.detach())


def probe(
    model: nn.Module,
    loss_closure: Callable[[], Tensor],
    *,
    epoch: int = 0,
    step: int = 0,
    max_samples: int = MAX_SAMPLES,
) -> ProbeResult:
    """`capture`, measured at once.

    A signal that cannot be known from this batch is None: the residual gradient needs twice as many rows as the
    layer has inputs, the saturation as many as it has units.
    """
    taken = capture(model, loss_closure, max_samples=max_samples)
    return ProbeResult(taken.signals(epoch=epoch, step=step), taken.samples(), float(taken.loss))


def _signal(site: SiteCapture, epoch: int, step: int) -> HealthSignal:
    y = _rows(site.rows_of_y)
    share, norm, noise = None, None, None
    if site.rows_of_g is not None:
        x, g = _rows(site.rows_of_x()), _rows(site.rows_of_g)
        if x.shape[0] == g.shape[0]:
            share, norm = residual_gradient(x, g)
        if x.shape[0] == g.shape[0] and site.form in _WEIGHTS_READ_ROWS:
            noise = signal_to_noise(x, g, site.looked_at)
    norms = site.norms
    gradient, weight = _number(norms.gradient), _number(norms.weight)
    incumbent = _root_mean_square(norms.gradient, norms.elements)
    newborn = _root_mean_square(norms.newborn, norms.newborn_elements)
    known = bool(torch.isfinite(y).all())
    found = spread(y) if known else None
    return HealthSignal(
        site=site.site,
        epoch=epoch,
        step=step,
        rows_seen=int(y.shape[0]),
        activation_mean=float(y.mean()) if known else None,
        activation_variance=float(y.var(unbiased=False)) if known else None,
        dead_neuron_ratio=_dead(y) if known and site.form in FEEDS_ACTIVATION else None,
        average_correlation=None if found is None else found.correlation,
        gradient_norm=finite(gradient),
        error_count=0 if known else 1,
        saturation=None if found is None else found.saturation,
        residual_gradient=share,
        residual_gradient_norm=norm,
        gradient_to_weight=quotient(gradient, weight),
        newborn_to_incumbent_gradient=quotient(newborn, incumbent),
        gradient_signal_to_noise=noise,
    )


def _rows(rows: Tensor) -> Tensor:
    return rows[evenly(rows.shape[0], MAX_ROWS)].detach().cpu().double()


def _dead(y: Tensor) -> float:
    return float((y.amax(0) <= 0).double().mean())


def _number(norm: Tensor | None) -> float | None:
    return None if norm is None else float(norm)


def _root_mean_square(norm: Tensor | None, elements: int) -> float | None:
    return None if norm is None or not elements else float(norm) / elements**0.5
