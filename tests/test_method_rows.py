"""Methods that weigh, revise or choose rows: every term against its equation, written out in fp64."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tiny_models import tiny_batch, tiny_config, tiny_encoder
from torch import Tensor

from mixkd_fast.data.batching import Batch
from mixkd_fast.frozen_teacher import FrozenTeacher
from mixkd_fast.methods import CCKD, KD, RDD, DataPartition, LabelRevision, MixKD, Moment
from mixkd_fast.methods.base import Method
from mixkd_fast.methods.cckd import participates
from mixkd_fast.methods.data_partition import better_source
from mixkd_fast.methods.label_revision import revised_logits
from mixkd_fast.methods.rdd import agreement
from mixkd_fast.methods.rows import RowTable, label_probability

START, LATE = Moment(0, 10, 0.0), Moment(9, 10, 3.0)
LENGTHS = [9, 5, 7, 3, 6, 8]
METHODS = [
    CCKD(),
    CCKD(variant="T", self_regulated=True),
    LabelRevision(select_share=0.5),
    DataPartition(),
    RDD(stage_share=0.0),
]


def _batch(width: int | None = None, rows: int = 6) -> Batch:
    batch = tiny_batch(
        tiny_config("bert"),
        LENGTHS[:rows],
        partner=[2, 0, 3, 1, 5, 4][:rows],
        lam=[0.3, 0.9, 0.5, 0.62, 0.2, 0.7][:rows],
        width=width,
    )
    return replace(batch, labels=torch.tensor([0, 2, 1, 2, 0, 1][:rows]))


def _soft(batch: Batch) -> Batch:
    soft = torch.randn(len(batch.labels), 3, generator=torch.Generator().manual_seed(5)).softmax(-1)
    return replace(batch, soft_labels=soft)


def _logits(seed: int, rows: int = 6, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed))


def _models() -> tuple[Any, FrozenTeacher]:
    student = tiny_encoder("bert", seed=1, hidden_dropout_prob=0.0)
    return student, FrozenTeacher(tiny_encoder("bert", seed=2).requires_grad_(False), lambda: "")


def _extras(method: Method) -> RowTable | None:
    if isinstance(method, LabelRevision):
        return RowTable(torch.tensor([1.0, 0, 0, 1, 1, 0])[:, None])
    return RowTable(_logits(9)) if isinstance(method, DataPartition) else None


def _p(logits: Tensor, temperature: float = 1.0) -> Tensor:
    powers = (logits.double() / temperature).exp()
    return powers / powers.sum(-1, keepdim=True)


def _kl(target: Tensor, student_logits: Tensor, temperature: float) -> Tensor:
    return temperature**2 * (target * (target.log() - _p(student_logits, temperature).log())).sum(-1)


def _ce(target: Tensor, student_logits: Tensor) -> Tensor:
    return -(target * _p(student_logits).log()).sum(-1)


def _targets(batch: Batch) -> Tensor:
    soft = batch.soft_labels
    return torch.eye(3, dtype=torch.float64)[batch.labels] if soft is None else soft.double()


def _same(terms: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        assert terms[name].shape == value.shape, "one value per row"
        torch.testing.assert_close(terms[name].double(), value, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("soft", [False, True])
def test_cckd_l_weighs_both_losses_by_the_teachers_confidence(soft: bool) -> None:
    batch = _soft(_batch()) if soft else _batch()
    student, teacher, target = _logits(1), _logits(2), _targets(batch)
    method = CCKD(temperature=3.0, kd_weight=0.5, mle_weight=2.0)
    weight = (target * _p(teacher)).sum(-1)
    expected = {
        "kd": 0.5 * weight * _kl(_p(teacher, 3.0), student, 3.0),
        "mle": 2.0 * (1 - weight) * _ce(target, student),
    }
    _same(method.row_terms(batch, student, teacher, None, START), expected)


@pytest.mark.parametrize("soft", [False, True])
def test_cckd_t_is_one_cross_entropy_against_a_mixed_target(soft: bool) -> None:
    batch = _soft(_batch()) if soft else _batch()
    student, teacher, label = _logits(1), _logits(2), _targets(batch)
    terms = CCKD(variant="T", temperature=3.0).row_terms(batch, student, teacher, None, START)
    weight = (label * _p(teacher)).sum(-1, keepdim=True)
    target = weight * _p(teacher, 3.0) + (1 - weight) * label
    torch.testing.assert_close((terms["kd"] + terms["mle"]).double(), _ce(target, student), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("epoch", [0.0, 0.5, 40.0, 200.0])
def test_self_regulation_leaves_out_what_the_student_knows(epoch: float) -> None:
    # Row by row: just right, surely right, surely wrong, barely wrong, right with a middling margin, a draw.
    student = torch.tensor(
        [[0.1, 0, 0], [-9, -9, 9.0], [5, 0, 0], [0, 0.1, 0], [1.0, 0, 0], [0, 1, 1.0]], dtype=torch.float32
    )
    batch = _batch()
    limit, expected = 1 - math.exp(-0.01 * epoch), []
    for probabilities, label in zip(_p(student).tolist(), batch.labels.tolist(), strict=True):
        second, first = sorted(probabilities)[-2:]
        expected.append(probabilities.index(first) != label or first - second < limit)
    assert participates(student, batch, epoch).tolist() == expected
    assert expected[1] is False and expected[2] is expected[3] is True and (epoch < 1 or expected[0])
    method = CCKD(self_regulated=True)
    whole = CCKD().row_terms(batch, student, _logits(2), None, START)
    kept = method.row_terms(batch, student, _logits(2), None, replace(START, epoch=epoch))
    _same(kept, {name: torch.tensor(expected).double() * term.double() for name, term in whole.items()})


@pytest.mark.parametrize("method", [*METHODS, CCKD(self_regulated=True)], ids=lambda m: m.name)
def test_weights_and_choices_have_no_gradient(method: Any) -> None:
    """The gradient is that of the two losses with everything else held fixed, and the teacher gets none."""
    batch, teacher = _batch(), _logits(2).requires_grad_()
    student = _logits(1).requires_grad_()
    extras = _extras(method)
    terms = method.row_terms(batch, student, teacher, extras, START)
    torch.stack(list(terms.values())).sum().backward()
    gradient = student.grad
    assert gradient is not None and (teacher.grad is None or not teacher.grad.any())
    step = 1e-3
    for row, column in ((0, 0), (3, 2), (5, 1)):
        moved = [student.detach().clone() for _ in range(2)]
        moved[0][row, column] += step
        moved[1][row, column] -= step
        # Far from every threshold, so the choice is the same on both sides and its own derivative 0 anyway.
        sums = [
            sum(t.double().sum() for t in method.row_terms(batch, m, teacher, extras, START).values()) for m in moved
        ]
        assert float(gradient[row, column]) == pytest.approx(float(sums[0] - sums[1]) / (2 * step), abs=5e-3)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("eta", [0.01, 0.8, 0.99])
def test_the_label_is_the_best_class_of_every_revised_answer(temperature: float, eta: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for scale in (0.01, 1.0, 10.0, 80.0):
        logits = scale * torch.randn(500, 5, generator=generator)
        labels = torch.randint(0, 5, (500,), generator=generator)
        revised = revised_logits(logits, labels, temperature, eta)
        answers = (revised.double() / temperature).softmax(-1)
        right = logits.argmax(-1) == labels
        assert torch.equal(revised[right], logits[right]), "where the teacher is right nothing changes"
        assert torch.equal(answers.argmax(-1), labels) and bool(torch.isfinite(revised).all())
        p = _p(logits - logits.max(-1, keepdim=True).values, temperature)
        beta = eta / (p.max(-1).values - p.gather(-1, labels[:, None])[:, 0] + 1)
        expected = beta[:, None] * p + (1 - beta)[:, None] * torch.eye(5, dtype=torch.float64)[labels]
        torch.testing.assert_close(answers[~right], expected[~right], atol=1e-5, rtol=1e-4)


def test_label_revision_distils_revised_answers_to_the_chosen_rows() -> None:
    batch, student, teacher = _batch(), _logits(1), _logits(2)
    method = LabelRevision(eta=0.7, temperature=2.5, kd_weight=0.5, mle_weight=2.0, select_share=0.5)
    p, label = _p(teacher, 2.5), _targets(batch)
    wrong = p.argmax(-1) != batch.labels
    assert 0 < int(wrong.sum()) < 6
    beta = 0.7 / (p.max(-1).values - (p * label).sum(-1) + 1)
    target = torch.where(wrong[:, None], beta[:, None] * p + (1 - beta)[:, None] * label, p)
    kd = 0.5 * _kl(target, student, 2.5)
    mle = 2.0 * _ce(label, student)
    chosen = torch.tensor([1.0, 0, 0, 1, 1, 0]).double()
    _same(method.row_terms(batch, student, teacher, _extras(method), START), {"kd": chosen * kd, "mle": mle})
    everything = method.model_copy(update={"select_share": 1.0})
    _same(everything.row_terms(batch, student, teacher, None, START), {"kd": kd, "mle": mle})


def test_soft_labels_leave_the_class_that_is_put_right() -> None:
    batch, teacher = _batch(), _logits(2)
    hard, soft = (LabelRevision().row_terms(b, _logits(1), teacher, None, START) for b in (batch, _soft(batch)))
    torch.testing.assert_close(hard["kd"], soft["kd"])
    assert not torch.equal(hard["mle"], soft["mle"])


@pytest.mark.parametrize("soft", [False, True])
def test_data_partition_asks_whoever_knows_the_label_better(soft: bool) -> None:
    batch = _soft(_batch()) if soft else _batch()
    student, teacher, initial, label = _logits(1), _logits(2), _logits(9), _targets(batch)
    better = (_p(teacher) * label).sum(-1) >= (_p(initial) * label).sum(-1)
    assert 0 < int(better.sum()) < 6
    expected = torch.stack([(teacher if b else initial)[row] for row, b in enumerate(better.tolist())])
    torch.testing.assert_close(better_source(teacher, initial, batch), expected)
    method = DataPartition(temperature=3.0, kd_weight=0.5)
    terms = method.row_terms(batch, student, teacher, RowTable(initial), START)
    _same(terms, {"kd": 0.5 * _kl(_p(expected, 3.0), student, 3.0), "mle": _ce(label, student)})
    unmoved = method.row_terms(batch, initial, teacher, RowTable(initial), START)["kd"]
    torch.testing.assert_close(unmoved[~better], torch.zeros(int((~better).sum())), atol=1e-6, rtol=0)
    assert bool((unmoved[better] > 1e-3).all())


def test_a_draw_is_the_teachers() -> None:
    batch = replace(_batch(), labels=torch.zeros(6, dtype=torch.int64))
    teacher, initial = torch.tensor([[2.0, 0, -30]] * 6), torch.tensor([[2.0, -30, 0]] * 6)
    assert torch.equal(label_probability(teacher, batch), label_probability(initial, batch))
    assert torch.equal(better_source(teacher, initial, batch), teacher)


def test_rdd_weighs_labels_by_the_agreement_of_two_dropout_passes() -> None:
    batch, (student, teacher) = _batch(), _models()
    method = RDD(mle_weight=2.0)
    torch.manual_seed(3)
    first, second = teacher.sampled(batch, 2)
    assert not torch.equal(first, second)
    divergence = (_p(first) * (_p(first).log() - _p(second).log())).sum(-1)
    torch.manual_seed(3)
    terms = method.terms(batch, student, teacher, None, Moment(4, 10, 0.4))
    logits = student.clean(batch).logits
    _same(terms, {"mle": 2.0 * (-divergence).exp() * _ce(_targets(batch), logits)})
    assert terms["mle"].requires_grad and agreement(torch.stack([first, first])).tolist() == [1.0] * 6
    assert method.terms(batch, student, teacher, None, Moment(5, 10, 0.5)).keys() == {"kd", "mle"}, "stage 2"


def test_rdd_keeps_rows_that_are_hard_for_exactly_one() -> None:
    batch = _batch()
    # p(y) of the two classes that count; the third takes no part. Labels are 0 2 1 2 0 1.
    shares = {"student": [0.9, 0.5, 0.9, 0.5, 0.71, 0.7], "teacher": [0.9, 0.9, 0.5, 0.5, 0.69, 0.72]}
    logits = {}
    for name, values in shares.items():
        logits[name] = torch.full((6, 3), -30.0)
        for row, (label, value) in enumerate(zip(batch.labels.tolist(), values, strict=True)):
            logits[name][row, label], logits[name][row, (label + 1) % 3] = math.log(value), math.log(1 - value)
    kept = torch.tensor([0.0, 1, 1, 0, 1, 1]).double()
    terms = RDD(temperature=2.0).row_terms(batch, logits["student"], logits["teacher"], None, LATE)
    kd = torch.nan_to_num(_kl(_p(logits["teacher"], 2.0), logits["student"], 2.0))
    _same(terms, {"kd": kept * kd, "mle": kept * _ce(_targets(batch), logits["student"])})
    at_the_limit = float(label_probability(logits["student"], batch)[5])
    exact = RDD(hard_below=at_the_limit).row_terms(batch, logits["student"], logits["teacher"], None, LATE)
    assert float(exact["mle"][5]) > 0, "p(y) equal to the limit is hard"


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_imitating_oneself_costs_nothing(method: Any) -> None:
    """CCKD's variant T is a cross entropy, which is not; revision changes nothing where the teacher is right."""
    if isinstance(method, CCKD) and method.variant == "T":
        method = CCKD()
    logits = _logits(1)
    batch = replace(_batch(), labels=logits.argmax(-1))
    extras = RowTable(logits) if isinstance(method, DataPartition) else _extras(method)
    torch.testing.assert_close(
        method.row_terms(batch, logits, logits, extras, LATE)["kd"], torch.zeros(6), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_padding_and_micro_batches_change_nothing(method: Any) -> None:
    student, teacher = _models()
    whole = method.terms(_batch(), student, teacher, _extras(method), LATE)
    wide = method.terms(_batch(width=16), student, teacher, _extras(method), LATE)
    front = method.terms(_batch(rows=4), student, teacher, _extras(method), LATE)
    for name, value in whole.items():
        torch.testing.assert_close(wide[name], value, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(front[name], value[:4], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_they_are_combined_with_mixkd(method: Any) -> None:
    batch, (student, teacher) = _batch(), _models()
    both = method.model_copy(update={"sm_weight": 0.5, "tmkd_weight": 2.0})
    assert method.mixing() is None and both.mixing() is not None
    terms = both.terms(batch, student, teacher, _extras(method), LATE)
    alone = method.terms(batch, student, teacher, _extras(method), LATE)
    mixed = MixKD(mle_weight=0.0, sm_weight=0.5, tmkd_weight=2.0).terms(batch, student, teacher, None, LATE)
    assert terms.keys() == alone.keys() | {"sm", "tmkd"}
    for name, value in (alone | mixed).items():
        torch.testing.assert_close(terms[name], value, atol=1e-5, rtol=1e-4)


def test_rdd_mixes_in_its_first_stage_too() -> None:
    batch, (student, teacher) = _batch(), _models()
    terms = RDD(sm_weight=0.5, tmkd_weight=2.0).terms(batch, student, teacher, None, START)
    mixed = MixKD(mle_weight=0.0, sm_weight=0.5, tmkd_weight=2.0).terms(batch, student, teacher, None, START)
    assert terms.keys() == {"mle", "sm", "tmkd"}
    torch.testing.assert_close(terms["tmkd"], mixed["tmkd"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_kept_teacher_logits_are_used(method: Any) -> None:
    batch, (student, teacher) = replace(_batch(), teacher_logits=_logits(7)), _models()
    assert method.needs_clean_teacher and method.needs_clean_student
    terms = method.terms(batch, student, teacher, _extras(method), LATE)
    expected = method.row_terms(batch, student.clean(batch).logits, _logits(7), _extras(method), LATE)
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value)


def test_a_table_keeps_its_numbers_whatever_the_precision_of_training() -> None:
    values = torch.randn(5, 3)
    batch = replace(_batch(), row_ids=torch.tensor([4, 0, -1, 2, 2, 3]))
    table = RowTable(values).to(torch.bfloat16)
    assert torch.equal(table.rows(batch), values[[4, 0, 0, 2, 2, 3]])
    assert list(RowTable(values).state_dict()) == ["bits"] and not list(table.parameters())


@pytest.mark.parametrize(
    ("method", "fields", "message"),
    [
        (CCKD, {"kd_weight": 0.0}, "greater than 0"),
        (CCKD, {"variant": "T", "distance": "mse"}, 'distance is "mse"'),
        (CCKD, {"variant": "REG"}, "'L' or 'T'"),
        (LabelRevision, {"eta": 1.0}, "less than 1"),
        (LabelRevision, {"distance": "mse"}, "'kl'"),
        (LabelRevision, {"select_share": 0.5, "mle_weight": 0.0}, "not chosen"),
        (RDD, {"mle_weight": 0.0}, "stage_share 0"),
        (RDD, {"stage_share": 1.0}, "less than 1"),
    ],
)
def test_senseless_options_are_refused(method: type[Method], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        method(**fields)


def test_one_weight_of_all_rows_is_plain_kd() -> None:
    """A teacher that is right everywhere is not revised; without selection that is KD."""
    logits = _logits(2)
    batch = replace(_batch(), labels=logits.argmax(-1))
    revised = LabelRevision().row_terms(batch, _logits(1), logits, None, START)
    plain = KD().clean_terms(batch, _logits(1), logits)
    assert all(np.array_equal(revised[name].numpy(), plain[name].numpy()) for name in ("kd", "mle"))
