"""`mixkd_fast::relation_kl_triton` and its backward: the launches.

Legend of shape suffixes: O rows, h heads, L positions, d width of a head.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from mixkd_fast.ops import RelationInputs
from mixkd_fast.ops import triton_relation_kernels as kernels

LARGEST_BLOCK = 64
"""Tokens per program, and of the others at a time."""
LARGEST_CHUNK = 64
"""Columns of a head that are read at a time, and that a program of the backward writes."""


def relation_kl(*arguments: Any) -> tuple[Tensor, Tensor]:
    """(loss [O], statistics [4, O h L]), see `mixkd_fast.ops.relation_schema`."""
    inputs = RelationInputs(*arguments)
    if inputs.compute_dtype == torch.float64:
        raise ValueError("an input is torch.float64; allowed with backend 'triton': float32, bfloat16, float16")
    rows, heads, length, _ = inputs.student_first.shape
    values = inputs.student_first.new_empty((rows, heads, length), dtype=torch.float32)
    statistics = inputs.student_first.new_empty((4, values.numel()), dtype=torch.float32)
    if values.numel() > 0:
        sizes = _sizes(inputs)
        with _device(values):
            kernels.statistics_kernel[(rows * heads * sizes["num_blocks"],)](
                *inputs, values, statistics, *_strides(inputs[:4]), **sizes, num_warps=4
            )
    return values.sum((1, 2)) / heads, statistics


def relation_kl_backward(grad_output: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Gradients [O, L, h, d] of the student's first and second that the bits of `needs` ask for; [0] for the others."""
    *given, statistics, needs = arguments
    inputs = RelationInputs(*given)
    rows, heads, length, width = inputs.student_first.shape
    sizes = _sizes(inputs)
    gradients = []
    for bit in (0, 1):
        needed = needs >> bit & 1
        gradient = inputs.student_first.new_empty((rows, length, heads, width) if needed else (0,))
        if gradient.numel() > 0:
            grid = (rows * heads * sizes["num_blocks"], triton.cdiv(width, sizes["CHUNK"]))
            with _device(gradient):
                kernels.gradient_kernel[grid](
                    *inputs,
                    statistics,
                    grad_output,
                    gradient,
                    *_strides(inputs[:4]),
                    **sizes,
                    factor=1 / (heads * math.sqrt(width)),
                    OF_FIRST=bit == 0,
                    PRECISION=_precision(inputs.student_first, "tf32x3"),
                    num_warps=4,
                )
        gradients.append(gradient)
    return gradients[0], gradients[1]


def _strides(tensors: tuple[Tensor, ...]) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()]


def _sizes(inputs: RelationInputs) -> dict[str, Any]:
    """The sizes that both kernels need, by name."""
    rows, heads, length, student_width = inputs.student_first.shape
    teacher_width = inputs.teacher_first.shape[3]
    block = min(LARGEST_BLOCK, max(16, triton.next_power_of_2(length)))
    chunk = min(LARGEST_CHUNK, max(16, triton.next_power_of_2(max(student_width, teacher_width))))
    return {
        "num_queries": rows * heads * length,
        "num_heads": heads,
        "length": length,
        "num_blocks": triton.cdiv(length, block),
        "student_width": student_width,
        "teacher_width": teacher_width,
        "student_scale": 1 / math.sqrt(student_width),
        "teacher_scale": 1 / math.sqrt(teacher_width),
        "STUDENT_PRECISION": _precision(inputs.student_first, "tf32"),
        "TEACHER_PRECISION": _precision(inputs.teacher_first, "tf32"),
        "BLOCK": block,
        "CHUNK": chunk,
    }


def _precision(tensor: Tensor, of_half: str) -> str:
    """How a product reads its operands: fp32 as it is; bf16 and fp16 in what TF32 holds of them, everything."""
    return "ieee" if tensor.dtype == torch.float32 else of_half


def _device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
