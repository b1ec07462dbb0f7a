"""One kernel: build, certify, publish, and tell the run by signal."""

import hashlib
from datetime import timedelta

from temporalio import workflow
from temporalio.exceptions import ActivityError
from temporalio.exceptions import ApplicationError
from temporalio.exceptions import is_cancelled_exception

from esper.activities import names
from esper.contracts.messages import Envelope
from esper.contracts.messages import KernelFailed
from esper.contracts.messages import KernelReady
from esper.contracts.messages import Payload
from esper.contracts.operational import KernelDelivery
from esper.contracts.orders import BuildRequest
from esper.contracts.orders import CertifyRequest
from esper.runtime.temporal import queues
from esper.runtime.temporal.options import FORGE_MARGIN
from esper.runtime.temporal.workflow_types import TEZZERET_COMPILE
from esper.workflows.ordering import order

_LONGEST_REASON = 1000


@workflow.defn(name=TEZZERET_COMPILE)
class TezzeretCompile:
    """Child of a `TrainingRun`, id `<run>/tezzeret/<adaptation>`; outlives its parent's continue-as-new.

    However it ends, the run is told: it would wait for ever else.
    """

    @workflow.run
    async def run(self, request: BuildRequest) -> KernelDelivery | None:
        try:
            delivery = await self._make(request)
        except ActivityError as failure:
            cancelled = is_cancelled_exception(failure)
            reason = "the forge was cancelled" if cancelled else f"{failure.activity_type}: {failure.cause or failure}"
            await self._tell_failure(request, reason)
            if cancelled:
                raise
            return None
        if delivery is None:
            await self._tell_failure(request, "the kernel was published without a certificate")
            return None
        await self._tell(request, KernelReady(delivery=delivery))
        return delivery

    async def _make(self, request: BuildRequest) -> KernelDelivery | None:
        adaptation = request.adaptation
        subject = f"{adaptation.blueprint} for {adaptation.site}"
        work = timedelta(seconds=request.tezzeret.timeout_s)
        # Twice: one part for waiting for a forge, or for one that dies over it; one for its work.
        limit, deadline = work + FORGE_MARGIN, 2 * work + FORGE_MARGIN
        built = await order(
            names.BUILD_KERNEL,
            request,
            task_queue=queues.FORGE,
            summary=f"build {subject}",
            limit=limit,
            deadline=deadline,
        )
        certified = await order(
            names.CERTIFY_KERNEL,
            CertifyRequest(kernel=built.kernel, build=request),
            task_queue=queues.FORGE,
            summary=f"certify {subject}",
            limit=limit,
            deadline=deadline,
        )
        published = await order(
            names.PUBLISH_KERNEL,
            certified,
            task_queue=queues.FORGE,
            summary=f"publish {built.kernel.digest[:19]}",
            deadline=deadline,
        )
        kernel = published.kernel
        if kernel.certificate is None:
            return None
        return KernelDelivery(
            delivery_id=_delivery_id(request),
            adaptation=adaptation,
            kernel=kernel.digest,
            manifest=kernel.manifest,
            weights=kernel.weights,
            certificate=kernel.certificate,
        )

    async def _tell_failure(self, request: BuildRequest, reason: str) -> None:
        adaptation_id = request.adaptation.adaptation_id
        await self._tell(request, KernelFailed(adaptation_id=adaptation_id, reason=reason[:_LONGEST_REASON]))

    async def _tell(self, request: BuildRequest, payload: Payload) -> None:
        """Signal the run by workflow id alone, so that the message follows it through continue-as-new."""
        signal = payload.topic.value.replace(".", "_")
        envelope = Envelope(
            event_id=f"{request.adaptation.adaptation_id}/{signal}",
            trace_id=request.run_id,
            causation_id=request.adaptation.adaptation_id,
            sender="tezzeret",
            payload=payload,
        )
        run = workflow.get_external_workflow_handle(request.run_id)
        try:
            await run.signal(signal, envelope)
        except ApplicationError as failure:
            if failure.type != "ExternalWorkflowExecutionNotFound":
                raise
            # The run is over. The kernel stays in Urza.
            workflow.logger.info("run %s is gone; %s undelivered", request.run_id, signal)


def _delivery_id(request: BuildRequest) -> str:
    adaptation = request.adaptation
    subject = (
        f"{request.run_id}\n{adaptation.adaptation_id}\n{adaptation.site}\n"
        f"{adaptation.seed}\n{adaptation.seed_generation}"
    )
    return f"sha256:{hashlib.sha256(subject.encode()).hexdigest()}"
