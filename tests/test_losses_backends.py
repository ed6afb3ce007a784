"""kd_loss and its backends: the table, what it imports, torch.compile, CUDA."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from cases import SETTINGS, gradient_of, make_logits, mixed_batch, setting_id
from torch import Tensor

from mixkd_fast.losses import kd_loss
from mixkd_fast.ops import backends

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def test_the_table_of_backends_says_what_is_missing_and_why() -> None:
    rows = {row.backend: row for row in backends.available("kd_loss")}
    assert rows["reference"].available
    assert backends.select("kd_loss", "cpu", "reference").name == "reference"
    chosen = backends.select("kd_loss", "cpu")
    for name in backends.preferred("cpu"):
        if name == chosen.name:
            break
        assert f"{name}: {rows[name].reason}" in chosen.reason
    for row in rows.values():
        if not row.available:
            with pytest.raises(RuntimeError, match=f"backend '{row.backend}' of kd_loss is not available: .+"):
                backends.select("kd_loss", "cpu", row.backend)
    with pytest.raises(ValueError, match="op is 'nothing'"):
        backends.select("nothing", "cpu")


def test_a_missing_backend_is_not_replaced_silently() -> None:
    student, teacher, *_ = mixed_batch()
    for row in backends.available("kd_loss"):
        if not row.available:
            with pytest.raises(RuntimeError, match="is not available"):
                kd_loss(student, teacher, backend=row.backend)


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    environment = {**os.environ, "PYTHONPATH": root}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=root)


def test_the_module_prints_the_table() -> None:
    result = run_python("-m", "mixkd_fast.ops.backends")
    assert result.returncode == 0 and result.stderr == ""
    for row in backends.available():
        assert any(row.op in line and row.backend in line and row.reason in line for line in result.stdout.split("\n"))


def test_the_losses_need_torch_only() -> None:
    program = (
        "import sys\n"
        "for name in ('pydantic', 'transformers', 'deepspeed', 'datasets', 'scipy', 'sklearn'):\n"
        "    sys.modules[name] = None\n"
        "import torch\n"
        "before = set(sys.modules)\n"
        "from mixkd_fast.losses import KDLoss, kd_loss\n"
        "print(KDLoss(ce_weight=1.0)(torch.zeros(2, 4), torch.ones(2, 4), torch.tensor([1, 2])).item())\n"
        "brought = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "assert brought - set(sys.stdlib_module_names) <= {'mixkd_fast', 'torch'}, brought\n"
    )
    result = run_python("-c", program)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) == pytest.approx(1.3862943649)


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("setting", SETTINGS, ids=setting_id)
def test_no_graph_break_under_torch_compile(setting: dict[str, Any]) -> None:
    student, teacher, labels, partner_labels, lam = mixed_batch(torch.float32)

    def loss(student_logits: Tensor) -> Tensor:
        result = kd_loss(
            student_logits, teacher, labels, partner_labels, lam, temperature=2.0, ce_weight=0.5, **setting
        )
        return result

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(student)
    torch.testing.assert_close(compiled, loss(student))
    torch.testing.assert_close(gradient_of(compiled, student), gradient_of(loss(student), student))


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sizes_and_numbers_that_torch_compile_keeps_open(dtype: torch.dtype) -> None:
    torch.compiler.reset()

    def loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        return kd_loss(student, teacher, temperature=temperature)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows, temperature in ((5, 1.0), (9, 2.0), (33, 3.5)):
        student, teacher = make_logits((rows, 7), 1.0, rows, dtype)
        expected = loss(student, teacher, temperature)
        actual = compiled(student, teacher, temperature)
        torch.testing.assert_close(actual, expected)
        # Once each: a compiled backward gives its buffers away.
        gradients = [torch.autograd.grad(value, student)[0] for value in (actual, expected)]
        torch.testing.assert_close(*gradients, rtol=2e-3, atol=1e-6)


@pytest.mark.usefixtures("each_backend")
def test_compiled_code_gives_nan_for_a_label_out_of_range() -> None:
    student, teacher, labels, *_ = mixed_batch(torch.float32)
    labels[3] = 9
    torch.compiler.reset()
    compiled = torch.compile(kd_loss, fullgraph=True, backend="aot_eager")
    rows = compiled(student, teacher, labels, ce_weight=1.0, reduction="none")
    assert rows.isnan().tolist() == [False, False, False, True, False, False]


@needs_cuda
def test_cuda_agrees_with_the_cpu_without_a_host_synchronisation() -> None:
    student, teacher, labels, partner_labels, lam = mixed_batch(torch.float32)
    expected = kd_loss(student, teacher, labels, partner_labels, lam, temperature=2.0, ce_weight=0.5)
    on_gpu = [x.detach().cuda() for x in (student, teacher, labels, partner_labels, lam)]
    leaf = on_gpu[0].requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = kd_loss(*on_gpu, temperature=2.0, ce_weight=0.5)
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(loss.cpu(), expected, rtol=1e-5, atol=1e-6)
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad.cpu(), gradient_of(expected, student), rtol=1e-5, atol=1e-6)


@needs_cuda
def test_cuda_label_out_of_range_is_nan_or_raises_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher, labels, *_ = mixed_batch(torch.float32)
    labels[3] = 9
    arguments = [x.detach().cuda() for x in (student, teacher, labels)]
    monkeypatch.delenv("MIXKD_FAST_CHECK", raising=False)
    rows = kd_loss(*arguments, ce_weight=1.0, reduction="none")
    assert rows.isnan().tolist() == [False, False, False, True, False, False]
    monkeypatch.setenv("MIXKD_FAST_CHECK", "1")
    with pytest.raises(ValueError, match="labels holds 9"):
        kd_loss(*arguments, ce_weight=1.0)


@needs_cuda
def test_cuda_graph_capture() -> None:
    student, teacher, labels, *_ = (x.cuda() for x in mixed_batch(torch.float32))
    leaf = student.detach().requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            kd_loss(leaf, teacher, labels, ce_weight=1.0).backward()
    torch.cuda.current_stream().wait_stream(side)
    leaf.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = kd_loss(leaf, teacher, labels, ce_weight=1.0)
        loss.backward()
    graph.replay()
    torch.testing.assert_close(loss.cpu(), kd_loss(student, teacher, labels, ce_weight=1.0).detach().cpu())
