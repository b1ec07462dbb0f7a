"""What telemetry has summed up of some watched steps, on the device, and how it reads as signals."""

import math
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from esper.contracts.operational import HealthSignal

Column = tuple[str, str]
"""A quantity and the site it is of; a norm has one column for each parameter of the site."""

MEAN, VARIANCE, GRADIENT, NEWBORN = "mean", "variance", "gradient", "newborn"
DEAD = "dead"
CHANGE, BEFORE = "change", "before"


@dataclass
class Window:
    """Sums over `steps` watched steps. `largest` has one tensor (sites, units) for each group of sites of one width,
    in the order of `groups`; `rows` are those seen of each site, `elements` the trained weights of the host and of
    its newborn parameters."""

    columns: tuple[Column, ...]
    sums: Tensor
    groups: tuple[tuple[str, ...], ...]
    largest: list[Tensor]
    rows: dict[str, int]
    elements: Mapping[Column, int]
    steps: int = 1

    def takes(self, step: "Window") -> bool:
        """Whether a step saw the same sites, widths and parameters, on the same device."""
        return (
            self.columns == step.columns
            and self.groups == step.groups
            and self.sums.device == step.sums.device
            and all(a.shape == b.shape for a, b in zip(self.largest, step.largest, strict=True))
        )

    def add(self, step: "Window") -> None:
        """Take one more watched step in."""
        self.sums += step.sums
        for largest, new in zip(self.largest, step.largest, strict=True):
            torch.maximum(largest, new, out=largest)
        for site, count in step.rows.items():
            self.rows[site] += count
        self.steps += step.steps


@dataclass(frozen=True)
class Change:
    """What one optimizer step changed: norms of the differences and of the weights before, by parameter."""

    columns: tuple[Column, ...]
    norms: Tensor


def joined(parts: Sequence[Tensor]) -> Tensor:
    """1-D tensors as one, float32, on the first one's device."""
    return torch.cat([part.to(parts[0].device, torch.float32) for part in parts])


def norms_of(tensors: Sequence[Tensor]) -> Tensor:
    """The Frobenius norms of tensors of any floating dtype, float32 (len(tensors),)."""
    norms = torch._foreach_norm(list(tensors), dtype=torch.float32)
    return torch.stack([norm.to(norms[0].device) for norm in norms])


@dataclass(frozen=True)
class Reading:
    """A window that is over. `units_die` are the sites where a unit can be dead."""

    window: Window | None
    change: Change | None
    units_die: frozenset[str]

    def signals(self, *, epoch: int, step: int) -> tuple[HealthSignal, ...]:
        """One signal for each site that was seen, with one transfer from the device; none where no step was watched.
        May be called on any thread."""
        window = self.window
        if window is None:
            return ()
        sites = [site for group in window.groups for site in group]
        dead = torch.cat([(largest <= 0).to(torch.float32).mean(1) for largest in window.largest])
        columns = (*window.columns, *((DEAD, site) for site in sites))
        known = _read(columns, [window.sums / window.steps, dead], self.change)

        def root_mean_square(quantity: str, site: str) -> float | None:
            norm, count = known.get((quantity, site)), window.elements.get((quantity, site), 0)
            return norm / math.sqrt(count) if norm is not None and count else None

        return tuple(
            HealthSignal(
                site=site,
                epoch=epoch,
                step=step,
                rows_seen=window.rows[site],
                activation_mean=finite(known[MEAN, site]),
                activation_variance=finite(known[VARIANCE, site]),
                dead_neuron_ratio=finite(known[DEAD, site]) if site in self.units_die else None,
                gradient_norm=finite(known.get((GRADIENT, site))),
                gradient_to_weight=quotient(known.get((GRADIENT, site)), known.get((BEFORE, site))),
                update_to_weight=quotient(known.get((CHANGE, site)), known.get((BEFORE, site))),
                newborn_to_incumbent_gradient=quotient(
                    root_mean_square(NEWBORN, site), root_mean_square(GRADIENT, site)
                ),
            )
            for site in sites
        )

    def updates(self) -> dict[str, float]:
        """By site, what the newest measured optimizer step changed of the weights, relative to them."""
        known = _read((), [], self.change)
        found = {site: quotient(known[CHANGE, site], known[BEFORE, site]) for _, site in known}
        return {site: value for site, value in found.items() if value is not None}


def _read(columns: Sequence[Column], parts: list[Tensor], change: Change | None) -> dict[Column, float]:
    """Each quantity of each site: the norm of all its parameters is the root of the sum of their squares."""
    if change is not None:
        columns, parts = (*columns, *change.columns), [*parts, change.norms]
    found: dict[Column, float] = {}
    for column, value in zip(columns, joined(parts).tolist() if parts else (), strict=True):
        found[column] = math.hypot(found[column], value) if column in found else value
    return found


def finite(value: float | None) -> float | None:
    """None for what is not a number that a signal may carry."""
    return value if value is not None and math.isfinite(value) else None


def quotient(above: float | None, below: float | None) -> float | None:
    """None where either is not known, or nothing is divided by."""
    return finite(above / below) if above is not None and below is not None and below > 0 else None
