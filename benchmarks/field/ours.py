"""Growth by Esper: units between two layers, born with outgoing weights of zero."""

import torch
from benchmarks.field.work import Learner
from benchmarks.field.work import Rows
from torch.nn import functional

import esper
from esper.contracts.config import TezzeretConfig
from esper.runtime.kasmina.growing.fitting import site_contract
from esper.runtime.kasmina.probe import probe
from esper.runtime.tezzeret.build import build_kernel
from esper.runtime.tezzeret.certify import certify
from esper.runtime.tezzeret.samples import samples_for

SITE = "0"


def grow_by_one_call(learner: Learner, rows: Rows, added: int) -> int:
    """`esper.graft` as a user's own loop calls it: no samples, Kaiming weights. Returns the units added."""
    x, _ = rows
    esper.wrap(learner.model, example_inputs=x[:2])
    esper.graft(learner.model, SITE, "widen", optimizer=learner.optimizer, units=added)
    return added


def grow_with_samples(learner: Learner, rows: Rows, added: int) -> int:
    """As a run does it: `rows` are the probe, the new units are aligned with what it shows, certified on it, and
    grafted. Raises RuntimeError when they are not what this benchmark says they are."""
    x, y = rows
    model = esper.wrap(learner.model, example_inputs=x[:2])
    seen = probe(model, lambda: functional.cross_entropy(model(x), y), max_samples=len(y))
    contract = site_contract(model, SITE, "widen")
    samples = samples_for(contract, seen.samples)
    files = build_kernel(
        "widen",
        contract,
        {"units": added},
        seed=0,
        samples=samples,
        max_parameters=TezzeretConfig().max_parameters,
    )
    certificate = certify(files, samples=samples, optimizer=learner.optimizer)
    if not certificate.passed:
        raise RuntimeError(f"the certificate failed: {'; '.join(certificate.failures)}")
    made = esper.graft(model, SITE, "widen", optimizer=learner.optimizer, kernel=files)
    if made.alpha != 1.0 or samples is None:
        raise RuntimeError(f"grafted at alpha {made.alpha}, samples: {samples is not None}")
    return added


def grow_and_restart(learner: Learner, rows: Rows, added: int) -> int:
    """`grow_with_samples`, but the optimizer begins anew: what carrying its state is worth."""
    grow_with_samples(learner, rows, added)
    group = learner.optimizer.param_groups[0]
    learner.optimizer = torch.optim.AdamW(
        learner.model.parameters(), lr=group["lr"], weight_decay=group["weight_decay"]
    )
    return added
