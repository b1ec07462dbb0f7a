import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies

from esper.errors import ConfigurationError
from esper.runtime.configuration import check_output
from esper.runtime.configuration import check_run_id


@pytest.mark.parametrize("run_id", ["digits-1", "a", "A_b-3", "0", "x" * 64])
def test_a_proper_run_id_is_returned(run_id: str) -> None:
    assert check_run_id(run_id) == run_id


@pytest.mark.parametrize(
    "run_id",
    [
        "../../etc",
        "x" * 300,
        "a b",
        "a\0b",
        ".",
        "..",
        "",
        "-a",
        "_a",
        "a/b",
        "a\n",
        "\u00e4",
        "\U0001f331",
        "CON",
        "nul",
        "com1",
    ],
)
def test_a_run_id_that_is_no_name_is_refused(run_id: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        check_run_id(run_id)
    assert caught.value.code == "ESP-209"
    assert "\0" not in caught.value.message
    assert len(caught.value.message) < 200


@given(strategies.text(max_size=70))
def test_a_run_id_is_a_file_name(run_id: str) -> None:
    try:
        accepted = check_run_id(run_id)
    except ConfigurationError:
        return
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", accepted)


def refusal(folder: Path) -> str:
    with pytest.raises(ConfigurationError) as caught:
        check_output(folder)
    assert caught.value.code == "ESP-208"
    assert str(folder) in caught.value.message
    return caught.value.message


def test_an_output_folder_that_can_be_written_is_returned_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert check_output(Path("results/a")) == tmp_path / "results" / "a"
    (tmp_path / "empty").mkdir()
    assert check_output(tmp_path / "empty") == tmp_path / "empty"
    assert {path.name for path in tmp_path.iterdir()} == {"empty"}


def test_an_output_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    assert "is a file" in refusal(tmp_path / "file")
    assert "is a file" in refusal(tmp_path / "file" / "below")
    assert "is not empty" in refusal(tmp_path / "full")
    refusal(tmp_path / "loop")
    refusal(tmp_path / "loop" / "below")
    assert "leads nowhere" in refusal(tmp_path / "nowhere")
    refusal(tmp_path / ("x" * 300))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_below_a_locked_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "is not writable" in refusal(tmp_path / "a")


def test_a_kernel_file_system_is_not_writable() -> None:
    refusal(Path("/proc/esper"))


def test_a_folder_that_is_gone_is_no_place_for_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    refusal(Path("results"))
