"""kd_loss by Triton: on a GPU where there is one, else by Triton's interpreter on the CPU."""

from typing import Any

import pytest
import torch
from cases import SETTINGS, gradient_of, load_vectors, make_logits, setting_id, true_divergence
from torch import Tensor

from mixkd_fast.losses import TopK, kd_loss
from mixkd_fast.ops import backends

pytest.importorskip("triton", reason="triton is not installed")
# numpy's, where the interpreter computes with infinities.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Narrow rows, one row in several programs, a width that fills no tile, rows beyond one group.
SHAPES = [(1, 1), (5, 2), (70, 3), (9, 17), (3, 257), (2, 513), (3, 5000)] + [(2, 8192)] * (DEVICE == "cuda")
# The interpreter computes them all in fp32.
DTYPES = [
    pytest.param(dtype, marks=[] if DEVICE == "cuda" or dtype == torch.float32 else [pytest.mark.slow])
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
]
WIDE = [(2, 30522), (1, 131073), (64, 50257)] if DEVICE == "cuda" else [(1, 30522)]


@pytest.fixture(autouse=True)
def triton_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter the backend is of use to tests only, so the table calls it missing without a GPU."""
    entry = backends.TABLE["kd_loss", "triton"]
    monkeypatch.setitem(backends.TABLE, ("kd_loss", "triton"), entry._replace(missing=lambda: ""))
    monkeypatch.setattr(backends, "_resolved", {})


def results(student: Tensor, teacher: Any, backend: str, grad_output: float = -2.5, **options: Any) -> list[Tensor]:
    """Loss, parts and gradient on the test's device."""
    on_device = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in options.items()}
    if isinstance(teacher, TopK):
        teacher = TopK(teacher.indices.to(DEVICE), teacher.logprobs.to(DEVICE), teacher.tail_mass)
    elif teacher is not None:
        teacher = teacher.to(DEVICE)
    leaf = student.detach().to(DEVICE).requires_grad_()
    parts = kd_loss(leaf, teacher, backend=backend, return_parts=True, **on_device)
    gradient = gradient_of(parts.loss, leaf, torch.full_like(parts.loss, grad_output))
    return [x.detach().cpu().double() for x in (*parts, gradient)]


def assert_alike(student: Tensor, teacher: Any, rtol: float = 2e-5, atol: float = 2e-6, **options: Any) -> None:
    """Triton against the reference in fp64 from the same inputs; the gradient to its dtype's rounding.

    It is rounded twice, when it is written and when grad_output multiplies it; the interpreter cuts bf16 off.
    """
    rounding = {torch.float32: 0.0, torch.bfloat16: 1.2e-2, torch.float16: 1e-3}[student.dtype]
    doubled = {n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in options.items()}
    if isinstance(teacher, TopK):
        exact: Any = teacher._replace(logprobs=teacher.logprobs.double())
    else:
        exact = None if teacher is None else teacher.double()
    expected = results(student.double(), exact, "reference", **doubled)
    actual = results(student, teacher, "triton", **options)
    for name, x, y in zip(("loss", "kd", "ce", "gradient"), actual, expected, strict=True):
        scale = max(1.0, y[y.isfinite()].abs().max().item() if y.isfinite().any() else 0.0)
        extra = rounding if name == "gradient" else 0.0
        assert torch.allclose(x, y, rtol + extra, (atol + extra) * scale, equal_nan=True), f"{name}: {x} is not {y}"


def labels_and_weights(rows: int, classes: int) -> dict[str, Tensor]:
    """Everything that can be given, with dropped rows."""
    generator = torch.Generator().manual_seed(rows)
    labels, partner_labels = torch.randint(classes, (2, rows), generator=generator)
    lam, weights = torch.rand(2, rows, generator=generator)
    if rows > 2:
        labels[1], partner_labels[2], weights[0] = -100, -100, 0.0
        lam[-1] = 1.0
    return {"labels": labels, "partner_labels": partner_labels, "lam": lam, "row_weights": weights}


@pytest.mark.parametrize("setting", SETTINGS, ids=setting_id)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_divergence_dtype_and_shape(setting: dict[str, Any], dtype: torch.dtype) -> None:
    for shape in SHAPES:
        student, teacher = make_logits(shape, 2.0, 0, dtype)
        hard = labels_and_weights(*shape)
        assert_alike(student, teacher, temperature=2.0, reduction="none", **setting)
        assert_alike(student, teacher, temperature=1.0, ce_weight=0.7, kd_weight=0.3, **hard, **setting)


@pytest.mark.parametrize("case", load_vectors(), ids=lambda c: "-".join([c["divergence"], c["logits"]]))
def test_high_precision_vectors(case: dict[str, Any]) -> None:
    student, teacher = (torch.tensor([[float(x) for x in case[side]]]) for side in ("student", "teacher"))
    options = {"temperature": case["temperature"], "divergence": case["divergence"], **case["options"]}
    loss, _, _, gradient = results(student, teacher, "triton", 1.0, **options)
    floor = 3e-7 * max(1.0, case["loss"]) * case["temperature"] ** 2
    assert loss.item() == pytest.approx(case["loss"], rel=1e-5, abs=floor)
    expected = torch.tensor([case["gradient"]], dtype=torch.float64)
    assert (gradient - expected).norm() <= 1e-5 * expected.norm() + floor


@pytest.mark.parametrize("setting", SETTINGS, ids=setting_id)
def test_wide_rows_and_far_apart_logits(setting: dict[str, Any]) -> None:
    for shape in WIDE:
        student, teacher = make_logits(shape, 1.0, 1, torch.bfloat16)
        assert_alike(student, teacher, temperature=0.5, atol=2e-5, **setting)
    if setting["divergence"] == "alpha_beta":
        return  # powers of far-apart probabilities leave fp32
    for shape in ((4, 30), (2, 3000)):
        student, teacher = make_logits(shape, 30.0, 2, torch.float32)
        values, gradient = true_divergence(student, teacher, temperature=2.0, **setting)
        loss, _, _, actual = results(student, teacher, "triton", 1.0, temperature=2.0, reduction="none", **setting)
        torch.testing.assert_close(loss, values, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(actual, gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("classes", [6, 3000])
def test_masked_equal_infinite_and_nan_logits(classes: int) -> None:
    for setting in SETTINGS:
        student, teacher = make_logits((5, classes), 1.0, 3, torch.float32)
        student.data[:, 1] = teacher[:, 1] = -float("inf")
        teacher[1] = student.data[1]
        assert_alike(student, teacher, temperature=2.0, reduction="none", **setting)
        student.data[2, 0], teacher[3, 4] = float("nan"), float("inf")
        loss, _, _, gradient = results(student, teacher, "triton", temperature=2.0, reduction="none", **setting)
        bad = torch.tensor([False, False, True, True, False])
        assert (loss.isfinite() == ~bad).all()
        assert gradient[~bad].isfinite().all() and gradient[2].isnan().any()


@pytest.mark.parametrize("classes", [5, 700, 5000])
def test_unequal_widths_strides_and_cross_entropy_alone(classes: int) -> None:
    for student_width, teacher_width in ((classes, classes + 90), (classes + 90, classes)):
        student, _ = make_logits((4, 2 * student_width), 1.0, 4, torch.float32)
        _, teacher = make_logits((8, teacher_width), 1.0, 5, torch.bfloat16)
        hard = labels_and_weights(4, classes)
        for temperature in (1.0, 3.0):
            assert_alike(student[:, :student_width], teacher[::2], temperature=temperature, ce_weight=0.5, **hard)
    assert_alike(student, None, kd_weight=0.0, ce_weight=1.0, **labels_and_weights(4, classes))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(300, 3), (20, 700)])
def test_reductions_and_normalizer(shape: tuple[int, int], reduction: str) -> None:
    student, teacher = make_logits(shape, 1.0, 6, torch.float32)
    hard = labels_and_weights(*shape)
    assert_alike(student, teacher, ce_weight=0.5, reduction=reduction, **hard)
    if reduction == "mean":
        assert_alike(student, teacher, normalizer=torch.tensor(7.0))
        nothing = torch.full((shape[0],), -100)
        loss, *_, gradient = results(student, teacher, "triton", labels=nothing)
        assert loss == 0 and (gradient == 0).all()


@pytest.mark.parametrize("tail_mass", [False, True])
@pytest.mark.parametrize("setting", [s for s in SETTINGS if s["divergence"] != "mse"], ids=setting_id)
def test_top_k(setting: dict[str, Any], tail_mass: bool) -> None:
    for classes in (5, 700):
        student, teacher = make_logits((6, classes), 1.0, 7, torch.float32)
        top = TopK.from_logits(teacher, 4, temperature=2.0, tail_mass=tail_mass)
        hard = labels_and_weights(6, classes)
        assert_alike(student, top, temperature=2.0, ce_weight=0.5, **hard, **setting)


def test_top_k_of_many_classes_and_ties() -> None:
    """Ties enter the head of adaptive_kl in the order of the lanes, the last bucket after them."""
    student, teacher = make_logits((3, 2500), 1.0, 7, torch.float32)
    teacher = (teacher * 2).round() / 2
    for k in (5, 300, 2047):
        top = TopK.from_logits(teacher, k, tail_mass=True)
        for divergence in ("forward_kl", "adaptive_kl"):
            assert_alike(student, top, divergence=divergence)
    with pytest.raises(
        ValueError, match=r"teacher has 2048 classes per row; allowed: up to 2047 with backend 'triton'"
    ):
        results(student, TopK.from_logits(teacher, 2048), "triton")


@pytest.mark.parametrize("classes", [5, 700])
def test_a_label_out_of_range_makes_its_row_nan(classes: int) -> None:
    student, teacher = make_logits((4, classes), 1.0, 8, torch.float32)
    labels = torch.tensor([0, classes, -1, 2])
    for ce_weight in (0.0, 1.0):
        loss, _, _, gradient = results(student, teacher, "triton", labels=labels, ce_weight=ce_weight, reduction="none")
        assert loss.isnan().tolist() == [False, True, True, False]
        assert gradient[[0, 3]].isfinite().all() and gradient[[1, 2]].isnan().all()


def test_no_rows_no_gradient_and_fp64() -> None:
    student, teacher = (x.to(DEVICE) for x in make_logits((3, 5), 1.0, 9, torch.float32))
    assert kd_loss(student[:0], teacher[:0], backend="triton").item() == 0
    with torch.no_grad():
        loss = kd_loss(student, teacher, backend="triton")
    torch.testing.assert_close(loss, kd_loss(student, teacher, backend="reference").detach())
    with pytest.raises(ValueError, match=r"student_logits or teacher_logits is torch.float64; allowed: float32"):
        kd_loss(student.double(), teacher, backend="triton")


def test_results_do_not_depend_on_what_new_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    for shape in ((19, 3), (3, 5000)):
        student, teacher = make_logits(shape, 1.0, 10, torch.float32)
        hard = labels_and_weights(*shape)
        for setting in SETTINGS:
            plain = results(student, teacher, "triton", ce_weight=1.0, **hard, **setting)
            torch.use_deterministic_algorithms(True)
            try:
                poisoned = results(student, teacher, "triton", ce_weight=1.0, **hard, **setting)
            finally:
                torch.use_deterministic_algorithms(False)
            torch.testing.assert_close(poisoned, plain, rtol=0, atol=0)
