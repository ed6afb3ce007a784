"""Inputs of relation_kl and its definition in plain loops, shared by the tests of its backends.

Legend of shape suffixes: O rows, h heads, L positions, d width of a head; S student, T teacher.
"""

import math
from typing import Any

import torch
from torch import Tensor

from mixkd_fast.losses import relation_kl

FLOORS = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float64: 1e-13}
"""Relative rounding of a stored gradient; that of the loss is of fp32, or of fp64."""
STUDENT = ("student_first", "student_second")


def make_relation(
    dtype: torch.dtype,
    rows: int = 3,
    heads: int = 2,
    length: int = 7,
    width: int = 8,
    teacher_width: int | None = None,
    seed: int = 0,
    scale: float = 1.0,
) -> dict[str, Any]:
    """Arguments of relation_kl: views of linear layers' outputs [O, L, h d]; rows of every length, each at least 1."""
    generator = torch.Generator().manual_seed(seed)

    def heads_of(size: int) -> Tensor:
        flat = (torch.randn(rows, length, heads * size, generator=generator) * scale).to(dtype)
        return flat.view(rows, length, heads, size).transpose(1, 2)

    lengths = torch.randint(1, length + 1, (rows,), generator=generator)
    lengths[:1] = length
    sizes = (width, width, *[teacher_width or width] * 2)
    names = (*STUDENT, "teacher_first", "teacher_second")
    arguments: dict[str, Any] = {name: heads_of(size) for name, size in zip(names, sizes, strict=True)}
    for name in STUDENT:
        arguments[name].requires_grad_()
    arguments["student_mask"] = (torch.arange(length) < lengths[:, None]).long()
    return arguments


def true_relation(arguments: dict[str, Any]) -> Tensor:
    """The definition, query by query, in fp64: [O]."""
    mask = arguments["student_mask"] != 0
    if arguments.get("teacher_mask") is not None:
        mask = mask & (arguments["teacher_mask"] != 0)
    sides = []
    for side in ("student", "teacher"):
        first, second = (arguments[f"{side}_{name}"].double() for name in ("first", "second"))
        sides.append((first, second, math.sqrt(first.shape[-1])))
    rows = []
    for row in range(mask.shape[0]):
        tokens = mask[row].nonzero()[:, 0]
        loss = torch.zeros((), dtype=torch.float64)
        for head in range(sides[0][0].shape[1]):
            for query in tokens:
                log_q, log_p = (
                    (second[row, head, tokens] @ first[row, head, query] / root).log_softmax(0)
                    for first, second, root in sides
                )
                loss = loss + (log_p.exp() * (log_p - log_q)).sum()
        rows.append(loss / sides[0][0].shape[1])
    return torch.stack(rows) if rows else torch.zeros(0, dtype=torch.float64)


def in_double(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same with fp64 leaves."""

    def doubled(value: Tensor) -> Tensor:
        return value.detach().double().requires_grad_(value.requires_grad) if value.is_floating_point() else value

    return {name: doubled(value) if isinstance(value, Tensor) else value for name, value in arguments.items()}


def loss_and_gradients(loss: Tensor, arguments: dict[str, Any], grad_output: Tensor) -> dict[str, Tensor]:
    """Loss [O] and both gradients for grad_output [O], in fp64 on the CPU; the graph stays usable."""
    leaves = [arguments[name] for name in STUDENT]
    gradients = torch.autograd.grad(loss, leaves, grad_output.to(loss.device, loss.dtype), retain_graph=True)
    found = {"loss": loss.detach()} | {name: g.detach() for name, g in zip(STUDENT, gradients, strict=True)}
    return {name: value.cpu().double() for name, value in found.items()}


def distance(actual: Tensor, expected: Tensor) -> float:
    """L2 norm of the difference."""
    return float((actual - expected).norm())


def grad_output_of(rows: int) -> Tensor:
    """Not 1, one of them 0."""
    values = torch.linspace(-1.5, 2.5, rows + 1)[1:]
    values[1:2] = 0
    return values


def check_against_fp64(arguments: dict[str, Any], backend: str, truth: dict[str, Any] | None = None) -> None:
    """A backend is at most twice as far from fp64 as the reference in the same dtype, plus the rounding of a value.

    Args: truth = the same arguments with fp64 leaves, on any device.
    """
    grad_output = grad_output_of(len(arguments["student_mask"]))
    exact = in_double(arguments) if truth is None else truth
    expected = loss_and_gradients(relation_kl(**exact, backend="reference"), exact, grad_output)
    eager = loss_and_gradients(relation_kl(**arguments, backend="reference"), arguments, grad_output)
    loss = relation_kl(**arguments, backend=backend)
    dtype = arguments["student_first"].dtype
    assert loss.dtype == torch.promote_types(dtype, torch.float32) and not loss.isnan().any()
    actual = loss_and_gradients(loss, arguments, grad_output)
    for name, value in expected.items():
        floor = FLOORS[loss.dtype if name == "loss" else dtype] * max(1e-6, float(value.norm()))
        error, allowed = distance(actual[name], value), 2 * distance(eager[name], value) + floor
        assert error <= allowed, f"{name}: {error} from fp64; allowed: {allowed}"
