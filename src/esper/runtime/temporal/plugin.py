"""What every client, worker and replayer of Esper shares, so that they cannot drift apart.

The pydantic converter, which lets no secret pass in the text of a failure; the sandbox that passes Esper's own modules
through; and the one place where an `EsperError` becomes a Temporal failure and back.
"""

from dataclasses import replace
from typing import Any

from temporalio import activity
from temporalio.api.failure.v1 import Failure
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.converter import DataConverter
from temporalio.converter import DefaultFailureConverter
from temporalio.converter import PayloadConverter
from temporalio.plugin import SimplePlugin
from temporalio.worker import ActivityInboundInterceptor
from temporalio.worker import ExecuteActivityInput
from temporalio.worker import Interceptor
from temporalio.worker import WorkflowRunner
from temporalio.worker.workflow_sandbox import SandboxedWorkflowRunner

from esper.errors import EsperError
from esper.runtime.logs import redact
from esper.runtime.logs import run_context
from esper.runtime.temporal.failures import to_failure


class _ErrorsInbound(ActivityInboundInterceptor):
    async def execute_activity(self, input: ExecuteActivityInput) -> Any:
        # Child workflows are named `<run>/...`.
        workflow_id = activity.info().workflow_id or ""
        with run_context(workflow_id.split("/", 1)[0]):
            try:
                return await super().execute_activity(input)
            except EsperError as error:
                raise to_failure(error) from error


class ErrorInterceptor(Interceptor):
    """Turns every `EsperError` that leaves an activity into its Temporal form, and marks its logs with the run."""

    def intercept_activity(self, next: ActivityInboundInterceptor) -> ActivityInboundInterceptor:
        return _ErrorsInbound(next)


# The workflows themselves are loaded anew inside the sandbox, so that its guards reach their code; what
# they are built from (data, names, numbers) is shared.
_SHARED_MODULES = ("esper.contracts", "esper.errors", "esper.activities.names", "esper.runtime", "lazy_loader")


def _runner(existing: WorkflowRunner | None) -> WorkflowRunner:
    if isinstance(existing, SandboxedWorkflowRunner):
        return replace(existing, restrictions=existing.restrictions.with_passthrough_modules(*_SHARED_MODULES))
    if existing is None:
        raise ValueError("a worker without a workflow runner")
    return existing


class RedactedFailures(DefaultFailureConverter):
    """Failures without secrets: what an exception says, also one of a library or of the user's own code, is kept in
    the history for ever."""

    def to_failure(self, exception: BaseException, payload_converter: PayloadConverter, failure: Failure) -> None:
        # Called again for each cause.
        super().to_failure(exception, payload_converter, failure)
        failure.message = redact(failure.message)
        failure.stack_trace = redact(failure.stack_trace)
        for payload in failure.application_failure_info.details.payloads:
            if payload.metadata.get("encoding", b"").startswith(b"json/"):
                payload.data = redact(payload.data.decode()).encode()


_CONVERTER = replace(pydantic_data_converter, failure_converter_class=RedactedFailures)


def _converter(existing: DataConverter | None) -> DataConverter:
    return _CONVERTER


class EsperPlugin(SimplePlugin):
    """Give it to `Client.connect(plugins=[EsperPlugin()])` and to `Replayer`; workers take it from the client."""

    def __init__(self) -> None:
        super().__init__(
            "esper",
            data_converter=_converter,
            interceptors=[ErrorInterceptor()],
            workflow_runner=_runner,
        )
