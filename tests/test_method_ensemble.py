"""Ensemble and Bayesian teachers: the target is the mean of probabilities, and the run reports the mean's metrics."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from method_runs import ends_of, run_method
from scipy.special import softmax
from tiny_models import tiny_batch, tiny_config, tiny_encoder
from torch import Tensor
from toy import losses, save_toy_teacher, toy_rows, toy_tokenizer
from transformers import AutoModelForSequenceClassification

from mixkd_fast.errors import ConfigurationError, ModelError
from mixkd_fast.frozen_teacher import FrozenTeacher
from mixkd_fast.methods import KD, Ensemble, MixKD, Moment
from mixkd_fast.methods.ensemble import Members, mean_answer
from mixkd_fast.metrics import expected_calibration_error

MOMENT = Moment(0, 10, 0.0)


def _teacher(seed: int, num_labels: int = 3, **fields: Any) -> FrozenTeacher:
    return FrozenTeacher(tiny_encoder("bert", num_labels=num_labels, seed=seed, **fields), lambda: "")


def _parts(num_labels: int = 3, **fields: Any) -> tuple[Any, FrozenTeacher, Members]:
    student = tiny_encoder("bert", num_labels=num_labels, seed=1, hidden_dropout_prob=0.0)
    teachers = [_teacher(seed, num_labels, **fields) for seed in (2, 3, 4)]
    return student, teachers[0], Members(tuple(teachers[1:]))


def _kl_of(p: Tensor, student_logits: Tensor, temperature: float) -> Tensor:
    log_q = (student_logits.double() / temperature).log_softmax(-1)
    return temperature**2 * (p * (p.log() - log_q)).sum(-1)


def test_clean_and_mixed_rows_follow_the_mean_of_the_probabilities() -> None:
    batch, (student, first, members) = tiny_batch(tiny_config("bert")), _parts()
    method = Ensemble(teachers=["two", "three"], kd_weight=0.5, tmkd_weight=2.0, sm_weight=1.0, temperature=3.0)
    terms = method.terms(batch, student, first, members, MOMENT)
    teachers = [first, *members.teachers]
    for name, weight, output, answers in (
        ("kd", 0.5, student.clean(batch), [one.clean(batch) for one in teachers]),
        ("tmkd", 2.0, student.mixed(batch, method), [one.mixed(batch, method) for one in teachers]),
    ):
        p = torch.stack([(answer.logits.double() / 3.0).softmax(-1) for answer in answers]).mean(0)
        torch.testing.assert_close(terms[name].double(), weight * _kl_of(p, output.logits, 3.0), atol=1e-5, rtol=1e-4)
    plain = MixKD().terms(batch, student, first, None, MOMENT)
    for name in ("mle", "sm"):
        torch.testing.assert_close(terms[name], plain[name])


def test_the_mean_of_the_logits_is_another_method() -> None:
    """It is the normalised geometric mean of the probabilities."""
    batch, (_, first, members) = tiny_batch(tiny_config("bert")), _parts()
    answers = torch.stack([one.clean(batch).logits for one in (first, *members.teachers)])
    assert (mean_answer(answers, 1.0).softmax(-1) - answers.mean(0).softmax(-1)).abs().max() > 1e-2


def test_mean_answer_is_exact_far_out() -> None:
    logits = torch.tensor([[[200.0, 0.0, -200.0]], [[-200.0, 0.0, 200.0]]])
    for temperature in (0.5, 2.0):
        mean = mean_answer(logits, temperature)
        expected = torch.tensor([[0.5, 0.0, 0.5]])
        torch.testing.assert_close((mean / temperature).softmax(-1), expected, atol=1e-6, rtol=0)
        assert torch.isfinite(mean).all()


def test_equal_teachers_are_one_teacher() -> None:
    batch, (student, first, _) = tiny_batch(tiny_config("bert")), _parts()
    of_two = Ensemble(teachers=["same"]).terms(batch, student, first, Members((first,)), MOMENT)
    torch.testing.assert_close(of_two["kd"], KD().terms(batch, student, first, None, MOMENT)["kd"])
    of_itself = Ensemble(teachers=["same"]).terms(batch, student, student, Members((student,)), MOMENT)
    torch.testing.assert_close(of_itself["kd"], torch.zeros(4), atol=1e-5, rtol=0)


def test_kept_logits_stand_for_the_first_teacher_alone() -> None:
    batch, (student, first, members) = tiny_batch(tiny_config("bert")), _parts()
    method = Ensemble(teachers=["two", "three"])
    kept = replace(batch, teacher_logits=first.clean(batch).logits)
    terms = [method.terms(rows, student, first, members, MOMENT)["kd"] for rows in (batch, kept)]
    torch.testing.assert_close(terms[0], terms[1])
    assert method.needs_clean_teacher and not Ensemble(dropout_passes=2).needs_clean_teacher


def test_dropout_passes_are_averaged_and_draw_from_the_step() -> None:
    batch, (student, first, members) = tiny_batch(tiny_config("bert")), _parts(hidden_dropout_prob=0.4)
    method = Ensemble(teachers=["two", "three"], dropout_passes=2, tmkd_weight=1.0)
    torch.manual_seed(5)
    terms = method.terms(batch, student, first, members, MOMENT)
    torch.manual_seed(5)
    again = method.terms(batch, student, first, members, MOMENT)
    torch.manual_seed(5)
    # In the order of the questions: every teacher's clean rows, then its mixed ones.
    drawn = [(one.sampled(batch, 2), one.sampled(batch, 2, method)) for one in (first, *members.teachers)]
    for name, answers, logits in zip(
        ("kd", "tmkd"),
        zip(*drawn, strict=True),
        (student.clean(batch).logits, student.mixed(batch, method).logits),
        strict=True,
    ):
        p = (torch.cat(answers).double() / 2.0).softmax(-1).mean(0)
        torch.testing.assert_close(terms[name].double(), _kl_of(p, logits, 2.0), atol=1e-5, rtol=1e-4)
        assert torch.equal(terms[name], again[name])
    assert not first.model.training, "the dropout is at work during the passes alone"
    other = method.terms(batch, student, first, members, MOMENT)
    assert not torch.equal(other["kd"], terms["kd"])


def test_regression_and_mse_average_the_outputs() -> None:
    for num_labels, distance in ((1, "kl"), (3, "mse")):
        batch, (student, first, members) = tiny_batch(tiny_config("bert", num_labels)), _parts(num_labels)
        batch = replace(batch, labels=torch.rand(4)) if num_labels == 1 else batch
        method = Ensemble(teachers=["two", "three"], distance=distance)
        mean = torch.stack([one.clean(batch).logits for one in (first, *members.teachers)]).mean(0)
        expected = (mean - student.clean(batch).logits).square().mean(-1)
        found = method.terms(batch, student, first, members, MOMENT)["kd"]
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_no_gradient_reaches_a_teacher_and_none_is_a_submodule() -> None:
    batch, (student, first, members) = tiny_batch(tiny_config("bert")), _parts()
    terms = Ensemble(teachers=["two"], tmkd_weight=1.0).terms(batch, student, first, members, MOMENT)
    sum(term.sum() for term in terms.values()).backward()
    assert not list(members.parameters()) and not members.state_dict()
    for one in (first, *members.teachers):
        assert not any(p.grad is not None and p.grad.any() for p in one.model.parameters())


def test_padding_changes_nothing() -> None:
    student, first, members = _parts()
    method = Ensemble(teachers=["two", "three"], tmkd_weight=1.0)
    narrow, wide = (
        method.terms(tiny_batch(tiny_config("bert"), width=width), student, first, members, MOMENT)
        for width in (12, 20)
    )
    for name, value in narrow.items():
        torch.testing.assert_close(wide[name], value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("fields", [{}, {"dropout_passes": 1}])
def test_an_ensemble_of_one_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="nothing to average"):
        Ensemble(**fields)


def test_a_run_learns_from_the_ensemble_and_reports_it(tmp_path: Path) -> None:
    folders = [save_toy_teacher(tmp_path / name, seed=n) for n, name in enumerate(("teacher", "second", "third"))]
    method = {"name": "ensemble", "teachers": [str(folder) for folder in folders[1:]], "mle_weight": 0.0}
    result = run_method(tmp_path, method, deepspeed={"zero_optimization": {"stage": 2}})
    first, last = ends_of(tmp_path / "run", "kd")
    assert last < 0.6 * first
    rows = toy_rows(40, 2)
    tokens, labels = toy_tokenizer()(rows["sentence"], padding=True, return_tensors="pt"), np.array(rows["label"])
    models = [AutoModelForSequenceClassification.from_pretrained(folder).eval() for folder in folders]
    with torch.no_grad():
        answers = [softmax(model(**tokens).logits.double().numpy(), axis=1) for model in models]
    mean = np.mean(answers, axis=0)
    reported = result.summary["teacher"]["metrics"]["validation"]
    assert reported["nll"] == pytest.approx(-np.log(mean[np.arange(40), labels]).mean(), abs=1e-5)
    assert reported["ece"] == pytest.approx(expected_calibration_error(mean, labels), abs=1e-5)
    assert reported["nll"] != pytest.approx(-np.log(answers[0][np.arange(40), labels]).mean(), abs=1e-3)


def test_a_bayesian_teacher_runs_and_accumulates(tmp_path: Path) -> None:
    """Reported figures are drawn from the seed: two runs report the same."""
    save_toy_teacher(tmp_path / "teacher", classifier_dropout=0.3)
    method = {"name": "ensemble", "dropout_passes": 4, "mle_weight": 0.0, "tmkd_weight": 1.0}
    results = [run_method(tmp_path, method, name) for name in ("run", "again")]
    first, last = ends_of(tmp_path / "run", "kd")
    assert last < 0.7 * first
    assert losses(tmp_path / "run") == losses(tmp_path / "again")
    assert results[0].summary["teacher"]["metrics"] == results[1].summary["teacher"]["metrics"]


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    missing = {"name": "ensemble", "teachers": [str(tmp_path / "nowhere")]}
    with pytest.raises(ModelError, match=r"method\.teachers\.0"):
        run_method(tmp_path, missing, "missing")
    with pytest.raises(ModelError, match="dropout"):
        run_method(tmp_path, {"name": "ensemble", "dropout_passes": 2}, "dry")
    with pytest.raises(ConfigurationError, match="nothing to average"):
        run_method(tmp_path, {"name": "ensemble"}, "alone")
