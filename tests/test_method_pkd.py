"""PKD: the patience term against its equation, its identities, and runs in which it falls."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from layer_runs import WIDER, falls, flipped, halves, layer_batch, layer_models, own_teacher, toy_run, widened
from pydantic import ValidationError
from torch import Tensor

from mixkd_fast.errors import ModelError
from mixkd_fast.methods import PKD, MixKD, Moment
from mixkd_fast.methods.layers import matched_layers

MOMENT = Moment(0, 10, 0.0)


def _patience(method: PKD, student: Any, teacher: Any, batch: Any, extras: Any = None) -> Tensor:
    return method.terms(batch, student, teacher, extras, MOMENT)["pkd"]


@pytest.mark.parametrize(
    ("layers", "models", "pairs"),
    [
        ("skip", (6, 12), [(0, 1), (1, 3), (2, 5), (3, 7), (4, 9)]),
        ("skip", (3, 12), [(0, 3), (1, 7)]),
        ("last", (6, 12), [(0, 6), (1, 7), (2, 8), (3, 9), (4, 10)]),
        ("last", (3, 12), [(0, 9), (1, 10)]),
        ([2, -1], (2, 12), [(0, 2), (1, 11)]),
    ],
)
def test_layers_are_matched_as_the_paper_does(layers: Any, models: tuple[int, int], pairs: list[Any]) -> None:
    assert matched_layers(layers, *models, include_last=False) == pairs


def test_the_last_layers_belong_to_each_other_where_they_are_matched() -> None:
    assert matched_layers("skip", 3, 12, include_last=True) == [(0, 3), (1, 7), (2, 11)]
    assert matched_layers("skip", 2, 5, include_last=True) == [(0, 1), (1, 4)]
    assert matched_layers("skip", 1, 4, include_last=True) == [(0, 3)]
    assert matched_layers("last", 2, 5, include_last=True) == [(0, 3), (1, 4)]


@pytest.mark.parametrize(
    ("layers", "models", "message"),
    [
        ([0, 1, 2], (2, 4), r"method.layers = \[0, 1, 2\]: names 3 teacher layers.*the student has 2"),
        ([4], (2, 4), r"method.layers = 4: the model has 4 layers; allowed: -4 to 3"),
        ("skip", (6, 4), r'method.layers = "skip": the student has 6 layers and the teacher 4'),
        ("last", (1, 4), r'method.layers = "last": leaves the last layer out, and the student has no other'),
    ],
)
def test_layers_that_do_not_exist_are_named(layers: Any, models: tuple[int, int], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        matched_layers(layers, *models, include_last=False)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_patience_is_its_equation(reduction: Any) -> None:
    batch, (student, teacher) = layer_batch(), layer_models()
    method = PKD(layers=[1, -1], pkd_weight=10.0, layer_reduction=reduction)
    own = student.clean(batch, output_hidden_states=True).hidden_states
    theirs = teacher.clean(batch, output_hidden_states=True).hidden_states
    expected = torch.zeros(4, dtype=torch.float64)
    for student_layer, teacher_layer in ((0, 1), (1, 3)):
        a, b = own[student_layer + 1][:, 0], theirs[teacher_layer + 1][:, 0]
        a, b = a / a.pow(2).sum(-1, keepdim=True).sqrt(), b / b.pow(2).sum(-1, keepdim=True).sqrt()
        expected += (a - b).pow(2).sum(-1) / 16
    scale = 10.0 / 2 if reduction == "mean" else 10.0
    torch.testing.assert_close(_patience(method, student, teacher, batch), scale * expected)


def test_the_other_terms_are_mixkds() -> None:
    batch, (student, teacher) = layer_batch(), layer_models()
    options: dict[str, Any] = {"kd_weight": 0.3, "sm_weight": 0.7, "tmkd_weight": 0.9, "temperature": 3.0}
    terms = PKD(**options).terms(batch, student, teacher, None, MOMENT)
    expected = MixKD(mle_weight=0.5, **options).terms(batch, student, teacher, None, MOMENT)
    assert terms.keys() == expected.keys() | {"pkd"}
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, msg=name)
    assert PKD(mle_weight=0.0, kd_weight=0.0).terms(batch, student, teacher, None, MOMENT).keys() == {"pkd"}


def test_imitating_oneself_costs_nothing_and_gives_no_gradient_to_the_teacher() -> None:
    batch, (student, teacher) = layer_batch(), layer_models()
    same = _patience(PKD(layers=[0, 1]), student, own_teacher(student), batch)
    torch.testing.assert_close(same, torch.zeros(4, dtype=torch.float64))
    _patience(PKD(), student, teacher, batch).sum().backward()
    assert all(p.grad is None for p in teacher.model.parameters()), "its parameters would take a gradient"
    assert any(p.grad is not None and bool(p.grad.any()) for p in student.parameters())


def test_padding_and_its_side_change_nothing() -> None:
    batch, (student, teacher) = layer_batch(), layer_models()
    expected = _patience(PKD(), student, teacher, batch)
    torch.testing.assert_close(_patience(PKD(), student, teacher, widened(batch)), expected)
    # Without positions a row's states do not depend on where it stands: the first token must be found on the right.
    for encoder in (student, teacher):
        encoder.model.bert.embeddings.position_embeddings.weight.data.zero_()
    expected = _patience(PKD(), student, teacher, batch)
    torch.testing.assert_close(_patience(PKD(), student, teacher, flipped(batch)), expected)
    options: dict[str, Any] = {"kd_weight": 1.0, "tmkd_weight": 1.0, "sm_weight": 1.0, "padding": "zero"}
    terms = PKD(temperature=2.0, mle_weight=1.0, **options).terms(flipped(batch), student, teacher, None, MOMENT)
    for name, value in MixKD(**options).terms(flipped(batch), student, teacher, None, MOMENT).items():
        torch.testing.assert_close(terms[name], value, msg=f"{name}: clean rows keep their pad embeddings")


def test_micro_batches_change_nothing() -> None:
    batch, (student, teacher) = layer_batch(), layer_models()
    method = PKD(tmkd_weight=1.0, sm_weight=1.0)
    whole = method.terms(batch, student, teacher, None, MOMENT)
    parts = [method.terms(half, student, teacher, None, MOMENT) for half in halves(batch)]
    for name, value in whole.items():
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), value, msg=name)


def test_the_teacher_runs_in_every_step_and_no_logits_are_kept() -> None:
    """Kept logits would cost a pass over all rows and save none."""
    assert PKD().reads_teacher and not PKD().needs_clean_teacher and PKD().mixing() is None
    batch, (student, teacher) = layer_batch(), layer_models()
    kept = replace(batch, teacher_logits=torch.full((4, 3), 7.0))
    for name, value in PKD().terms(kept, student, teacher, None, MOMENT).items():
        torch.testing.assert_close(value, PKD().terms(batch, student, teacher, None, MOMENT)[name], msg=name)


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(ValidationError, match="pkd_weight"):
        PKD(pkd_weight=0.0)


def test_the_term_falls_and_accumulation_changes_nothing(tmp_path: Path) -> None:
    method = {"name": "pkd", "pkd_weight": 100.0}
    terms = toy_run(tmp_path, method)
    assert falls(terms, "pkd")
    accumulated = toy_run(tmp_path, method, "accumulated", micro_batch_size=4)
    for step, other in zip(terms, accumulated, strict=True):
        assert other == pytest.approx(step, rel=2e-3, abs=1e-5)


def test_widths_that_differ_need_the_projection(tmp_path: Path) -> None:
    refusal = r'method.projection = "none": the student is 24 wide and the teacher 32.*"linear"'
    with pytest.raises(ModelError, match=refusal):
        toy_run(tmp_path, {"name": "pkd"}, "refused", student=WIDER)
    for stage in (2, 3):
        terms = toy_run(tmp_path, {"name": "pkd", "projection": "linear"}, f"stage{stage}", stage, student=WIDER)
        assert falls(terms, "pkd")
        if stage == 2:
            first = terms
    assert first[-1]["pkd"] == pytest.approx(terms[-1]["pkd"], rel=1e-2)
