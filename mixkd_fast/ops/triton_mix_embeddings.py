"""`mixkd_fast::mix_embeddings` and its backward by Triton: launches, and the sorting of gradients by table row.

Deterministic: every sum has a fixed order. Nothing here waits for the device. Legend of shape suffixes: L positions, H
width, O rows of the output; a token is one of the O * L rows of width H.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from mixkd_fast.ops import MixInputs
from mixkd_fast.ops import triton_mix_kernels as kernels

ENTRIES = 64
"""Summands per program: long enough to hide the reading of indices, short enough to fill a GPU with a few thousand."""
PROGRAMS = 512
"""Programs that share the tokens in LayerNorm's backward; each leaves one row of partial sums."""
LARGEST_WIDTH = 16384


def mix_embeddings(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(output, mean, rstd), see `mixkd_fast.ops.mix_schema`; an index out of range makes its token NaN."""
    inputs = MixInputs(*arguments)
    weight, (output_rows, length) = inputs.weight, _output_size(inputs)
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
    """The gradients of the tables and of LayerNorm that bit k of `needs` asks for; [0] for the others."""
    *given, mean, rstd, needs, _ = arguments
    inputs = MixInputs(*given)
    weight, (output_rows, length) = inputs.weight, _output_size(inputs)
    num_tokens, width = output_rows * length, weight.shape[1]
    source = grad_output.reshape(num_tokens, width)
    of_norm_weight = of_norm_bias = None
    if inputs.use_norm:
        tokens_each = max(1, triton.cdiv(num_tokens, PROGRAMS))
        programs = triton.cdiv(num_tokens, tokens_each)
        grad_x = weight.new_empty((num_tokens, width), dtype=torch.float32)
        norm_sums = weight.new_empty((programs, 2, width), dtype=torch.float32)
        if num_tokens * width > 0:
            with _device(weight):
                kernels.norm_backward_kernel[(programs,)](
                    source,
                    *inputs[:10],
                    mean,
                    rstd,
                    grad_x,
                    norm_sums,
                    num_tokens,
                    *_sizes(inputs),
                    tokens_each,
                    **_block(weight),
                )
        source = grad_x
        of_norm_weight, of_norm_bias = norm_sums.sum(0)
    nothing = [weight.new_empty(0) for _ in range(5)]
    gradients = list(nothing)
    first, second, u, v = _pairs(inputs, output_rows, length)
    if needs & 1:
        ids = torch.cat([inputs.input_ids[first].flatten(), inputs.input_ids[second].flatten()])
        gradients[0] = _sum_by_row(source, ids, torch.cat([u, v]), weight)
    if needs & 2 and inputs.position_weight is not None:
        places = inputs.position_ids
        if places is None:
            places = torch.arange(length, device=weight.device).expand(output_rows, -1)
        gradients[1] = _sum_by_row(source, places.flatten(), torch.ones_like(u), inputs.position_weight)
    if needs & 4 and inputs.token_type_weight is not None and inputs.token_type_ids is not None:
        types = torch.cat([inputs.token_type_ids[first].flatten(), inputs.token_type_ids[second].flatten()])
        gradients[2] = _sum_by_row(source, types, torch.cat([u, v]), inputs.token_type_weight)
    for place, of_norm, like in ((3, of_norm_weight, inputs.norm_weight), (4, of_norm_bias, inputs.norm_bias)):
        if needs >> place & 1 and of_norm is not None and like is not None:
            gradients[place] = of_norm.to(like.dtype)
    return gradients[0], gradients[1], gradients[2], gradients[3], gradients[4]


def _pairs(inputs: MixInputs, output_rows: int, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """First and second row [O], and their weights [O * L] with those of padding 0."""
    rows = torch.arange(output_rows, device=inputs.weight.device)
    leading = inputs.num_rows if inputs.include_clean else 0
    first = torch.where(rows < leading, rows, (rows - leading) % max(1, inputs.num_rows))
    second = torch.cat([rows[:leading], inputs.partner])
    lam = torch.cat([inputs.lam.new_ones(leading), inputs.lam])
    in_pool = (second >= 0) & (second < inputs.input_ids.shape[0])
    second = torch.where(in_pool, second, 0)
    u, v = lam[:, None].expand(-1, length), (1 - lam)[:, None].expand(-1, length)
    if inputs.padding_mask is not None:
        u = torch.where(inputs.padding_mask[first], 0.0, u)
        v = torch.where(inputs.padding_mask[second], 0.0, v)
    return first, second, u.flatten(), v.flatten()


def _sum_by_row(source: Tensor, rows: Tensor, shares: Tensor, table: Tensor) -> Tensor:
    """The gradient of `table`: row r is the sum of shares * source[token] over the entries with rows = r.

    Args: source [tokens, H]; rows, shares [k * tokens], of token 0, 1, ... and again from 0.
    """
    gradient = torch.zeros_like(table)
    num_entries, width = rows.shape[0], table.shape[1]
    if num_entries == 0 or width == 0:
        return gradient
    inside = (rows >= 0) & (rows < table.shape[0])
    # Rows outside the table were NaN in the forward; here they end up nowhere.
    ordered, order = torch.where(inside, rows, 0).sort(stable=True)
    shares = torch.where(inside, shares, 0.0)[order]
    tokens = order % source.shape[0]
    chunks = triton.cdiv(num_entries, ENTRIES)
    partials = source.new_empty((chunks, 2, width), dtype=torch.float32)
    block = _block(table)
    with _device(table):
        kernels.sum_runs_kernel[(chunks,)](
            source, ordered, tokens, shares, gradient, partials, num_entries, width, ENTRIES=ENTRIES, **block
        )
        kernels.join_runs_kernel[(chunks,)](ordered, gradient, partials, num_entries, width, ENTRIES=ENTRIES, **block)
    return gradient


def _output_size(inputs: MixInputs) -> tuple[int, int]:
    leading = inputs.num_rows if inputs.include_clean else 0
    return inputs.partner.shape[0] + leading, inputs.input_ids.shape[1]


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
    """A program holds a whole row: up to 16 numbers a thread."""
    width = table.shape[1]
    if width > LARGEST_WIDTH:
        raise ValueError(f"weight has width {width}; allowed: up to {LARGEST_WIDTH} with backend 'triton'")
    block = max(16, triton.next_power_of_2(width))
    return {"BLOCK": block, "num_warps": max(1, min(16, block // 256))}


def _device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
