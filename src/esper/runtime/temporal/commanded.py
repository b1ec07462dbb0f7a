"""What a workflow orders, noted down while it is replayed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from temporalio.worker import ContinueAsNewInput
from temporalio.worker import Interceptor
from temporalio.worker import StartActivityInput
from temporalio.worker import StartChildWorkflowInput
from temporalio.worker import WorkflowInboundInterceptor
from temporalio.worker import WorkflowInterceptorClassInput
from temporalio.worker import WorkflowOutboundInterceptor
from temporalio.workflow import ActivityHandle
from temporalio.workflow import ChildWorkflowHandle


@dataclass(frozen=True)
class Command:
    """One thing that a workflow orders. `what` names it for people; `argument` is what it is given, as JSON."""

    kind: str
    what: str
    argument: Any


class Recording(Interceptor):
    """Give it to a `Replayer`: the commands that the replayed workflow gives, in order. Timers are not among them."""

    def __init__(self) -> None:
        self.commands: list[Command] = []

    def workflow_interceptor_class(
        self, input: WorkflowInterceptorClassInput
    ) -> type[WorkflowInboundInterceptor] | None:
        commands = self.commands

        class Inbound(WorkflowInboundInterceptor):
            def init(self, outbound: WorkflowOutboundInterceptor) -> None:
                super().init(_Recorder(outbound, commands))

        return Inbound


class _Recorder(WorkflowOutboundInterceptor):
    def __init__(self, next: WorkflowOutboundInterceptor, commands: list[Command]) -> None:
        super().__init__(next)
        self.commands = commands

    def start_activity(self, input: StartActivityInput) -> ActivityHandle[Any]:
        self.commands.append(Command("activity", f"{input.activity} ({input.summary})", _plain(input.args)))
        return super().start_activity(input)

    async def start_child_workflow(self, input: StartChildWorkflowInput) -> ChildWorkflowHandle[Any, Any]:
        self.commands.append(Command("child workflow", input.id, _plain(input.args)))
        return await super().start_child_workflow(input)

    def continue_as_new(self, input: ContinueAsNewInput) -> Any:
        self.commands.append(Command("continue as new", "", _plain(input.args)))
        return super().continue_as_new(input)


def _plain(arguments: Sequence[Any]) -> Any:
    (argument,) = arguments if len(arguments) == 1 else (list(arguments),)
    return argument.model_dump(mode="json") if isinstance(argument, BaseModel) else argument
