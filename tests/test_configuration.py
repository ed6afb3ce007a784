"""The configuration: what is refused, and with which words; what is derived."""

import copy
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from mixkd_fast import cli_config
from mixkd_fast.configuration import (
    BatchArithmetic,
    Config,
    Teacher,
    Training,
    batch_arithmetic,
    load_config,
    validate,
)
from mixkd_fast.errors import ConfigurationError
from mixkd_fast.section import Section
from mixkd_fast.strict_json import apply_overrides

BASE: dict[str, Any] = {"task": {"name": "demo"}, "teacher": {"model": "somewhere"}}
_TERMS = ("mle", "kd", "sm", "tmkd", "adversarial", "contrastive")
CILDA_WEIGHTS = [f"{term}_weight" for term in _TERMS]


def _merged(changes: dict[str, Any]) -> dict[str, Any]:
    return {**copy.deepcopy(BASE), **changes}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"training": {"batchsize": 3}}, ["training.batchsize: unknown key", 'nearest: "batch_size"']),
        ({"trainig": {}}, ["trainig: unknown key", 'nearest: "training"']),
        ({"method": {"name": "mixkd", "alhpa": 1}}, ["method.alhpa: unknown key", 'nearest: "alpha"']),
        ({"method": {"name": "mixd"}}, ["method.name = 'mixd'", "'cckd', 'cilda', 'cr_ild'"]),
        ({"method": {"alpha": 1.0}}, ["method.name"]),
        (
            {"teacher": {"model": "m", "offload": {"devise": "cpu"}}},
            ["offload.devise: unknown key", 'nearest: "device"'],
        ),
        ({"training": {"steps": 1.5}}, ["training.steps = 1.5", "integer"]),
        ({"training": {"steps": True}}, ["training.steps = True", "integer"]),
        ({"training": {"learning_rate": "1e-4"}}, ["training.learning_rate = '1e-4'", "number"]),
        ({"training": {"batch_size": 0}}, ["training.batch_size = 0", "greater than 0"]),
        ({"training": {"precision": "fp8"}}, ["training.precision = 'fp8'", "'fp32', 'bf16' or 'fp16'"]),
        ({"training": {"steps": 1, "epochs": 1.0}}, ["epochs (1.0) and steps (1) exclude each other"]),
        ({"task": {"train_rows": 1, "train_fraction": 0.1}}, ["train_fraction (0.1) and train_rows (1) exclude"]),
        (
            {"task": {"label_names": ["a"], "soft_label_columns": ["p", "q"]}},
            ["label_names has 1", "soft_label_columns 2"],
        ),
        ({"student": {"num_layers": 2, "layers": [0]}}, ["num_layers (2) and layers ([0]) exclude each other"]),
        ({"student": {"model": "m", "config": {"model_type": "bert"}}}, ["model ('m') and config"]),
        ({"student": {"config": {}}}, ['config needs "model_type"']),
        ({"student": {"config": {"model_type": "bert"}, "num_layers": 2}}, ["num_layers copies layers"]),
        ({"teacher": {"model": "m", "offload": {"device": "cpu"}}}, ["offload needs zero_stage 3", "is 0"]),
        ({"teacher": {"model": "m", "zero_stage": 3, "offload": {"device": "nvme"}}}, ["nvme_path"]),
        ({"teacher": {"model": "m", "zero_stage": 2}}, ["teacher.zero_stage = 2", "0 or 3"]),
        ({"teacher": None}, ["teacher: is missing", "mixkd"]),
        ({"teacher": None, "method": {"name": "finetune"}}, ["student: has neither model nor config"]),
        ({"task": {"max_length": 2}}, ["task.max_length = 2", "greater than 2"]),
        ({"deepspeed": 3}, ["deepspeed = 3: input should be a valid dictionary or a valid string"]),
        ({"wq": {}}, ["wq: unknown key (the top level has: $schema, deepspeed, method,"]),
        ({"schema_": "x"}, ["schema_: unknown key", 'nearest: "$schema"']),
        ({"task": {"nam": "demo"}}, ["task.nam: unknown key", 'nearest: "name"']),
        ({"student": {"num_layer": 3}}, ["student.num_layer: unknown key", 'nearest: "num_layers"']),
        ({"output": {"dir": "x"}}, ["output.dir: unknown key", 'nearest: "directory"']),
        ({"method": {"name": "kd", "alpha": 1.0}}, ["method.alpha: unknown key", "(method has: distance, kd_weight,"]),
        ({"method": {"name": "finetune", "temperatur": 1}}, ["unknown key (method has: name)"]),
        ({"method": 3}, ["method = 3", "dictionary"]),
        ({"teacher": {}}, ["teacher: model is missing", "or give offline"]),
        ({"teacher": {"model": ""}}, ["teacher.model = ''", "at least 1 character"]),
        ({"output": {"directory": ""}}, ["output.directory = ''", "at least 1 character"]),
        ({"training": {"batch_size": 32.0}}, ["training.batch_size = 32.0", "integer"]),
        ({"training": {"keep_best": 1}}, ["training.keep_best = 1", "boolean"]),
        ({"training": {"learning_rate": True}}, ["training.learning_rate = True", "number"]),
        ({"training": {"learning_rate": float("inf")}}, ["training.learning_rate = inf", "finite"]),
        ({"training": {"weight_decay": float("nan")}}, ["training.weight_decay = nan", "finite"]),
        ({"training": {"betas": [0.9]}}, ["training.betas = [0.9]", "at least 2 items"]),
        ({"training": {"betas": [0.9, "x"]}}, ["training.betas.1 = 'x'", "number"]),
        ({"training": None}, ["training = None", "dictionary"]),
        # The name of a split may be that of a method or a type.
        ({"task": {"evaluation_files": {"kd": "dev.csv"}}}, ["task.evaluation_files.kd = 'dev.csv'", "list"]),
        ({"task": {"evaluation_files": {"str": [3]}}}, ["task.evaluation_files.str.0 = 3", "string"]),
        ({"method": {"name": "kd", "mle_weight": 0, "kd_weight": 0}}, ["method: mle_weight, kd_weight are all 0"]),
        (
            {"method": {"name": "cilda", "generator": "g"} | dict.fromkeys(CILDA_WEIGHTS, 0)},
            ["method: mle_weight, kd_weight, sm_weight, tmkd_weight, adversarial_weight, contrastive_weight are all 0"],
        ),
        (
            {"method": {"name": "mixkd", "mle_weight": 0, "sm_weight": 0, "tmkd_weight": 0}},
            ["mle_weight, kd_weight, sm_weight, tmkd_weight are all 0: nothing would be trained"],
        ),
        ({"teacher": None, "method": {"name": "kd"}}, ["teacher: is missing", '"kd" imitates one']),
    ],
)
def test_wrong_fields_are_named_with_value_and_what_is_allowed(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        validate(Config, _merged(changes))
    for word in words:
        assert word in str(caught.value)


def test_all_problems_are_listed_at_once() -> None:
    with pytest.raises(ConfigurationError, match="3 problems") as caught:
        validate(Config, _merged({"training": {"steps": 0, "seeed": 1}, "output": {"directory": 5}}))
    assert all(field in str(caught.value) for field in ("training.steps", "training.seeed", "output.directory"))


def test_whole_numbers_are_taken_for_real_ones() -> None:
    config = validate(Config, _merged({"training": {"epochs": 2, "learning_rate": 1}}))
    assert config.training.epochs == 2.0 and config.method.name == "mixkd"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"task":\n  {"name": "demo"},}', ["line 2, column 20", "not JSON"]),
        ('{"task": {}, "task": {}}', ["key 'task' stands twice"]),
        ('{"training": {"epochs": NaN}}', ["NaN is not a number of JSON"]),
        ('{"training": {"epochs": -Infinity}}', ["-Infinity is not a number of JSON"]),
        ('{"training": {"epochs": 1e999}}', ["1e999 is larger than any floating-point number"]),
        ('{"method": {"name": "kd", "name": "mixkd"}}', ["key 'name' stands twice"]),
        ("", ["line 1, column 1", "not JSON"]),
        ("[]", ["not an object"]),
        (None, ["cannot be read", "no.json"]),
    ],
)
def test_files_that_are_not_strict_json(tmp_path: Path, text: str | None, words: list[str]) -> None:
    path = tmp_path / "no.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        load_config(path)
    assert all(word in str(caught.value) for word in words)


def _load(tmp_path: Path, *overrides: str, **changes: Any) -> Config:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(_merged(changes)))
    return load_config(path, overrides)


def test_overrides_are_json_or_text_and_make_sections(tmp_path: Path) -> None:
    config = _load(
        tmp_path,
        "training.steps=7",
        "training.learning_rate=1e-3",
        "output.directory=runs/x y",
        "student.layers=[0,2]",
        'deepspeed={"zero_optimization": {"stage": 2}}',
        "method.name=kd",
        "teacher.model=other=name",
    )
    assert (config.training.steps, config.training.learning_rate, config.student.layers) == (7, 1e-3, [0, 2])
    assert config.output.directory == "runs/x y" and config.method.name == "kd"
    assert config.deepspeed == {"zero_optimization": {"stage": 2}}
    assert config.teacher is not None and config.teacher.model == "other=name"


def test_overrides_reach_the_schema_key_and_fill_null_sections(tmp_path: Path) -> None:
    config = _load(tmp_path, "$schema=./other.json", "teacher.model=m", "task.train_fraction=null", teacher=None)
    assert config.schema_ == "./other.json" and config.task.train_fraction is None
    assert config.teacher is not None and config.teacher.model == "m"


def test_overrides_leave_the_content_as_it_was() -> None:
    content = {"training": {"steps": 1}}
    assert apply_overrides(content, ["training.steps=2", "output.overwrite=true"]) == {
        "training": {"steps": 2},
        "output": {"overwrite": True},
    }
    assert content == {"training": {"steps": 1}}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.steps", ["not of the form section.field=value"]),
        (".steps=1", ["not of the form"]),
        ("=1", ["--set '=1' is not of the form"]),
        ("training.learning_rate=NaN", ["training.learning_rate = 'NaN'", "number"]),
        ("training.steps=ten", ["training.steps = 'ten'", "integer"]),
        ("student.layers=[0,", ["student.layers = '[0,'", "list"]),
        ("task.name.more=1", ["task.name is 'demo', which has no fields"]),
        ("training.stepps=1", ["training.stepps: unknown key", 'nearest: "steps"']),
    ],
)
def test_bad_overrides_are_refused(tmp_path: Path, override: str, words: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        _load(tmp_path, override)
    assert all(word in str(caught.value) for word in words)


def test_another_method_does_not_drop_options_in_silence(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="2 problems") as caught:
        _load(tmp_path, "method.name=kd", method={"name": "mixkd", "alpha": 0.4, "temperature": 3, "sm_weight": 1})
    for option in ("alpha", "sm_weight"):
        assert f"method.{option}: unknown key" in str(caught.value)
    assert "temperature: unknown" not in str(caught.value)


def test_a_new_method_is_named_without_being_known_to_the_messages() -> None:
    class Patient(Section):
        name: Literal["patient"] = "patient"
        every: int = 2

    class Other(Section):
        name: Literal["other"] = "other"

    class Root(Section):
        method: Annotated[Patient | Other, Field(discriminator="name")]

    with pytest.raises(
        ConfigurationError, match=r'^method\.evry: unknown key; nearest: "every" \(method has: every, name'
    ):
        validate(Root, {"method": {"name": "patient", "evry": 1}})
    with pytest.raises(ConfigurationError, match=r"^method\.name = 'kd': allowed: 'patient', 'other'$"):
        validate(Root, {"method": {"name": "kd"}})


def test_a_section_alone_is_named_by_its_prefix() -> None:
    with pytest.raises(ConfigurationError, match=r"^teacher\.zero_stag: unknown key; nearest: \"zero_stage\""):
        validate(Teacher, {"model": "m", "zero_stag": 3}, "teacher")
    with pytest.raises(ConfigurationError, match=r"^training: epochs \(1\.0\) and steps \(2\) exclude each other"):
        validate(Training, {"epochs": 1.0, "steps": 2}, "training")


@pytest.mark.parametrize(
    ("fields", "ranks", "expected"),
    [
        ({"batch_size": 32}, 1, (32, 32, 1, 1)),
        ({"batch_size": 32}, 4, (32, 8, 1, 4)),
        ({"batch_size": 32, "micro_batch_size": 4}, 2, (32, 4, 4, 2)),
        ({"batch_size": 24, "micro_batch_size": 4}, 3, (24, 4, 2, 3)),
    ],
)
def test_batch_arithmetic(fields: dict[str, int], ranks: int, expected: tuple[int, ...]) -> None:
    assert batch_arithmetic(Training.model_validate(fields), ranks) == BatchArithmetic(*expected)


@pytest.mark.parametrize(
    ("fields", "ranks", "words"),
    [
        ({"batch_size": 10}, 4, ["training.batch_size = 10", "4 ranks", "nearest: 8 or 12"]),
        ({"batch_size": 33, "micro_batch_size": 8}, 1, ["1 rank x training.micro_batch_size 8 = 8", "32 or 40"]),
        ({"batch_size": 3}, 4, ["training.batch_size = 3", "nearest: 4"]),
        ({"batch_size": 4, "micro_batch_size": 3}, 2, ["micro_batch_size 3 = 6", "nearest: 6"]),
    ],
)
def test_batches_that_do_not_divide(fields: dict[str, int], ranks: int, words: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        batch_arithmetic(Training.model_validate(fields), ranks)
    assert all(word in str(caught.value) for word in words)


def test_config_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(json.dumps(BASE))
    bad.write_text('{"task": {"nam": "demo"}}')
    assert cli_config.main(["show", "--config", str(good), "--set", "training.steps=9"]) == 0
    assert json.loads(capsys.readouterr().out)["training"]["steps"] == 9
    assert cli_config.main(["check", str(good), str(bad)]) == 1
    shown = capsys.readouterr()
    assert "good.json: fine" in shown.out and 'nearest: "name"' in shown.err
    assert cli_config.main(["show", "--config", str(bad)]) == 1


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({"task": {"name": "mlni"}}, [], ['task.name is "mlni"', 'nearest: "mnli"']),
        ({"deepspeed": "nowhere.json"}, [], ["deepspeed = 'nowhere.json'", "cannot be read"]),
        ({"training": {"batch_size": 9}}, ["--ranks", "2"], ["training.batch_size = 9", "8 or 10"]),
        ({}, ["--set", "training.stps=1"], ["training.stps: unknown key", 'nearest: "steps"']),
    ],
)
def test_check_finds_what_needs_no_data(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, changes: dict[str, Any], options: list[str], words: list[str]
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(_merged(changes)))
    assert cli_config.main(["check", str(path), *options]) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith(f"{path}: ")
    assert all(word in shown.err for word in words)


def test_shown_configuration_is_one_that_loads_to_the_same(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = _load(tmp_path, method={"name": "kd", "temperature": 3.0})
    assert cli_config.main(["show", "--config", str(tmp_path / "config.json")]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["training"]["betas"] == [0.9, 0.999] and shown["method"]["temperature"] == 3.0
    assert validate(Config, shown) == config


@pytest.mark.parametrize("arguments", [[], ["show"], ["check"], ["unknown"]])
def test_wrong_command_lines_exit_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli_config.main(arguments)
    assert caught.value.code == 2
