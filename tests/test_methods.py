"""The loss terms of every method against their equations, and mistakes that public implementations make."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_batch, tiny_config, tiny_encoder
from torch import Tensor

from mixkd_fast.configuration import Config, validate
from mixkd_fast.data.batching import Batch
from mixkd_fast.methods import KD, FineTune, MixKD, Moment
from mixkd_fast.methods.base import Method

MOMENT = Moment(0, 10, 0.0)
EVERYTHING = MixKD(mle_weight=0.5, kd_weight=2.0, sm_weight=3.0, tmkd_weight=0.7, temperature=3.0)


def _batch(regression: bool = False) -> Batch:
    batch = tiny_batch(tiny_config("bert"), [9, 5, 7, 3], partner=[2, 0, 3, 1], lam=[0.3, 0.9, 0.5, 0.62])
    labels = torch.tensor([0.5, -1.0, 2.0, 0.1]) if regression else torch.tensor([0, 2, 1, 2])
    return replace(batch, labels=labels)


def _models(num_labels: int = 3) -> tuple[Any, Any]:
    student = tiny_encoder("bert", num_labels=num_labels, seed=1, hidden_dropout_prob=0.0)
    return student, tiny_encoder("bert", num_labels=num_labels, seed=2).requires_grad_(False)


def _terms(method: Method, batch: Batch, student: Any, teacher: Any) -> dict[str, Tensor]:
    return method.terms(batch, student, teacher, None, MOMENT)


def _kl(teacher_logits: Tensor, student_logits: Tensor, temperature: float) -> Tensor:
    """tau^2 KL(p || q) in fp64, written out."""
    p = (teacher_logits.double() / temperature).softmax(-1)
    log_q = (student_logits.double() / temperature).log_softmax(-1)
    return temperature**2 * (p * (p.log() - log_q)).sum(-1)


def test_every_term_of_mixkd_is_its_equation() -> None:
    batch, (student, teacher) = _batch(), _models()
    terms = _terms(EVERYTHING, batch, student, teacher)
    clean, mixed = student.clean(batch).logits, student.mixed(batch, EVERYTHING).logits
    assert batch.lam is not None and batch.partner is not None
    other = batch.labels[batch.partner]
    own_ce, other_ce = (F.cross_entropy(mixed, labels, reduction="none") for labels in (batch.labels, other))
    expected = {
        "mle": 0.5 * F.cross_entropy(clean, batch.labels, reduction="none"),
        "kd": 2.0 * _kl(teacher.clean(batch).logits, clean, 3.0),
        "sm": 3.0 * (batch.lam * own_ce + (1 - batch.lam) * other_ce),
        "tmkd": 0.7 * _kl(teacher.mixed(batch, EVERYTHING).logits, mixed, 3.0),
    }
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        assert terms[name].shape == (4,), "one value per row"
        torch.testing.assert_close(terms[name].double(), value.double(), atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("weights", "names"),
    [
        ({"sm_weight": 0.0, "tmkd_weight": 0.0, "kd_weight": 1.0}, {"mle", "kd"}),
        ({"sm_weight": 1.0, "tmkd_weight": 0.0}, {"mle", "sm"}),
        ({"sm_weight": 0.0, "tmkd_weight": 1.0}, {"mle", "tmkd"}),
        ({"mle_weight": 0.0, "kd_weight": 1.0}, {"kd", "sm", "tmkd"}),
        ({}, {"mle", "sm", "tmkd"}),
    ],
)
def test_rows_of_the_paper_are_settings_of_one_objective(weights: dict[str, float], names: set[str]) -> None:
    batch, (student, teacher) = _batch(), _models()
    assert _terms(MixKD(**weights), batch, student, teacher).keys() == names


@pytest.mark.parametrize("distance", ["kl", "mse"])
def test_imitating_oneself_costs_nothing(distance: Any) -> None:
    batch, (student, _) = _batch(), _models()
    terms = _terms(MixKD(kd_weight=1.0, distance=distance), batch, student, student)
    for name in ("kd", "tmkd"):
        torch.testing.assert_close(terms[name], torch.zeros(4), atol=1e-5, rtol=0)


def test_the_teacher_sees_the_mixed_input_and_not_two_answers_averaged() -> None:
    batch, (student, teacher) = _batch(), _models()
    method = MixKD()
    terms = _terms(method, batch, student, teacher)
    answers = teacher.clean(batch).logits
    assert batch.lam is not None and batch.partner is not None
    averaged = batch.lam[:, None] * answers + (1 - batch.lam)[:, None] * answers[batch.partner]
    weaker = _kl(averaged, student.mixed(batch, method).logits, method.temperature)
    assert (terms["tmkd"].double() - weaker).abs().max() > 1e-2


def test_student_and_teacher_share_pairs_and_lam() -> None:
    """With equal weights, a teacher that mixed other pairs or another lam would differ from the student."""
    batch, (student, _) = _batch(), _models()
    assert batch.partner is not None
    twisted = replace(batch, partner=batch.partner.flip(0))
    same = _terms(MixKD(), batch, student, student)["tmkd"]
    moved = (student.mixed(batch, MixKD()).logits - student.mixed(twisted, MixKD()).logits).abs().max()
    assert same.abs().max() < 1e-5 < 1e-2 < moved


def test_no_gradient_reaches_the_teacher() -> None:
    batch, (student, _) = _batch(), _models()
    teacher = tiny_encoder("bert", seed=2)  # its parameters would take a gradient if one came
    sum(term.sum() for term in _terms(EVERYTHING, batch, student, teacher).values()).backward()
    assert all(p.grad is None or not p.grad.any() for p in teacher.parameters())
    assert any(p.grad is not None and bool(p.grad.any()) for p in student.parameters())


def test_hard_and_one_hot_labels_cost_the_same() -> None:
    batch, (student, teacher) = _batch(), _models()
    one_hot = replace(batch, soft_labels=F.one_hot(batch.labels, 3).float())
    hard, soft = (_terms(EVERYTHING, b, student, teacher) for b in (batch, one_hot))
    for name in hard:
        torch.testing.assert_close(hard[name], soft[name], msg=name)


def test_regression_mixes_its_targets() -> None:
    batch, (student, teacher) = _batch(regression=True), _models(num_labels=1)
    terms = _terms(MixKD(kd_weight=1.0), batch, student, teacher)
    assert batch.lam is not None and batch.partner is not None
    target = batch.lam * batch.labels + (1 - batch.lam) * batch.labels[batch.partner]
    mixed = student.mixed(batch, MixKD()).logits[:, 0]
    torch.testing.assert_close(terms["sm"], (mixed - target).square())
    torch.testing.assert_close(terms["mle"], (student.clean(batch).logits[:, 0] - batch.labels).square())
    gap = teacher.clean(batch).logits[:, 0] - student.clean(batch).logits[:, 0]
    torch.testing.assert_close(terms["kd"], gap.square())


def test_several_mixed_rows_per_row_are_averaged() -> None:
    student, teacher = _models()
    method = MixKD(mixed_rows=2, mle_weight=0.0)
    both = replace(
        _batch(),
        partner=torch.tensor([2, 0, 3, 1, 1, 3, 0, 2]),
        lam=torch.tensor([0.3, 0.9, 0.5, 0.62, 0.2, 0.4, 0.8, 0.1]),
    )
    assert both.partner is not None and both.lam is not None
    halves = [replace(both, partner=both.partner[s], lam=both.lam[s]) for s in (slice(0, 4), slice(4, 8))]
    expected = [_terms(MixKD(mle_weight=0.0), half, student, teacher) for half in halves]
    for name, value in _terms(method, both, student, teacher).items():
        torch.testing.assert_close(value, (expected[0][name] + expected[1][name]) / 2, atol=1e-5, rtol=1e-4)


def test_kd_and_finetune_are_the_clean_part() -> None:
    batch, (student, teacher) = _batch(), _models()
    whole = _terms(MixKD(kd_weight=1.0), batch, student, teacher)
    torch.testing.assert_close(_terms(KD(), batch, student, teacher)["kd"], whole["kd"])
    torch.testing.assert_close(_terms(FineTune(), batch, student, None)["mle"], whole["mle"])
    assert KD().mixing() is None and FineTune().mixing() is None and not FineTune.uses_teacher


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"name": "kd"}, []),
        ({"name": "kd", "distance": "mse", "temperature": 7.0}, ['method.temperature: distance "mse" has none']),
        ({"name": "mixkd", "alpha": 1.0}, []),
        ({"name": "pkd", "alpha": 9.0}, ["method.alpha: no rows are mixed with these weights"]),
        ({"name": "pkd", "alpha": 9.0, "sm_weight": 1.0}, []),
        ({"name": "cr_ild", "mixed_rows": 2}, []),
        ({"name": "cr_ild", "consistency_weight": 0.0, "mixed_rows": 2}, ["method.mixed_rows: no rows are mixed"]),
        ({"name": "cr_ild", "ild_share": 1, "kd_weight": 2.0}, ["method.kd_weight: ild_share 1 has no KD steps"]),
        ({"name": "cr_ild", "ema_decay": 0.5}, ["method.ema_decay: no moving average is compared with"]),
        ({"name": "cr_ild", "ema_decay": 0.5, "consistency_target": "ema"}, []),
        ({"name": "cr_ild", "ild_share": 0, "attention": "none"}, ["method.attention: ild_share 0 has no ILD steps"]),
    ],
)
def test_options_without_effect_are_named(section: dict[str, Any], said: list[str]) -> None:
    found = validate(Config, {"task": {}, "teacher": {"model": "t"}, "method": section}).method.without_effect
    assert len(found) == len(said) and all(text.startswith(start) for text, start in zip(found, said, strict=True))
