"""The kd_loss cases: loss and gradient by every backend, by eager and compiled PyTorch, by TRL and Liger-Kernel."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.cases import KDCase, KDInputs, describe, kd_inputs
from benchmarks.timing import Arm, Budget, measure
from mixkd_fast.losses import kd_loss
from mixkd_fast.ops import backends

TESTS = ("test_losses*.py", "test_reference_divergences.py", "test_*kd_loss*.py")
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 3e-3, torch.float16: 1e-3}
"""Relative L2 error of loss and of gradient. bf16 and fp16: the gradient is rounded once, the loss is fp32."""

TRUTH_ELEMENTS = 1 << 24
"""The fp64 truth is computed in pieces of this many logits."""


def run(cases: list[KDCase], device: torch.device, budget: Budget, compiled: bool) -> list[dict[str, Any]]:
    """Check and time every case; compiled=False leaves torch.compile out. Raises: WrongResult."""
    results = []
    for case in cases:
        print(case.name, file=sys.stderr, flush=True)
        torch.compiler.reset()
        inputs = kd_inputs(case, device)
        entries = measure(
            _arms(case, inputs, device, compiled),
            copy=inputs.student_logits.detach().clone,
            copy_bytes=2 * case.tensor_bytes,
            floor_bytes=3 * case.tensor_bytes,
            truth=dict(zip(("loss", "gradient"), truth(case, inputs), strict=True)),
            dtype=case.dtype,
            tolerances=TOLERANCES,
            device=device,
            budget=budget,
        )
        results.append({"op": "kd_loss", "case": describe(case), "span": "loss+gradient", "arms": entries})
    return results


def truth(case: KDCase, inputs: KDInputs) -> tuple[Tensor, Tensor]:
    """The reference in fp64 from the same inputs: loss [] and gradient [N, C]."""
    gradient = torch.empty_like(inputs.student_logits, dtype=torch.float64, requires_grad=False)
    loss = torch.zeros((), dtype=torch.float64, device=gradient.device)
    step = max(1, TRUTH_ELEMENTS // case.classes)
    for start in range(0, case.rows, step):
        piece = slice(start, start + step)
        part = KDInputs(*(None if t is None else t.detach()[piece] for t in vars(inputs).values()))
        student = part.student_logits.double().requires_grad_()
        exact = KDInputs(student, part.teacher_logits.double(), part.labels, part.partner_labels, part.lam)
        # "sum" over pieces, divided once, is the mean over all rows.
        part_loss = _kd_loss(case, exact, "reference", reduction="sum") / case.rows
        gradient[piece] = torch.autograd.grad(part_loss, student)[0]
        loss += part_loss.detach()
    return loss, gradient


def _arms(case: KDCase, inputs: KDInputs, device: torch.device, compiled: bool) -> list[Arm]:
    hand_written = peers.eager(case)
    losses: list[tuple[str, Any, peers.Loss | str]] = [
        ("eager", "eager", hand_written),
        ("compiled eager", "compile", _compiled(hand_written, compiled)),
        ("compiled reference", "compile", _compiled(_project(case, "reference"), compiled)),
        ("TRL", "peer", peers.trl(case)),
        ("Liger-Kernel", "peer", peers.liger(case, device)),
    ]
    arms = []
    for row in backends.available("kd_loss"):
        runs_here = row.backend in backends.preferred(device)
        missing = row.reason if not row.available else f"not for {device.type}"
        losses.append((row.backend, "project", _project(case, row.backend) if row.available and runs_here else missing))
        if row.available and runs_here and row.backend != "reference" and case.divergence != "forward_kl":
            # Timed in the same rounds, because other divergences are held against forward KL's time.
            forward = KDCase(case.rows, case.classes, case.dtype, "forward_kl", case.mixed)
            call = _with_gradient(_project(forward, row.backend), inputs)
            arms.append(Arm(f"{row.backend}, forward_kl", "project", call, compared=False))
    for name, kind, loss in losses:
        if isinstance(loss, str):
            arms.append(Arm(name, kind, None, missing=loss))
        else:
            arms.append(Arm(name, kind, _with_gradient(loss, inputs)))
    return arms


def _project(case: KDCase, backend: str) -> peers.Loss:
    return lambda inputs: _kd_loss(case, inputs, backend)


def _kd_loss(case: KDCase, inputs: KDInputs, backend: str, reduction: Any = "mean") -> Tensor:
    return kd_loss(
        inputs.student_logits,
        inputs.teacher_logits,
        inputs.labels,
        inputs.partner_labels,
        inputs.lam,
        temperature=case.temperature,
        divergence=case.divergence,
        ce_weight=1.0 if case.mixed else 0.0,
        reduction=reduction,
        backend=backend,
    )


def _compiled(loss: peers.Loss | str, compiled: bool) -> peers.Loss | str:
    if isinstance(loss, str):
        return loss
    return torch.compile(loss, dynamic=False) if compiled else "left out by --quick"


def _with_gradient(loss: peers.Loss, inputs: KDInputs) -> Callable[[], tuple[Tensor, ...]]:
    def call() -> tuple[Tensor, ...]:
        value = loss(inputs)
        return value.detach(), *torch.autograd.grad(value, inputs.student_logits)

    return call
