"""Every error that Esper raises on purpose.

    EsperError
    ├── UsageError            exit 2   what was asked cannot be done as asked; ESP-200 the command line itself
    │   ├── ConfigurationError         ESP-201..214  files, keys, values, paths, ids
    │   ├── TargetError                ESP-310..313  the user's own task
    │   ├── SiteError                  ESP-314       layers and sites
    │   ├── DeviceError                ESP-315       devices
    │   ├── DatasetError               ESP-340..346  data that cannot be trained on
    │   ├── BlueprintError             ESP-410..428  blueprints, their IR and the limits of the forge
    │   └── GrowthError                ESP-431..440  a graft, cull or fold that cannot be done
    ├── UnavailableError      exit 3   a service cannot be reached or data cannot be had
    │   ├── TemporalUnavailable        ESP-301..307
    │   ├── ObjectsUnavailable         ESP-321..324
    │   ├── DatabaseUnavailable        ESP-331..334
    │   └── DataUnavailable            ESP-207
    ├── IntegrityError        exit 4   stored bytes are not what they must be   ESP-401..409
    │   └── DivergenceError            ESP-409       a history and the code disagree
    ├── ConflictError         exit 5   running, exists, fenced
    │   ├── RunConflict                ESP-501, 502, 504
    │   └── LeaseLost                  ESP-503       another process owns the run now
    ├── NotFoundError         exit 6   ESP-430 kernels, ESP-505 runs
    ├── RunFailed             exit 1   ESP-601       the run itself failed; ESP-602 a fault of Esper's own
    ├── EnvironmentTooOld     exit 2   ESP-101       Python, torch or temporalio
    └── PackageMissing        exit 2   ESP-102       an optional package that is not installed

A message says what, where and why; `hint` says what to do. `code` is stable: tests and scripts may
rely on it.
"""

from typing import Any


class EsperError(Exception):
    """Base of all. `exit_code` is what `esper-cli` ends with.

    ```python
    raise ConfigurationError("ESP-204", "run.max_epochs at run.yaml:4: 0 is below 1", hint="give at least 1")
    ```
    """

    exit_code = 1

    def __init__(self, code: str, message: str, *, hint: str | None = None, run_id: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint
        self.run_id = run_id

    def __str__(self) -> str:
        return f"{self.message.rstrip('.')}. {self.hint}" if self.hint else self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.code, self.message, self.hint, self.run_id))

    def to_json(self) -> dict[str, Any]:
        """The error form of `--json`, also the form in which a failed run keeps its error."""
        return {"code": self.code, "message": self.message, "hint": self.hint, "run_id": self.run_id}


class UsageError(EsperError):
    exit_code = 2


class ConfigurationError(UsageError):
    pass


class TargetError(UsageError):
    pass


class SiteError(UsageError):
    pass


class DeviceError(UsageError):
    pass


class DatasetError(UsageError):
    pass


class BlueprintError(UsageError):
    pass


class GrowthError(UsageError):
    pass


class EnvironmentTooOld(UsageError):
    pass


class PackageMissing(UsageError):
    pass


class UnavailableError(EsperError):
    exit_code = 3


class TemporalUnavailable(UnavailableError):
    pass


class ObjectsUnavailable(UnavailableError):
    pass


class DatabaseUnavailable(UnavailableError):
    pass


class DataUnavailable(UnavailableError):
    pass


class IntegrityError(EsperError):
    exit_code = 4


class DivergenceError(IntegrityError):
    pass


class ConflictError(EsperError):
    exit_code = 5


class RunConflict(ConflictError):
    pass


class LeaseLost(ConflictError):
    pass


class NotFoundError(EsperError):
    exit_code = 6


class RunFailed(EsperError):
    exit_code = 1


def _rebuild(kind: type[EsperError], code: str, message: str, hint: str | None, run_id: str | None) -> EsperError:
    return kind(code, message, hint=hint, run_id=run_id)


def _kinds(kind: type[EsperError]) -> dict[str, type[EsperError]]:
    kinds = {kind.__name__: kind}
    for child in kind.__subclasses__():
        kinds |= _kinds(child)
    return kinds


def by_name(name: str) -> type[EsperError] | None:
    """The class of that name: how an error keeps its kind across a process border."""
    return _kinds(EsperError).get(name)


_BY_RANGE: tuple[tuple[int, int, type[EsperError]], ...] = (
    (101, 101, EnvironmentTooOld),
    (102, 102, PackageMissing),
    (200, 200, UsageError),
    (207, 207, DataUnavailable),
    (201, 214, ConfigurationError),
    (301, 307, TemporalUnavailable),
    (310, 313, TargetError),
    (314, 314, SiteError),
    (315, 315, DeviceError),
    (321, 324, ObjectsUnavailable),
    (331, 334, DatabaseUnavailable),
    (340, 346, DatasetError),
    (409, 409, DivergenceError),
    (401, 408, IntegrityError),
    (410, 429, BlueprintError),
    (430, 430, NotFoundError),
    (431, 440, GrowthError),
    (503, 503, LeaseLost),
    (501, 504, RunConflict),
    (505, 505, NotFoundError),
)


def by_code(code: str) -> type[EsperError]:
    """The class a code belongs to, by the ranges above; `RunFailed` for any other: a failed run keeps only the code."""
    digits = code.removeprefix("ESP-")
    number = int(digits) if digits.isdecimal() else 0
    return next((kind for low, high, kind in _BY_RANGE if low <= number <= high), RunFailed)


def last_line(error: BaseException) -> str:
    """The kind of an error that is not Esper's, and the last line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__
