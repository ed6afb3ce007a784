"""Deep mutual learning: its terms, and that a run trains, scores, saves and resumes every student."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from method_runs import RANDOM_STUDENT, ends_of, run_method, term_of
from safetensors.torch import load_file
from tiny_models import tiny_batch, tiny_config, tiny_encoder
from torch import Tensor, nn
from toy import losses, save_toy_teacher, toy_config, toy_rows, toy_tokenizer
from transformers import AutoModelForSequenceClassification

from mixkd_fast.configuration import Config, validate
from mixkd_fast.errors import ConfigurationError
from mixkd_fast.methods import DML, Moment

MOMENT = Moment(0, 10, 0.0)


def _students(count: int, num_labels: int = 3) -> list[Any]:
    return [tiny_encoder("bert", num_labels=num_labels, seed=seed, hidden_dropout_prob=0.0) for seed in range(count)]


def _terms(method: DML, batch: Any, students: list[Any], teacher: Any = None) -> dict[str, Tensor]:
    return method.terms(batch, students[0], teacher, nn.ModuleList(students[1:]), MOMENT)


def _kl(p_logits: Tensor, q_logits: Tensor, temperature: float) -> Tensor:
    p = (p_logits.double() / temperature).softmax(-1)
    return temperature**2 * (p * (p.log() - (q_logits.double() / temperature).log_softmax(-1))).sum(-1)


def test_every_student_has_its_equation() -> None:
    batch, students = tiny_batch(tiny_config("bert")), _students(3)
    terms = _terms(DML(students=3, mle_weight=0.5, mutual_weight=2.0, mutual_temperature=1.5), batch, students)
    answers = [one.clean(batch).logits for one in students]
    assert list(terms) == ["mle", "mutual", "mle_2", "mutual_2", "mle_3", "mutual_3"]
    for number, own in enumerate(answers):
        suffix = f"_{number + 1}" if number else ""
        others = [_kl(other, own, 1.5) for index, other in enumerate(answers) if index != number]
        mle = 0.5 * F.cross_entropy(own.double(), batch.labels, reduction="none")
        torch.testing.assert_close(terms["mle" + suffix].double(), mle, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(terms["mutual" + suffix].double(), 2.0 * sum(others) / 2, atol=1e-5, rtol=1e-4)


def test_a_students_term_moves_that_student_alone() -> None:
    batch, students = tiny_batch(tiny_config("bert")), _students(2)
    _terms(DML(), batch, students)["mutual_2"].sum().backward()
    assert not any(p.grad is not None and p.grad.any() for p in students[0].parameters()), "the other one is a teacher"
    assert any(p.grad is not None and p.grad.any() for p in students[1].parameters())


def test_equal_students_have_nothing_to_teach() -> None:
    batch, student = tiny_batch(tiny_config("bert")), _students(1)[0]
    terms = _terms(DML(), batch, [student, student])
    torch.testing.assert_close(terms["mutual"], torch.zeros(4), atol=1e-6, rtol=0)


def test_regression_compares_by_squared_difference() -> None:
    batch, students = tiny_batch(tiny_config("bert", 1)), _students(2, 1)
    terms = _terms(DML(), replace(batch, labels=torch.rand(4)), students)
    gap = students[1].clean(batch).logits[:, 0] - students[0].clean(batch).logits[:, 0]
    torch.testing.assert_close(terms["mutual"], gap.square())


def test_a_teacher_and_mixed_rows_are_for_every_student() -> None:
    batch, students = tiny_batch(tiny_config("bert")), _students(2)
    teacher = tiny_encoder("bert", seed=9)
    method = DML(kd_weight=0.7, sm_weight=0.3, tmkd_weight=0.2)
    terms = _terms(method, batch, students, teacher)
    names = ["mle", "kd", "sm", "tmkd", "mutual"]
    assert list(terms) == names + [f"{name}_2" for name in names]
    kd = 0.7 * _kl(teacher.clean(batch).logits, students[1].clean(batch).logits, 2.0)
    torch.testing.assert_close(terms["kd_2"].double(), kd, atol=1e-5, rtol=1e-4)
    sum(term.sum() for term in terms.values()).backward()
    assert not any(p.grad is not None and p.grad.any() for p in teacher.parameters())


def test_padding_changes_nothing() -> None:
    students = _students(2)
    narrow, wide = (_terms(DML(), tiny_batch(tiny_config("bert"), width=w), students) for w in (12, 20))
    for name, value in narrow.items():
        torch.testing.assert_close(wide[name], value, atol=1e-5, rtol=1e-4)


def test_a_teacher_is_asked_for_where_one_is_needed(tmp_path: Path) -> None:
    fields = toy_config(tmp_path, method={"name": "dml", "kd_weight": 1.0}, student={"config": RANDOM_STUDENT})
    assert validate(Config, {k: v for k, v in fields.items() if k != "student"}).method.needs_teacher
    del fields["teacher"], fields["student"]["num_layers"]
    with pytest.raises(ConfigurationError, match="teacher"):
        validate(Config, fields)


def _accuracy(folder: Path) -> float:
    """Of a saved student on the toy validation rows, by transformers alone."""
    model, rows = AutoModelForSequenceClassification.from_pretrained(folder), toy_rows(40, 2)
    tokens = toy_tokenizer()(rows["sentence"], padding=True, return_tensors="pt")
    with torch.no_grad():
        predicted = model.eval()(**tokens).logits.argmax(-1)
    return float((predicted == torch.tensor(rows["label"])).float().mean())


@pytest.mark.parametrize("stage", [0, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_all_students_are_trained_scored_and_saved(tmp_path: Path, stage: int) -> None:
    result = run_method(
        tmp_path,
        {"name": "dml", "students": 3},
        teacher=False,
        deepspeed={"zero_optimization": {"stage": stage}},
        training={"keep_best": False, "steps": 40, "evaluate_every": 40},
    )
    further = result.summary["further_students"]
    assert set(further) == {"student_2", "student_3"}
    for name, metrics in {"student": result.metrics, **further}.items():
        assert _accuracy(tmp_path / "run" / name) == pytest.approx(metrics["validation"]["accuracy"])
        assert metrics["validation"]["accuracy"] > 0.8, "trained, not only saved"
        assert (tmp_path / "run" / name / "tokenizer.json").exists()
    for suffix in ("", "_2", "_3"):
        first, last = ends_of(tmp_path / "run", "mle" + suffix)
        assert last < 0.7 * first
    states = [load_file(tmp_path / "run" / name / "model.safetensors") for name in ("student", "student_2")]
    assert any(not torch.equal(states[0][key], states[1][key]) for key in states[0]), "each has its own seed"


def test_students_come_to_agree(tmp_path: Path) -> None:
    """The mutual term falls where it is all that is trained: students of other weights learn each other's answers."""
    save_toy_teacher(tmp_path / "teacher")
    run_method(
        tmp_path,
        {"name": "dml", "mle_weight": 0.0},
        teacher=False,
        student={"config": RANDOM_STUDENT | {"initializer_range": 0.3}},
        training={"learning_rate": 1e-3},
    )
    for name in ("mutual", "mutual_2"):
        first, last = ends_of(tmp_path / "run", name)
        assert 0 < last < 0.5 * first


@pytest.mark.parametrize("stage", [2])
def test_a_resumed_run_has_the_same_students(tmp_path: Path, stage: int) -> None:
    options: dict[str, Any] = {
        "teacher": False,
        "student": {"dropout": 0.1},
        "training": {"checkpoint_every": 10, "keep_best": False},
        "deepspeed": {"zero_optimization": {"stage": stage}},
    }
    whole = run_method(tmp_path, {"name": "dml"}, **options)
    # As if it had been cut off behind its first checkpoint.
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    checkpoints = sorted(path for path in (tmp_path / "run" / "checkpoints").iterdir() if path.is_dir())
    assert len(checkpoints) == 2
    shutil.rmtree(checkpoints[-1])
    resumed = run_method(tmp_path, {"name": "dml"}, resume=True, **options)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole") and len(term_of(tmp_path / "run", "mutual_2")) == 20
    assert resumed.summary["further_students"] == whole.summary["further_students"]
    for name in ("student", "student_2"):
        one, two = (load_file(tmp_path / run / name / "model.safetensors") for run in ("whole", "run"))
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_gradient_accumulation_changes_nothing(tmp_path: Path) -> None:
    for size in (16, 4):
        run_method(
            tmp_path, {"name": "dml"}, f"by{size}", teacher=False, training={"micro_batch_size": size, "steps": 5}
        )
    assert losses(tmp_path / "by4") == pytest.approx(losses(tmp_path / "by16"), abs=1e-5)
    assert json.loads((tmp_path / "by4" / "summary.json").read_text())["training"]["accumulation"] == 4
