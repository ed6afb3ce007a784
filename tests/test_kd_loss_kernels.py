"""The compiled kernels of kd_loss: accuracy per dtype and shape, autograd, instruction sets, threads, memory."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import SETTINGS, SHAPES, gradient_of, make_logits, mixed_batch, setting_id, true_divergence
from conftest import require
from torch import Tensor

from mixkd_fast.losses import TopK, kd_loss
from mixkd_fast.ops.fused import DIVERGENCE_INDEX
from mixkd_fast.ops.schema import OVERLOADS

COMPUTED = 6e-7
"""Rounding of the arithmetic: a few units in the last place of fp32."""
STORED = {torch.float32: 2e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4}
"""Rounding of a stored gradient."""
ROOT = Path(__file__).resolve().parent.parent


def both_losses(
    student: Tensor, teacher: Tensor, backend: str, grad_output: float, **options: Any
) -> tuple[Tensor, Tensor]:
    """(row losses, gradient for grad_output) of a backend."""
    rows = kd_loss(student, teacher, reduction="none", backend=backend, **options)
    return rows.detach().double(), gradient_of(rows, student, torch.full_like(rows, grad_output)).double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("setting", SETTINGS, ids=setting_id)
def test_error_is_not_above_twice_that_of_eager_pytorch(setting: dict[str, Any], dtype: torch.dtype) -> None:
    """Error against fp64 at most twice eager's in the same dtype, and a floor. fp64 itself: the vectors."""
    require("cpu")
    for shape in SHAPES:
        for scale, temperature in ((1.0, 1.0), (3.0, 2.0), (1.0, 0.5), (4.0, 20.0), (30.0, 2.0)):
            if scale == 30.0 and setting["divergence"] == "alpha_beta" and setting.get("ab_alpha") == 0.0:
                continue  # q^b / p^b overflows there, in the truth as well
            student, teacher = make_logits(shape, scale, 3, dtype)
            values, gradient = true_divergence(student, teacher, temperature=temperature, **setting)
            options = {"temperature": temperature, **setting}
            for name, expected, of_kernel, of_eager in zip(
                ("loss", "gradient"),
                (values, -2.5 * gradient),
                both_losses(student, teacher, "cpu", -2.5, **options),
                both_losses(student, teacher, "reference", -2.5, **options),
                strict=True,
            ):
                size = expected.abs().max().clamp(min=1e-30)
                # tau^2 multiplies what is left of terms as large as the log-ratios, which scale / tau bounds roughly.
                terms = max(1.0, scale / temperature, size.item() / temperature**2)
                floor = COMPUTED * terms * temperature ** (2 if name == "loss" else 1)
                if name == "gradient":
                    floor += STORED[dtype] * size.item()
                error, eager = ((x - expected).abs().max().item() for x in (of_kernel, of_eager))
                assert error <= 2 * eager + floor, f"{name} {shape} scale {scale} tau {temperature}: {error} {eager}"


def test_a_mean_over_many_rows_keeps_its_fp16_gradient() -> None:
    """1 / 8192 of a probability is below the smallest half-precision number; with a loss scale it must come back."""
    require("cpu")
    student, teacher = make_logits((8192, 300), 1.0, 0, torch.float16)
    loss = kd_loss(student, teacher, temperature=2.0, backend="cpu")
    gradient = gradient_of(loss, student, torch.tensor(65536.0))
    expected = gradient_of(kd_loss(student, teacher, temperature=2.0, backend="reference") * 65536.0, student)
    assert gradient.dtype == torch.float16
    assert (gradient.double() - expected.double()).norm() <= 2e-3 * expected.double().norm()


def test_teacher_and_student_of_different_dtypes() -> None:
    require("cpu")
    for student_dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for teacher_dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            for classes in (3, 300, 3000):
                student, _ = make_logits((4, classes), 1.0, 0, student_dtype)
                _, teacher = make_logits((4, classes), 1.0, 1, teacher_dtype)
                for pair in ((student, teacher), (student, TopK.from_logits(teacher, 2))):
                    ours, theirs = (kd_loss(*pair, backend=name) for name in ("cpu", "reference"))
                    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("classes", [3, 300, 3000])
def test_unequal_widths_and_masked_classes_at_every_width(classes: int) -> None:
    require("cpu")
    for setting in SETTINGS:
        for student_width, teacher_width in ((classes, classes + 7), (classes + 7, classes), (classes, classes)):
            student, _ = make_logits((5, student_width), 2.0, 0, torch.float32)
            _, teacher = make_logits((5, teacher_width), 2.0, 1, torch.float32)
            student.data[:, 1] = teacher[:, 1] = -float("inf")
            labels, partner_labels = torch.tensor([0, 2, 0, -100, 2]), torch.tensor([2, 2, 0, 0, 0])
            lam = torch.tensor([0.0, 1.0, 0.3, 0.5, 0.8])
            for temperature in (1.0, 2.0):
                results = []
                for backend in ("cpu", "reference"):
                    loss = kd_loss(
                        student,
                        teacher,
                        labels,
                        partner_labels,
                        lam,
                        temperature=temperature,
                        ce_weight=0.7,
                        backend=backend,
                        **setting,
                    )
                    results.append((loss.detach(), gradient_of(loss, student)))
                torch.testing.assert_close(results[0], results[1], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("tail_mass", [False, True])
def test_a_class_outside_top_k_far_below_the_kept_ones(tail_mass: bool) -> None:
    """The kept classes are e^150 likelier than the rest: their share of the last bucket must not overflow."""
    require("cpu")
    student, teacher = make_logits((3, 40), 1.0, 5, torch.float32)
    student.data[:, :2] += 150
    top = TopK(torch.tensor([[0, 1]] * 3), teacher.log_softmax(-1)[:, :2], tail_mass)
    results = []
    for backend in ("cpu", "reference"):
        loss = kd_loss(student, top, backend=backend)
        results.append((loss.detach(), gradient_of(loss, student)))
    assert results[0][1].isfinite().all()
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


def test_a_leaf_may_be_used_in_several_backwards_of_one_graph() -> None:
    """The saved gradient is handed on as it is; accumulating into `.grad` must not write into it."""
    require("cpu")
    student, teacher = make_logits((6, 5), 1.0, 0, torch.float32)
    loss = kd_loss(student, teacher, backend="cpu")
    expected = gradient_of(loss, student).clone()
    for times in (1, 2, 3, 4):
        loss.backward(retain_graph=True)
        assert student.grad is not None
        torch.testing.assert_close(student.grad, times * expected)
    first, second = kd_loss(student, teacher, backend="cpu"), kd_loss(student, teacher, backend="cpu")
    torch.testing.assert_close(gradient_of(first + second, student), 2 * expected)


def test_backward_with_grad_output_1_moves_no_gradient() -> None:
    require("cpu")
    student, teacher = make_logits((6, 5), 1.0, 0, torch.float32)
    loss = kd_loss(student, teacher, backend="cpu")
    node: Any = loss.grad_fn
    saved = node.saved_tensors[0].data_ptr()
    (kept,) = torch.autograd.grad(loss, student, retain_graph=True)  # somebody may ask again: a copy
    (scaled,) = torch.autograd.grad(loss, student, torch.tensor(2.0), retain_graph=True)
    (last,) = torch.autograd.grad(loss, student)
    assert [x.data_ptr() == saved for x in (kept, scaled, last)] == [False, False, True]


def test_a_second_derivative_is_refused_not_wrong() -> None:
    require("cpu")
    student, teacher = make_logits((6, 5), 1.0, 0, torch.float64)
    (gradient,) = torch.autograd.grad(kd_loss(student, teacher, backend="cpu"), student, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once; backend='reference'"):
        gradient.square().sum().backward()
    # A gradient penalty, which asks for some inputs only.
    weight = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    loss = kd_loss(torch.tanh(student.detach() @ weight), teacher, backend="cpu")
    (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="kd_loss is differentiable once; backend='reference'"):
        torch.autograd.grad(gradient.square().sum(), weight)


def test_forward_mode_is_refused_not_zero() -> None:
    require("cpu")
    student, teacher = make_logits((6, 5), 1.0, 0, torch.float64)
    student = student.detach()
    derivative = torch.func.jvp(lambda x: kd_loss(x, teacher, backend="reference"), (student,), (student,))[1]
    assert derivative != 0
    with pytest.raises(RuntimeError, match="kd_loss has no forward-mode derivative; backend='reference' has one"):
        torch.func.jvp(lambda x: kd_loss(x, teacher, backend="cpu"), (student,), (student,))


def op_arguments(dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[Any, ...]:
    """Arguments of the op `kd_loss` with everything given."""
    student, teacher, labels, partner_labels, lam = mixed_batch(dtype)
    weights = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 1.0], dtype=lam.dtype)
    arguments: dict[str, Any] = {
        "student_logits": student,
        "teacher_logits": teacher,
        "teacher_indices": None,
        "labels": labels,
        "partner_labels": partner_labels,
        "lam": lam,
        "row_weights": weights,
        "normalizer": None,
        "divergence": 0,
        "temperature": 2.0,
        "beta": 0.5,
        "alpha": 0.1,
        "ab_alpha": 0.2,
        "ab_beta": 0.7,
        "detach_mixture": False,
        "kd_weight": 1.0,
        "ce_weight": 0.5,
        "tail_mass": True,
        "ignore_index": -100,
        "reduction": 0,
        "need_grad": True,
        "raise_invalid": True,
    }
    return tuple({**arguments, **changes}.values())


@pytest.mark.parametrize("divergence", list(DIVERGENCE_INDEX))
@pytest.mark.parametrize("reduction", [0, 1, 2])
def test_opcheck(divergence: str, reduction: int) -> None:
    require("cpu")
    arguments = op_arguments(divergence=DIVERGENCE_INDEX[divergence], reduction=reduction)
    # A tolerance of the op's own: both runs of opcheck are the same kernel.
    torch.library.opcheck(OVERLOADS["kd_loss"], arguments)


def test_the_ops_own_autograd_gives_the_same_gradient() -> None:
    require("cpu")
    arguments = op_arguments(torch.float64)
    loss, kd, ce, grad_logits = OVERLOADS["kd_loss"](*arguments)
    assert loss.requires_grad and not (kd.requires_grad or ce.requires_grad or grad_logits.requires_grad)
    torch.testing.assert_close(gradient_of(loss * 3, arguments[0]), 3 * grad_logits)
    assert torch.autograd.gradcheck(lambda s: OVERLOADS["kd_loss"](s, *arguments[1:])[0], (arguments[0],))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_logits": torch.zeros(5, 5)}, r"teacher_logits must be \[6, classes\]"),
        ({"labels": torch.zeros(6)}, "labels has a wrong dtype"),
        ({"labels": torch.zeros(12, dtype=torch.long)[::2]}, "labels must be contiguous"),
        ({"lam": None}, "partner_labels needs lam"),
        ({"divergence": 9}, "divergence is 9"),
        ({"labels": torch.full((6,), 7)}, "labels holds 7; allowed: 0 to 4"),
    ],
)
def test_a_direct_call_with_wrong_tensors_is_refused(changes: dict[str, Any], message: str) -> None:
    require("cpu")
    with pytest.raises(RuntimeError, match=message):
        OVERLOADS["kd_loss"](*op_arguments(**changes))


def test_results_do_not_depend_on_what_new_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allocations filled with NaN: whatever is not written shows."""
    require("cpu")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    for classes in (1, 3, 60, 300, 3000):
        student, teacher = make_logits((19, classes), 1.0, 0, torch.float32)
        labels = torch.zeros(19, dtype=torch.long)
        labels[3] = -100
        for setting in SETTINGS:
            plain = kd_loss(student, teacher, labels, ce_weight=1.0, backend="cpu", **setting)
            expected = plain.detach(), gradient_of(plain, student)
            torch.use_deterministic_algorithms(True)
            try:
                assert torch.empty(3).isnan().all()
                poisoned = kd_loss(student, teacher, labels, ce_weight=1.0, backend="cpu", **setting)
                result = poisoned.detach(), gradient_of(poisoned, student)
            finally:
                torch.use_deterministic_algorithms(False)
            torch.testing.assert_close(result, expected, rtol=0, atol=0)


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    require("cpu")
    before = torch.get_num_threads()
    for shape in ((5000, 3), (600, 300), (9, 30522)):
        student, teacher = make_logits(shape, 1.0, 0, torch.float32)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            loss = kd_loss(student, teacher, divergence="jsd", backend="cpu")
            results.append((loss.detach(), gradient_of(loss, student)))
        torch.set_num_threads(before)
        for result in results[1:]:
            torch.testing.assert_close(result, results[0], rtol=0, atol=0)


PROGRAM = """
import sys, torch
sys.path.insert(0, "tests")
from cases import SETTINGS, make_logits, gradient_of
from mixkd_fast.losses import TopK, kd_loss
out = []
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for shape in ((7, 3), (20, 17), (5, 300), (3, 5000)):
        student, teacher = make_logits(shape, 2.0, 0, dtype)
        labels = torch.arange(shape[0]) % 3
        for setting in SETTINGS:
            for side in (teacher, *([TopK.from_logits(teacher, 2)] if setting["divergence"] != "mse" else [])):
                loss = kd_loss(student, side, labels, temperature=2.0, ce_weight=0.5, backend="cpu", **setting)
                out += [loss.detach().double().reshape(1), gradient_of(loss, student).double().flatten()]
torch.save(torch.cat(out), sys.argv[1])
"""


def test_every_instruction_set_gives_the_same(tmp_path: Path) -> None:
    """torch's ATEN_CPU_CAPABILITY also chooses among the loops of this package."""
    require("cpu")
    results = {}
    for name in ("default", "avx2", "avx512"):
        target = tmp_path / name
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": name, "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-c", PROGRAM, str(target)], check=True, cwd=ROOT, env=environment)
        results[name] = torch.load(target)
    for name in ("default", "avx2"):
        torch.testing.assert_close(results[name], results["avx512"], rtol=8e-3, atol=1e-5)
        # Most values are not near a rounding boundary of bf16.
        assert ((results[name] - results["avx512"]).abs() > 1e-5).double().mean() < 0.05
