"""Calling the user's own task factory by its import string, and saying in one line why that failed."""

import difflib
import importlib
import inspect
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any
from typing import NoReturn

from esper.errors import TargetError
from esper.errors import last_line

_HINT = "Give package.module:function of your own code, a function that returns esper.Task"


def call_target(target: str, arguments: Mapping[str, Any]) -> object:
    """What `module:function` returns for `arguments`.

    Targets in the standard library or builtins are refused without being imported or called. Raises `TargetError`:
    ESP-310 module (refused or not importable), ESP-311 attribute (missing or not callable), ESP-313 raised.
    """
    module_name, _, attribute = target.partition(":")
    if not module_name or not attribute:
        raise TargetError("ESP-310", f"task.target {target!r} is not of the form module:function", hint=_HINT)
    refuse_standard(target)
    function = _attribute(_module(target, module_name), target, attribute)
    try:
        return function(**arguments)
    except (Exception, SystemExit) as error:
        _raised(f"task.target {target!r} raised", error)


def refuse_standard(target: str) -> None:
    """Raise `TargetError` (ESP-310) when the target's module is Python's own; nothing is imported."""
    module_name = target.partition(":")[0]
    if _is_standard(module_name):
        raise TargetError(
            "ESP-310",
            f"task.target {target!r}: {module_name!r} belongs to Python or to Esper itself and is refused",
            hint=_HINT,
        )


def no_such_module(target: str, module_name: str) -> TargetError:
    """ESP-310, for a module that cannot be found."""
    return TargetError(
        "ESP-310",
        f"task.target {target!r}: there is no module {module_name!r}",
        hint="Start from the folder that holds it, put that folder on PYTHONPATH, or install the package",
    )


def _is_standard(module_name: str) -> bool:
    top = module_name.partition(".")[0]
    return top in sys.stdlib_module_names or top in sys.builtin_module_names or top in ("builtins", "__main__", "esper")


def _module(target: str, module_name: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if module_name == missing or module_name.startswith(f"{missing}."):
            raise no_such_module(target, missing) from error
        raise TargetError(
            "ESP-310", f"task.target {target!r}: {module_name} needs {missing!r}, which is not installed"
        ) from error
    except (Exception, SystemExit) as error:
        _raised(f"task.target {target!r}: importing {module_name} raised", error)


def _attribute(module: ModuleType, target: str, attribute: str) -> Any:
    value: Any = module
    for part in attribute.split("."):
        if not hasattr(value, part):
            near = difflib.get_close_matches(part, [name for name in dir(value) if not name.startswith("_")], n=1)
            raise TargetError(
                "ESP-311",
                f"task.target {target!r}: {module.__name__} has no {attribute!r}",
                hint=f"Did you mean {near[0]}?" if near else _HINT,
            )
        value = getattr(value, part)
    if not callable(value):
        raise TargetError("ESP-311", f"task.target {target!r} is a {type(value).__name__}, not callable", hint=_HINT)
    home = getattr(value, "__module__", None)
    if (inspect.isroutine(value) or inspect.isclass(value)) and isinstance(home, str) and _is_standard(home):
        raise TargetError("ESP-310", f"task.target {target!r} is {home}'s own and is refused", hint=_HINT)
    return value


def _raised(what: str, error: BaseException) -> NoReturn:
    raise TargetError(
        "ESP-313", f"{what} {last_line(error)}", hint="It is your code that raised; run it by itself"
    ) from error
