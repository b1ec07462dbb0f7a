import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies

from esper.contracts.config import EsperConfig
from esper.contracts.config import TaskConfig
from esper.errors import ConfigurationError
from esper.errors import UsageError
from esper.runtime.configuration import config_schema
from esper.runtime.configuration import dump_config
from esper.runtime.configuration import list_packaged
from esper.runtime.configuration import list_quick_starts
from esper.runtime.configuration import load_config
from esper.runtime.configuration import reference_text
from esper.runtime.validation import key_paths
from esper.runtime.yaml_document import read_document


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def refusal(folder: Path, text: str, *overrides: str, **environment: str) -> UsageError:
    with pytest.raises(UsageError) as caught:
        load_config(write(folder, text), overrides=overrides, environment=environment)
    assert caught.value.exit_code == 2
    return caught.value


DIGITS = "task: {name: digits}\n"


def test_what_is_not_said_has_its_default(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, DIGITS), environment={})
    assert config == EsperConfig(task=TaskConfig(name="digits"))


def test_an_empty_section_says_nothing(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, f"{DIGITS}kasmina:\n  # cache_size_mb: 3\n"), environment={})
    assert config == EsperConfig(task=TaskConfig(name="digits"))


def test_set_beats_environment_beats_file(tmp_path: Path) -> None:
    path = write(tmp_path, f"{DIGITS}run: {{seed: 1, max_epochs: 1}}\noptimizer: {{lr: 0.5}}\n")
    environment = {"ESPER_RUN_SEED": "2", "ESPER_RUN_MAX_EPOCHS": "2"}
    config = load_config(path, overrides=["run.seed=3", "run.seed=4"], environment=environment)
    assert (config.run.seed, config.run.max_epochs, config.optimizer.lr) == (4, 2, 0.5)


def test_overrides_are_read_as_yaml() -> None:
    overrides = [
        "optimizer.lr=1e-3",
        "optimizer.schedule={name: linear}",
        "kasmina.exclude=[a, b]",
        "optimizer.clip=null",
    ]
    config = load_config(None, quick_start="digits", overrides=overrides, environment={})
    assert config.optimizer.lr == 1e-3
    assert config.optimizer.clip is None
    assert (config.optimizer.schedule.name, config.optimizer.schedule.warmup) == ("linear", 0.05)
    assert config.kasmina.exclude == ("a", "b")


def test_an_override_makes_the_mapping_that_it_needs() -> None:
    config = load_config(None, quick_start="digits", overrides=["training.early_stop.patience=3"], environment={})
    assert config.training.early_stop is not None
    assert config.training.early_stop.patience == 3


@pytest.mark.parametrize("name", ["run.seed", "optimizer.schedule.name", "kasmina.exclude"])
def test_every_key_has_its_environment_variable(name: str) -> None:
    values = {"run.seed": "7", "optimizer.schedule.name": "linear", "kasmina.exclude": "[a]"}
    variable = f"ESPER_{name.replace('.', '_').upper()}"
    config = load_config(None, quick_start="digits", environment={variable: values[name]})
    changed = load_config(None, quick_start="digits", overrides=[f"{name}={values[name]}"], environment={})
    assert config == changed != load_config(None, quick_start="digits", environment={})


def test_environment_variables_name_keys_uniquely() -> None:
    names = ["_".join(str(part) for part in path).upper() for path in key_paths()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", ["ESPER_HOME", "ESPER_TEMPORAL_CLI", "ESPER_S3_ENDPOINT_URL", "ESPERANTO", "PATH"])
def test_other_variables_are_no_configuration(name: str) -> None:
    plain = load_config(None, quick_start="digits", environment={})
    assert load_config(None, quick_start="digits", environment={name: "x"}) == plain


@pytest.mark.parametrize("name", ["ESPER_DB_URL", "ESPER_HOME", "ESPER_RUN_SEED"])
@pytest.mark.parametrize("value", ["", "  "])
def test_an_empty_variable_is_named(tmp_path: Path, name: str, value: str) -> None:
    error = refusal(tmp_path, DIGITS, **{name: value})
    assert error.code == "ESP-211"
    assert name in error.message


def test_an_unknown_variable_of_a_section_is_named(tmp_path: Path) -> None:
    error = refusal(tmp_path, DIGITS, ESPER_RUN_SEEDS="1")
    assert error.code == "ESP-203"
    assert "ESPER_RUN_SEEDS" in error.message
    assert "ESPER_RUN_SEED" in (error.hint or "")


def test_a_wrong_variable_is_named(tmp_path: Path) -> None:
    error = refusal(tmp_path, DIGITS, ESPER_RUN_SEED="many")
    assert error.code == "ESP-212"
    assert "ESPER_RUN_SEED" in error.message
    assert '"many"' in error.message


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("{}", "ESP-204", "task is missing"),
        ("- a\n", "ESP-204", "must be a mapping of sections"),
        ("task: {}", "ESP-204", "exactly one of task.name and task.target"),
        ("task: {name: a, target: 'a:b'}", "ESP-204", "exactly one"),
        ("task: {target: nocolon}", "ESP-310", "task.target at"),
        (f"{DIGITS}trainng: {{}}", "ESP-203", "unknown key trainng at"),
        (f"{DIGITS}training:\n  bach_size: 3", "ESP-203", "run.yaml:3:3"),
        (f"{DIGITS}run: 5", "ESP-204", "run at"),
        (f"{DIGITS}run: {{max_epochs: 0}}", "ESP-204", "a whole number from 1 to 1000000, not 0"),
        (f"{DIGITS}run: {{max_epochs: -1}}", "ESP-204", "not -1"),
        (f"{DIGITS}run: {{max_epochs: 1.5}}", "ESP-204", "not 1.5"),
        (f"{DIGITS}run: {{max_epochs: 1000000000000}}", "ESP-204", "not 1000000000000"),
        (f"{DIGITS}run: {{max_epochs: '5'}}", "ESP-204", 'not "5"'),
        (f"{DIGITS}run: {{seed: true}}", "ESP-204", "not true"),
        (f"{DIGITS}run: {{device: tpu}}", "ESP-315", "run.device"),
        (f"{DIGITS}run: {{threads: none}}", "ESP-204", "from 1 to 1024 or auto"),
        (f"{DIGITS}run: {{name: ../../etc}}", "ESP-204", "run.name"),
        (f"{DIGITS}optimizer: {{name: adamwx}}", "ESP-204", "one of sgd, adam, adamw"),
        (f"{DIGITS}kasmina: {{seeds_per_layer: 0}}", "ESP-204", "from 1 to 64"),
        (f"{DIGITS}kasmina: {{seeds_per_layer: 1000000}}", "ESP-204", "from 1 to 64"),
        (f"{DIGITS}kasmina: {{cache_size_mb: -1}}", "ESP-204", "from 1 to 65536"),
        (f"{DIGITS}kasmina: {{target_layers: [1]}}", "ESP-204", "kasmina.target_layers[0]"),
        (f"{DIGITS}tamiyo: {{blueprints: []}}", "ESP-204", "a list that is not empty"),
        (f"{DIGITS}tamiyo: {{policy: heuristics}}", "ESP-204", "there is no policy"),
        (f"{DIGITS}tamiyo: {{blueprints: [widen, botleneck]}}", "ESP-204", "tamiyo.blueprints[1]"),
        (f"{DIGITS}tamiyo: {{keep_margin: 1}}", "ESP-204", ">= 0 and < 1"),
        (f"{DIGITS}delivery: {{mode: soon}}", "ESP-204", "one of scheduled, asap"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, text: str, code: str, said: str) -> None:
    error = refusal(tmp_path, text)
    assert error.code == code
    assert said in error.message


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "1e999", "0", "-1", "fast", "true", "'1e-3'", "[]", "null"])
def test_a_learning_rate_is_finite_and_positive(tmp_path: Path, value: str) -> None:
    error = refusal(tmp_path, f"{DIGITS}optimizer:\n  lr: {value}\n")
    assert error.code == "ESP-204"
    assert "optimizer.lr" in error.message
    assert "run.yaml:3:3" in error.message
    assert "must be a finite number > 0" in error.message


def test_a_number_in_quotes_is_explained(tmp_path: Path) -> None:
    assert "1e-3 without quotes" in (refusal(tmp_path, f"{DIGITS}optimizer: {{lr: '1e-3'}}").hint or "")
    assert "'3' in quotes" in (refusal(tmp_path, f"{DIGITS}run: {{name: 3}}").hint or "")


def test_near_names_are_offered(tmp_path: Path) -> None:
    assert "max_epochs" in (refusal(tmp_path, f"{DIGITS}run: {{max_epoch: 3}}").hint or "")
    assert "adamw" in (refusal(tmp_path, f"{DIGITS}optimizer: {{name: adamwx}}").hint or "")
    assert "heuristic" in (refusal(tmp_path, f"{DIGITS}tamiyo: {{policy: heurstic}}").hint or "")


def test_all_mistakes_are_said_at_once(tmp_path: Path) -> None:
    text = f"{DIGITS}run: {{max_epochs: 0, sed: 1}}\noptimizer: {{lr: fast}}\ntamiyo: {{policy: x}}\n"
    error = refusal(
        tmp_path, text, "training.batch_size=0", "nothing.here=1", ESPER_RUN_DEVICE="9", ESPER_RUN_SEEDS="1"
    )
    for said in (
        "run.max_epochs", "run.sed", "optimizer.lr", "tamiyo.policy", "--set training.batch_size", "nothing",
        "ESPER_RUN_DEVICE", "ESPER_RUN_SEEDS",
    ):  # fmt: skip
        assert said in error.message
    assert error.message.startswith("8 mistakes")


def test_one_mistake_is_one_line(tmp_path: Path) -> None:
    assert "\n" not in refusal(tmp_path, f"{DIGITS}run: {{max_epochs: 0}}").message


def test_a_password_in_a_wrong_value_is_not_shown(tmp_path: Path) -> None:
    error = refusal(tmp_path, f"{DIGITS}urza: {{database: [postgresql+psycopg://me:hunter2@host/db]}}")
    assert "hunter2" not in str(error)


@pytest.mark.parametrize("text", ["run", "=3", "run.=3", ".seed=3", ""])
def test_an_override_without_key_and_value_is_refused(tmp_path: Path, text: str) -> None:
    error = refusal(tmp_path, DIGITS, text)
    assert error.code == "ESP-204"
    assert "section.key=value" in error.message


@pytest.mark.parametrize("text", ["run.seed={", "run.seed=!!int 3", "run.seed=*a", "run.seed=\x00"])
def test_a_hostile_override_is_refused(tmp_path: Path, text: str) -> None:
    error = refusal(tmp_path, DIGITS, text)
    assert error.code in ("ESP-202", "ESP-205")
    assert "--set run.seed" in error.message


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").touch()
    (tmp_path / "comment.yaml").write_text("# nothing\n")
    loop = tmp_path / "loop.yaml"
    loop.symlink_to(loop)
    for path, said in (
        (tmp_path / "missing.yaml", "no such file"),
        (tmp_path, "directory"),
        (tmp_path / "empty.yaml", "is empty"),
        (tmp_path / "comment.yaml", "is empty"),
        (loop, "cannot be read"),
        (Path("a\0b"), "cannot be read"),
    ):
        with pytest.raises(ConfigurationError) as caught:
            load_config(path, environment={})
        assert caught.value.code == "ESP-201"
        assert said in caught.value.message.lower()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, DIGITS)
    path.chmod(0)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        load_config(path, environment={})


def test_a_huge_file_is_not_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "huge.yaml"
    with path.open("wb") as stream:
        stream.truncate(50_000_000_000)
    with pytest.raises(ConfigurationError) as caught:
        load_config(path, environment={})
    assert caught.value.code == "ESP-205"


def test_an_unknown_quick_start_lists_the_known() -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_config(None, quick_start="cifar99", environment={})
    assert caught.value.code == "ESP-206"
    assert "Did you mean cifar10" in (caught.value.hint or "")
    assert all(name in (caught.value.hint or "") for name in list_quick_starts())


def test_quick_start_and_config_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_config(write(tmp_path, DIGITS), quick_start="digits", environment={})
    assert caught.value.code == "ESP-206"


@pytest.mark.parametrize("name", ["digits", "digits-cnn", "teacher", "cifar10", "cifar100"])
def test_a_quick_start_says_neither_where_nor_when_to_grow(name: str) -> None:
    assert name in list_quick_starts()
    config = load_config(None, quick_start=name, environment={})
    assert config.task.name == name
    assert config.kasmina.target_layers == "auto"
    assert config.tamiyo == EsperConfig(task=config.task).tamiyo


@pytest.mark.parametrize("name", ["development", "phase1_mvp", "experiments/cifar10", "experiments/cifar100"])
def test_a_packaged_configuration_is_found_by_name(name: str) -> None:
    assert name in list_packaged()
    assert load_config(Path(name), environment={}) == load_config(Path(f"{name}.yaml"), environment={})


def test_development_is_small() -> None:
    config = load_config(Path("development"), environment={})
    assert (config.run.max_epochs, config.kasmina.seeds_per_layer, len(config.kasmina.target_layers)) == (5, 2, 1)


def test_a_file_beside_us_beats_a_packaged_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("development").write_text("task: {name: mine}\n")
    assert load_config(Path("development"), environment={}).task.name == "mine"


def test_the_reference_is_the_defaults_and_names_every_key(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, reference_text()), environment={})
    defaults = EsperConfig(task=TaskConfig(name="digits"))
    assert config == defaults
    said = read_document(reference_text().encode(), "reference").places
    early_stop = {path for path in key_paths() if path[:2] == ("training", "early_stop") and len(path) > 2}
    assert set(key_paths()) - early_stop <= set(said)


def test_a_dumped_configuration_is_read_back(tmp_path: Path) -> None:
    for name in list_quick_starts():
        config = load_config(None, quick_start=name, environment={})
        assert load_config(write(tmp_path, dump_config(config)), environment={}) == config


NAMES = strategies.text(max_size=5)
SCALARS = (
    strategies.booleans() | strategies.integers() | strategies.floats(allow_nan=False, allow_infinity=False) | NAMES
)
JSON = strategies.recursive(
    strategies.none() | SCALARS,
    lambda inner: strategies.lists(inner, max_size=3) | strategies.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)


@given(
    arguments=strategies.dictionaries(strategies.text(max_size=8), JSON, max_size=3),
    path=strategies.none() | strategies.text(max_size=20),
    lr=strategies.floats(min_value=0, exclude_min=True, allow_nan=False, allow_infinity=False),
)
def test_any_configuration_survives_being_written(
    tmp_path_factory: pytest.TempPathFactory, arguments: dict[str, object], path: str | None, lr: float
) -> None:
    plain = EsperConfig(task=TaskConfig(name="digits", path=path, arguments=arguments))  # type: ignore[arg-type]
    config = plain.model_copy(update={"optimizer": plain.optimizer.model_copy(update={"lr": lr})})
    path_written = tmp_path_factory.getbasetemp() / "any.yaml"
    path_written.write_text(dump_config(config))
    assert load_config(path_written, environment={}) == config


def test_the_schema_knows_every_section() -> None:
    schema = json.loads(json.dumps(config_schema()))
    assert set(schema["properties"]) == set(EsperConfig.model_fields)
