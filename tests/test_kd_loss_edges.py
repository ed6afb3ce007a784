"""kd_loss on input that is legal but rare, and on input that must be refused, by every backend of the CPU."""

from typing import Any

import pytest
import torch
from cases import gradient_of, make_logits, mixed_batch
from conftest import require

from mixkd_fast.losses import TopK, kd_loss
from mixkd_fast.ops import backends


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("top", [False, True])
def test_a_double_teacher_of_a_narrower_student(
    each_backend: str, dtype: torch.dtype, top: bool, reduction: Any
) -> None:
    student, teacher = make_logits((6, 40), 1.0, 0, torch.float32)
    leaf = student.detach().to(dtype).requires_grad_()
    side: Any = TopK.from_logits(teacher.double(), 5) if top else teacher.double()
    loss = kd_loss(leaf, side, reduction=reduction)
    assert loss.dtype == torch.float64
    exact = leaf.detach().double().requires_grad_()
    true = kd_loss(exact, side, reduction=reduction, backend="reference")
    weights = torch.full_like(loss, -3.0)
    gradient, expected = gradient_of(loss, leaf, weights), gradient_of(true, exact, weights)
    torch.testing.assert_close(loss, true)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-2, atol=1e-3)


def test_a_double_teacher_of_weight_0(each_backend: str) -> None:
    """The dtype of the loss does not depend on a weight."""
    student, teacher, labels, partner_labels, lam = mixed_batch(torch.float32)
    options: dict[str, Any] = {"kd_weight": 0.0, "ce_weight": 1.0, "row_weights": torch.ones(labels.shape)}
    loss = kd_loss(student, teacher.double(), labels, partner_labels, lam, normalizer=torch.tensor(3.0), **options)
    true = kd_loss(student, None, labels, partner_labels, lam, normalizer=3.0, backend="reference", **options)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss.float(), true)


@pytest.mark.parametrize("kept", [1, 2])
def test_a_half_precision_mean_over_few_of_many_rows(each_backend: str, kept: int) -> None:
    """The saved gradient must hold a share of 1 / 1 as well as one of 1 / 65536."""
    student = torch.tensor([10.0, 0, 0, 0]).expand(65536, 4).half().contiguous().requires_grad_()
    teacher = torch.tensor([0, 10.0, 0, 0]).expand(65536, 4)
    labels = torch.full((65536,), -100)
    labels[:kept] = 0
    gradient = gradient_of(kd_loss(student, teacher, labels, temperature=2.0), student)
    exact = student.detach()[:kept].double().requires_grad_()
    expected = gradient_of(kd_loss(exact, teacher[:kept].double(), temperature=2.0, backend="reference"), exact)
    torch.testing.assert_close(gradient[:kept].double(), expected, rtol=2e-3, atol=1e-4)
    assert (gradient[kept:] == 0).all()


def test_a_half_precision_mean_over_a_large_normalizer(each_backend: str) -> None:
    student, teacher = make_logits((64, 1000), 1.0, 1, torch.float16)
    loss = kd_loss(student, teacher, normalizer=1e6)
    gradient = gradient_of(loss, student, torch.tensor(65536.0))
    exact = student.detach().double().requires_grad_()
    true = kd_loss(exact, teacher.double(), normalizer=1e6, backend="reference")
    expected = gradient_of(true, exact, torch.tensor(65536.0, dtype=torch.float64))
    assert ((gradient.double() - expected).norm() / expected.norm()).item() < 1e-3


@pytest.mark.parametrize("powers", [(1.0, 0.0), (0.2, 0.0), (-0.5, 0.5)], ids=str)
def test_a_class_the_student_masks_in_alpha_beta(each_backend: str, powers: tuple[float, float]) -> None:
    """The loss is infinite; the gradient is that of the limit. (1, 0) is forward KL."""
    student = torch.tensor([[1.0, 2.0, -torch.inf]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[0.5, 1.0, 0.2]], dtype=torch.float64)
    options: dict[str, Any] = {"divergence": "alpha_beta", "ab_alpha": powers[0], "ab_beta": powers[1]}
    loss = kd_loss(student, teacher, **options)
    expected = gradient_of(kd_loss(student, teacher, backend="reference", **options), student)
    gradient = gradient_of(loss, student)
    assert loss.isposinf() and gradient.isfinite().all()
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(
    ("dtype", "classes", "label"), [(torch.int8, 1000, 99), (torch.uint8, 300, 156), (torch.int16, 40000, 5)], ids=str
)
def test_labels_narrower_than_the_number_of_classes(
    each_backend: str, dtype: torch.dtype, classes: int, label: int
) -> None:
    student, teacher = make_logits((3, classes), 1.0, 2, torch.float32)
    labels = torch.tensor([1, 50, label])
    narrow = kd_loss(student, teacher, labels.to(dtype), ce_weight=1.0)
    torch.testing.assert_close(narrow, kd_loss(student, teacher, labels, ce_weight=1.0))
    top = TopK.from_logits(teacher, 2)._replace(indices=torch.tensor([[1, 2], [50, 3], [label, 0]]))
    torch.testing.assert_close(kd_loss(student, top._replace(indices=top.indices.to(dtype))), kd_loss(student, top))


@pytest.mark.parametrize("name", ["teacher_logits", "labels", "partner_labels", "lam", "row_weights"])
def test_tensors_on_another_device_are_refused(each_backend: str, name: str) -> None:
    student, teacher, labels, partner_labels, lam = mixed_batch(torch.float32)
    given: dict[str, Any] = {"teacher_logits": teacher, "labels": labels, "partner_labels": partner_labels, "lam": lam}
    given["row_weights"] = torch.ones(labels.shape)
    given[name] = given[name].to("meta")
    with pytest.raises(ValueError, match=f"{name} is on meta; allowed: cpu, the device of student_logits"):
        kd_loss(student, **given)


def test_a_backend_of_another_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = backends.TABLE["kd_loss", "cuda"]
    monkeypatch.setitem(backends.TABLE, ("kd_loss", "cuda"), entry._replace(missing=lambda: ""))
    with pytest.raises(RuntimeError, match="backend 'cuda' of kd_loss is for tensors on cuda; these are on cpu"):
        backends.select("kd_loss", "cpu", "cuda")


def test_a_returned_gradient_may_be_changed(each_backend: str) -> None:
    student, teacher = make_logits((6, 5), 1.0, 0, torch.float32)
    loss = kd_loss(student, teacher)
    (first,) = torch.autograd.grad(loss, student, retain_graph=True)
    expected = first.clone()
    first.mul_(2)
    torch.testing.assert_close(torch.autograd.grad(loss, student)[0], expected)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_common_offsets_cancel_behind_a_masked_block(each_backend: str, offset: float) -> None:
    student, teacher = (x.detach() for x in make_logits((4, 3000), 1.0, 3, torch.float32))
    student[:, :1024] = teacher[:, :1024] = -torch.inf
    # Exact in fp32, so that the truth is that of the logits without it.
    student, teacher = (torch.round(x * 64) / 64 for x in (student, teacher))
    true = kd_loss(student.double(), teacher.double(), backend="reference")
    torch.testing.assert_close(kd_loss(student + offset, teacher + offset).double(), true, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("what", ["student masked", "teacher masked", "NaN behind a masked block"])
@pytest.mark.parametrize("classes", [5, 100, 5000])
def test_a_row_without_a_softmax_is_nan_whole(each_backend: str, divergence: Any, what: str, classes: int) -> None:
    student, teacher = (x.detach() for x in make_logits((3, classes), 1.0, 4, torch.float32))
    if what == "student masked":
        student[1] = -torch.inf
    elif what == "teacher masked":
        teacher[1] = -torch.inf
    else:
        student[1, : classes - 1] = -torch.inf
        student[1, -1] = torch.nan
    student.requires_grad_()
    loss = kd_loss(student, teacher, divergence=divergence, reduction="none")
    gradient = gradient_of(loss, student, torch.ones_like(loss))
    assert loss.isnan().tolist() == [False, True, False]
    assert gradient[1].isnan().all() and gradient[[0, 2]].isfinite().all()


def test_a_direct_call_reads_no_foreign_memory() -> None:
    require("cpu")
    from test_kd_loss_kernels import op_arguments

    from mixkd_fast.ops.schema import OVERLOADS

    rows = op_arguments()[0].shape[0]
    indices, logprobs = torch.zeros(rows, 1, dtype=torch.long), torch.zeros(rows, 1)
    for changes, message in (
        ({"teacher_indices": indices, "teacher_logits": logprobs, "divergence": 8}, "mse compares logits"),
        ({"normalizer": torch.empty(0)}, "normalizer must be one element"),
        ({"normalizer": torch.tensor(2.0, dtype=torch.float64)}, "normalizer must be one element"),
        ({"normalizer": torch.tensor(2)}, "normalizer must be one element"),
    ):
        with pytest.raises(RuntimeError, match=message):
            OVERLOADS["kd_loss"](*op_arguments(**changes))
