"""What the one plugin gives to clients, workers and replayers."""

import asyncio
import logging
import uuid

import pytest
from temporalio import activity
from temporalio.client import Client
from temporalio.client import WorkflowFailureError
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.exceptions import ApplicationError
from temporalio.testing import ActivityEnvironment
from temporalio.worker import ExecuteActivityInput
from temporalio.worker import Worker
from temporalio.worker import WorkflowRunner
from temporalio.worker.workflow_sandbox import SandboxedWorkflowRunner
from workflow_stage import configuration

from esper.contracts.orders import RecordRun
from esper.contracts.orders import TrainingRequest
from esper.errors import TargetError
from esper.runtime.temporal import queues
from esper.runtime.temporal.options import OPTIONS
from esper.runtime.temporal.plugin import ErrorInterceptor
from esper.runtime.temporal.plugin import EsperPlugin
from esper.runtime.temporal.plugin import _runner
from esper.workflows.training_run import TrainingRun


def test_the_sandbox_stays_and_shares_what_is_pure() -> None:
    runner = _runner(SandboxedWorkflowRunner())
    assert isinstance(runner, SandboxedWorkflowRunner)
    shared = runner.restrictions.passthrough_modules
    assert {"esper.contracts", "esper.errors", "esper.runtime"} <= shared
    assert "esper.workflows" not in shared


def test_another_runner_is_left_alone_and_none_is_refused() -> None:
    class Other(WorkflowRunner):
        def prepare_workflow(self, defn: object) -> None: ...

        def set_worker_level_failure_exception_types(self, types: object) -> None: ...

        def create_instance(self, det: object) -> object: ...

    other = Other()
    assert _runner(other) is other
    with pytest.raises(ValueError, match="without a workflow runner"):
        _runner(None)


def test_an_error_leaves_an_activity_in_its_temporal_form() -> None:
    class Next:
        async def execute_activity(self, input: ExecuteActivityInput) -> object:
            raise {"ours": TargetError("ESP-310", "no module"), "theirs": KeyError("x")}[input.args[0]]

    @activity.defn
    async def through(what: str) -> object:
        inbound = ErrorInterceptor().intercept_activity(Next())  # type: ignore[arg-type]
        return await inbound.execute_activity(ExecuteActivityInput(fn=through, args=[what], executor=None, headers={}))

    environment = ActivityEnvironment()
    with pytest.raises(ApplicationError) as ours:
        asyncio.run(environment.run(through, "ours"))
    assert (ours.value.type, ours.value.non_retryable) == ("TargetError", True)
    with pytest.raises(KeyError):
        asyncio.run(environment.run(through, "theirs"))


@pytest.mark.temporal
def test_an_error_of_an_activity_reaches_the_client_with_its_code(
    temporal_address: str, caplog: pytest.LogCaptureFixture
) -> None:
    @activity.defn(name="record_run")
    async def record_run(request: RecordRun) -> None:
        raise TargetError("ESP-310", f"no task for {request.run_id}", hint="look again")

    async def scene() -> ApplicationError:
        client = await Client.connect(temporal_address, plugins=[EsperPlugin()])
        expected = pydantic_data_converter.payload_converter_class
        assert client.data_converter.payload_converter_class is expected
        run_id = f"run-{uuid.uuid4().hex[:8]}"
        async with Worker(client, task_queue=queues.ORCHESTRATION, workflows=[TrainingRun], activities=[record_run]):
            with pytest.raises(WorkflowFailureError) as failed:
                request = TrainingRequest(run_id=run_id, config=configuration(2))
                await client.execute_workflow(TrainingRun.run, request, id=run_id, task_queue=queues.ORCHESTRATION)
        assert isinstance(failed.value.cause, ApplicationError)
        return failed.value.cause

    with caplog.at_level(logging.CRITICAL):
        cause = asyncio.run(scene())
    assert cause.type == "TargetError"
    assert cause.details[0]["hint"] == "look again"


def test_every_activity_that_beats_has_a_time_out_and_every_one_has_options() -> None:
    from esper.activities import names

    known = {value.name for value in vars(names).values() if isinstance(value, names.ActivityName)}
    assert known == set(OPTIONS) - {"reclaim_trainer"}
    for name, options in OPTIONS.items():
        keywords = options.keywords()
        assert keywords["start_to_close_timeout"] is not None, name
        if options.retry.maximum_attempts == 1:
            assert options.schedule_to_start is not None, f"{name}: a dead pinned queue must be noticed"
