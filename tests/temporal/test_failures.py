"""Every error of Esper survives Temporal: a failure and back, and the wire in between."""

import asyncio

import pytest
from temporalio.api.failure.v1 import Failure
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.exceptions import ActivityError
from temporalio.exceptions import ApplicationError
from temporalio.exceptions import RetryState

from esper import errors
from esper.errors import EsperError
from esper.errors import LeaseLost
from esper.errors import RunFailed
from esper.errors import UnavailableError
from esper.errors import by_name
from esper.runtime.temporal.failures import from_failure
from esper.runtime.temporal.failures import to_failure


def tree(kind: type[EsperError]) -> list[type[EsperError]]:
    return [kind, *(below for child in kind.__subclasses__() for below in tree(child))]


KINDS = tree(EsperError)


def over_the_wire(failure: BaseException) -> BaseException:
    """What the other side of a server sees of it."""

    async def convert() -> BaseException:
        wire = Failure()
        await pydantic_data_converter.encode_failure(failure, wire)
        return await pydantic_data_converter.decode_failure(Failure.FromString(wire.SerializeToString()))

    return asyncio.run(convert())


def test_the_tree_is_all_of_it() -> None:
    defined = {value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, EsperError)}
    assert defined == set(KINDS)
    assert all(by_name(kind.__name__) is kind for kind in KINDS)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(("hint", "run_id"), [("do this", "r-1"), (None, None)])
def test_an_error_comes_back_as_what_it_was(kind: type[EsperError], hint: str | None, run_id: str | None) -> None:
    sent = kind("ESP-999", "what happened where", hint=hint, run_id=run_id)
    for received in (to_failure(sent), over_the_wire(to_failure(sent))):
        error = from_failure(received)
        assert type(error) is kind
        assert error.to_json() == sent.to_json()
        assert str(error) == str(sent)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_only_what_may_heal_is_tried_again(kind: type[EsperError]) -> None:
    assert to_failure(kind("ESP-999", "x")).non_retryable is not issubclass(kind, UnavailableError)


def test_an_error_is_found_behind_all_its_causes() -> None:
    inner = to_failure(LeaseLost("ESP-503", "fenced"))
    activity = ActivityError(
        "activity failed",
        scheduled_event_id=1,
        started_event_id=2,
        identity="",
        activity_type="train_epoch",
        activity_id="1",
        retry_state=RetryState.NON_RETRYABLE_FAILURE,
    )
    activity.__cause__ = inner
    outer = ApplicationError("the child failed")
    outer.__cause__ = activity
    assert isinstance(from_failure(over_the_wire(outer)), LeaseLost)


@pytest.mark.parametrize(
    "failure",
    [
        ApplicationError("x", type="LeaseLost"),
        ApplicationError("x", "no mapping", type="LeaseLost"),
        ApplicationError("x", {"code": "ESP-503"}, type="LeaseLost"),
        ApplicationError("x", {"code": "ESP-503", "message": "m"}, type="NobodyKnows"),
        ValueError("first line\nx"),
    ],
)
def test_a_failure_of_another_kind_is_a_failed_run_and_never_raises(failure: BaseException) -> None:
    error = from_failure(failure)
    assert (type(error), error.code) == (RunFailed, "ESP-601")
    assert error.message.endswith("x")
    assert "\n" not in error.message


def test_a_failure_without_words_is_named() -> None:
    assert from_failure(ValueError()).message == "ValueError"
