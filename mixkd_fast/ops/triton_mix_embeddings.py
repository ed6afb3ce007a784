"""`mixkd_fast::mix_embeddings` and its backward by Triton: the launches. The sorting between them is `mix_backward.py`.

Legend of shape suffixes: L positions, H width, O rows of the output; a token is one of the O * L rows of width H.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from mixkd_fast.ops import MixInputs
from mixkd_fast.ops import triton_mix_kernels as kernels
from mixkd_fast.ops.mix_backward import gradients, output_size

ENTRIES = 64
"""Summands per program: long enough to hide the reading of indices, short enough to fill a GPU with a few thousand."""
PROGRAMS = 512
"""Programs that share the tokens in LayerNorm's backward; each leaves one row of partial sums."""
LARGEST_WIDTH = 16384


def mix_embeddings(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(output, mean, rstd), see `mixkd_fast.ops.mix_schema`; an index out of range makes its token NaN."""
    inputs = MixInputs(*arguments)
    if inputs.weight.dtype == torch.float64:
        raise ValueError("weight is torch.float64; allowed with backend 'triton': float32, bfloat16, float16")
    weight, (output_rows, length) = inputs.weight, output_size(inputs)
    num_tokens = output_rows * length
    output = weight.new_empty((output_rows, length, weight.shape[1]))
    mean, rstd = (weight.new_empty(num_tokens if inputs.use_norm else 0, dtype=torch.float32) for _ in range(2))
    if output.numel() > 0:
        with _device(weight):
            kernels.forward_kernel[(num_tokens,)](
                *inputs[:11],
                output,
                mean,
                rstd,
                *_sizes(inputs),
                inputs.norm_eps,
                USE_NORM=inputs.use_norm,
                **_block(weight),
            )
    return output, mean, rstd


def mix_embeddings_backward(grad_output: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients that bit k of `needs` asks for; [0] for the others."""
    *given, mean, rstd, needs, _ = arguments
    return gradients(grad_output, MixInputs(*given), mean, rstd, needs, _norm_backward, _sum_rows)


def _norm_backward(grad_output: Tensor, inputs: MixInputs, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    num_tokens, width = grad_output.shape
    tokens_each = max(1, triton.cdiv(num_tokens, PROGRAMS))
    programs = triton.cdiv(num_tokens, tokens_each)
    grad_x = inputs.weight.new_empty((num_tokens, width), dtype=torch.float32)
    norm_sums = inputs.weight.new_empty((programs, 2, width), dtype=torch.float32)
    if num_tokens * width > 0:
        with _device(grad_output):
            kernels.norm_backward_kernel[(programs,)](
                grad_output,
                *inputs[:10],
                mean,
                rstd,
                grad_x,
                norm_sums,
                num_tokens,
                *_sizes(inputs),
                tokens_each,
                **_block(inputs.weight),
            )
    return grad_x, norm_sums


def _sum_rows(source: Tensor, rows: Tensor, tokens: Tensor, shares: Tensor, table: Tensor) -> None:
    num_entries, width = rows.shape[0], table.shape[1]
    chunks = triton.cdiv(num_entries, ENTRIES)
    partials = source.new_empty((chunks, 2, width), dtype=torch.float32)
    block = _block(table)
    with _device(table):
        kernels.sum_runs_kernel[(chunks,)](
            source, rows, tokens, shares, table, partials, num_entries, width, ENTRIES=ENTRIES, **block
        )
        kernels.join_runs_kernel[(chunks,)](rows, table, partials, num_entries, width, ENTRIES=ENTRIES, **block)


def _sizes(inputs: MixInputs) -> tuple[int, ...]:
    """The sizes that the kernels need, in their order."""
    places, types = inputs.position_weight, inputs.token_type_weight
    return (
        *inputs.input_ids.shape,
        inputs.weight.shape[1],
        inputs.weight.shape[0],
        0 if places is None else places.shape[0],
        0 if types is None else types.shape[0],
        max(1, inputs.num_rows),
        inputs.num_rows if inputs.include_clean else 0,
    )


def _block(table: Tensor) -> dict[str, int]:
    """A program holds a whole row: up to 32 numbers a thread."""
    width = table.shape[1]
    if width > LARGEST_WIDTH:
        raise ValueError(f"weight has width {width}; allowed: up to {LARGEST_WIDTH} with backend 'triton'")
    block = max(16, triton.next_power_of_2(width))
    return {"BLOCK": block, "num_warps": max(1, min(16, block // 256))}


def _device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
