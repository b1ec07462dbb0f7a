import os
import stat
from pathlib import Path

import pytest

from esper.contracts.config import UrzaConfig
from esper.errors import ConfigurationError
from esper.runtime.home import find_home
from esper.runtime.home import logs_folder
from esper.runtime.home import make_home
from esper.runtime.home import resolve_urza
from esper.runtime.home import temporal_database
from esper.runtime.home import workers_folder


def refusal(value: str) -> ConfigurationError:
    with pytest.raises(ConfigurationError) as caught:
        make_home({"ESPER_HOME": value})
    assert caught.value.exit_code == 2
    return caught.value


def test_a_home_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    home = make_home({"ESPER_HOME": str(tmp_path / "deep" / "home")})
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert logs_folder(home).is_dir()
    assert workers_folder(home).is_dir()
    assert make_home({"ESPER_HOME": str(home)}) == home


def test_finding_a_home_writes_nothing(tmp_path: Path) -> None:
    assert find_home({"ESPER_HOME": str(tmp_path / "home")}) == tmp_path / "home"
    assert list(tmp_path.iterdir()) == []


def test_a_relative_home_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_home({"ESPER_HOME": "here"}) == tmp_path / "here"


def test_the_default_is_the_users_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_home({}).is_relative_to(tmp_path)
    assert find_home({}).name == "esper"


def test_without_any_home_the_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platformdirs.user_data_dir", lambda *_, **__: "~/.local/share/esper")
    with pytest.raises(ConfigurationError) as caught:
        find_home({})
    assert caught.value.code == "ESP-208"
    assert "ESPER_HOME" in str(caught.value)


def test_a_home_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert refusal("").code == refusal("  ").code == "ESP-211"
    for value in (str(tmp_path / "file"), str(tmp_path / "file" / "below"), "/proc/esper", "a\0b", "x" * 300):
        assert refusal(value).code == "ESP-208"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_home_that_is_locked_is_named(tmp_path: Path) -> None:
    make_home({"ESPER_HOME": str(tmp_path)})
    tmp_path.chmod(0o500)
    assert refusal(str(tmp_path)).code == "ESP-208"


def test_urza_is_at_home_unless_it_is_named(tmp_path: Path) -> None:
    local = resolve_urza(UrzaConfig(), tmp_path)
    assert local.database == f"sqlite+aiosqlite:///{tmp_path}/urza.db"
    assert local.objects == str(tmp_path / "objects")
    named = UrzaConfig(database="postgresql+psycopg://host/db", objects="s3://bucket/prefix")
    assert resolve_urza(named, tmp_path) == named


def test_every_server_version_has_its_own_database(tmp_path: Path) -> None:
    assert temporal_database(tmp_path, "1.31.2").name == "temporal-1.31.2.db"
