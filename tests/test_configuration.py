"""The configuration: what is refused, and with which words; what is derived; what reaches DeepSpeed."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from toy import ROOT

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
from mixkd_fast.data.loading import load_splits
from mixkd_fast.deepspeed_config import student_deepspeed_config, teacher_zero3_config
from mixkd_fast.errors import ConfigurationError

BASE: dict[str, Any] = {"task": {"name": "demo"}, "teacher": {"model": "somewhere"}}
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.json") if path.name != "schema.json")


def _merged(changes: dict[str, Any]) -> dict[str, Any]:
    return {**copy.deepcopy(BASE), **changes}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"training": {"batchsize": 3}}, ["training.batchsize: unknown key", 'nearest: "batch_size"']),
        ({"trainig": {}}, ["trainig: unknown key", 'nearest: "training"']),
        ({"method": {"name": "mixkd", "alhpa": 1}}, ["method.alhpa: unknown key", 'nearest: "alpha"']),
        ({"method": {"name": "mixd"}}, ["method.name = 'mixd'", "'finetune', 'kd', 'mixkd'"]),
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
        ({"deepspeed": 3}, ["deepspeed = 3"]),
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
        ('{"task": {"name": "demo"},}', ["line 1", "not JSON"]),
        ('{"task": {}, "task": {}}', ["key 'task' stands twice"]),
        ('{"training": {"epochs": NaN}}', ["NaN is not a number of JSON"]),
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


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.steps", ["not of the form section.field=value"]),
        (".steps=1", ["not of the form"]),
        ("task.name.more=1", ["task.name is 'demo', which has no fields"]),
        ("training.stepps=1", ["training.stepps: unknown key", 'nearest: "steps"']),
    ],
)
def test_bad_overrides_are_refused(tmp_path: Path, override: str, words: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        _load(tmp_path, override)
    assert all(word in str(caught.value) for word in words)


def test_another_method_does_not_drop_options_in_silence(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"method\.alpha: unknown key"):
        _load(tmp_path, "method.name=kd", method={"name": "mixkd", "alpha": 0.4})


@pytest.mark.parametrize(
    ("fields", "ranks", "expected"),
    [
        ({"batch_size": 32}, 1, (32, 32, 1, 1)),
        ({"batch_size": 32}, 4, (32, 8, 1, 4)),
        ({"batch_size": 32, "micro_batch_size": 4}, 2, (32, 4, 4, 2)),
    ],
)
def test_batch_arithmetic(fields: dict[str, int], ranks: int, expected: tuple[int, ...]) -> None:
    assert batch_arithmetic(Training(**fields), ranks) == BatchArithmetic(*expected)


@pytest.mark.parametrize(
    ("fields", "ranks", "words"),
    [
        ({"batch_size": 10}, 4, ["training.batch_size = 10", "4 ranks", "nearest: 8 or 12"]),
        ({"batch_size": 4, "micro_batch_size": 3}, 2, ["micro_batch_size 3 = 6", "nearest: 6"]),
    ],
)
def test_batches_that_do_not_divide(fields: dict[str, int], ranks: int, words: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        batch_arithmetic(Training(**fields), ranks)
    assert all(word in str(caught.value) for word in words)


ARITHMETIC = BatchArithmetic(32, 4, 4, 2)


def test_deepspeed_section_passes_untouched_beside_what_is_derived() -> None:
    section = {"zero_optimization": {"stage": 2, "x": [1, {"y": None}]}, "flops_profiler": {"enabled": True}, "odd": 1}
    before = copy.deepcopy(section)
    result = student_deepspeed_config(validate(Config, _merged({"deepspeed": section})), ARITHMETIC)
    assert {key: result[key] for key in section} == before and section == before
    derived = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    assert [result[key] for key in derived] == [32, 4, 4, 1.0]
    assert "bf16" not in result and "fp16" not in result


def test_auto_is_filled_and_agreement_is_fine() -> None:
    section = {
        "train_batch_size": "auto",
        "gradient_accumulation_steps": 4,
        "bf16": {"enabled": "auto", "check_grad_overflow": True},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": 1e-6}},
    }
    changes = {"deepspeed": section, "training": {"precision": "bf16", "learning_rate": 1e-3}}
    result = student_deepspeed_config(validate(Config, _merged(changes)), ARITHMETIC)
    assert result["bf16"] == {"enabled": True, "check_grad_overflow": True}
    assert result["optimizer"]["params"] == {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-6}


@pytest.mark.parametrize(
    ("section", "training", "words"),
    [
        ({"train_batch_size": 64}, {}, ["deepspeed.train_batch_size = 64", "training.batch_size = 32"]),
        ({"train_micro_batch_size_per_gpu": 8}, {}, ["training.micro_batch_size = 4"]),
        ({"gradient_accumulation_steps": 1}, {}, ["deepspeed.gradient_accumulation_steps = 1", "= 4"]),
        ({"gradient_clipping": 0.5}, {}, ["deepspeed.gradient_clipping = 0.5", "training.max_grad_norm = 1.0"]),
        ({"fp16": {"enabled": True}}, {}, ["deepspeed.fp16.enabled = True", "training.precision = 'fp32'"]),
        ({"bf16": {"enabled": False}}, {"precision": "bf16"}, ["deepspeed.bf16.enabled = False", "'bf16'"]),
        (
            {"optimizer": {"params": {"lr": 1.0}}},
            {"learning_rate": 2.0},
            ["optimizer.params.lr", "training.learning_rate"],
        ),
        ({"zero_optimization": {"stage": 4}}, {}, ["deepspeed.zero_optimization.stage = 4", "0, 1, 2, 3"]),
    ],
)
def test_contradictions_name_both_fields(section: dict[str, Any], training: dict[str, Any], words: list[str]) -> None:
    config = validate(Config, _merged({"deepspeed": section, "training": training}))
    with pytest.raises(ConfigurationError) as caught:
        student_deepspeed_config(config, ARITHMETIC)
    assert all(word in str(caught.value) for word in words)


def test_deepspeed_section_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    path.write_text('{"zero_optimization": {"stage": 1}}')
    config = validate(Config, _merged({"deepspeed": str(path)}))
    assert student_deepspeed_config(config, ARITHMETIC)["zero_optimization"] == {"stage": 1}
    with pytest.raises(ConfigurationError, match=r"deepspeed = .*cannot be read"):
        student_deepspeed_config(validate(Config, _merged({"deepspeed": "nowhere.json"})), ARITHMETIC)


def test_sharded_teacher_limits_follow_the_largest_layer() -> None:
    teacher = Teacher.model_validate(
        {"model": "m", "zero_stage": 3, "offload": {"device": "nvme", "nvme_path": "/disk"}}
    )
    config = teacher_zero3_config(teacher, 1000, 4, "bf16")
    zero = DeepSpeedZeroConfig(**config["zero_optimization"])
    assert (zero.max_live_parameters, zero.max_reuse_distance, zero.param_persistence_threshold) == (2000, 1000, 0)
    assert zero.offload_param is not None and str(zero.offload_param.nvme_path) == "/disk"
    assert config["bf16"] == {"enabled": True} and config["train_micro_batch_size_per_gpu"] == 4


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_configuration_is_right(path: Path) -> None:
    config = load_config(path)
    assert config.schema_ == "./schema.json"
    student_deepspeed_config(config, batch_arithmetic(config.training, 1))
    if config.teacher is not None and config.task.name not in ("demo", "reviews"):
        assert config.teacher.model == f"runs/{config.task.name}-teacher/student"


def test_tasks_of_the_paper_have_their_configuration() -> None:
    names = {path.stem for path in CONFIGS}
    assert names >= {
        "mnli",
        "qqp",
        "qnli",
        "sst2",
        "mrpc",
        "rte",
        "cola",
        "stsb",
        "teacher",
        "local_files",
        "mnli_3layer",
    }
    assert names >= {"demo_teacher", "demo_finetune", "demo_kd", "demo_mixkd"}


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "deepspeed").glob("*.json")), ids=lambda path: path.stem)
def test_every_fragment_is_known_to_deepspeed(path: Path) -> None:
    fragment = json.loads(path.read_text())
    DeepSpeedZeroConfig(**fragment["zero_optimization"])
    config = validate(Config, _merged({"deepspeed": fragment}))
    assert student_deepspeed_config(config, ARITHMETIC)["zero_optimization"] == fragment["zero_optimization"]


def test_local_files_example_loads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    splits = load_splits(load_config("configs/local_files.json").task)
    assert (len(splits.train), splits.num_extra_rows, len(splits.evaluation["validation"])) == (12, 4, 4)
    assert splits.train[8]["soft_labels"] == pytest.approx([0.05, 0.95])


def test_published_schema_is_up_to_date() -> None:
    assert json.loads((ROOT / "configs" / "schema.json").read_text()) == cli_config.json_schema()


def test_schema_describes_every_field() -> None:
    schema = cli_config.json_schema()
    for name, section in schema["$defs"].items():
        for field, content in section["properties"].items():
            assert content.get("description"), f"{name}.{field} has no description"
        assert section["additionalProperties"] is False


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
