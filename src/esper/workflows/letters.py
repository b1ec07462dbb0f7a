"""Reads what a signal brought: anybody may send one, so nothing is taken for granted."""

import json
from collections.abc import Sequence
from typing import TypeVar

from pydantic import ValidationError

from esper.contracts.base import Contract
from esper.contracts.base import first_problem

MessageT = TypeVar("MessageT", bound=Contract)


def read(kind: type[MessageT], sent: Sequence[object]) -> MessageT | str:
    """The one message among the arguments of a signal, as JSON gave them; else why there is none, in a few words."""
    if len(sent) != 1:
        return f"{len(sent)} arguments in place of one message"
    try:
        return kind.model_validate_json(json.dumps(sent[0], allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        if not isinstance(error, ValidationError):
            return "not JSON"
        place, problem = first_problem(error)
        return f"{place or 'message'}: {problem}"
