"""What other distillation libraries are reported to get wrong, one test each, and the identities of MixKD."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import SETTINGS, gradient_of, kl_rows, mixed_batch, setting_id
from torch import Tensor

from mixkd_fast.losses import kd_loss

pytestmark = pytest.mark.usefixtures("each_backend")


def test_temperature_squared_scales_loss_and_gradient_alike() -> None:
    """Reported: the loss multiplied by tau^2, the gradient not (ratio 4 at tau = 2)."""
    student, teacher, *_ = mixed_batch()
    loss = kd_loss(student, teacher, temperature=2.0)
    expected = kl_rows(student, teacher, 2.0).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient_of(loss, student), gradient_of(expected, student))
    step = 1e-6 * torch.ones_like(student)
    step[:, 1:] = 0
    slope = (
        kd_loss(student + step, teacher, temperature=2.0) - kd_loss(student - step, teacher, temperature=2.0)
    ) / 2e-6
    torch.testing.assert_close(gradient_of(loss, student)[:, 0].sum(), slope.detach(), rtol=1e-6, atol=0)


def test_temperature_squared_is_not_missing() -> None:
    """As tau grows, tau^2 KL tends to half the variance of the logit difference over classes, not to 0."""
    student, teacher, *_ = mixed_batch()
    gap = student - teacher
    limit = (gap - gap.mean(-1, keepdim=True)).square().mean(-1) / 2
    loss = kd_loss(student, teacher, temperature=1e3, reduction="none")
    torch.testing.assert_close(loss, limit, rtol=1e-2, atol=1e-5)


def test_mean_does_not_divide_by_the_classes() -> None:
    """Reported: KLDivLoss("mean") divides by classes too."""
    student, teacher, *_ = mixed_batch()
    total = kd_loss(student, teacher, reduction="sum")
    torch.testing.assert_close(kd_loss(student, teacher), total / 6)


def test_wider_teacher_is_not_filled_with_logit_0_and_a_narrower_one_does_not_crash() -> None:
    student, teacher, *_ = mixed_batch()
    wide = torch.cat([teacher, torch.full((6, 3), 8.0, dtype=teacher.dtype)], -1)
    torch.testing.assert_close(kd_loss(student, wide), kd_loss(student, teacher))
    labels = torch.tensor([4, 4, 3, 0, 1, 2])
    loss = kd_loss(student, teacher[:, :3], labels, ce_weight=1.0)
    expected = kl_rows(student[:, :3], teacher[:, :3], 1.0).mean() + F.cross_entropy(student, labels)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("ce_weight", [0.0, 1.0])
@pytest.mark.parametrize("setting", SETTINGS, ids=setting_id)
def test_ignored_rows_get_no_loss_and_no_gradient(setting: dict[str, Any], ce_weight: float) -> None:
    """Reported: gradient leaking into ignored rows; ignore_index not applied. Garbage there is harmless."""
    student, teacher, labels, *_ = mixed_batch()
    labels = labels.index_fill(0, torch.tensor([1, 4]), -100)
    for garbage in (0.0, float("nan"), float("inf"), -float("inf")):
        student.data[1], teacher[4] = garbage, garbage
        loss = kd_loss(student, teacher, labels, ce_weight=ce_weight, **setting)
        kept = torch.tensor([0, 2, 3, 5])
        expected = kd_loss(student[kept], teacher[kept], labels[kept], ce_weight=ce_weight, **setting)
        torch.testing.assert_close(loss, expected)
        gradient = gradient_of(loss, student)
        assert (gradient[[1, 4]] == 0).all()
        torch.testing.assert_close(gradient[kept], gradient_of(expected, student)[kept])


def test_another_ignore_index_and_an_ignored_partner() -> None:
    student, teacher, labels, partner_labels, lam = mixed_batch()
    labels[0], partner_labels[3] = -1, -1
    rows = kd_loss(student, teacher, labels, partner_labels, lam, ce_weight=1.0, ignore_index=-1, reduction="none")
    assert (rows == 0).tolist() == [True, False, False, True, False, False]


def test_all_rows_ignored_is_0_with_gradient_0() -> None:
    student, teacher, labels, *_ = mixed_batch()
    for reduction in ("mean", "sum"):
        loss = kd_loss(student, teacher, torch.full_like(labels, -100), ce_weight=1.0, reduction=reduction)
        assert loss.item() == 0
        assert (gradient_of(loss, student) == 0).all()


def test_the_normalizer_makes_micro_batches_add_up_to_the_whole_batch() -> None:
    """Reported: the mean taken per micro-batch under accumulation, whatever its number of tokens."""
    student, teacher, labels, *_ = mixed_batch()
    labels[1] = labels[2] = -100
    whole = kd_loss(student, teacher, labels, ce_weight=0.5)
    for normalizer in (4, 4.0, torch.tensor(4), torch.tensor([4.0])):
        parts = [
            kd_loss(student[rows], teacher[rows], labels[rows], ce_weight=0.5, normalizer=normalizer)
            for rows in (slice(0, 2), slice(2, 6))
        ]
        torch.testing.assert_close(parts[0] + parts[1], whole)
        torch.testing.assert_close(gradient_of(parts[0] + parts[1], student), gradient_of(whole, student))
    naive = (kd_loss(student[:2], teacher[:2], labels[:2]) + kd_loss(student[2:], teacher[2:], labels[2:])) / 2
    assert not torch.allclose(naive, kd_loss(student, teacher, labels))


def test_a_normalizer_is_not_rounded_to_fp32() -> None:
    student, teacher = (torch.randn(4, 7, dtype=torch.float64) for _ in range(2))
    expected = kd_loss(student, teacher, reduction="sum") / 3.3
    torch.testing.assert_close(kd_loss(student, teacher, normalizer=3.3), expected, rtol=1e-14, atol=0)


def test_a_normalizer_of_0_gives_0() -> None:
    student, teacher, labels, *_ = mixed_batch()
    for normalizer in (0, torch.tensor(0)):
        loss = kd_loss(student, teacher, torch.full_like(labels, -100), normalizer=normalizer)
        assert loss.item() == 0


def test_nothing_but_the_student_receives_a_gradient() -> None:
    """Reported: gradients reaching the teacher; the teacher's head building autograd state."""
    student, teacher, labels, partner_labels, lam = mixed_batch()
    weights = torch.ones(6, dtype=torch.float64)
    others = [teacher.requires_grad_(), lam.requires_grad_(), weights.requires_grad_()]
    loss = kd_loss(student, teacher, labels, partner_labels, lam, ce_weight=1.0, row_weights=weights)
    loss.backward()
    assert student.grad is not None and all(other.grad is None for other in others)
    leaves, nodes, seen = set(), [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        nodes.extend(following for following, _ in node.next_functions)
    assert leaves == {id(student)}


def test_mixed_labels_are_not_an_argmax() -> None:
    """lam CE(y_i) + (1 - lam) CE(y_j) is the cross entropy against the mixed one-hot labels."""
    student, _, labels, partner_labels, lam = mixed_batch()
    soft = lam[:, None] * F.one_hot(labels, 5) + (1 - lam[:, None]) * F.one_hot(partner_labels, 5)
    loss = kd_loss(student, None, labels, partner_labels, lam, kd_weight=0.0, ce_weight=0.7)
    expected = 0.7 * F.cross_entropy(student, soft)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient_of(loss, student), gradient_of(expected, student))


def test_lam_1_is_the_plain_loss_and_lam_0_the_partners() -> None:
    student, teacher, labels, partner_labels, _ = mixed_batch()
    student.data[0, partner_labels[0]] = -float("inf")
    teacher[0, partner_labels[0]] = -float("inf")
    plain = kd_loss(student, teacher, labels, ce_weight=1.0)
    assert plain.isfinite()
    for lam in (1.0, torch.ones(6), torch.tensor(1)):
        if isinstance(lam, Tensor):
            lam = lam.double()
        torch.testing.assert_close(
            kd_loss(student, teacher, labels, partner_labels, lam, ce_weight=1.0), plain, rtol=0, atol=0
        )
    torch.testing.assert_close(kd_loss(student, teacher, partner_labels, labels, 0.0, ce_weight=1.0), plain)


def test_swapping_the_pair_and_lam_changes_nothing() -> None:
    student, teacher, labels, partner_labels, lam = mixed_batch()
    loss = kd_loss(student, teacher, labels, partner_labels, lam, ce_weight=1.0)
    swapped = kd_loss(student, teacher, partner_labels, labels, 1 - lam, ce_weight=1.0)
    torch.testing.assert_close(loss, swapped)
    torch.testing.assert_close(gradient_of(loss, student), gradient_of(swapped, student))


@pytest.mark.parametrize("setting", SETTINGS, ids=setting_id)
def test_no_value_is_read_by_the_host_in_forward_or_backward(setting: dict[str, Any]) -> None:
    """Reported: host synchronisation in backward. A meta tensor has no value: reading one would raise."""
    student = torch.empty(4, 7, device="meta", requires_grad=True)
    teacher = torch.empty(4, 6, device="meta", dtype=torch.bfloat16)
    labels = torch.empty(4, dtype=torch.long, device="meta")
    lam = torch.empty(4, device="meta")
    options: dict[str, Any] = {"ce_weight": 0.5, "row_weights": torch.empty(4, device="meta"), **setting}
    kd_loss(student, teacher, labels, labels, lam, return_parts=True, **options).loss.backward()
    kd_loss(student, teacher, labels, labels, 0.5, normalizer=torch.empty((), device="meta"), **options).backward()
    kd_loss(student, teacher, normalizer=3, **setting).backward()
    kd_loss(student, teacher, **setting).backward()
    assert student.grad is not None and student.grad.shape == (4, 7)
