"""The fake world with faults: errors before or after the work of an activity, and results that are altered."""

import typing
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import field
from typing import Any

from fake_activities import FakeWorld
from temporalio import activity


@dataclass
class FaultyWorld(FakeWorld):
    """By activity name. An error before: the work was not done. One after: it was done, and nobody was told."""

    before: dict[str, list[BaseException]] = field(default_factory=dict)
    after: dict[str, list[BaseException]] = field(default_factory=dict)
    alter: dict[str, Callable[[Any], Any]] = field(default_factory=dict)

    def all(self) -> list[Callable[..., Any]]:
        return [self._faulty(method) for method in super().all()]

    def _faulty(self, method: Callable[..., Any]) -> Callable[..., Any]:
        name = method.__name__

        async def run(request: Any) -> Any:
            if self.before.get(name):
                raise self.before[name].pop(0)
            result = await method(request)
            if self.after.get(name):
                raise self.after[name].pop(0)
            return self.alter[name](result) if name in self.alter else result

        hints = typing.get_type_hints(method)
        run.__annotations__ = {"request": hints["request"], "return": hints["return"]}
        return activity.defn(name=name)(run)
