"""The contract of kd_loss: hard labels, weights, reductions, parts, shapes, refusals."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import SETTINGS, gradient_of, kl_rows, make_logits, mixed_batch, setting_id, true_divergence
from hypothesis import given, settings
from hypothesis import strategies as st

from mixkd_fast.losses import KDLoss, KDLossParts, TopK, kd_loss
from mixkd_fast.ops import LossInputs, RowOptions
from mixkd_fast.ops.reference import row_losses

pytestmark = pytest.mark.usefixtures("each_backend")


def test_weights_rows_and_parts_are_those_of_the_formula() -> None:
    student, teacher, labels, partner_labels, lam = mixed_batch()
    weights = torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0, 0.25], dtype=torch.float64)
    parts: dict[str, KDLossParts] = {}
    for reduction in ("none", "sum", "mean"):
        result = kd_loss(
            student,
            teacher,
            labels,
            partner_labels,
            lam,
            temperature=3.0,
            kd_weight=0.7,
            ce_weight=0.3,
            row_weights=weights,
            reduction=reduction,
            return_parts=True,
        )
        assert isinstance(result, KDLossParts)
        parts[reduction] = result
    ce = lam * F.cross_entropy(student, labels, reduction="none")
    ce = ce + (1 - lam) * F.cross_entropy(student, partner_labels, reduction="none")
    kd_rows, ce_rows = weights * 0.7 * kl_rows(student, teacher, 3.0), weights * 0.3 * ce
    torch.testing.assert_close(parts["none"], KDLossParts(kd_rows + ce_rows, kd_rows.detach(), ce_rows.detach()))
    torch.testing.assert_close(parts["sum"].kd, kd_rows.sum().detach())
    torch.testing.assert_close(parts["mean"].loss, (kd_rows + ce_rows).sum() / weights.sum())
    torch.testing.assert_close(parts["mean"].ce, ce_rows.sum().detach() / weights.sum())
    assert not any(part.kd.requires_grad or part.ce.requires_grad for part in parts.values())


def test_a_row_of_weight_0_is_dropped_also_if_it_is_nan() -> None:
    student, teacher, *_ = mixed_batch()
    student.data[2] = float("nan")
    weights = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    loss = kd_loss(student, teacher, row_weights=weights)
    kept = [0, 1, 3, 4, 5]
    torch.testing.assert_close(loss, kd_loss(student[kept], teacher[kept]))
    assert gradient_of(loss, student).isfinite().all()


@pytest.mark.parametrize("setting", SETTINGS, ids=setting_id)
def test_non_unit_grad_output_and_a_graph_used_twice(setting: dict[str, Any]) -> None:
    student, teacher, *_ = mixed_batch()
    _, expected = true_divergence(student, teacher, temperature=2.0, **setting)
    rows = kd_loss(student, teacher, temperature=2.0, reduction="none", **setting)
    for grad_output in (torch.full((6,), -2.5), torch.arange(6.0), torch.zeros(6)):
        weight = grad_output.double()
        torch.testing.assert_close(gradient_of(rows, student, weight), weight[:, None] * expected)
    torch.testing.assert_close(gradient_of(rows.sum() * 3, student), 3 * expected)


@pytest.mark.parametrize("inplace", [False, True])
def test_inputs_are_not_overwritten(inplace: bool) -> None:
    """`inplace` only permits it; the reference backend leaves the inputs alone in both cases."""
    student, teacher, labels, partner_labels, lam = mixed_batch(torch.float32)
    before = [x.detach().clone() for x in (student, teacher, labels, partner_labels, lam)]
    kd_loss(student, teacher, labels, partner_labels, lam, ce_weight=1.0, inplace=inplace).backward()
    for x, copy in zip((student, teacher, labels, partner_labels, lam), before, strict=True):
        torch.testing.assert_close(x.detach(), copy, rtol=0, atol=0)


def test_strided_rows_and_columns() -> None:
    base, other = make_logits((5, 4, 8), 1.0, 1, torch.float64)
    labels = torch.arange(20).reshape(4, 5).t() % 4
    for view in (
        lambda x: x[:, :, ::2],
        lambda x: x[..., 1:5],
        lambda x: x.transpose(0, 1)[..., :4].transpose(0, 1),
    ):
        student, teacher = view(base), view(other)
        assert not student.is_contiguous()
        loss = kd_loss(student, teacher, labels, ce_weight=1.0)
        expected = kd_loss(student.contiguous(), teacher.contiguous(), labels.contiguous(), ce_weight=1.0)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradient_of(loss, base), gradient_of(expected, base))
    expanded = other[:1].expand(5, 4, 8)
    torch.testing.assert_close(kd_loss(base, expanded), kd_loss(base, expanded.contiguous()))


def test_any_leading_shape_including_none_and_zero_rows() -> None:
    student, teacher, labels, *_ = mixed_batch()
    shaped = kd_loss(student.view(2, 3, 5), teacher.view(2, 3, 5), labels.view(2, 3), ce_weight=1.0, reduction="none")
    assert shaped.shape == (2, 3)
    flat = kd_loss(student, teacher, labels, ce_weight=1.0, reduction="none")
    torch.testing.assert_close(shaped.flatten(), flat)
    torch.testing.assert_close(kd_loss(student[0], teacher[0], labels[0], ce_weight=1.0), flat[0])
    empty = student[:0]
    loss = kd_loss(empty, teacher[:0], labels[:0], ce_weight=1.0)
    assert loss.item() == 0 and gradient_of(loss, student).abs().sum() == 0


def test_more_rows_than_16_bits() -> None:
    student, teacher = make_logits((70_000, 3), 1.0, 2, torch.float32)
    rows = kd_loss(student, teacher, temperature=2.0, reduction="none")
    torch.testing.assert_close(rows, kl_rows(student, teacher, 2.0), rtol=1e-4, atol=1e-6)


def test_a_label_the_student_masks_is_infinite_not_nan() -> None:
    student = torch.tensor([[0.0, -float("inf"), 1.0]], requires_grad=True)
    loss = kd_loss(student, None, torch.tensor([1]), kd_weight=0.0, ce_weight=1.0)
    assert loss.item() == float("inf")
    torch.testing.assert_close(
        gradient_of(loss, student), student.detach().softmax(-1) - torch.tensor([[0.0, 1.0, 0.0]])
    )


def test_both_weights_0_is_0_and_differentiable() -> None:
    student, teacher, *_ = mixed_batch()
    loss = kd_loss(student, teacher, kd_weight=0.0)
    assert loss.item() == 0 and (gradient_of(loss, student) == 0).all()


@pytest.mark.parametrize("label_dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_labels_of_any_integer_dtype(label_dtype: torch.dtype) -> None:
    student, teacher, labels, *_ = mixed_batch()
    loss = kd_loss(student, teacher, labels.to(label_dtype), ce_weight=1.0)
    torch.testing.assert_close(loss, kd_loss(student, teacher, labels, ce_weight=1.0))


@pytest.mark.parametrize("bad", [5, -1, -101, 2**40])
def test_a_label_out_of_range_is_refused_on_the_cpu(bad: int) -> None:
    student, teacher, labels, partner_labels, lam = mixed_batch()
    for which in (labels, partner_labels):
        good = which[2].item()
        which[2] = bad
        name = "partner_labels" if which is partner_labels else "labels"
        with pytest.raises(ValueError, match=rf"^{name} holds {bad}; allowed: 0 to 4, or ignore_index -100"):
            kd_loss(student, teacher, labels, partner_labels, lam)
        which[2] = good


def test_an_index_of_a_top_k_teacher_out_of_range_is_refused_on_the_cpu() -> None:
    student, teacher, *_ = mixed_batch()
    top = TopK.from_logits(teacher, 2)
    top.indices[1, 1] = 5
    with pytest.raises(ValueError, match=r"teacher_logits.indices holds 5; allowed: 0 to 4"):
        kd_loss(student, top)
    ignored = torch.tensor([0, -100, 0, 0, 0, 0])
    assert kd_loss(student, top, ignored).isfinite()


def test_a_row_with_a_label_out_of_range_is_nan_where_values_are_not_read() -> None:
    """The rule for GPUs, held here through the backend itself, which has the out-of-range rows marked."""
    student, teacher, labels, *_ = mixed_batch()
    labels[2] = 77
    invalid = labels >= 5
    keep = torch.tensor([True, True, True, True, True, False])
    kd, ce = row_losses(LossInputs(student, teacher, labels), RowOptions(ce_weight=1.0), keep, invalid)
    rows = kd + ce
    assert rows.isnan().tolist() == [False, False, True, False, False, False]
    gradient = gradient_of(rows.sum(), student)
    assert gradient[[0, 1, 3, 4, 5]].isfinite().all() and gradient[2].isnan().all()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"temperature": 0.0}, "temperature is 0.0; allowed: a finite number above 0"),
    ({"temperature": float("nan")}, "temperature is nan"),
    ({"divergence": "kl"}, "divergence is 'kl'; allowed: forward_kl, reverse_kl"),
    ({"beta": 1.5}, "beta is 1.5; allowed: a number from 0 to 1"),
    ({"alpha": 1.0}, "alpha is 1.0; allowed: a number from 0 to below 1"),
    ({"ab_alpha": float("inf")}, "ab_alpha is inf"),
    ({"kd_weight": float("nan")}, "kd_weight is nan"),
    ({"reduction": "batchmean"}, "reduction is 'batchmean'; allowed: mean, sum, none"),
    ({"reduction": "sum", "normalizer": 3}, "normalizer is 3; allowed: None with reduction 'sum'"),
    ({"normalizer": torch.ones(2)}, "normalizer is 'a tensor of shape \\(2,\\)'"),
    ({"detach_mixture": True}, "detach_mixture is True; allowed: False for forward_kl"),
    ({"ce_weight": 1.0}, "labels is None"),
    ({"labels": torch.zeros(5, dtype=torch.long)}, "labels has shape \\(5,\\); allowed: \\[6\\]"),
    ({"labels": torch.zeros(6)}, "labels is torch.float32; allowed: an integer dtype"),
    ({"labels": torch.zeros(6, dtype=torch.bool)}, "labels is torch.bool; allowed: an integer dtype"),
    ({"labels": torch.zeros(6).long(), "lam": 0.5}, "partner_labels and lam belong together"),
    ({"labels": torch.zeros(6).long(), "partner_labels": torch.zeros(6).long()}, "belong together"),
    ({"partner_labels": torch.zeros(6).long(), "lam": 0.5}, "labels is None"),
    ({"row_weights": torch.ones(6, 1)}, "row_weights has shape \\(6, 1\\); allowed: \\[6\\]"),
    ({"teacher_logits": None}, "teacher_logits is None; allowed only with kd_weight 0"),
    ({"teacher_logits": torch.ones(4, 5)}, "teacher_logits has shape \\(4, 5\\); allowed: \\[6, C >= 1\\]"),
    ({"teacher_logits": torch.ones(6, 0)}, "teacher_logits has shape \\(6, 0\\)"),
    ({"teacher_logits": torch.ones(6, 5).long()}, "teacher_logits is torch.int64; allowed: a floating dtype"),
    ({"student_logits": torch.ones(())}, "student_logits has shape \\(\\); allowed: \\[C >= 1\\]"),
    (
        {"teacher_logits": TopK(torch.zeros(6, 1).long(), torch.zeros(6, 2))},
        "teacher_logits.logprobs has shape",
    ),
    ({"teacher_logits": TopK(torch.zeros(6, 1).long(), torch.zeros(6, 1)), "divergence": "mse"}, "TopK"),
    ({"backend": "gpu"}, "backend is 'gpu'; allowed: auto, reference, cpu, triton, cuda"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_wrong_arguments_are_refused_with_field_value_and_what_is_allowed(change: dict[str, Any], message: str) -> None:
    student, teacher, *_ = mixed_batch()
    arguments: dict[str, Any] = {"student_logits": student, "teacher_logits": teacher, **change}
    with pytest.raises(ValueError, match=message):
        kd_loss(**arguments)


def test_the_module_is_the_function() -> None:
    student, teacher, labels, partner_labels, lam = mixed_batch()
    options: dict[str, Any] = {"temperature": 2.0, "divergence": "jsd", "beta": 0.3, "ce_weight": 0.5}
    module = KDLoss(**options, ignore_index=-7, return_parts=True)
    labels[0] = -7
    weights = torch.rand(6)
    result = module(student, teacher, labels, partner_labels, lam, row_weights=weights, normalizer=9)
    expected = kd_loss(
        student,
        teacher,
        labels,
        partner_labels,
        lam,
        row_weights=weights,
        normalizer=9,
        ignore_index=-7,
        return_parts=True,
        **options,
    )
    torch.testing.assert_close(result, expected, rtol=0, atol=0)
    assert "temperature=2.0, divergence='jsd', beta=0.3, ce_weight=0.5" in repr(module)
    with pytest.raises(ValueError, match="temperature"):
        KDLoss(temperature=-1.0)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(0, 6),
    classes=st.integers(1, 12),
    ignored=st.sets(st.integers(0, 5)),
    lam=st.floats(0, 1),
    ce_weight=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 999),
)
def test_whole_loss_of_any_batch(
    rows: int, classes: int, ignored: set[int], lam: float, ce_weight: float, seed: int
) -> None:
    student, teacher = make_logits((rows, classes), 2.0, seed, torch.float64)
    generator = torch.Generator().manual_seed(seed)
    labels, partner_labels = torch.randint(classes, (2, rows), generator=generator)
    weights = torch.rand(rows, generator=generator, dtype=torch.float64) + 0.1
    for row in ignored & set(range(rows)):
        labels[row] = -100
    kept = labels != -100
    loss = kd_loss(
        student,
        teacher,
        labels,
        partner_labels,
        lam,
        temperature=2.0,
        ce_weight=ce_weight,
        row_weights=weights,
    )
    ce = lam * F.cross_entropy(student, labels.clamp(min=0), reduction="none")
    ce = ce + (1 - lam) * F.cross_entropy(student, partner_labels, reduction="none")
    expected_rows = (weights * (kl_rows(student, teacher, 2.0) + ce_weight * ce))[kept]
    expected = expected_rows.sum() / weights[kept].sum() if kept.any() else expected_rows.sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient_of(loss, student), gradient_of(expected, student))
