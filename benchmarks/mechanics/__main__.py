"""S0, the mechanics of growth: every host kind x blueprint x initialiser x optimizer, measured on tiny models.

A row is a host and a blueprint that fits it, over all initialisers and optimizers; the worst value counts.
"""

import argparse
import dataclasses
import logging
import math
import random
import time
from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence
from typing import Any

import torch
from benchmarks.engine.report import Report
from benchmarks.engine.report import options_of
from benchmarks.mechanics.cases import LIBRARY
from benchmarks.mechanics.cases import Case
from benchmarks.mechanics.cases import all_cases
from benchmarks.mechanics.hosts import kinds_without_host
from benchmarks.mechanics.measure import Outcome
from benchmarks.mechanics.measure import measure
from benchmarks.mechanics.optimizers import DEFAULT

from esper.runtime.tezzeret.parity import c_compiler

COLUMNS = (
    "host",
    "blueprint",
    "cases",
    "refused as told",
    "birth",
    "first-step drift",
    "gradients",
    "carry",
    "reset",
    "round trip",
    "fold",
    "compiled",
    "findings",
)


def measured(case: Case, *, compiled: bool) -> Outcome:
    """One outcome, whatever happens: an error that nobody foresaw is a finding too."""
    try:
        return measure(case, compiled=compiled)
    except Exception as error:
        return Outcome(case, refused=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


def row(outcomes: Sequence[Outcome]) -> tuple[str, ...]:
    """One line of the table."""
    told = [one for one in outcomes if one.refused is not None and one.is_expected]
    ran = [one for one in outcomes if one.refused is None]
    head = outcomes[0].case
    gradients = sum(one.with_gradient for one in ran), sum(one.parameters for one in ran)
    folded = any(one.folded for one in ran)
    return (
        head.host.name,
        head.blueprint,
        str(len(outcomes)),
        str(len(told)),
        _worst(one.birth for one in ran),
        _worst(one.drift for one in ran if one.case.optimizer == DEFAULT),
        "all" if gradients[0] == gradients[1] else f"{gradients[0]} of {gradients[1]}",
        _worst(one.carry for one in ran),
        _worst(one.reset for one in ran if one.case.optimizer == DEFAULT),
        _worst(one.round_trip for one in ran),
        f"{_worst(one.fold for one in ran)}{'' if folded else ' (kept)'}",
        _worst(one.compiled for one in ran),
        str(sum(bool(one.findings) for one in outcomes)),
    )


def record(outcome: Outcome) -> dict[str, Any]:
    """An outcome as JSON."""
    values = {field.name: getattr(outcome, field.name) for field in dataclasses.fields(outcome) if field.name != "case"}
    case = outcome.case
    names = {
        "host": case.host.name,
        "kind": case.host.kind,
        "blueprint": case.blueprint,
        "initialiser": case.initialiser,
        "optimizer": case.optimizer.name,
    }
    finite = {key: str(value) if _endless(value) else value for key, value in values.items() if value is not None}
    return {**names, **finite, "findings": outcome.findings}


FIELDS = ("initialiser", "optimizer", "birth", "drift", "with_gradient", "parameters", "carry", "reset", "round_trip")
FIELDS += ("fold", "folded", "compiled")


def compact(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records by host and blueprint, each case as one line of `FIELDS` with commas between; thousands of them must be
    readable. Of a refusal the line has its reason."""
    data: dict[tuple[str, str], dict[str, Any]] = {}
    for one in records:
        pair = {key: one[key] for key in ("host", "kind", "blueprint")}
        group = data.setdefault((one["host"], one["blueprint"]), {**pair, "fields": ", ".join(FIELDS), "cases": []})
        refused = one.get("refused")
        values = [_shown(one.get(field)) for field in (FIELDS if refused is None else FIELDS[:2])]
        reason = [] if refused is None else [str(refused)[:120]]
        group["cases"].append(", ".join([*values, *reason, *(f"FINDING {finding}" for finding in one["findings"])]))
    return list(data.values())


def _shown(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _endless(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _worst(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{max(known):.2g}" if known else "-"


def chosen_cases(options: argparse.Namespace) -> list[Case]:
    """Of the product: every optimizer with the library's own way, every initialiser with the default optimizer, a
    share of all the rest; and of these what the options name."""
    lot = random.Random(0)
    return [
        case
        for case in all_cases()
        if (case.initialiser == LIBRARY or case.optimizer == DEFAULT or lot.random() < options.share)
        and (not options.host or options.host in case.host.name)
        and (not options.blueprint or options.blueprint == case.blueprint)
        and (not options.initialiser or options.initialiser == case.initialiser)
        and (not options.optimizer or options.optimizer == case.optimizer.name)
    ]


def worth_compiling(cases: Iterable[Case]) -> set[Case]:
    """A compilation takes seconds: the library's own way with the default optimizer, until every host and every
    blueprint was met."""
    found: set[Case] = set()
    for case in cases:
        met = {one.host for one in found}, {one.blueprint for one in found}
        new = case.host not in met[0] or case.blueprint not in met[1]
        if new and case.initialiser == LIBRARY and case.optimizer == DEFAULT:
            found.add(case)
    return found


def main() -> None:
    parser = options_of("S0, the mechanics of growth")
    for name in ("host", "blueprint", "initialiser", "optimizer"):
        parser.add_argument(f"--{name}", default="", help=f"only cases of this {name}")
    parser.add_argument("--share", type=float, default=1.0, help="of the pairings of other initialisers and optimizers")
    parser.add_argument("--without-compiling", action="store_true", help="leave out torch.compile (seconds a pair)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("torch.fx").setLevel(logging.CRITICAL)
    cases = chosen_cases(options)
    compiling = set() if options.without_compiling or c_compiler() is None else worth_compiling(cases)
    outcomes: list[Outcome] = []
    began, pair = time.monotonic(), ("", "")
    for case in cases:
        if (case.host.name, case.blueprint) != pair:
            pair = (case.host.name, case.blueprint)
            print(
                f"{time.monotonic() - began:5.0f} s  {len(outcomes)} of {len(cases)}  {pair[0]}, {pair[1]}", flush=True
            )
        outcomes.append(measured(case, compiled=case in compiling))
    report = Report("mechanics", "S0, the mechanics of growth: the worst over all initialisers and optimizers", COLUMNS)
    for key in dict.fromkeys((one.case.host.name, one.case.blueprint) for one in outcomes):
        report.rows.append(row([one for one in outcomes if (one.case.host.name, one.case.blueprint) == key]))
    report.data = compact([record(one) for one in outcomes])
    report.notes = notes(outcomes, bool(compiling))
    report.publish(options)


def notes(outcomes: Sequence[Outcome], compiling: bool) -> list[str]:
    """What must be known to read the table, and every finding."""
    refusals = [one.refused for one in outcomes if one.refused is not None and one.is_expected]
    told = Counter(refusal.partition(" ")[0] for refusal in refusals)
    found = [(one.case.name, finding) for one in outcomes for finding in one.findings]
    initialisers = dict.fromkeys(one.case.initialiser for one in outcomes)
    optimizers = dict.fromkeys(one.case.optimizer.name for one in outcomes)
    return [
        f"{len(outcomes)} cases: initialisers {', '.join(initialisers)}; optimizers {', '.join(optimizers)}. Every "
        f"optimizer with `{LIBRARY}`, every initialiser with {DEFAULT.name}, and the `share` that the options say of "
        f"all the rest. `{LIBRARY}` is `esper.graft` as a user calls it; the others are built from the model's own "
        "samples and weights, certified and grafted as stored kernels.",
        "`birth`: largest change of the output at the graft, in training and evaluation. `first-step drift`: root "
        f"mean square change of the output by the newborn's first step, relative, {DEFAULT.name}. `gradients`: "
        "tensors with a gradient within two steps. `carry`: largest difference of old parameters and of all that the "
        "optimizer keeps of them, one step after the graft against without. `reset`: how far that step would be off "
        f"with an optimizer made anew, relative, {DEFAULT.name}. `round trip`: save and load. `fold`: fossilize and "
        "unwrap, relative to the largest output (`kept`: the block stays a module). `compiled`: against "
        "eager, relative, once for each host and for each blueprint. All in float32.",
        f"`refused as told` counts refusals that are the right answer: {dict(told) or 'none'}. ESP-428: an initialiser "
        "without what it needs; `certificate`: one that does not preserve the function and whose kernels the birth "
        "certificate refuses; ESP-433: an optimizer that cannot take new parameters.",
        *([] if compiling else ["No compiled column: no C++ compiler, or not asked for."]),
        *[f"GAP: no host of kind {kind}" for kind in kinds_without_host()],
        *[f"FINDING: {name}: {finding}" for name, finding in found[:60]],
        *([f"... and {len(found) - 60} findings more, in the JSON."] if len(found) > 60 else []),
    ]


if __name__ == "__main__":
    main()
