"""The relation_kl cases: by every backend, and by eager and compiled PyTorch as users write it."""

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import RelationCase, RelationInputs, describe, relation_inputs
from benchmarks.timing import Arm, Budget, measure
from mixkd_fast.losses import relation_kl
from mixkd_fast.ops import backends

TESTS = ("test_relation_k*.py", "test_triton_relation_kl.py", "test_memory_of_relations.py")
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Relative L2 error of the losses and of each gradient."""

Relation = Callable[[RelationInputs], Tensor]


def run(cases: list[RelationCase], device: torch.device, budget: Budget, compiled: bool) -> list[dict[str, Any]]:
    """Check and time every case; compiled=False leaves torch.compile out. Raises: WrongResult."""
    results = []
    for case in cases:
        print(case.name, file=sys.stderr, flush=True)
        torch.compiler.reset()
        inputs = relation_inputs(case, device)
        num_bytes = floor_bytes(case)
        source = torch.zeros(num_bytes // 2, dtype=torch.int8, device=device)
        entries = measure(
            _arms(inputs, device, compiled),
            copy=source.clone,
            copy_bytes=num_bytes,
            floor_bytes=num_bytes,
            truth=truth(inputs),
            dtype=case.dtype,
            tolerances=TOLERANCES,
            device=device,
            budget=budget,
        )
        results.append({"op": "relation_kl", "case": describe(case), "span": "forward+backward", "arms": entries})
    return results


def floor_bytes(case: RelationCase) -> int:
    """Read first and second of student and teacher, write the student's two gradients."""
    return 6 * case.tensor_bytes


def truth(inputs: RelationInputs) -> dict[str, Tensor]:
    """The reference in fp64 from the same inputs: the losses [O] and both gradients [O, h, L, d]."""
    first, second = (tensor.detach().double().requires_grad_() for tensor in inputs.student)
    doubled = RelationInputs(
        student=(first, second),
        teacher=(inputs.teacher[0].double(), inputs.teacher[1].double()),
        mask=inputs.mask,
        grad_output=inputs.grad_output.double(),
    )
    names = ("output", "gradient of first", "gradient of second")
    return dict(zip(names, _call(_project("reference"), doubled)(), strict=True))


def _arms(inputs: RelationInputs, device: torch.device, compiled: bool) -> list[Arm]:
    arms = [Arm("eager", "eager", _call(eager, inputs))]
    if compiled:
        arms.append(Arm("compiled eager", "compile", _call(torch.compile(eager, dynamic=False), inputs)))
    else:
        arms.append(Arm("compiled eager", "compile", None, missing="left out by --quick"))
    for row in backends.available("relation_kl"):
        if row.available and row.backend in backends.preferred(device):
            arms.append(Arm(row.backend, "project", _call(_project(row.backend), inputs)))
        else:
            arms.append(Arm(row.backend, "project", None, missing=row.reason or f"not for {device.type}"))
    return arms


def _project(backend: str) -> Relation:
    def relation(inputs: RelationInputs) -> Tensor:
        return relation_kl(*inputs.student, *inputs.teacher, inputs.mask, backend=backend)

    return relation


def eager(inputs: RelationInputs) -> Tensor:
    """As attention is written: products in the inputs' dtype, softmaxes in fp32."""

    def scores(first: Tensor, second: Tensor) -> Tensor:
        products = first @ second.transpose(-1, -2) / math.sqrt(first.shape[-1])
        return products.masked_fill(~inputs.mask[:, None, None, :], torch.finfo(products.dtype).min)

    with torch.no_grad():
        log_p = F.log_softmax(scores(*inputs.teacher), -1, dtype=torch.float32)
    log_q = F.log_softmax(scores(*inputs.student), -1, dtype=torch.float32)
    rows = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    return (rows * inputs.mask[:, None, :]).sum((1, 2)) / rows.shape[1]


def _call(relation: Relation, inputs: RelationInputs) -> Callable[[], tuple[Tensor, ...]]:
    def call() -> tuple[Tensor, ...]:
        loss = relation(inputs)
        return loss.detach(), *torch.autograd.grad(loss, inputs.student, inputs.grad_output)

    return call
