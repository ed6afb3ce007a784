"""linear_kd_loss and in-place gradients on a GPU: products with fp32 results, rows picked without a stall, memory.

Needs one GPU; run on sm_80 and on sm_90.
"""

from typing import Any

import pytest
import torch
from cases import SETTINGS, gradient_of, setting_id
from linear_cases import LEAVES, ROUNDING, assert_near, gradients_of, make_heads, true_rows
from test_cuda_kd_loss import DTYPES, SHAPES, labels_of, make, reason_to_skip
from torch import Tensor

from mixkd_fast.losses import kd_loss, linear_kd_loss
from mixkd_fast.ops import backends, linear_chunks

pytestmark = pytest.mark.skipif(reason_to_skip() is not None, reason=str(reason_to_skip()))
MIB = 2**20


def on_gpu(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same arguments on the GPU; the student's are leaves again."""
    moved = {name: x.detach().cuda() if isinstance(x, Tensor) else x for name, x in arguments.items()}
    for name in LEAVES:
        if name in moved:
            moved[name].requires_grad_(arguments[name].requires_grad)
    return moved


def backends_here() -> list[str]:
    """Those with kernels."""
    rows = backends.available("linear_kd_loss")
    return [row.backend for row in rows if row.available and row.backend in ("cuda", "triton")]


@pytest.mark.parametrize("limits", [{}, {"max_logits_mib": 0.5}, {"logit_free": True, "max_logits_mib": 2}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("setting", SETTINGS, ids=setting_id)
def test_against_fp64(setting: dict[str, Any], dtype: torch.dtype, limits: dict[str, Any]) -> None:
    if limits.get("logit_free") and setting["divergence"] == "adaptive_kl":
        pytest.skip("adaptive_kl sorts whole rows")
    for classes, teacher_classes, softcap in ((300, 300, None), (5000, 4990, 9.0)):
        arguments = make_heads((130,), classes, teacher_classes, (64, 48), dtype=dtype)
        arguments |= {"student_softcap": softcap, "student_scale": 1.1}
        options: dict[str, Any] = {"temperature": 2.0, "ce_weight": 0.4, **setting}
        expected = true_rows(arguments, -2.5, **options)
        for backend in backends_here():
            moved = on_gpu(arguments)
            result = linear_kd_loss(**moved, **options, **limits, reduction="sum", backend=backend, return_parts=True)
            for name in ("kd_rows", "ce_rows"):
                assert_near(getattr(result, name).cpu(), expected[name], ROUNDING[dtype], name)
            gradients = gradients_of(result.loss, moved, torch.tensor(-2.5, device="cuda"))
            for name, gradient in gradients.items():
                assert_near(gradient, expected[name], ROUNDING[dtype], f"{backend}: gradient of {name}")


@pytest.mark.parametrize("softcap", [None, 8.0])
def test_logits_never_take_more_than_allowed(softcap: float | None) -> None:
    arguments = on_gpu(make_heads((4096,), 32000, widths=(64, 64), dtype=torch.bfloat16, bias=False))
    arguments["student_softcap"] = softcap
    kept = 32000 * 64 * (4 + 2) + 4096 * 64 * 2
    for limit in (32, 128):
        for backend in backends_here():
            loss = linear_kd_loss(**arguments, max_logits_mib=limit, backend=backend)
            loss.backward()
            del loss
            arguments["student_hidden"].grad = arguments["student_weight"].grad = None
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            linear_kd_loss(**arguments, max_logits_mib=limit, backend=backend).backward()
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - before
            assert peak < limit * MIB + kept + 24 * MIB, f"{backend}: {peak / MIB} MiB with {limit} MiB of logits"
            arguments["student_hidden"].grad = arguments["student_weight"].grad = None


def test_one_chunk_never_waits_and_may_be_captured() -> None:
    arguments = on_gpu(make_heads((64,), 3000, widths=(64, 64), dtype=torch.bfloat16))

    def gradients() -> tuple[Tensor, ...]:
        loss = linear_kd_loss(**arguments, ce_weight=0.5, backend="cuda")
        return torch.autograd.grad(loss, [arguments[name] for name in LEAVES])

    expected = gradients()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = gradients()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(again, expected)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        gradients()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients()
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(captured, expected)


def test_dropped_rows_behind_the_last_chunk_may_hold_nan() -> None:
    arguments = on_gpu(make_heads((2000,), 500, widths=(32, 32)))
    keep = torch.arange(2000, device="cuda") % 7 == 0
    arguments["labels"] = torch.where(keep, arguments["labels"].clamp(min=0), -100)
    arguments["row_weights"] = torch.ones(2000, device="cuda")
    expected = gradients_of(linear_kd_loss(**arguments, ce_weight=0.5, backend="reference"), arguments)
    arguments["student_hidden"].data[~keep] = torch.nan
    arguments["teacher_hidden"][~keep] = torch.nan
    for backend in backends_here():
        loss = linear_kd_loss(**arguments, ce_weight=0.5, max_logits_mib=0.5, backend=backend)
        for name, gradient in gradients_of(loss, arguments).items():
            assert_near(gradient, expected[name], 1e-5, f"{backend}: {name}")


def test_chunks_behind_the_last_row_that_counts_are_not_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """316 of 4096 rows, in chunks of 256 or all at once: what a call of one chunk cannot know without waiting."""
    multiplied: list[int] = []
    original = linear_chunks.products.multiply

    def counted(hidden: Tensor, *others: Any) -> None:
        multiplied.append(hidden.shape[0])
        original(hidden, *others)

    monkeypatch.setattr(linear_chunks.products, "multiply", counted)
    arguments = on_gpu(make_heads((4096,), 2000, widths=(32, 32), hard=False))
    keep = torch.arange(4096, device="cuda") % 13 == 0
    arguments["labels"] = torch.where(keep, 5, -100)
    for backend in backends_here():
        for limit, expected in ((4, [256] * 4), (512, [4096] * 2)):
            multiplied.clear()
            linear_kd_loss(**arguments, max_logits_mib=limit, backend=backend).backward()
            assert multiplied == expected


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("logit_free", [False, True])
def test_a_gpu_that_is_not_the_current_one(logit_free: bool) -> None:
    """How many rows count is asked on the stream that works: the current GPU's is idle, and has nothing to say."""
    arguments = on_gpu(make_heads((4096,), 500, widths=(32, 32)))
    expected = gradients_of(linear_kd_loss(**arguments, ce_weight=0.5, backend="reference"), arguments)
    moved = {name: x.detach().to("cuda:1") if isinstance(x, Tensor) else x for name, x in arguments.items()}
    for name in LEAVES:
        moved[name].requires_grad_()
    for backend in backends_here():
        for _ in range(3):
            with torch.cuda.device(1):
                torch.cuda._sleep(100_000_000)
            loss = linear_kd_loss(**moved, ce_weight=0.5, max_logits_mib=0.5, backend=backend, logit_free=logit_free)
            for name, gradient in gradients_of(loss, moved).items():
                assert_near(gradient, expected[name], 1e-5, f"{backend}: {name}")


@pytest.mark.parametrize("setting", SETTINGS, ids=setting_id)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_in_place_is_the_same(shape: tuple[int, int], dtype: torch.dtype, setting: dict[str, Any]) -> None:
    student, teacher = make(shape, 2.0, 0, dtype).requires_grad_(), make(shape, 2.0, 1, dtype)
    options = {**labels_of(student, 2), "temperature": 2.0, "ce_weight": 0.7, **setting}
    for backend in backends_here():
        results = []
        for inplace in (False, True):
            loss = kd_loss(student * 1.0, teacher, inplace=inplace, backend=backend, **options)
            results.append((loss.detach(), gradient_of(loss, student, torch.full_like(loss, -2.5))))
        torch.testing.assert_close(results[1], results[0])
