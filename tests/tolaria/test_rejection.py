"""Kernels that must not reach the model, or must leave it at once; and kernels that run compiled."""

import pytest
import torch
from tolaria_world import make_config
from tolaria_world import ordered
from tolaria_world import silent

from esper.contracts.assets import ArtifactRef
from esper.contracts.assets import Certificate
from esper.contracts.enums import FactKind
from esper.contracts.enums import SeedState
from esper.contracts.enums import Verdict
from esper.runtime.tezzeret.artifact import KernelFiles
from esper.runtime.tezzeret.artifact import digest_of
from esper.runtime.tezzeret.artifact import manifest_bytes
from esper.runtime.tezzeret.artifact import verified_tensors
from esper.runtime.tezzeret.artifact import weights_bytes
from esper.runtime.tezzeret.parity import c_compiler
from esper.runtime.tolaria.live.surgery import grown_kernels


def with_certificate(world, delivery, **changes):
    certificate = Certificate.model_validate_json(world.objects.get(delivery.certificate))
    data = certificate.model_copy(update=changes).model_dump_json().encode()
    return delivery.model_copy(update={"certificate": world.objects.put(data)})


def not_zero_at_birth(
    world, delivery, tensors_of=lambda tensors: {n: torch.full_like(t, 0.5) for n, t in tensors.items()}
):
    """A kernel of valid bytes whose last operation is not zero, with a certificate that lies."""
    files = KernelFiles(world.objects.get(delivery.manifest), world.objects.get(delivery.weights))
    manifest, tensors = verified_tensors(files, delivery.kernel)
    weights = weights_bytes(tensors_of(tensors))
    ref = ArtifactRef(digest=digest_of(weights), size_bytes=len(weights))
    changed = KernelFiles(manifest_bytes(manifest.model_copy(update={"weights": ref})), weights)
    other = delivery.model_copy(
        update={
            "kernel": changed.digest,
            "manifest": world.objects.put(changed.manifest),
            "weights": world.objects.put(changed.weights),
        }
    )
    return with_certificate(world, other, kernel=changed.digest)


@pytest.fixture
def grown(drive):
    def begin(config=None, run_id="run"):
        driver = drive(config or make_config(), run_id=run_id)
        order = ordered(1, 14, run_id=run_id)
        driver.schedule = (order,)
        (first,) = driver.train(1, expects_decision=True)
        return driver, driver.world.deliver(first, order)

    return begin


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"passed": False, "failures": ("drift",)}, "no certificate: drift"),
        ({"kernel": "sha256:" + "1" * 64}, "certificate is of kernel"),
    ],
)
def test_kernel_without_a_certificate_of_its_own_is_not_grafted(grown, changes, words):
    driver, delivery = grown()
    answer = driver.session.install(with_certificate(driver.world, delivery, **changes))
    assert not answer.accepted and words in answer.reason
    assert answer.fact.kind is FactKind.MISSED


def test_certificate_that_is_none_is_refused(grown):
    driver, delivery = grown()
    junk = driver.world.objects.put(b"{}")
    answer = driver.session.install(delivery.model_copy(update={"certificate": junk}))
    assert not answer.accepted and "certificate" in answer.reason


@pytest.mark.fault("A11")
def test_kernel_that_would_change_the_function_is_culled_at_its_birth(grown, drive):
    driver, delivery = grown()
    assert driver.session.install(not_zero_at_birth(driver.world, delivery)).accepted
    reports = driver.train(2, 3, 4, 5, 6)
    assert [fact.kind for fact in reports[1].facts] == [FactKind.GRAFT, FactKind.CULL]
    assert reports[1].facts[1].reason.startswith("rejected")
    assert reports[1].held_adaptation is None
    assert driver.session.judge("run/a1", silent).verdict is Verdict.VOID
    seed = next(node for node in reports[1].graph.nodes if node.contract.site == "first").seeds[0]
    assert (seed.state, seed.generation) == (SeedState.DORMANT, 1)
    plain = drive(make_config(), run_id="plain")
    plain.train(1, 2, 3, 4, 5, 6)
    assert driver.digest() == plain.digest()


def spikes_only(tensors):
    """Silent for every input that is not far larger than a standard normal one."""
    down = torch.zeros_like(tensors["down.weight"])
    down[:, 0] = 1.0
    bias = torch.full_like(tensors["down.bias"], -100.0)
    return {"down.weight": down, "down.bias": bias, "up.weight": torch.full_like(tensors["up.weight"], 0.5)}


@pytest.mark.fault("A11")
def test_birth_that_changes_only_rows_of_the_task_is_culled(grown):
    driver, delivery = grown(make_config("tolaria_tasks:spiky"))
    assert driver.session.install(not_zero_at_birth(driver.world, delivery, spikes_only)).accepted
    reports = driver.train(2, 3)
    assert [fact.kind for fact in reports[1].facts] == [FactKind.GRAFT, FactKind.CULL]
    assert "changed the output" in reports[1].facts[1].reason
    assert reports[1].parameters == reports[0].parameters


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"site": "nowhere"}, "nowhere"), ({"seed": 99}, "no seed 99")],
)
def test_delivery_for_a_place_that_does_not_exist_is_rejected(grown, changes, words):
    driver, delivery = grown()
    wrong = delivery.model_copy(update={"adaptation": delivery.adaptation.model_copy(update=changes)})
    answer = driver.session.install(wrong)
    assert not answer.accepted and words in answer.reason


@pytest.mark.fault("B4")
def test_without_a_compiler_kernels_run_eagerly_and_end_in_the_same_bits(grown, monkeypatch, caplog):
    digests = []
    monkeypatch.setattr("esper.runtime.tezzeret.compile.c_compiler", lambda: None)
    for mode in ("on", "off"):
        config = make_config(tezzeret={"compile": mode}, tamiyo={"keep_margin": 0.0, "hold_epochs": 1, "hold_steps": 0})
        driver, delivery = grown(config, run_id=mode)
        assert driver.session.install(delivery).accepted
        driver.train(2, 3)
        driver.session.judge(f"{mode}/a1", silent)
        driver.train(4)
        digests.append(driver.digest())
    assert digests[0] == digests[1]
    assert "runs eagerly: no C++ compiler" in caplog.text


@pytest.mark.skipif(c_compiler() is None, reason="no C++ compiler on this machine")
def test_compiled_kernel_is_part_of_the_bits_and_comes_back_with_the_run(drive):
    config = make_config(
        "tolaria_tasks:narrow",
        optimizer={"lr": 0.02},
        run={"max_epochs": 4},
        tamiyo={"hold_epochs": 1, "hold_steps": 0},
        tezzeret={"compile": "on"},
    )
    digests = []
    for run_id, restarted in (("whole", False), ("restarted", True)):
        driver = drive(config, run_id=run_id)
        order = ordered(1, 16, site="layers.0", blueprint="widen", run_id=run_id)
        driver.schedule = (order,)
        (first,) = driver.train(1, expects_decision=True)
        assert driver.session.install(driver.world.deliver(first, order)).accepted
        driver.train(2)
        assert driver.session.judge(f"{run_id}/a1", silent).verdict is Verdict.KEEP
        if restarted:
            driver = drive(config, run_id=run_id)
            assert driver.session.describe().warnings == ()
        driver.train(3)
        assert [
            kernel.accelerated is not None for kernel in grown_kernels(driver.session._shared.run.trainee.model)
        ] == [True]
        driver.train(4)
        digests.append(driver.digest())
    assert digests[0] == digests[1]
