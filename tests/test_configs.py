"""The shipped configurations are right, whole and up to date."""

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from toy import ROOT

from mixkd_fast import cli_config
from mixkd_fast.configuration import batch_arithmetic, load_config
from mixkd_fast.data.loading import load_splits
from mixkd_fast.data.tasks import KNOWN_TASKS, resolve
from mixkd_fast.deepspeed_config import student_deepspeed_config
from mixkd_fast.methods import AnyMethod, MixKD

SWEEPS = sorted((ROOT / "configs").glob("sweep_*.json"))  # and their schema; tests/test_sweep_plan.py has them
CONFIGS = sorted(set((ROOT / "configs").glob("*.json")) - {*SWEEPS, ROOT / "configs" / "schema.json"})
FRAGMENTS = sorted((ROOT / "configs" / "deepspeed").glob("*.json"))
GLUE = [name for name in KNOWN_TASKS if name != "demo"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_configuration_is_right(path: Path) -> None:
    config = load_config(path)
    assert config.schema_ == "./schema.json"
    student_deepspeed_config(config, batch_arithmetic(config.training, 1))
    is_hub_model = config.plan.teacher is not None  # lm_70b.json
    is_own = config.teacher is None or config.teacher.model is None or config.task.name in ("demo", "reviews")
    if config.teacher is not None and not is_own and not is_hub_model:
        task = "rte" if path.stem == "cr_ild_supplementary" else config.task.name
        assert config.teacher.model == f"runs/{task}-teacher/student"


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


@pytest.mark.parametrize("name", [*GLUE, "mnli_3layer"])
def test_glue_configurations_are_mixkd_as_defined(name: str) -> None:
    config = load_config(ROOT / "configs" / f"{name}.json")
    assert config.task.name == name.removesuffix("_3layer")
    assert config.student.num_layers == (3 if name.endswith("_3layer") else 6)
    assert config.method == MixKD(
        alpha=0.4, temperature=2.0, mle_weight=1.0, sm_weight=1.0, tmkd_weight=1.0, kd_weight=0.0
    )
    assert resolve(config.task).hub == "nyu-mll/glue" and config.task.max_length == 128
    training = config.training
    assert training.batch_size == 32 and 2e-5 <= training.learning_rate <= 5e-5 and training.early_stopping is None
    assert training.epochs is not None and 3 <= training.epochs <= 5


@pytest.mark.parametrize("name", GLUE)
def test_one_command_each_makes_the_teachers(name: str) -> None:
    """As the README of the folder says."""
    overrides = [f"task.name={name}", f"output.directory=runs/{name}-teacher"]
    teacher = load_config(ROOT / "configs" / "teacher.json", overrides)
    assert teacher.method.name == "finetune" and teacher.teacher is None
    student = load_config(ROOT / "configs" / f"{name}.json").teacher
    assert student is not None and student.model == f"{teacher.output.directory}/student"
    assert teacher.task.name == name and teacher.student.model == "google-bert/bert-base-uncased"


def test_the_parts_of_cr_ild_fit_together() -> None:
    first, second = (load_config(ROOT / "configs" / f"cr_ild_{part}.json") for part in ("supplementary", "target"))
    assert second.student.model == f"{first.output.directory}/student" and second.teacher == first.teacher
    assert not first.method.trains_classifier and second.method.mixing() is None
    assert first.task.name != second.task.name


def test_runs_write_into_folders_of_their_own() -> None:
    folders = [load_config(path).output.directory for path in CONFIGS]
    assert len(set(folders)) == len(folders)


def test_demo_students_differ_in_the_method_alone() -> None:
    names = ("demo_finetune", "demo_kd", "demo_mixkd")
    configs = [load_config(ROOT / "configs" / f"{name}.json") for name in names]
    assert [config.method.name for config in configs] == ["finetune", "kd", "mixkd"]
    for config in configs:
        assert config.teacher is not None and config.teacher.model == "mixkd_fast/data/demo/teacher"
        assert config.output.overwrite and config.output.directory.startswith("runs/demo_")
        assert (config.task, config.student) == (configs[0].task, configs[0].student)
        assert (config.training, config.deepspeed) == (configs[0].training, configs[0].deepspeed)


def test_readme_names_every_file_and_no_other() -> None:
    text = (ROOT / "configs" / "README.md").read_text()
    table = "\n".join(line.split("|")[1] for line in text.splitlines() if line.startswith("| `"))
    named = set(re.findall(r"`([\w/]+\.json)`", table))
    assert named == {path.relative_to(ROOT / "configs").as_posix() for path in [*CONFIGS, *SWEEPS, *FRAGMENTS]} | {
        "schema.json"
    }


@pytest.mark.parametrize("path", FRAGMENTS, ids=lambda path: path.stem)
def test_every_fragment_is_known_to_deepspeed(path: Path) -> None:
    fragment = json.loads(path.read_text())
    DeepSpeedZeroConfig(**fragment["zero_optimization"])
    overrides = [f"deepspeed={path}", "training.precision=fp32"]
    config = load_config(ROOT / "configs" / "rte.json", overrides)
    result = student_deepspeed_config(config, batch_arithmetic(config.training, 1))
    assert {key: result[key] for key in fragment} == fragment
    understood = DeepSpeedConfig(result)
    assert understood.zero_optimization_stage == fragment["zero_optimization"]["stage"]


def test_local_files_example_loads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    splits = load_splits(load_config("configs/local_files.json").task)
    assert (len(splits.train), splits.num_extra_rows, len(splits.evaluation["validation"])) == (12, 4, 4)
    assert splits.spec.label_names == ("bad", "good") and splits.train[0]["soft_labels"] == [0.0, 1.0]
    assert splits.train[8]["soft_labels"] == pytest.approx([0.05, 0.95])
    splits = load_splits(load_config("configs/local_files_generated.json").task)
    assert (len(splits.train), splits.num_extra_rows) == (13, 5)


def test_published_schema_is_up_to_date() -> None:
    assert json.loads((ROOT / "configs" / "schema.json").read_text()) == cli_config.json_schema()


def test_schema_describes_every_field() -> None:
    schema = cli_config.json_schema()
    for name, section in schema["$defs"].items():
        for field, content in section["properties"].items():
            assert content.get("description"), f"{name}.{field} has no description"
        assert section["additionalProperties"] is False


def _resolved(schema: dict[str, Any], root: dict[str, Any]) -> dict[str, Any]:
    reference = schema.get("$ref")
    found: dict[str, Any] = root["$defs"][reference.rpartition("/")[2]] if reference else schema
    return found


def test_the_schema_says_of_a_method_which_it_is() -> None:
    """Editors pick the fields to offer by `method.name`."""
    schema = json.loads((ROOT / "configs" / "schema.json").read_text())
    mapping = schema["properties"]["method"]["discriminator"]["mapping"]
    assert set(mapping) == {method.model_fields["name"].default for method in get_args(get_args(AnyMethod)[0])}
    for name, reference in mapping.items():
        section = _resolved({"$ref": reference}, schema)
        assert section["properties"]["name"]["const"] == name
    assert "$schema" in schema["properties"]


def test_schema_command_prints_the_published_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli_config.main(["schema"]) == 0
    assert capsys.readouterr().out == (ROOT / "configs" / "schema.json").read_text()
