"""A kernel on its way into the live model: fetched, verified and built off the training thread.

Nothing here touches a global random generator: kernels are built on the meta device and filled from their bytes.
"""

import torch
from pydantic import ValidationError

from esper.contracts.assets import Certificate
from esper.contracts.enums import FactKind
from esper.contracts.operational import Fact
from esper.contracts.operational import KernelDelivery
from esper.contracts.operational import ScheduledAdaptation
from esper.errors import IntegrityError
from esper.runtime.kasmina.cache import kernel_cache
from esper.runtime.tezzeret.artifact import KernelFiles
from esper.runtime.tezzeret.build import KernelModule
from esper.runtime.tezzeret.build import load_kernel
from esper.runtime.tolaria.plan import TrainingPlan
from esper.runtime.tolaria.store import SessionStore


def prepare_kernel(delivery: KernelDelivery, store: SessionStore, device: torch.device) -> KernelModule:
    """A private trainable copy on `device`, through the kernel cache of this process.

    Raises `IntegrityError` (ESP-401..406) for damaged bytes or a certificate that is missing, failed or of another
    kernel; `GrowthError` (ESP-438) for a kernel larger than the cache; what the store raises when it is away.
    """
    _check_certificate(delivery, store.get(delivery.certificate))
    cache = kernel_cache()
    module = cache.get(delivery.kernel)
    if module is None:
        files = KernelFiles(store.get(delivery.manifest), store.get(delivery.weights))
        cache.put(files, delivery.kernel)
        # Under pressure it may have left the cache already.
        module = cache.get(delivery.kernel) or load_kernel(files, delivery.kernel)
    return module.to(device)


def _check_certificate(delivery: KernelDelivery, data: bytes) -> None:
    try:
        certificate = Certificate.model_validate_json(data)
    except ValidationError as error:
        raise IntegrityError("ESP-406", f"the certificate of kernel {delivery.kernel[:19]} is damaged") from error
    if certificate.kernel != delivery.kernel:
        raise IntegrityError(
            "ESP-406", f"the certificate is of kernel {certificate.kernel[:19]}, not of {delivery.kernel[:19]}"
        )
    if not certificate.passed:
        raise IntegrityError(
            "ESP-406", f"kernel {delivery.kernel[:19]} has no certificate: {'; '.join(certificate.failures)}"
        )


def graft_fact(run_id: str, delivery: KernelDelivery, apply_step: int, plan: TrainingPlan) -> Fact:
    """The fact of a graft at `apply_step`, with the step of its verdict."""
    adaptation = delivery.adaptation
    return Fact(
        run_id=run_id,
        adaptation_id=adaptation.adaptation_id,
        kind=FactKind.GRAFT,
        apply_step=apply_step,
        seq=0,
        site=adaptation.site,
        seed=adaptation.seed,
        delivery=delivery,
        judge_step=plan.judge_step(apply_step),
    )


def missed_fact(run_id: str, adaptation: ScheduledAdaptation, apply_step: int, reason: str) -> Fact:
    """The fact that an adaptation will not be grafted."""
    return Fact(
        run_id=run_id,
        adaptation_id=adaptation.adaptation_id,
        kind=FactKind.MISSED,
        apply_step=apply_step,
        seq=0,
        site=adaptation.site,
        seed=adaptation.seed,
        reason=reason,
    )
