"""The op `mixkd_fast::relation_kl`: schema, fake kernel and autograd of the C++ kernel.

Loss and gradients come from one call; the backward only multiplies them. The gradients lie as a linear layer's output
does, [O, L, h, d], and without the factor 1 / (h sqrt(d)), so that half precision keeps more of small ones.

Legend of shape suffixes: O rows, h heads, L positions, d width of a head.
"""

import math
from typing import Any

import torch
from torch import Tensor

from mixkd_fast.ops import RelationInputs
from mixkd_fast.ops.schema import LIBRARY, refuse_forward_mode, refusing_a_second_derivative

ARGUMENTS = "Tensor student_first, Tensor student_second, Tensor teacher_first, Tensor teacher_second, Tensor keep"
NUM_ARGUMENTS = 5
FIRST, SECOND = 1, 2
"""Bits of `needs`: which of the student's tensors wants a gradient."""


def _fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [O]; each gradient [O, L, h, d], or [0] if it is not needed."""
    inputs, needs = RelationInputs(*arguments[:NUM_ARGUMENTS]), arguments[-1]
    rows, heads, length, width = inputs.student_first.shape
    loss = inputs.student_first.new_empty((rows,), dtype=inputs.compute_dtype)
    shapes = [(rows, length, heads, width) if needs & bit else (0,) for bit in (FIRST, SECOND)]
    first, second = (inputs.student_first.new_empty(shape) for shape in shapes)
    return loss, first, second


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    loss, grad_first, grad_second = output
    ctx.save_for_backward(loss, grad_first, grad_second)
    ctx.mark_non_differentiable(grad_first, grad_second)
    ctx.shape, ctx.needs = inputs[0].shape, inputs[-1]


def _backward(ctx: Any, grad_output: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    loss, *saved = ctx.saved_tensors
    rows, heads, length, width = ctx.shape
    factor = (grad_output / (heads * math.sqrt(width))).contiguous()
    gradients: list[Tensor] = []
    for gradient, bit in zip(saved, (FIRST, SECOND), strict=True):
        if ctx.needs & bit:
            scaled = torch.ops.mixkd_fast.scaled_gradient(gradient.flatten(1), factor)
            gradients.append(scaled.view(rows, length, heads, width).transpose(1, 2))
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        gradients = refusing_a_second_derivative("relation_kl", gradients, [loss, grad_output])
    found = iter(gradients)
    return *(next(found) if ctx.needs & bit else None for bit in (FIRST, SECOND)), None, None, None, None


def needs_of(inputs: RelationInputs) -> int:
    """Which gradients somebody may ask for."""
    if not torch.is_grad_enabled():
        return 0
    return FIRST * inputs.student_first.requires_grad + SECOND * inputs.student_second.requires_grad


def fused(inputs: RelationInputs) -> Tensor:
    """The loss of every row [O] by the C++ kernel."""
    refuse_tangents(inputs)
    loss: Tensor = torch.ops.mixkd_fast.relation_kl(*inputs._replace(keep=inputs.keep.contiguous()), needs_of(inputs))[
        0
    ]
    return loss


def refuse_tangents(inputs: RelationInputs) -> None:
    """Forward mode is the reference's alone."""
    if not torch.compiler.is_compiling():
        refuse_forward_mode("relation_kl", inputs[:2])


LIBRARY.define(f"relation_kl({ARGUMENTS}, int needs) -> (Tensor loss, Tensor grad_first, Tensor grad_second)")
torch.library.register_fake("mixkd_fast::relation_kl", _fake, lib=LIBRARY)
torch.library.register_autograd("mixkd_fast::relation_kl", _backward, setup_context=_save, lib=LIBRARY)
