"""The linear_kd_loss cases: by every backend, by eager and compiled PyTorch, by Liger-Kernel's fused linear losses."""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.cases import LinearCase, LinearInputs, describe, linear_inputs
from benchmarks.timing import Arm, Budget, measure
from mixkd_fast.losses import linear_kd_loss
from mixkd_fast.ops import backends, bf16_product

TESTS = ("test_linear_kd_loss*.py", "test_kd_loss_in_place.py", "test_*kd_loss*.py")
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Relative L2 error of the loss and of each gradient."""
TRUTH_ELEMENTS = 1 << 26
"""The fp64 truth is computed in pieces of this many logits."""
MORE_MIB = 2048


def run(cases: list[LinearCase], device: torch.device, budget: Budget, compiled: bool) -> list[dict[str, Any]]:
    """Check and time every case; compiled=False leaves torch.compile out. Raises: WrongResult."""
    results = []
    for case in cases:
        print(case.name, file=sys.stderr, flush=True)
        torch.compiler.reset()
        inputs = linear_inputs(case, device)
        source = torch.zeros(case.least_bytes // 2, dtype=torch.int8, device=device)
        entries = measure(
            _arms(case, inputs, device, compiled),
            copy=source.clone,
            copy_bytes=case.least_bytes,
            floor_bytes=case.least_bytes,
            truth=truth(case, inputs),
            dtype=case.dtype,
            tolerances=TOLERANCES,
            device=device,
            budget=budget,
        )
        for entry in entries[1:]:
            if "time" in entry:
                entry["tflop_per_s"] = case.flop / entry["time"]["median_ms"] * 1e-9
            if entry["name"] in ("cpu", f"cpu, {MORE_MIB} MiB") and sums_nothing(case):
                gradients = (case.rows + case.classes) * case.width * case.dtype.itemsize
                entry |= {"kept_bytes": gradients, "forward_kept_bytes": gradients}
        result = {"op": "linear_kd_loss", "case": describe(case), "span": "forward+backward", "arms": entries}
        kept = {"kept_bytes": kept_bytes(case), "forward_kept_bytes": forward_kept_bytes(case)}
        results.append(result | kept)
    return results


def sums_nothing(case: LinearCase) -> bool:
    """Whether one chunk is all, and a CPU that multiplies bf16 writes the weight's gradient as it is to be."""
    both_logits = case.rows * 2 * case.classes * 4
    return case.dtype == torch.bfloat16 and bf16_product.is_available() and both_logits <= 512 * 2**20


def forward_kept_bytes(case: LinearCase) -> int:
    """What the forward leaves to the backward: the gradient by hidden states, and the weight's sums in fp32."""
    return case.rows * case.width * case.dtype.itemsize + case.classes * case.width * 4


def kept_bytes(case: LinearCase) -> int:
    """Gradients by hidden states and weight, and the weight's sums in fp32 where they are not the gradient itself."""
    gradients = (case.rows + case.classes) * case.width * case.dtype.itemsize
    return gradients + (0 if case.dtype == torch.float32 else 4 * case.classes * case.width)


def truth(case: LinearCase, inputs: LinearInputs) -> dict[str, Tensor]:
    """The reference in fp64 from the same inputs: the loss and both gradients."""
    weight = inputs.student_weight.detach().double().requires_grad_()
    teacher_weight = inputs.teacher_weight.double()
    loss = torch.zeros((), dtype=torch.float64, device=weight.device)
    of_hidden = torch.empty_like(inputs.student_hidden, dtype=torch.float64, requires_grad=False)
    of_weight = torch.zeros_like(weight, requires_grad=False)
    step = max(1, TRUTH_ELEMENTS // case.classes)
    for start in range(0, case.rows, step):
        piece = slice(start, start + step)
        hidden = inputs.student_hidden.detach()[piece].double().requires_grad_()
        exact = LinearInputs(hidden, weight, inputs.teacher_hidden[piece].double(), teacher_weight)
        # "sum" over pieces, divided once, is the mean over all rows.
        part = _loss(case, "reference", reduction="sum")(exact) / case.rows
        of_hidden[piece], grad_weight = torch.autograd.grad(part, (hidden, weight))
        of_weight += grad_weight
        loss += part.detach()
    return {"output": loss, "gradient of hidden states": of_hidden, "gradient of weight": of_weight}


def _arms(case: LinearCase, inputs: LinearInputs, device: torch.device, compiled: bool) -> list[Arm]:
    eager = peers.eager_linear(case)
    fast: peers.LinearLoss | str = "left out by --quick"
    if compiled:
        fast = eager if isinstance(eager, str) else torch.compile(eager, dynamic=False)
    losses: list[tuple[str, Any, peers.LinearLoss | str]] = [
        ("eager", "eager", eager),
        ("compiled eager", "compile", fast),
        ("Liger-Kernel fused", "peer", peers.liger_linear(case, device, chunked=False)),
        ("Liger-Kernel chunked", "peer", peers.liger_linear(case, device, chunked=True)),
    ]
    for row in backends.available("linear_kd_loss"):
        if not row.available or row.backend not in backends.preferred(device):
            losses.append((row.backend, "project", row.reason or f"not for {device.type}"))
            continue
        losses.append((row.backend, "project", _loss(case, row.backend)))
        if row.backend != "reference":
            more = _loss(case, row.backend, max_logits_mib=MORE_MIB)
            losses.append((f"{row.backend}, {MORE_MIB} MiB", "project", more))
            losses.append((f"{row.backend}, logit-free", "project", _loss(case, row.backend, logit_free=True)))
    return [
        Arm(name, kind, None, missing=loss) if isinstance(loss, str) else _arm(name, kind, loss, inputs)
        for name, kind, loss in losses
    ]


def _arm(name: str, kind: Any, loss: peers.LinearLoss, inputs: LinearInputs) -> Arm:
    forward = partial(loss, inputs) if kind == "project" else None
    return Arm(name, kind, _with_gradients(loss, inputs), forward=forward)


def _loss(case: LinearCase, backend: str, **options: Any) -> peers.LinearLoss:
    def loss(inputs: LinearInputs) -> Tensor:
        sides = inputs.student_hidden, inputs.student_weight, inputs.teacher_hidden, inputs.teacher_weight
        value: Tensor = linear_kd_loss(*sides, divergence=case.divergence, backend=backend, **options)
        return value

    return loss


def _with_gradients(loss: peers.LinearLoss, inputs: LinearInputs) -> Callable[[], tuple[Tensor, ...]]:
    def call() -> tuple[Tensor, ...]:
        value = loss(inputs)
        return value.detach(), *torch.autograd.grad(value, (inputs.student_hidden, inputs.student_weight))

    return call
