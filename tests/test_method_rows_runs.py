"""Methods that weigh, revise or choose rows, through the real program: they learn, resume, and choose by gradients."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from toy import losses, records, save_toy_teacher, toy_config, toy_tokenizer
from transformers import AutoModelForSequenceClassification

from mixkd_fast import distill
from mixkd_fast.data.batching import Padding
from mixkd_fast.data.tokenization import TokenRows, tokenize_rows
from mixkd_fast.encoder import Encoder
from mixkd_fast.errors import ConfigurationError, ModelError
from mixkd_fast.evaluation import EvaluationPlan, predict

TWENTY = {"steps": 20, "batch_size": 16, "micro_batch_size": 8, "learning_rate": 5e-3, "evaluate_every": 20}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that knows the task, with dropout in its configuration."""
    folder = tmp_path_factory.mktemp("teacher")
    training = {"steps": 40, "batch_size": 16, "learning_rate": 3e-3, "evaluate_every": 40}
    start = {"model": str(save_toy_teacher(folder / "start"))}
    config = toy_config(folder, teacher=start, student=start, method={"name": "finetune"}, training=training)
    result = distill(**config, progress=False)
    assert result.metrics["validation"]["accuracy"] > 0.95
    path = folder / "run" / "student" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_dropout_prob": 0.1}))
    return path.parent


@pytest.fixture(scope="module")
def student(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The section of a student that has the teacher's layers and gives every class the same probability."""
    folder = tmp_path_factory.mktemp("student") / "undecided"
    model = AutoModelForSequenceClassification.from_pretrained(teacher)
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.zero_()
    model.save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return {"model": str(folder), "num_layers": 1, "dropout": 0.0}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize(
    ("method", "term"),
    [
        ({"name": "cckd"}, "kd"),
        ({"name": "cckd", "variant": "T", "self_regulated": True}, "mle"),
        ({"name": "label_revision", "select_share": 0.5}, "kd"),
        ({"name": "data_partition", "mle_weight": 0.0}, "kd"),
        ({"name": "rdd", "stage_share": 0.0}, "kd"),
        ({"name": "cckd", "sm_weight": 1.0, "tmkd_weight": 1.0}, "kd"),
    ],
)
def test_twenty_steps_lower_the_methods_own_term(
    tmp_path: Path, teacher: Path, student: dict[str, Any], method: dict[str, Any], term: str
) -> None:
    own = {"model": str(teacher)}
    distill(**toy_config(tmp_path, teacher=own, student=student, method=method, training=TWENTY), progress=False)
    values = [line["terms"][term] for line in records(tmp_path / "run")]
    assert len(values) == 20 and _mean(values[-5:]) < 0.8 * _mean(values[:5])


def test_both_stages_of_rdd_are_trained(tmp_path: Path, teacher: Path, student: dict[str, Any]) -> None:
    own, method = {"model": str(teacher)}, {"name": "rdd", "stage_share": 0.75}
    config = toy_config(tmp_path, teacher=own, student=student, method=method, training=TWENTY)
    config["output"]["report"] = True
    result = distill(**config, progress=False)
    lines = [line["terms"] for line in records(tmp_path / "run")]
    assert [set(line) for line in lines] == [{"mle"}] * 15 + [{"kd", "mle"}] * 5
    first = [line["mle"] for line in lines[:15]]
    assert _mean(first[-5:]) < 0.9 * _mean(first[:5])
    assert (result.directory / "report.html").exists(), "terms that come later do not stop the report"


def test_rdd_needs_a_teacher_with_dropout(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"method.stage_share = 0.5.*stage_share 0"):
        distill(**toy_config(tmp_path, method={"name": "rdd"}, training=TWENTY), progress=False)


@pytest.mark.parametrize("name", ["cckd", "label_revision", "data_partition", "rdd"])
def test_regressions_are_refused(tmp_path: Path, name: str) -> None:
    config = toy_config(tmp_path, method={"name": name}, training=TWENTY)
    config["task"]["kind"] = "regression"
    with pytest.raises(ConfigurationError, match=f'method "{name}" is for classification tasks'):
        distill(**config, progress=False)


@pytest.mark.parametrize(("name", "stage"), [("data_partition", 0), ("data_partition", 3), ("label_revision", 2)])
def test_a_resumed_run_is_bit_identical(tmp_path: Path, name: str, stage: int) -> None:
    method = {"name": name} | ({"select_share": 0.5} if name == "label_revision" else {})
    training = TWENTY | {"steps": 8, "checkpoint_every": 4, "evaluate_every": 8}
    zero = {"zero_optimization": {"stage": stage}}
    student = {"num_layers": 1, "dropout": 0.1}
    config = toy_config(tmp_path, method=method, training=training, student=student, deepspeed=zero)
    distill(**config, progress=False)
    whole = losses(tmp_path / "run")
    weights = load_file(tmp_path / "run" / "student" / "model.safetensors")
    checkpoints = sorted(path for path in (tmp_path / "run" / "checkpoints").iterdir() if path.is_dir())
    shutil.rmtree(checkpoints[-1])  # as if it had been killed before step 8
    distill(**config, progress=False, resume=True)
    assert losses(tmp_path / "run") == whole and len(set(whole)) == 8
    again = load_file(tmp_path / "run" / "student" / "model.safetensors")
    assert all(torch.equal(again[key], weights[key]) for key in weights)


def test_data_partition_distils_from_the_student_of_the_start(tmp_path: Path) -> None:
    """At a vanishing learning rate the student stays what it was: rows it is better at cost nothing."""
    method = {"name": "data_partition", "mle_weight": 0.0}
    training = TWENTY | {"steps": 6, "batch_size": 16, "learning_rate": 1e-12, "evaluate_every": 6}
    own = {"model": str(save_toy_teacher(tmp_path / "student", seed=1))}
    distill(**toy_config(tmp_path, student=own, method=method, training=training), progress=False)
    # One epoch of the same 96 rows each; only the rows that the teacher knows better are left.
    rows, models = _rows(tmp_path), [_loaded(tmp_path / name) for name in ("run/student", "teacher")]
    labels = torch.tensor(rows.labels)
    initial, theirs = (torch.from_numpy(predict(rows, _plan(), lambda b, m=m: m.clean(b).logits)[0]) for m in models)
    better = theirs.softmax(-1).gather(1, labels[:, None]) >= initial.softmax(-1).gather(1, labels[:, None])
    p = (theirs.double() / 2).softmax(-1)
    distance = 4 * (p * (p.log() - (initial.double() / 2).log_softmax(-1))).sum(-1)
    assert 0 < int(better.sum()) < 96
    assert _mean(losses(tmp_path / "run")) == pytest.approx(float((distance * better[:, 0]).mean()), rel=1e-4)


def _rows(folder: Path) -> TokenRows:
    files = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    columns = {"text": [row["sentence"] for row in files], "label": [row["label"] for row in files]}
    table = Dataset.from_dict(columns | {"row": list(range(len(files)))})
    return tokenize_rows(table, toy_tokenizer(), 32, None)


def _plan() -> EvaluationPlan:
    return EvaluationPlan(7, Padding.of(toy_tokenizer()), torch.device("cpu"), ["accuracy"])


def _loaded(folder: Path) -> Encoder:
    return Encoder(AutoModelForSequenceClassification.from_pretrained(folder).eval().requires_grad_(False))
