"""The fast layer of S0: what growth must do on every kind of host with every blueprint, on tiny models."""

import random

import pytest
import torch
from benchmarks.mechanics.__main__ import compact
from benchmarks.mechanics.__main__ import record
from benchmarks.mechanics.__main__ import row
from benchmarks.mechanics.cases import LIBRARY
from benchmarks.mechanics.cases import Case
from benchmarks.mechanics.cases import all_cases
from benchmarks.mechanics.cases import fitting_pairs
from benchmarks.mechanics.hosts import host_named
from benchmarks.mechanics.hosts import kinds_without_host
from benchmarks.mechanics.measure import Outcome
from benchmarks.mechanics.measure import measure
from benchmarks.mechanics.optimizers import DEFAULT
from benchmarks.mechanics.optimizers import OPTIMIZERS

from esper.runtime.tezzeret.blueprints.registry import list_blueprints
from esper.runtime.tezzeret.initialisers import list_initialisers
from esper.runtime.tezzeret.parity import c_compiler

PAIRS = fitting_pairs()
ALL = tuple(all_cases())
SAMPLE = random.Random(0).sample(ALL, 40)


def named(pair) -> str:
    return f"{pair[0].name}-{pair[1]}"


def optimizer(name: str):
    return next(case for case in OPTIMIZERS if case.name == name)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_every_kind_of_host_and_every_blueprint_is_met():
    assert kinds_without_host() == ()
    assert {blueprint for _, blueprint in PAIRS} == {blueprint.name for blueprint in list_blueprints()}


def test_every_optimizer_of_torch_is_met():
    found = {case.kind for case in OPTIMIZERS}
    assert found == {
        kind
        for kind in vars(torch.optim).values()
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
    }
    assert {"AdamW", "AdamW fused", "AdamW amsgrad", "SGD nesterov", "Muon", "LBFGS"} <= {c.name for c in OPTIMIZERS}


@pytest.mark.parametrize("pair", PAIRS, ids=named)
def test_every_blueprint_on_every_host(pair):
    """Exact at birth, old state carried to the bit, all parameters learn, save and load, fold and unwrap."""
    outcome = measure(Case(*pair, LIBRARY, DEFAULT))
    assert outcome.refused is None
    assert outcome.findings == ()
    assert outcome.birth == 0.0
    assert outcome.carry == 0.0
    assert outcome.reset is not None
    assert outcome.reset > 0.01
    assert (outcome.drift == 0.0) == (pair[1] == "noop")


@pytest.mark.parametrize("case", SAMPLE, ids=lambda case: case.name)
def test_a_sample_of_all_cases(case):
    assert measure(case).findings == ()


@pytest.mark.parametrize("case", OPTIMIZERS, ids=lambda case: case.name)
def test_every_optimizer(case):
    outcome = measure(Case(host_named("mlp"), "bottleneck", LIBRARY, case))
    assert outcome.findings == ()
    assert (outcome.refused is None) == case.steps_alone


@pytest.mark.parametrize("initialiser", list_initialisers())
@pytest.mark.parametrize(
    ("host", "blueprint"), [("mlp", "lowrank"), ("mlp of a sequence", "widen"), ("image", "lowrank")]
)
def test_every_initialiser_is_exact_or_refused_by_its_certificate(host, blueprint, initialiser):
    outcome = measure(Case(host_named(host), blueprint, initialiser, DEFAULT))
    assert outcome.findings == ()
    assert outcome.refused is None or outcome.is_expected
    if initialiser == "random":
        assert outcome.refused is not None
        assert outcome.refused.startswith("certificate birth")


@pytest.mark.skipif(c_compiler() is None, reason="no C++ compiler")
def test_compiled_equals_eager():
    """One pair, since compiling takes seconds; the table has every one."""
    outcome = measure(Case(host_named("mlp"), "se_gate", LIBRARY, DEFAULT), compiled=True)
    assert outcome.findings == ()
    assert outcome.compiled is not None


def test_what_is_wrong_becomes_a_finding():
    case = Case(host_named("mlp"), "bottleneck", LIBRARY, DEFAULT)
    assert Outcome(case, birth=0.0, carry=0.0, fold=1e-7).findings == ()
    assert Outcome(case, birth=1e-9).findings == ("birth 1e-09",)
    assert Outcome(case, carry=float("inf")).findings == ("carry inf",)
    assert Outcome(case, drift=float("nan")).findings == ("drift nan",)
    assert Outcome(case, with_gradient=1, parameters=3).findings == ("gradients for 1 of 3 tensors within two steps",)
    assert Outcome(case, refused="ESP-433 it cannot").findings == ("refused: ESP-433 it cannot",)
    assert Outcome(Case(*PAIRS[0], LIBRARY, optimizer("LBFGS")), refused="ESP-433 it cannot").findings == ()


def test_an_outcome_is_a_row_and_a_record():
    case = Case(host_named("mlp"), "bottleneck", LIBRARY, DEFAULT)
    outcomes = [
        Outcome(case, birth=0.0, drift=0.5, with_gradient=3, parameters=3, carry=0.0, fold=1e-7, folded=True),
        Outcome(case, birth=2.0, drift=float("inf"), with_gradient=3, parameters=3),
    ]
    line = row(outcomes)
    assert line[:3] == ("mlp", "bottleneck", "2")
    assert "2" in line
    assert record(outcomes[1])["drift"] == "inf"
    assert record(outcomes[1])["findings"] == ("birth 2", "drift inf")
    refusal = Outcome(case, refused="ESP-433 it cannot")
    (group,) = compact([record(one) for one in (*outcomes, refusal)])
    assert group["blueprint"] == "bottleneck"
    assert group["cases"][0] == "library, AdamW, 0, 0.5, 3, 3, 0, -, -, 1e-07, True, -"
    assert group["cases"][1].endswith("FINDING birth 2, FINDING drift inf")
    assert group["cases"][2] == "library, AdamW, ESP-433 it cannot, FINDING refused: ESP-433 it cannot"
