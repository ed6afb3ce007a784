"""Every divergence of kd_loss against high-precision vectors and independent fp64 formulas."""

from typing import Any

import pytest
import torch
from cases import (
    SETTINGS,
    SHAPES,
    load_vectors,
    make_logits,
    relative_error,
    setting_id,
    true_divergence,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from mixkd_fast.losses import TopK, kd_loss

pytestmark = pytest.mark.usefixtures("each_backend")

INFINITY = float("inf")
VECTORS = load_vectors()


def every_setting(function: Any) -> Any:
    return pytest.mark.parametrize("setting", SETTINGS, ids=setting_id)(function)


def value_and_gradient(student: torch.Tensor, teacher: torch.Tensor | TopK, **options: Any) -> Any:
    student.grad = None
    loss = kd_loss(student, teacher, reduction="none", **options)
    loss.sum().backward()
    assert student.grad is not None
    return loss.detach(), student.grad


@pytest.mark.parametrize(
    ("dtype", "relative", "absolute"), [(torch.float64, 1e-11, 3e-15), (torch.float32, 1e-5, 2e-7)]
)
@pytest.mark.parametrize("case", VECTORS, ids=lambda c: "-".join([c["divergence"], c["logits"]]))
def test_high_precision_vectors(case: dict[str, Any], dtype: torch.dtype, relative: float, absolute: float) -> None:
    student, teacher = (torch.tensor([float(x) for x in case[side]], dtype=dtype) for side in ("student", "teacher"))
    student.requires_grad_()
    loss, gradient = value_and_gradient(
        student, teacher, temperature=case["temperature"], divergence=case["divergence"], **case["options"]
    )
    # A saturated row is a difference of terms as large as the loss: that sets the absolute floor.
    floor = absolute * max(1.0, case["loss"]) * case["temperature"] ** 2
    assert loss.item() == pytest.approx(case["loss"], rel=relative, abs=floor)
    expected = torch.tensor(case["gradient"], dtype=torch.float64)
    assert (gradient.double() - expected).norm() <= relative * expected.norm() + floor


def test_vectors_cover_every_divergence_and_every_kind_of_logits() -> None:
    assert {case["divergence"] for case in VECTORS} == {setting["divergence"] for setting in SETTINGS}
    assert {case["logits"] for case in VECTORS} >= {
        "far",
        "one_hot_teacher",
        "both_underflow",
        "equal",
        "masked_in_both",
        "masked_in_teacher",
        "masked_in_student",
    }


@pytest.mark.parametrize("temperature", [0.5, 1.0, 20.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_setting
def test_awkward_shapes_fp32(setting: dict[str, Any], shape: tuple[int, ...], temperature: float) -> None:
    student, teacher = make_logits(shape, 3.0, 1, torch.float32)
    loss, gradient = value_and_gradient(student, teacher, temperature=temperature, **setting)
    expected_loss, expected_gradient = true_divergence(student, teacher, temperature=temperature, **setting)
    assert loss.dtype == torch.float32 and loss.shape == shape[:-1]
    torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-5, atol=1e-6 * temperature**2)
    # Saturated rows are differences of terms of the size of D: a few units in their last place are the floor.
    floor = 1e-6 * temperature * max(1.0, expected_loss.max().item() / temperature**2)
    assert (gradient.double() - expected_gradient).norm() <= 1e-5 * expected_gradient.norm() + floor


@every_setting
def test_distributions_far_apart_fp32(setting: dict[str, Any]) -> None:
    student, teacher = make_logits((32, 50), 30.0, 2, torch.float32)
    loss, gradient = value_and_gradient(student, teacher, temperature=2.0, **setting)
    expected_loss, expected_gradient = true_divergence(student, teacher, temperature=2.0, **setting)
    torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-5, atol=1e-6)
    assert relative_error(gradient, expected_gradient) <= 1e-5


@pytest.mark.parametrize(
    "setting",
    [s for s in SETTINGS if s["divergence"] != "adaptive_kl" and not s.get("detach_mixture")],
    ids=setting_id,
)
def test_gradcheck_fp64_at_a_temperature_other_than_1(setting: dict[str, Any]) -> None:
    """adaptive_kl and the detached mixture freeze a part: the vectors hold their differences."""
    student, teacher = make_logits((3, 5), 1.0, 3, torch.float64)
    labels, partner_labels = torch.tensor([0, 4, -100]), torch.tensor([1, 4, 2])

    def loss(student_logits: torch.Tensor) -> torch.Tensor:
        result = kd_loss(
            student_logits,
            teacher,
            labels,
            partner_labels,
            torch.tensor([0.3, 0.6, 0.5], dtype=torch.float64),
            temperature=1.7,
            ce_weight=0.4,
            row_weights=torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64),
            **setting,
        )
        return result

    assert torch.autograd.gradcheck(loss, (student,))


@every_setting
def test_loss_and_gradient_are_zero_when_student_is_teacher(setting: dict[str, Any]) -> None:
    student, _ = make_logits((5, 33), 4.0, 4, torch.float32)
    loss, gradient = value_and_gradient(student, student.detach().clone(), temperature=2.0, **setting)
    torch.testing.assert_close(loss, torch.zeros_like(loss), atol=1e-5, rtol=0)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-6, rtol=0)


@every_setting
def test_half_precision_inputs_are_computed_in_fp32(setting: dict[str, Any]) -> None:
    for dtype, rounding in ((torch.bfloat16, 2**-8), (torch.float16, 2**-11)):
        student, teacher = make_logits((6, 31), 3.0, 5, dtype)
        loss, gradient = value_and_gradient(student, teacher, temperature=2.0, **setting)
        expected_loss, expected_gradient = true_divergence(student, teacher, temperature=2.0, **setting)
        assert loss.dtype == torch.float32 and gradient.dtype == dtype
        torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient.double(), expected_gradient, rtol=rounding, atol=1e-6)


@every_setting
def test_student_and_teacher_may_differ_in_dtype(setting: dict[str, Any]) -> None:
    student, teacher = make_logits((4, 9), 2.0, 6, torch.bfloat16)
    mixed = kd_loss(student, teacher.float(), **setting)
    torch.testing.assert_close(mixed, kd_loss(student.float(), teacher, **setting), rtol=0, atol=0)
    assert kd_loss(student, teacher.double(), **setting).dtype == torch.float64


@every_setting
def test_nan_in_a_row_is_nan_for_that_row_only(setting: dict[str, Any]) -> None:
    for side in (0, 1):
        student, teacher = make_logits((3, 6), 1.0, 7, torch.float32)
        (student, teacher)[side].data[1, 2] = float("nan")
        loss, gradient = value_and_gradient(student, teacher, temperature=2.0, **setting)
        assert loss.isnan().tolist() == [False, True, False]
        assert gradient[[0, 2]].isfinite().all()


@every_setting
def test_a_class_masked_in_both_counts_for_nothing(setting: dict[str, Any]) -> None:
    student, teacher = make_logits((4, 6), 2.0, 8, torch.float64)
    narrow, narrow_gradient = value_and_gradient(student, teacher, temperature=2.0, **setting)
    pad = torch.full((4, 3), -INFINITY, dtype=torch.float64)
    wide_student = torch.cat([pad, student.detach()], -1).requires_grad_()
    wide, gradient = value_and_gradient(wide_student, torch.cat([pad, teacher], -1), temperature=2.0, **setting)
    torch.testing.assert_close(wide, narrow, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient[:, 3:], narrow_gradient.clone(), rtol=1e-10, atol=1e-14)
    assert (gradient[:, :3] == 0).all()


def test_a_row_of_which_every_class_is_masked_is_nan_and_leaves_the_others_alone() -> None:
    student, teacher = make_logits((2, 4), 1.0, 9, torch.float32)
    student.data[0] = -INFINITY
    loss, gradient = value_and_gradient(student, teacher)
    assert loss.isnan().tolist() == [True, False] and gradient[1].isfinite().all()


def test_forward_kl_is_infinite_where_only_the_student_masks_with_a_finite_gradient() -> None:
    student, teacher = make_logits((1, 4), 1.0, 10, torch.float64)
    student.data[0, 0] = -INFINITY
    loss, gradient = value_and_gradient(student, teacher)
    assert loss.item() == INFINITY
    torch.testing.assert_close(gradient, student.softmax(-1).detach() - teacher.softmax(-1))


def test_jsd_is_not_nan_when_both_underflow() -> None:
    for dtype in (torch.float32, torch.float64):
        student = torch.tensor([[0.0, -2000.0, 1.0]], dtype=dtype, requires_grad=True)
        teacher = torch.tensor([[0.0, -3000.0, 0.5]], dtype=dtype)
        for divergence in ("jsd", "skew_forward_kl", "skew_reverse_kl", "reverse_kl", "alpha_beta"):
            loss, gradient = value_and_gradient(student, teacher, divergence=divergence)
            assert loss.isfinite().all() and gradient.isfinite().all()
            without, _ = value_and_gradient(
                student[:, ::2].detach().requires_grad_(), teacher[:, ::2], divergence=divergence
            )
            torch.testing.assert_close(loss, without)


def test_tvd_gradient_is_zero_where_p_equals_q() -> None:
    student = torch.tensor([[0.0, 0.0, 3.0], [1.0, 2.0, 3.0]], requires_grad=True)
    teacher = torch.tensor([[0.0, 0.0, 3.0], [2.0, 1.0, 3.0]])
    _, gradient = value_and_gradient(student, teacher, divergence="tvd")
    assert (gradient[0] == 0).all()
    q = student.detach()[1].softmax(-1)
    # p = q for the third class: its u is 0, so its gradient is -q_3 sum(q u) alone.
    torch.testing.assert_close(gradient[1, 2], -q[2] * (q[1] - q[0]) / 2)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@every_setting
def test_gradient_scales_with_temperature_squared_as_the_loss_does(setting: dict[str, Any], temperature: float) -> None:
    """With logits scaled by tau the distributions stay: the loss grows by tau^2, its gradient by tau."""
    student, teacher = make_logits((4, 7), 1.0, 11, torch.float64)
    loss, gradient = value_and_gradient(student, teacher, temperature=1.0, **setting)
    scaled_student = (student.detach() * temperature).requires_grad_()
    scaled_loss, scaled_gradient = value_and_gradient(
        scaled_student, teacher * temperature, temperature=temperature, **setting
    )
    torch.testing.assert_close(scaled_loss, temperature**2 * loss)
    torch.testing.assert_close(scaled_gradient, temperature * gradient)


def test_named_divergences_meet_in_their_limits() -> None:
    student, teacher = make_logits((4, 7), 1.5, 12, torch.float64)

    def rows(**options: Any) -> torch.Tensor:
        result = kd_loss(student, teacher, temperature=2.0, reduction="none", **options)
        return result.detach()

    forward, reverse = rows(), rows(divergence="reverse_kl")
    assert not torch.allclose(forward, reverse)
    for equal_to_forward in (
        {"divergence": "jsd", "beta": 0.0},
        {"divergence": "skew_forward_kl", "alpha": 0.0},
        {"divergence": "alpha_beta", "ab_alpha": 1.0, "ab_beta": 0.0},
    ):
        torch.testing.assert_close(rows(**equal_to_forward), forward)
    for equal_to_reverse in (
        {"divergence": "jsd", "beta": 1.0},
        {"divergence": "skew_reverse_kl", "alpha": 0.0},
        {"divergence": "alpha_beta", "ab_alpha": 0.0, "ab_beta": 1.0},
    ):
        torch.testing.assert_close(rows(**equal_to_reverse), reverse)
    near_zero = rows(divergence="jsd", beta=1e-6) / 1e-6
    torch.testing.assert_close(near_zero, forward, rtol=1e-4, atol=0)
    swapped = kd_loss(teacher, student, temperature=2.0, reduction="none", divergence="jsd")
    torch.testing.assert_close(rows(divergence="jsd"), swapped)


@every_setting
def test_unequal_vocabularies_compare_shared_classes_only(setting: dict[str, Any]) -> None:
    """Neither a crash when the teacher is narrower nor logit 0 as filling when it is wider."""
    student, teacher = make_logits((3, 12), 2.0, 13, torch.float64)
    shared = student.detach()[:, :9].clone().requires_grad_()
    expected, expected_gradient = value_and_gradient(shared, teacher[:, :9], temperature=2.0, **setting)
    wider_student, gradient = value_and_gradient(student, teacher[:, :9], temperature=2.0, **setting)
    torch.testing.assert_close(wider_student, expected)
    torch.testing.assert_close(gradient[:, :9], expected_gradient)
    assert (gradient[:, 9:] == 0).all()
    narrower = student.detach()[:, :9].clone().requires_grad_()
    wider_teacher, gradient = value_and_gradient(narrower, teacher, temperature=2.0, **setting)
    torch.testing.assert_close(wider_teacher, expected)
    torch.testing.assert_close(gradient, expected_gradient)


def test_padded_vocabularies_of_large_models() -> None:
    student, teacher = make_logits((1, 152064), 2.0, 14, torch.float32)
    expected, _ = true_divergence(student[:, :151936], teacher[:, :151936], temperature=2.0, divergence="forward_kl")
    loss = kd_loss(student, teacher[:, :151936], temperature=2.0, reduction="none")
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("setting", [s for s in SETTINGS if s["divergence"] != "mse"], ids=setting_id)
def test_top_k_of_all_classes_is_the_dense_teacher(setting: dict[str, Any]) -> None:
    student, teacher = make_logits((2, 3, 8), 2.0, 15, torch.float64)
    expected, expected_gradient = value_and_gradient(student, teacher, temperature=2.0, **setting)
    expected_gradient = expected_gradient.clone()
    for tail_mass in (True, False):
        top = TopK.from_logits(teacher, 8, temperature=2.0, tail_mass=tail_mass)
        loss, gradient = value_and_gradient(student, top, temperature=2.0, **setting)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("setting", [s for s in SETTINGS if s["divergence"] != "mse"], ids=setting_id)
def test_top_k_holds_the_rest_in_one_bucket(setting: dict[str, Any]) -> None:
    """The bucket of classes is one class whose logit is the logsumexp of theirs."""
    student, teacher = make_logits((5, 11), 2.0, 16, torch.float64)
    tau = 2.0
    top = TopK.from_logits(teacher, 3, temperature=tau)
    loss, gradient = value_and_gradient(student, top, temperature=tau, **setting)
    for row in range(5):
        kept = top.indices[row].tolist()
        rest = [c for c in range(11) if c not in kept]
        leaf = student.detach()[row].clone().requires_grad_()
        coarse = torch.cat([leaf[kept], (tau * (leaf[rest] / tau).logsumexp(0)).reshape(1)])
        coarse_teacher = torch.cat([teacher[row][kept], (tau * (teacher[row][rest] / tau).logsumexp(0)).reshape(1)])
        expected = kd_loss(coarse, coarse_teacher, temperature=tau, reduction="none", **setting)
        expected.backward()
        torch.testing.assert_close(loss[row], expected.detach())
        torch.testing.assert_close(gradient[row], leaf.grad)


def test_top_k_without_the_tail_renormalises_both_sides() -> None:
    student, teacher = make_logits((4, 9), 2.0, 17, torch.float64)
    top = TopK.from_logits(teacher, 4, temperature=2.0, tail_mass=False)
    loss, _ = value_and_gradient(student, top, temperature=2.0)
    expected = kd_loss(
        student.gather(-1, top.indices), teacher.gather(-1, top.indices), temperature=2.0, reduction="none"
    )
    torch.testing.assert_close(loss, expected.detach())


@pytest.mark.parametrize("setting", [s for s in SETTINGS if s["divergence"] != "mse"], ids=setting_id)
def test_top_k_stays_finite_when_the_tail_vanishes(setting: dict[str, Any]) -> None:
    """A teacher so sure that 1 - sum(p) is rounding noise, and a student that masks every other class."""
    student, teacher = make_logits((3, 6), 1.0, 18, torch.float32)
    teacher[:, 0] = 60.0
    student.data[1, 2:] = -INFINITY
    teacher[1, 2:] = -INFINITY
    loss, gradient = value_and_gradient(student, TopK.from_logits(teacher, 2), **setting)
    assert loss.isfinite().all() and gradient.isfinite().all()


@settings(max_examples=40, deadline=None)
@given(
    setting=st.sampled_from(SETTINGS),
    rows=st.integers(0, 5),
    classes=st.integers(1, 40),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 20.0]),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    seed=st.integers(0, 2**16),
)
def test_any_shape_and_magnitude(
    setting: dict[str, Any], rows: int, classes: int, scale: float, temperature: float, seed: int
) -> None:
    student, teacher = make_logits((rows, classes), scale, seed, torch.float64)
    loss, gradient = value_and_gradient(student, teacher, temperature=temperature, **setting)
    if rows == 0:
        assert loss.shape == (0,) and gradient.shape == (0, classes)
        return
    expected_loss, expected_gradient = true_divergence(student, teacher, temperature=temperature, **setting)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-8, atol=1e-12)
    assert (loss >= -1e-12).all()
    if setting["divergence"] != "mse":
        torch.testing.assert_close(gradient.sum(-1), torch.zeros(rows, dtype=torch.float64), atol=1e-11, rtol=0)
