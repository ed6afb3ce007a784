"""linear_kd_loss by the fused kernels: accuracy per divergence, dtype and shape; chunks, memory, autograd, compile."""

from typing import Any

import pytest
import torch
from cases import SETTINGS, setting_id
from conftest import interpreted_triton, require
from linear_cases import (
    ROUNDING,
    assert_near,
    check_against_truth,
    gradients_of,
    in_double,
    make_heads,
    true_rows,
)
from torch import Tensor

from benchmarks.timing import peak_bytes
from mixkd_fast.losses import linear_kd_loss
from mixkd_fast.ops import HeadInputs, LinearInputs, LinearLimits, RowOptions, backends, bf16_product, linear_chunks
from mixkd_fast.ops.linear_fused import arguments_of

MIB = 2**20
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def the_kernel_is_there() -> None:
    require("cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("setting", SETTINGS, ids=setting_id)
def test_every_divergence_in_every_dtype(setting: dict[str, Any], dtype: torch.dtype) -> None:
    """From the same hidden states and weights: half precision costs no more than the rounding of its gradients."""
    for classes, teacher_classes in ((300, 300), (2100, 2070)):
        arguments = make_heads((21,), classes, teacher_classes, (64, 48), dtype=dtype)
        for reduction, temperature in (("mean", 2.0), ("none", 1.0)):
            options = {"temperature": temperature, "ce_weight": 0.4, "backend": "cpu", **setting}
            check_against_truth(arguments, reduction, ROUNDING[dtype], **options)


@pytest.mark.parametrize("classes", [1, 2, 3, 257, 30522])
def test_awkward_numbers_of_classes(classes: int) -> None:
    for dtype in DTYPES:
        arguments = make_heads((5,), classes, widths=(8, 24), dtype=dtype)
        check_against_truth(arguments, "sum", ROUNDING[dtype], ce_weight=0.5, backend="cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads_of_any_strides(dtype: torch.dtype) -> None:
    """Columns next to each other, and nothing next to anything."""
    for across in (True, False):
        arguments = make_heads((21,), 300, 290, (64, 48), dtype=dtype)
        for name in ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight"):
            value = arguments[name].detach()
            spread = value.T.contiguous().T if across else value.repeat_interleave(2, 1)[:, ::2]
            arguments[name] = spread.requires_grad_(arguments[name].requires_grad)
        check_against_truth(arguments, "mean", ROUNDING[dtype], ce_weight=0.5, backend="cpu")


def test_vocabularies_of_151936_and_152064_classes() -> None:
    arguments = make_heads((2,), 151936, 152064, widths=(8, 8), dtype=torch.bfloat16, hard=False)
    check_against_truth(arguments, "mean", 1e-2, divergence="jsd", backend="cpu")


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "tvd"])
def test_distributions_far_apart(divergence: str) -> None:
    """Logits of standard deviation 30: nearly one-hot, most classes underflow."""
    arguments = make_heads((16,), 500, widths=(64, 64), spread=30.0, bias=False)
    check_against_truth(arguments, "mean", 1e-4, divergence=divergence, ce_weight=0.3, backend="cpu")


def test_half_precision_logits_would_not_do() -> None:
    """What the 1 % is about: the same gradient from logits rounded to bf16."""
    arguments = make_heads((64,), 2000, widths=(64, 64), dtype=torch.bfloat16, spread=8.0, bias=False, hard=False)
    expected = true_rows(arguments)["student_hidden"]
    ours = gradients_of(linear_kd_loss(**arguments, reduction="sum", backend="cpu"), arguments)["student_hidden"]
    rounded = torch.nn.functional.linear(arguments["student_hidden"], arguments["student_weight"])
    teacher = torch.nn.functional.linear(arguments["teacher_hidden"], arguments["teacher_weight"])
    loss = torch.nn.functional.kl_div(rounded.float().log_softmax(-1), teacher.float().softmax(-1), reduction="sum")
    theirs = gradients_of(loss, {"student_hidden": arguments["student_hidden"]})["student_hidden"]
    size = expected.norm()
    assert (ours - expected).norm() < 0.01 * size < (theirs - expected).norm()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("softcap", [None, 6.0])
def test_chunks_change_nothing(reduction: Any, softcap: float | None) -> None:
    """One row at a time, some rows at a time, all at once."""
    arguments = in_double(make_heads((150,), 61, 67, (8, 8)))
    arguments |= {"student_softcap": softcap, "student_scale": 1.3}
    results = []
    for max_logits_mib in (1e-6, 0.07, 0.11, 512):
        loss = linear_kd_loss(
            **arguments, ce_weight=0.5, temperature=2.0, reduction=reduction, max_logits_mib=max_logits_mib
        )
        results.append((loss.detach(), gradients_of(loss, arguments, torch.full_like(loss, 2.0))))
    for result in results[:-1]:
        torch.testing.assert_close(result, results[-1], rtol=1e-11, atol=1e-13)


def peak_of(max_logits_mib: float, arguments: dict[str, Any], **options: Any) -> int:
    """Bytes that forward and backward occupied at once, without the gradients."""

    def call() -> list[Tensor]:
        loss = linear_kd_loss(**arguments, max_logits_mib=max_logits_mib, **options)
        loss.sum().backward()
        gradients = [value.grad for value in arguments.values() if isinstance(value, Tensor) and value.grad is not None]
        for value in arguments.values():
            if isinstance(value, Tensor):
                value.grad = None
        return gradients

    return peak_bytes(call, torch.device("cpu"))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("changes", [{}, {"student_softcap": 20.0}, {"dtype": torch.bfloat16}], ids=str)
def test_logits_never_take_more_than_allowed(changes: dict[str, Any], reduction: str) -> None:
    """Whole logits of both sides would be 64 MiB; gradients and their sums are 3 MiB."""
    dtype = changes.get("dtype", torch.float32)
    arguments = make_heads((1024,), 8192, widths=(32, 32), bias=False, dtype=dtype)
    arguments |= {name: value for name, value in changes.items() if name != "dtype"}
    beside = 6 * MIB
    for limit in (4, 16):
        peak = peak_of(limit, arguments, ce_weight=0.5, reduction=reduction, backend="cpu")
        assert 0.4 * limit * MIB < peak < limit * MIB + beside, f"{peak / MIB} MiB with {limit} MiB of logits"
    assert peak_of(512, arguments, reduction=reduction, backend="reference") > 64 * MIB


@pytest.mark.skipif(not bf16_product.is_available(), reason="this processor does not multiply bf16")
def test_the_gradient_of_one_chunk_needs_no_wider_copy() -> None:
    """Of a head of 16 MiB in bf16. The logits of all rows are 4 MiB, and chunks are summed up in 32 MiB."""
    arguments = make_heads((16,), 32768, widths=(256, 8), bias=False, dtype=torch.bfloat16)
    assert peak_of(512, arguments, backend="cpu") < 22 * MIB
    assert peak_of(0.5, arguments, backend="cpu") > 48 * MIB
    results = []
    for max_logits_mib in (512, 0.5):
        loss = linear_kd_loss(**arguments, max_logits_mib=max_logits_mib, backend="cpu")
        results.append(gradients_of(loss, arguments, torch.tensor(3.0))["student_weight"])
    assert (results[0].double() - results[1]).norm() <= 3e-3 * results[1].double().norm()


def test_dropped_rows_are_not_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    multiplied: list[int] = []
    original = linear_chunks.products.multiply

    def counted(hidden: Tensor, *others: Any) -> None:
        multiplied.append(hidden.shape[0])
        original(hidden, *others)

    monkeypatch.setattr(linear_chunks.products, "multiply", counted)
    arguments = make_heads((100,))
    kept = int(((arguments["labels"] != -100) & (arguments["row_weights"] != 0)).sum())
    linear_kd_loss(**arguments, backend="cpu").backward()
    assert kept < 100 and multiplied == [kept, kept]


def test_chunks_are_balanced_and_few_rows_are_one() -> None:
    sizes = {most: linear_chunks.Chunks(None, 1000, most).size for most in (1, 10, 64, 500, 600, 1000, 4000)}
    assert sizes == {1: 1, 10: 10, 64: 64, 500: 500, 600: 512, 1000: 1000, 4000: 1024}
    assert linear_chunks.Chunks(None, 1000, 4000).begins() == [0]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torch_compile_finds_one_graph(reduction: Any, dtype: torch.dtype) -> None:
    arguments = make_heads((12,), 100, widths=(16, 8), dtype=dtype)
    names = ("student_hidden", "student_weight", "student_bias")
    fixed = {name: value for name, value in arguments.items() if name not in names}

    def loss_of(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        loss: Tensor = linear_kd_loss(
            hidden.tanh(), weight, student_bias=bias, **fixed, ce_weight=0.5, reduction=reduction, backend="cpu"
        )
        return loss * 2

    torch.compiler.reset()
    results = []
    for function in (loss_of, torch.compile(loss_of, fullgraph=True, backend="aot_eager")):
        loss = function(*(arguments[name] for name in names))
        results.append((loss.detach(), gradients_of(loss, arguments, torch.full_like(loss, 3.0))))
    # The compiled call cannot know that one chunk is all, and rounds bf16 once instead of twice.
    close = {} if dtype == torch.float32 else {"rtol": 8e-3, "atol": 1e-6}
    torch.testing.assert_close(results[1], results[0], **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_opcheck(reduction: str, dtype: torch.dtype) -> None:
    arguments = make_heads((6,), 11, widths=(4, 3), dtype=dtype)
    student = HeadInputs(arguments["student_hidden"], arguments["student_weight"], arguments["student_bias"], 5.0)
    teacher = HeadInputs(arguments["teacher_hidden"], arguments["teacher_weight"], arguments["teacher_bias"])
    rows = (arguments[name] for name in ("labels", "partner_labels", "lam", "row_weights"))
    call = arguments_of(
        "kd_loss", LinearInputs(student, teacher, *rows), RowOptions(ce_weight=0.5), -100, LinearLimits()
    )
    if reduction == "none":
        torch.library.opcheck(torch.ops.mixkd_fast.linear_kd_loss_rows.default, tuple(call))
    else:
        torch.library.opcheck(torch.ops.mixkd_fast.linear_kd_loss.default, (*call, 7))


def test_results_do_not_depend_on_what_new_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allocations filled with NaN: whatever is not written shows."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    for changes in ({}, {"student_softcap": 5.0}, {"dtype": torch.bfloat16}, {"logit_free": True}):
        arguments = make_heads((70,), 1500, 1400, (16, 24), dtype=changes.get("dtype", torch.float32))
        arguments |= {name: value for name, value in changes.items() if name != "dtype"}
        outcomes = []
        for poisoned in (False, True):
            torch.use_deterministic_algorithms(poisoned)
            try:
                loss = linear_kd_loss(**arguments, ce_weight=0.5, max_logits_mib=0.2, divergence="jsd")
                outcomes.append((loss.detach(), gradients_of(loss, arguments)))
            finally:
                torch.use_deterministic_algorithms(False)
        torch.testing.assert_close(outcomes[1], outcomes[0], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("logit_free", [False, True])
def test_a_second_derivative_is_refused_not_wrong(reduction: Any, logit_free: bool) -> None:
    arguments = make_heads((4,))
    loss = linear_kd_loss(**arguments, reduction=reduction, backend="cpu", logit_free=logit_free)
    (gradient,) = torch.autograd.grad(loss.sum(), arguments["student_hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match="linear_kd_loss is differentiable once; backend='reference'"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("logit_free", [False, True])
def test_forward_mode_is_refused_not_zero(logit_free: bool) -> None:
    arguments = make_heads((4,))
    hidden = arguments.pop("student_hidden").detach()

    def loss(given: Tensor) -> Tensor:
        result: Tensor = linear_kd_loss(given, **arguments, backend="cpu", logit_free=logit_free)
        return result

    with pytest.raises(RuntimeError, match="linear_kd_loss has no forward-mode derivative"):
        torch.func.jvp(loss, (hidden,), (hidden,))


def test_autocast_does_not_round_logits() -> None:
    arguments = make_heads((8,), 300, widths=(64, 64))
    plain = linear_kd_loss(**arguments, backend="cpu")
    with torch.autocast("cpu", torch.bfloat16):
        for backend, logit_free in (("cpu", False), ("reference", False), ("cpu", True)):
            loss = linear_kd_loss(**arguments, backend=backend, logit_free=logit_free)
            torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-6)


def test_hidden_states_and_weight_of_different_dtypes() -> None:
    """bf16 hidden states and an fp32 weight, as mixed precision has them; each gradient in its own dtype."""
    arguments = make_heads((9,), 300, widths=(64, 64))
    arguments["student_hidden"] = arguments["student_hidden"].detach().bfloat16().requires_grad_()
    check_against_truth(arguments, "mean", 1e-2, ce_weight=0.5, backend="cpu")
    teacher = {name: arguments[name].double() for name in ("teacher_hidden", "teacher_weight", "teacher_bias")}
    assert linear_kd_loss(**{**arguments, **teacher}, backend="cpu").dtype == torch.float64


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("setting", SETTINGS, ids=setting_id)
def test_triton(setting: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its interpreter: rows in registers, and rows split over programs."""
    interpreted_triton("linear_kd_loss", monkeypatch)
    monkeypatch.setattr(backends, "_resolved", {})
    split = dtype == torch.float32 and setting["divergence"] in ("forward_kl", "jsd")
    shapes = [((5,), 60, 57)] + [((2,), 4200, 4200)] * split
    for rows, classes, teacher_classes in shapes:
        arguments = make_heads(rows, classes, teacher_classes, (16, 24), dtype=dtype)
        options = {"temperature": 2.0, "ce_weight": 0.4, "backend": "triton", **setting}
        check_against_truth(arguments, "mean", max(ROUNDING[dtype], 2e-5), **options)


def test_a_sum_of_many_rows_is_exact_enough() -> None:
    """The weight's gradient is summed in fp32, not rounded to bf16 after every chunk."""
    arguments = make_heads((3000,), 40, widths=(16, 16), dtype=torch.bfloat16, bias=False, hard=False)
    expected = true_rows(arguments)["student_weight"]
    loss = linear_kd_loss(**arguments, reduction="sum", max_logits_mib=0.02, backend="cpu")
    assert_near(gradients_of(loss, arguments)["student_weight"], expected, 4e-3, "student_weight")
