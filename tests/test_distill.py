"""`distill` as scripts and notebooks call it: loaded models, Dataset objects, own methods."""

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from toy import losses, must_run, program, records, save_toy_teacher, toy_config, toy_rows, toy_tokenizer
from transformers import AutoModelForSequenceClassification, pipeline

from mixkd_fast import KD, FineTune, MixKD, distill
from mixkd_fast.errors import ConfigurationError
from mixkd_fast.methods import Moment, Setting
from mixkd_fast.methods.base import Method, supervised_loss

TRAINING = {"steps": 60, "batch_size": 16, "learning_rate": 3e-3, "evaluate_every": 30, "threads": 1}


def _folder(folder: Path) -> dict[str, Any]:
    return {"directory": str(folder), "report": False}


def _data(folder: Path) -> dict[str, Any]:
    return {
        "train": Dataset.from_dict(toy_rows(128, 1)),
        "evaluation": Dataset.from_dict(toy_rows(64, 2)),
        "task": {"max_length": 32, "cache_dir": str(folder / "cache")},
        "progress": False,
    }


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher made by the engine itself: fine-tuned from random weights."""
    folder = tmp_path_factory.mktemp("teacher")
    save_toy_teacher(folder / "start")
    result = distill(
        student=str(folder / "start"),
        method=FineTune(),
        training=TRAINING,
        output=_folder(folder / "run"),
        **_data(folder),
    )
    assert result.metrics["validation"]["accuracy"] > 0.95, "the toy task can be learned"
    return folder / "run" / "student"


@pytest.mark.parametrize("method", [KD(), MixKD(), MixKD(kd_weight=1.0, distance="mse", lam_per="batch")])
def test_student_learns_from_the_teacher(tmp_path: Path, teacher: Path, method: Method) -> None:
    result = distill(
        teacher=str(teacher),
        student={"config": {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                            "intermediate_size": 64, "hidden_dropout_prob": 0.0}},
        method=method,
        training=TRAINING | {"steps": 150, "learning_rate": 5e-3},
        output=_folder(tmp_path / "run"),
        **_data(tmp_path),
    )  # fmt: skip
    first, last = losses(tmp_path / "run")[:5], losses(tmp_path / "run")[-5:]
    assert sum(last) < 0.8 * sum(first)
    assert result.metrics["validation"]["teacher_agreement"] > 0.9
    assert result.summary["teacher"]["metrics"]["validation"]["accuracy"] > 0.95


def test_loaded_models_and_datasets_are_taken_as_they_are(tmp_path: Path, teacher: Path) -> None:
    loaded_teacher = AutoModelForSequenceClassification.from_pretrained(teacher)
    before = {name: tensor.clone() for name, tensor in loaded_teacher.state_dict().items()}
    student = AutoModelForSequenceClassification.from_pretrained(teacher, num_hidden_layers=1)
    result = distill(
        teacher=loaded_teacher,
        student=student,
        method=MixKD(alpha=0.4, temperature=2.0),
        training={**TRAINING, "steps": 4, "evaluate_every": 2, "keep_best": False},
        output=str(tmp_path / "run"),
        tokenizer=toy_tokenizer(),
        **_data(tmp_path),
    )
    assert not any(p.requires_grad or p.grad is not None for p in loaded_teacher.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in loaded_teacher.state_dict().items())
    assert not loaded_teacher.training
    for name, tensor in result.student.state_dict().items():
        torch.testing.assert_close(student.state_dict()[name], tensor, msg=f"{name}: trained in place and saved")
    assert (result.directory / "report.html").stat().st_size > 1000
    assert (result.directory / "student" / "README.md").exists()


def test_loaded_teacher_is_partitioned_after_its_layers_were_copied(tmp_path: Path, teacher: Path) -> None:
    for stage in (0, 3):
        distill(
            teacher={"model": AutoModelForSequenceClassification.from_pretrained(teacher), "zero_stage": stage},
            student={"num_layers": 1, "dropout": 0.0},
            training={**TRAINING, "steps": 4, "evaluate_every": 2},
            output=_folder(tmp_path / f"run{stage}"),
            tokenizer=toy_tokenizer(),
            **_data(tmp_path),
        )
    assert losses(tmp_path / "run3") == pytest.approx(losses(tmp_path / "run0"), abs=1e-5)


def test_saved_student_loads_through_pipeline(tmp_path: Path, teacher: Path) -> None:
    distill(
        teacher=str(teacher),
        student={"num_layers": 2},
        training={**TRAINING, "steps": 20},
        output=_folder(tmp_path / "run"),
        **_data(tmp_path),
    )
    classify = pipeline("text-classification", model=str(tmp_path / "run" / "student"))
    answers = classify(["the film is superb", "the plot is awful"])
    assert answers[0]["label"] != answers[1]["label"]


class Projected(Method):
    """A method nobody knows: last [CLS] states matched through a trained projection. The engine needs no change."""

    name: Literal["projected"] = "projected"

    def build(self, setting: Setting) -> nn.Module:
        torch.manual_seed(0)
        assert setting.teacher is not None
        return nn.Linear(setting.student.config.hidden_size, setting.teacher.model.config.hidden_size)

    def terms(self, batch: Any, student: Any, teacher: Any, extras: Any, moment: Moment) -> dict[str, Tensor]:
        own = student.clean(batch, output_hidden_states=True)
        with torch.no_grad():
            target = teacher.clean(batch, output_hidden_states=True).hidden_states[-1][:, 0]
        distance = F.mse_loss(extras(own.hidden_states[-1][:, 0]), target, reduction="none").mean(-1)
        return {"mle": supervised_loss(own.logits, batch), "hidden": distance}


@pytest.mark.parametrize("stages", [(0, 0), (3, 3)])
def test_a_new_method_is_one_class(tmp_path: Path, teacher: Path, stages: tuple[int, int]) -> None:
    distill(
        teacher={"model": str(teacher), "zero_stage": stages[1]},
        student={"num_layers": 1},
        method=Projected(),
        training=TRAINING,
        output=_folder(tmp_path / "run"),
        deepspeed={"zero_optimization": {"stage": stages[0]}},
        **_data(tmp_path),
    )
    hidden = [line["terms"]["hidden"] for line in records(tmp_path / "run")]
    assert hidden[-1] < 0.5 * hidden[0], "the projection is trained along"


def test_soft_labels_and_extra_rows_are_trained_on(tmp_path: Path, teacher: Path) -> None:
    config = toy_config(tmp_path, method={"name": "mixkd"}, training={"steps": 4, "evaluate_every": 2})
    extra = tmp_path / "extra.jsonl"
    rows = [{"sentence": "the film is warm", "p0": 0.25, "p1": 0.75}, {"sentence": "a dull plot", "p0": 0.9, "p1": 0.1}]
    extra.write_text("\n".join(json.dumps(row) for row in rows))
    config["task"] |= {"extra_train_files": [str(extra)], "soft_label_columns": ["p0", "p1"]}
    result = distill(**config, progress=False)
    assert result.summary["data"]["train_rows"] == 98 and result.summary["data"]["extra_rows"] == 2


def test_regression_is_trained_with_mse_and_scored_by_correlation(tmp_path: Path) -> None:
    rows = toy_rows(96)
    rows["label"] = [float(value) * 4 + 0.5 for value in rows["label"]]
    save_toy_teacher(tmp_path / "start", num_labels=1)
    data = _data(tmp_path) | {"train": Dataset.from_dict(rows), "evaluation": Dataset.from_dict(rows)}
    data["task"] |= {"kind": "regression"}
    shared: dict[str, Any] = {"training": TRAINING | {"steps": 100}, **data}
    made = distill(student=str(tmp_path / "start"), method=FineTune(), output=_folder(tmp_path / "teacher"), **shared)
    assert made.metrics["validation"]["pearson"] > 0.9
    result = distill(
        teacher=str(tmp_path / "teacher" / "student"),
        student={"num_layers": 1},
        method=MixKD(kd_weight=1.0),
        output=_folder(tmp_path / "run"),
        **shared,
    )
    assert result.metrics["validation"]["pearson"] > 0.9
    assert result.metrics["validation"]["teacher_mse"] < 1.0


def test_early_stopping_ends_the_run(tmp_path: Path, teacher: Path) -> None:
    result = distill(
        student=str(teacher),
        method=FineTune(),
        training={**TRAINING, "steps": 60, "learning_rate": 1e-9, "evaluate_every": 5, "early_stopping": 2},
        output=_folder(tmp_path / "run"),
        **_data(tmp_path),
    )
    assert result.summary["training"]["stopped_early"] and result.summary["training"]["steps"] == 15
    assert result.summary["best"]["step"] == 5


def test_monitors_are_told(tmp_path: Path, teacher: Path) -> None:
    """DeepSpeed's own csv monitor, set in its own section."""
    distill(
        teacher=str(teacher),
        student={"num_layers": 1},
        training={**TRAINING, "steps": 6, "evaluate_every": 3},
        output=_folder(tmp_path / "run"),
        deepspeed={"csv_monitor": {"enabled": True, "output_path": str(tmp_path / "csv"), "job_name": "toy"}},
        **_data(tmp_path),
    )
    written = {path.name: path.read_text() for path in (tmp_path / "csv").rglob("*.csv")}
    assert any("loss" in name for name in written) and any("accuracy" in name for name in written)
    assert len(next(text for name, text in written.items() if name.endswith("train_loss.csv")).splitlines()) == 7


def test_bf16_trains(tmp_path: Path) -> None:
    config = toy_config(tmp_path, training={"precision": "bf16", "steps": 30, "evaluate_every": 15})
    must_run(program("--config", _write(tmp_path, config)))
    values = losses(tmp_path / "run")
    assert sum(values[-5:]) < sum(values[:5])


def test_method_without_its_teacher_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="teacher"):
        distill(student="somewhere", method=Projected(), output=_folder(tmp_path / "run"), **_data(tmp_path))


def _write(folder: Path, config: dict[str, Any]) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder / "config.json")
