"""CR-ILD: every term against its equation, what the released code gets wrong, stages, and runs of one and two parts."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layer_runs import WIDER, falls, halves, layer_batch, layer_models, own_teacher, toy_run, widened
from pydantic import ValidationError
from torch import Tensor, nn

from mixkd_fast.data.batching import Batch
from mixkd_fast.methods import CRILD, MixKD, Moment
from mixkd_fast.methods.cr_ild import Extras
from mixkd_fast.methods.moving_average import MovingAverage
from mixkd_fast.mixing import Mixing, draw_lam

MOMENT = Moment(step=6, total_steps=20, epoch=0.0)
"""The seventh of ten ILD steps at ild_share 0.5: w = 0.1 * 6 / 9."""


def _extras(student: Any, teacher: Any, average: float | None = None) -> Extras:
    torch.manual_seed(3)
    projection = nn.Linear(student.config.hidden_size, teacher.model.config.hidden_size, bias=False).double()
    return Extras(projection, None if average is None else MovingAverage(student, average))


def _states(model: Any, batch: Batch, mixing: Mixing | None = None) -> tuple[Tensor, ...]:
    """Hidden states, queries, keys and values of the last layer, as `transformers` computes them."""
    number = model.model.config.num_hidden_layers - 1
    reading = model.read(batch, mixing, layers=[number])
    part = reading.projections[number]
    return reading.hidden_states[-1], part.query, part.key, part.value


def _softmax(first: Tensor, second: Tensor, keys: list[int]) -> Tensor:
    """Over some keys of one row's and head's scores: [L, keys]."""
    return (first @ second.T / math.sqrt(first.shape[-1]))[:, keys].softmax(-1)


def _kl_of_maps(own: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor], tokens: list[int]) -> Tensor:
    """Mean over heads, sum over query tokens of KL(target || own) for one row's [h, L, d] pairs."""
    total = torch.zeros((), dtype=torch.float64)
    heads = own[0].shape[0]
    for head in range(heads):
        q = _softmax(own[0][head], own[1][head], tokens)[tokens]
        p = _softmax(target[0][head], target[1][head], tokens)[tokens]
        total = total + (p * (p.log() - q.log())).sum() / heads
    return total


def _cut(values: Tensor, heads: int) -> Tensor:
    """[h, L, d] -> [heads, L, ...]"""
    length = values.shape[1]
    return values.permute(1, 0, 2).reshape(length, heads, -1).permute(1, 0, 2)


def _attention(own: Any, target: Any, row: int, other: int, tokens: list[int], method: CRILD) -> Tensor:
    a, b = [values[row] for values in own[1:]], [values[other] for values in target[1:]]
    if method.attention == "maps":
        return _kl_of_maps((a[0], a[1]), (b[0], b[1]), tokens)
    heads = method.relation_heads or a[0].shape[0]
    a, b = [_cut(values, heads) for values in a], [_cut(values, heads) for values in b]
    return sum((_kl_of_maps((x, x), (y, y), tokens) for x, y in zip(a, b, strict=True)), torch.zeros(()))


def _hidden(own: Tensor, target: Tensor, tokens: list[int]) -> Tensor:
    return sum(((own[t] - target[t]) ** 2).mean() for t in tokens)


LENGTHS = (9, 5, 7, 3)


@pytest.mark.parametrize(
    "options", [{}, {"attention": "relations"}, {"attention": "relations", "relation_heads": 4}, {"attention": "none"}]
)
def test_every_ild_term_is_its_equation(options: dict[str, Any]) -> None:
    batch, (student, teacher) = layer_batch(), layer_models()
    method = CRILD(attention_weight=2.0, hidden_weight=3.0, **options)
    extras = _extras(student, teacher)
    terms = method.terms(batch, student, teacher, extras, MOMENT)
    own, theirs, mixed = _states(student, batch), _states(teacher, batch), _states(student, batch, method)
    projected = own[0] @ extras.projection.weight.T
    assert batch.partner is not None and batch.lam is not None
    attention, hidden, consistency = [], [], []
    has_attention = method.attention != "none"
    for row, length in enumerate(LENGTHS):
        tokens = list(range(length))
        if has_attention:
            attention.append(2.0 * _attention(own, theirs, row, row, tokens, method) / 6)
        hidden.append(3.0 * _hidden(projected[row], theirs[0][row], tokens) / 6)
        total, partner = torch.zeros((), dtype=torch.float64), int(batch.partner[row])
        lam = float(batch.lam[row])
        for weight, other in ((lam, row), (1 - lam, partner)):
            kept = list(range(LENGTHS[other]))
            if has_attention:
                total = total + weight * 2.0 * _attention(mixed, own, row, other, kept, method)
            total = total + weight * 3.0 * _hidden(mixed[0][row], own[0][other], kept)
        consistency.append(0.1 * 6 / 9 * total / 7.5)
    expected = {"attention": attention} if has_attention else {}
    expected |= {"hidden": hidden, "consistency": consistency}
    assert terms.keys() == expected.keys(), "consistency is there, and nothing is there twice"
    for name, values in expected.items():
        torch.testing.assert_close(terms[name].double(), torch.stack(values).double(), atol=1e-6, rtol=1e-6, msg=name)


def test_consistency_trains_the_student_and_not_its_target() -> None:
    """The released code never applies it; and its target must not be pulled towards the mixed row."""
    batch, (student, teacher) = layer_batch(), layer_models()
    method, extras = CRILD(), _extras(student, teacher)
    consistency = method.terms(batch, student, teacher, extras, MOMENT)["consistency"]
    assert consistency.min() > 1e-4
    parameters = list(student.model.bert.parameters())
    grads = torch.autograd.grad(consistency.sum(), parameters, allow_unused=True)
    # With the targets as constants the gradient is that of the mixed rows' forward alone.
    targets = [tensor.detach() for tensor in _states(student, batch)]
    mixed = _states(student, batch, method)
    assert batch.partner is not None and batch.lam is not None
    total = torch.zeros((), dtype=torch.float64)
    for row in range(4):
        lam = float(batch.lam[row])
        for weight, other in ((lam, row), (1 - lam, int(batch.partner[row]))):
            kept = list(range(LENGTHS[other]))
            total = total + weight * _attention(mixed, targets, row, other, kept, method)
            total = total + weight * _hidden(mixed[0][row], targets[0][other], kept)
    expected = torch.autograd.grad(0.1 * 6 / 9 * total / 7.5, parameters, allow_unused=True)
    for own, other in zip(grads, expected, strict=True):
        assert (own is None) == (other is None)
        if own is not None and other is not None:
            torch.testing.assert_close(own, other, atol=1e-7, rtol=1e-5)


def test_the_ramp_begins_at_zero_and_ends_at_the_weight() -> None:
    batch, (student, teacher) = layer_batch(), layer_models()
    extras = _extras(student, teacher)

    def size(step: int, **options: Any) -> float:
        terms = CRILD(**options).terms(batch, student, teacher, extras, Moment(step, 20, 0.0))
        return float(terms["consistency"].detach().sum())

    full = size(9)
    assert size(0) == 0.0
    assert size(3) == pytest.approx(full * 3 / 9, rel=1e-6)
    assert size(9, consistency_weight=0.2) == pytest.approx(2 * full, rel=1e-6)
    assert size(19, ild_share=1.0) == pytest.approx(full, rel=1e-6)


def test_stages_come_one_after_the_other() -> None:
    batch, (student, teacher) = layer_batch(), layer_models()
    extras = _extras(student, teacher)

    def names(step: int, **options: Any) -> set[str]:
        return set(CRILD(**options).terms(batch, student, teacher, extras, Moment(step, 20, 0.0)))

    ild = {"attention", "hidden", "consistency"}
    assert names(9) == ild and names(10) == {"kd"}
    assert names(19, ild_share=1.0) == ild and names(0, ild_share=0.0) == {"kd"}
    assert names(10, mle_weight=1.0, sm_weight=1.0, tmkd_weight=1.0) == {"mle", "kd", "sm", "tmkd"}
    assert names(0, consistency_weight=0.0) == {"attention", "hidden"}
    assert names(0, hidden_weight=0.0) == {"attention", "consistency"}
    method = CRILD(temperature=3.0)
    kd = method.terms(batch, student, teacher, None, Moment(15, 20, 0.0))["kd"]
    other = MixKD(mle_weight=0.0, kd_weight=1.0, sm_weight=0.0, temperature=3.0)
    torch.testing.assert_close(kd, other.terms(batch, student, teacher, None, MOMENT)["kd"])


def test_what_the_engine_asks_of_it() -> None:
    assert CRILD().trains_classifier and not CRILD(ild_share=1.0).trains_classifier
    assert CRILD().needs_clean_teacher and not CRILD(ild_share=1.0).needs_clean_teacher
    assert CRILD().reads_teacher and not CRILD(ild_share=0.0).reads_teacher
    assert CRILD().mixing() is not None and CRILD(ild_share=0.0).mixing() is None
    assert CRILD(consistency_weight=0.0).mixing() is None
    assert CRILD(ild_share=0.0, sm_weight=1.0).mixing() is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "none", "hidden_weight": 0.0}, "leave nothing to train in the ILD steps"),
        ({"attention_weight": 0.0, "hidden_weight": 0.0}, "leave nothing to train in the ILD steps"),
        ({"kd_weight": 0.0}, "nothing would be trained in the KD steps"),
        ({"relation_heads": 4}, 'relation_heads needs attention "relations"'),
        ({"ild_share": 1.0, "sm_weight": 0.5}, "sm_weight = 0.5 and tmkd_weight = 0.0 are terms of the KD steps"),
        ({"ild_share": 1.0, "tmkd_weight": 1.0}, "ild_share = 1 leaves none"),
    ],
)
def test_options_that_train_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        CRILD(**options)
    assert CRILD(ild_share=1.0, kd_weight=0.0).kd_weight == 0.0


def test_imitating_oneself_costs_nothing() -> None:
    """Distances to the teacher with W = 1; consistency of a row that is mixed with itself."""
    batch, (student, _) = layer_batch(), layer_models()
    teacher = own_teacher(student)
    extras = _extras(student, teacher)
    nn.init.eye_(extras.projection.weight)
    batch = replace(batch, partner=torch.arange(4))
    for attention in ("maps", "relations"):
        method = CRILD(attention=attention)
        for name, value in method.terms(batch, student, teacher, extras, MOMENT).items():
            torch.testing.assert_close(
                value.double(), torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0, msg=name
            )


def test_no_gradient_reaches_the_teacher() -> None:
    batch, (student, teacher) = layer_batch(), layer_models()
    terms = CRILD().terms(batch, student, teacher, _extras(student, teacher), MOMENT)
    sum((term.sum() for term in terms.values()), torch.zeros(())).backward()
    assert all(p.grad is None for p in teacher.model.parameters()), "its parameters would take a gradient"
    assert any(p.grad is not None and bool(p.grad.any()) for p in student.parameters())


@pytest.mark.parametrize("options", [{}, {"attention": "relations"}, {"consistency_target": "ema"}])
def test_padding_and_micro_batches_change_nothing(options: dict[str, Any]) -> None:
    batch, (student, teacher) = layer_batch(), layer_models()
    extras = _extras(student, teacher, average=0.9)
    # The average runs in fp32, so its hidden states are not those of fp64 to the last digit.
    method, near = CRILD(**options), {"atol": 1e-6, "rtol": 1e-5}
    whole = method.terms(batch, student, teacher, extras, MOMENT)
    padded = method.terms(widened(batch), student, teacher, extras, MOMENT)
    parts = [method.terms(half, student, teacher, extras, MOMENT) for half in halves(batch)]
    assert any(len(half.input_ids) > half.num_rows for half in halves(batch)), "partners from the other half"
    for name, value in whole.items():
        torch.testing.assert_close(padded[name], value, msg=name, **near)
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), value, msg=name, **near)


def test_a_lam_of_one_stays_finite() -> None:
    batch, (student, teacher) = layer_batch(), layer_models()
    terms = CRILD().terms(
        replace(batch, lam=torch.tensor([1.0, 1.0, 0.5, 1.0])), student, teacher, _extras(student, teacher), MOMENT
    )
    assert terms["consistency"].isfinite().all()
    (grad,) = torch.autograd.grad(terms["consistency"].sum(), student.model.bert.embeddings.word_embeddings.weight)
    assert grad.isfinite().all()


def test_several_mixed_rows_are_averaged() -> None:
    batch, (student, teacher) = layer_batch(), layer_models()
    extras = _extras(student, teacher)
    assert batch.lam is not None and batch.partner is not None
    twice = replace(batch, partner=batch.partner.repeat(2), lam=batch.lam.repeat(2))
    one = CRILD().terms(batch, student, teacher, extras, MOMENT)["consistency"]
    two = CRILD(mixed_rows=2).terms(twice, student, teacher, extras, MOMENT)["consistency"]
    torch.testing.assert_close(one, two)


def test_lam_is_the_larger_part() -> None:
    plain, larger = Mixing(alpha=1.0), Mixing(alpha=1.0, larger_first=True)
    for one in (plain, plain.model_copy(update={"lam_per": "batch"})):
        lam = draw_lam(one, 400, np.random.default_rng(0))
        other = draw_lam(larger.model_copy(update={"lam_per": one.lam_per}), 400, np.random.default_rng(0))
        assert lam.dtype == other.dtype == np.float32 and lam.shape == other.shape == (400,)
        np.testing.assert_allclose(other, np.maximum(lam, 1 - lam), rtol=1e-6)
    assert larger.model_copy(update={"lam_per": "row"}) == larger and not plain.larger_first
    assert (draw_lam(larger, 400, np.random.default_rng(0)) >= 0.5).all() and CRILD().larger_first


def test_the_moving_average_follows_and_is_what_mixed_rows_meet() -> None:
    batch, (student, teacher) = layer_batch(), layer_models()
    extras = _extras(student, teacher, average=0.9)
    assert extras.average is not None
    first = {name: p.clone() for name, p in extras.average.encoder.named_parameters()}
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    method = CRILD(consistency_target="ema")
    before = method.terms(batch, student, teacher, extras, MOMENT)["consistency"]
    assert (before - CRILD().terms(batch, student, teacher, extras, MOMENT)["consistency"]).abs().max() > 1e-4
    method.after_step(student, extras, Moment(15, 20, 0.0))
    for name, own in extras.average.encoder.named_parameters():
        torch.testing.assert_close(own, first[name], rtol=0, atol=0, msg="in the KD steps it rests")
    method.after_step(student, extras, MOMENT)
    for name, own in extras.average.encoder.named_parameters():
        expected = 0.9 * first[name] + 0.1 * student.get_parameter(name).float()
        torch.testing.assert_close(own, expected, msg=name)
        assert not own.requires_grad
    assert not list(extras.average.parameters()) and not extras.train().average.encoder.model.training
    again = _extras(student, teacher, average=0.9)
    again.load_state_dict(extras.bfloat16().state_dict())
    assert again.average is not None
    for name, own in again.average.encoder.named_parameters():
        torch.testing.assert_close(own, extras.average.encoder.get_parameter(name), rtol=0, atol=0, msg=name)


ILD = {"name": "cr_ild", "ild_share": 1.0}


@pytest.mark.parametrize(
    ("options", "names"),
    [({}, ("attention", "hidden")), ({"attention": "relations", "consistency_target": "ema"}, ("attention", "hidden"))],
)
def test_terms_fall_and_accumulation_changes_nothing(tmp_path: Path, options: dict[str, Any], names: Any) -> None:
    terms = toy_run(tmp_path, ILD | options)
    assert all(falls(terms, name) for name in names)
    assert terms[-1]["consistency"] > 0
    accumulated = toy_run(tmp_path, ILD | options, "accumulated", micro_batch_size=4)
    for step, other in zip(terms, accumulated, strict=True):
        assert other == pytest.approx(step, rel=5e-3, abs=1e-5)


def test_two_parts_in_one_run(tmp_path: Path) -> None:
    method = {"name": "cr_ild", "ild_share": 0.5, "attention": "none"}
    terms = toy_run(tmp_path, method, steps=40, student=WIDER, learning_rate=1e-2)
    assert [set(step) for step in terms] == [{"hidden", "consistency"}] * 20 + [{"kd"}] * 20
    assert falls(terms[:20], "hidden") and falls(terms[20:], "kd")
