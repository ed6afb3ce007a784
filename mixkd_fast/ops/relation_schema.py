"""The ops `mixkd_fast::relation_kl` (C++) and `relation_kl_triton`: schema, fake kernels and autograd.

In C++ loss and gradients come from one call; the backward only multiplies them. They come without the factor
1 / (h sqrt(d)), so that half precision keeps more of small ones. Triton's forward leaves the statistics of both
softmaxes, from which its backward makes the relations again. Gradients lie as a linear layer's output: [O, L, h, d].

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


def _triton_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Loss [O], statistics [4, O h L]."""
    inputs = RelationInputs(*arguments)
    rows, heads, length, _ = inputs.student_first.shape
    loss = inputs.student_first.new_empty((rows,), dtype=torch.float32)
    return loss, inputs.student_first.new_empty((4, rows * heads * length), dtype=torch.float32)


def _triton_backward_fake(grad_output: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *given, _, needs = arguments
    _, first, second = _fake(*given, needs)
    return first, second


def _triton_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])


def _triton_gradients(ctx: Any, grad_output: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    needs = FIRST * ctx.needs_input_grad[0] + SECOND * ctx.needs_input_grad[1]
    found = torch.ops.mixkd_fast.relation_kl_backward_triton(grad_output.contiguous(), *saved, needs)
    gradients = [found[bit].transpose(1, 2) for bit in (0, 1) if needs >> bit & 1]
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        sources = [tensor for tensor in (*saved, grad_output) if tensor.requires_grad]
        gradients = refusing_a_second_derivative("relation_kl", gradients, sources)
    each = iter(gradients)
    return *(next(each) if needs & bit else None for bit in (FIRST, SECOND)), None, None, None


def _triton(*arguments: Any) -> tuple[Tensor, Tensor]:
    from mixkd_fast.ops.triton_relation_kl import relation_kl

    results: tuple[Tensor, Tensor] = relation_kl(*arguments)
    return results


def _triton_backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    from mixkd_fast.ops.triton_relation_kl import relation_kl_backward

    results: tuple[Tensor, Tensor] = relation_kl_backward(*arguments)
    return results


def needs_of(inputs: RelationInputs) -> int:
    """Which gradients somebody may ask for."""
    if not torch.is_grad_enabled():
        return 0
    return FIRST * inputs.student_first.requires_grad + SECOND * inputs.student_second.requires_grad


def fused(inputs: RelationInputs) -> Tensor:
    """The loss of every row [O] by the C++ kernel."""
    loss: Tensor = torch.ops.mixkd_fast.relation_kl(*_plain(inputs), needs_of(inputs))[0]
    return loss


def fused_triton(inputs: RelationInputs) -> Tensor:
    """The loss of every row [O] by the Triton kernels."""
    loss: Tensor = torch.ops.mixkd_fast.relation_kl_triton(*_plain(inputs))[0]
    return loss


def _plain(inputs: RelationInputs) -> RelationInputs:
    if not torch.compiler.is_compiling():
        refuse_forward_mode("relation_kl", inputs[:2])
    return inputs._replace(keep=inputs.keep.contiguous())


LIBRARY.define(f"relation_kl({ARGUMENTS}, int needs) -> (Tensor loss, Tensor grad_first, Tensor grad_second)")
torch.library.register_fake("mixkd_fast::relation_kl", _fake, lib=LIBRARY)
torch.library.register_autograd("mixkd_fast::relation_kl", _backward, setup_context=_save, lib=LIBRARY)
LIBRARY.define(f"relation_kl_triton({ARGUMENTS}) -> (Tensor loss, Tensor statistics)")
LIBRARY.define(
    f"relation_kl_backward_triton(Tensor grad_output, {ARGUMENTS}, Tensor statistics, int needs) "
    "-> (Tensor grad_first, Tensor grad_second)"
)
torch.library.register_fake("mixkd_fast::relation_kl_triton", _triton_fake, lib=LIBRARY)
torch.library.register_fake("mixkd_fast::relation_kl_backward_triton", _triton_backward_fake, lib=LIBRARY)
torch.library.register_autograd(
    "mixkd_fast::relation_kl_triton", _triton_gradients, setup_context=_triton_save, lib=LIBRARY
)
for _device in ("CPU", "CUDA"):
    # On the CPU Triton's interpreter runs them, for tests.
    LIBRARY.impl("relation_kl_triton", _triton, _device)
    LIBRARY.impl("relation_kl_backward_triton", _triton_backward, _device)
