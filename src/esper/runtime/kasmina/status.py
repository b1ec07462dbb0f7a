"""What has grown in a model, as frozen data that prints as a table."""

from dataclasses import dataclass

from torch import nn

from esper.contracts.enums import SeedState
from esper.runtime.kasmina.layer import state_of
from esper.runtime.kasmina.wrapping.morphable import model_state
from esper.runtime.kasmina.wrapping.morphable import sites_of


@dataclass(frozen=True)
class SeedStatus:
    """One seed. `parameters` counts what it keeps beside its host now (0 once folded); `born` is the step."""

    index: int
    state: SeedState
    blueprint: str | None
    kernel: str | None
    parameters: int
    born: int | None
    alpha: float = 1.0
    folded: bool = False
    fold_difference: float | None = None
    """The largest change of the output that folding it made, measured on a seeded batch; None while not folded."""
    stays: str | None = None
    """Why it stays a block although it is kept for good."""


@dataclass(frozen=True)
class SiteStatus:
    """One module with its seeds. `proven`: its forward has been seen to be called; `obstacle`: why nothing can grow
    there, as that call showed."""

    name: str
    kind: str
    seeds: tuple[SeedStatus, ...]
    proven: bool = True
    obstacle: str | None = None


@dataclass(frozen=True)
class ModelStatus:
    """A wrapped model. `generation` rises with every structural change."""

    sites: tuple[SiteStatus, ...]
    host_parameters: int
    grown_parameters: int
    generation: int

    def __str__(self) -> str:
        header = ("site", "kind", "seed", "state", "blueprint", "parameters", "kernel")
        rows = [header]
        for site in self.sites:
            grown = [seed for seed in site.seeds if seed.state is not SeedState.DORMANT]
            for seed in grown:
                state = f"{seed.state} (folded)" if seed.folded else str(seed.state)
                kernel = (seed.kernel or "-").removeprefix("sha256:")[:12]
                cells = (str(seed.index), state, seed.blueprint or "-", f"{seed.parameters:,}", kernel)
                rows.append((site.name, site.kind, *cells))
            resting = len(site.seeds) - len(grown)
            if resting:
                known = "dormant" if site.proven else "dormant, not called yet"
                if site.obstacle is not None:
                    known = f"cannot grow: {site.obstacle}"
                rows.append((site.name, site.kind, f"{resting} x", known, "-", "-", "-"))
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * width for width in widths))
        lines.append(
            f"{self.host_parameters:,} host parameters, {self.grown_parameters:,} grown, generation {self.generation}"
        )
        return "\n".join(lines)


def status(model: nn.Module) -> ModelStatus:
    """Sites in module order with their seeds. Raises SiteError ESP-314 for a model that is not wrapped."""
    state = model_state(model)
    sites = []
    for name, module in sites_of(model).items():
        site = state_of(module)
        seeds = tuple(
            SeedStatus(
                index=slot.seed.index,
                state=slot.seed.state,
                blueprint=slot.seed.blueprint,
                kernel=slot.seed.kernel,
                parameters=sum(p.numel() for p in slot.kernel.parameters()) if slot.kernel is not None else 0,
                born=slot.seed.born_step,
                alpha=slot.alpha,
                folded=slot.folded,
                fold_difference=slot.fold_difference,
                stays=slot.stays,
            )
            for slot in site.slots
        )
        sites.append(SiteStatus(name, site.kind, seeds, site.proven, site.obstacle))
    grown = sum(seed.parameters for site in sites for seed in site.seeds)
    total = sum(p.numel() for p in model.parameters())
    return ModelStatus(tuple(sites), total - grown, grown, state.generation)
