"""The user's own data source fails, before a run begins and in the middle of it: fault row A14, bad input 16 and 40."""

from collections.abc import Callable
from collections.abc import Iterator

import failing_data
import pytest
from failing_data import Fault
from tolaria_world import Driver
from tolaria_world import World
from tolaria_world import make_config

from esper.errors import DatasetError
from esper.errors import EsperError
from esper.errors import RunFailed
from esper.errors import TargetError

pytestmark = pytest.mark.fault("A14")

CONFIG = make_config("failing_data:task", training={"batch_size": 16}, run={"max_epochs": 3})
STEPS = 4

Drive = Callable[..., Driver]


@pytest.fixture(autouse=True)
def fault(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fault]:
    made = Fault()
    monkeypatch.setattr(failing_data, "FAULT", made)
    yield made


ERRORS: dict[str, Callable[[], BaseException]] = {
    "an error": lambda: OSError(5, "Input/output error"),
    "an exit": lambda: SystemExit("no such table"),
    "an end": lambda: IndexError("read past the end\nrow 12 is gone"),
}
SAID = {
    "an error": "Input/output error",
    "an exit": "SystemExit: no such table",
    "an end": "IndexError: row 12 is gone",
}


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_data_that_raise_in_the_middle_fail_the_run_in_one_line_and_it_goes_on_once_they_are_mended(
    drive: Drive, world: World, fault: Fault, split: str, kind: str
) -> None:
    whole = drive(CONFIG, run_id="whole")
    whole.train(1, 2, 3)
    driver = drive(CONFIG)
    driver.train(1)
    fault.split, fault.error, fault.at = split, ERRORS[kind], fault.readings[split] + 20
    with pytest.raises(RunFailed) as caught:
        driver.train(2)
    error = caught.value
    assert (error.code, error.exit_code, error.run_id) == ("ESP-601", 1, "run")
    assert SAID[kind] in error.message and "\n" not in error.message
    assert "step 5 raised" in error.message if split == "train" else "after epoch 2" in error.message
    assert error.hint is not None and "esper-cli resume run" in error.hint
    # It is over: no other order of the session does anything.
    with pytest.raises(EsperError):
        driver.train(2)
    record = world.call(world.library.run("run"))
    assert record.steps == STEPS and len(world.call(world.library.reports("run"))) == 1
    fault.split = "none"
    again = drive(CONFIG)
    assert again.session.describe().step == STEPS
    again.train(2, 3)
    assert again.digest() == whole.digest()


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        (Fault("train", lambda: KeyError("x"), 1), "ESP-313", r"train\[0\] raised KeyError"),
        (Fault("validation", lambda: SystemExit(3), 1), "ESP-313", r"validation\[0\] raised SystemExit: 3"),
        # The rows are looked at first, then the first batch is made.
        (
            Fault("train", lambda: OSError(5, "Input/output error"), 70),
            "ESP-313",
            "first batch of train .*Input/output",
        ),
        (Fault("train", size_error=lambda: OSError(2, "gone")), "ESP-313", "size of train .*gone"),
        (Fault("validation", size_error=lambda: TypeError("no len")), "ESP-313", "size of validation .*no len"),
    ],
)
def test_data_that_raise_at_once_are_refused_before_anything_is_recorded(
    drive: Drive, world: World, monkeypatch: pytest.MonkeyPatch, given: Fault, code: str, said: str
) -> None:
    monkeypatch.setattr(failing_data, "FAULT", given)
    with pytest.raises(TargetError, match=said) as caught:
        drive(CONFIG)
    assert (caught.value.code, caught.value.exit_code) == (code, 2)
    assert world.call(world.library.heads("run")) == ()


def test_data_that_are_others_at_every_call_are_refused_before_the_first_step(drive: Drive, world: World) -> None:
    with pytest.raises(DatasetError, match="other data every time") as caught:
        drive(make_config("failing_data:unseeded", training={"batch_size": 16}))
    assert (caught.value.code, caught.value.exit_code) == ("ESP-346", 2)
    assert caught.value.hint is not None and "data_digest" in caught.value.hint
    assert world.call(world.library.heads("run")) == ()


def test_a_collate_function_that_raises_is_told_from_the_loss(drive: Drive) -> None:
    with pytest.raises(TargetError, match=r"first batch of train .*TypeError: rows of two kinds") as caught:
        drive(make_config("failing_data:failing_to_collate", training={"batch_size": 16}))
    assert caught.value.code == "ESP-313" and caught.value.hint is not None
