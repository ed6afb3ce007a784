"""The backward of `mix_embeddings` on a GPU, around the kernels of a backend: who belongs to which table row, sorted.

Every sum has a fixed order, so the result is deterministic; nothing waits for the device. Legend of shape suffixes: L
positions, H width, O rows of the output; a token is one of the O * L rows of width H.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mixkd_fast.ops import MixInputs

NormBackward = Callable[[Tensor, MixInputs, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(grad_output [tokens, H], inputs, mean, rstd) -> (grad_x [tokens, H], sums [parts, 2, H]), fp32; the parts of sums
add up to the gradients of LayerNorm's weight and bias."""
SumRows = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
"""(source [tokens, H], rows, tokens, shares, table): table[rows[e]] = sum of shares[e] * source[tokens[e]] over entries
e whose rows ascend; rows without entries are left alone."""


def gradients(
    grad_output: Tensor,
    inputs: MixInputs,
    mean: Tensor,
    rstd: Tensor,
    needs: int,
    norm_backward: NormBackward,
    sum_rows: SumRows,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the tables and of LayerNorm that bit k of `needs` asks for; [0] for the others."""
    weight, (output_rows, length) = inputs.weight, output_size(inputs)
    source = grad_output.reshape(output_rows * length, weight.shape[1])
    of_norm_weight = of_norm_bias = None
    if inputs.use_norm:
        source, sums = norm_backward(source, inputs, mean, rstd)
        of_norm_weight, of_norm_bias = sums[:, 0].sum(0), sums[:, 1].sum(0)  # two tensors, not two views of one
    found = [weight.new_empty(0) for _ in range(5)]
    first, second, u, v = _pairs(inputs, output_rows, length)
    if needs & 1:
        ids = torch.cat([inputs.input_ids[first].flatten(), inputs.input_ids[second].flatten()])
        found[0] = _sum_by_row(source, ids, torch.cat([u, v]), weight, sum_rows)
    if needs & 2 and inputs.position_weight is not None:
        places = inputs.position_ids
        if places is None:
            places = torch.arange(length, device=weight.device).expand(output_rows, -1)
        found[1] = _sum_by_row(source, places.flatten(), torch.ones_like(u), inputs.position_weight, sum_rows)
    if needs & 4 and inputs.token_type_weight is not None and inputs.token_type_ids is not None:
        types = torch.cat([inputs.token_type_ids[first].flatten(), inputs.token_type_ids[second].flatten()])
        found[2] = _sum_by_row(source, types, torch.cat([u, v]), inputs.token_type_weight, sum_rows)
    for place, of_norm, like in ((3, of_norm_weight, inputs.norm_weight), (4, of_norm_bias, inputs.norm_bias)):
        if needs >> place & 1 and of_norm is not None and like is not None:
            found[place] = of_norm.to(like.dtype)
    return found[0], found[1], found[2], found[3], found[4]


def output_size(inputs: MixInputs) -> tuple[int, int]:
    """O and L."""
    leading = inputs.num_rows if inputs.include_clean else 0
    return inputs.partner.shape[0] + leading, inputs.input_ids.shape[1]


def _pairs(inputs: MixInputs, output_rows: int, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """First and second row [O], and their weights [O * L] with those of padding 0."""
    rows = torch.arange(output_rows, device=inputs.weight.device)
    leading = inputs.num_rows if inputs.include_clean else 0
    first = torch.where(rows < leading, rows, (rows - leading) % max(1, inputs.num_rows))
    second = torch.cat([rows[:leading], inputs.partner])
    lam = torch.cat([inputs.lam.new_ones(leading), inputs.lam])
    in_pool = (second >= 0) & (second < inputs.input_ids.shape[0])
    second = torch.where(in_pool, second, 0)
    # The tokens of a partner that is not there were NaN in the forward; they count for nobody.
    u, v = (torch.where(in_pool, share, 0.0)[:, None].expand(-1, length) for share in (lam, 1 - lam))
    if inputs.padding_mask is not None:
        u = torch.where(inputs.padding_mask[first], 0.0, u)
        v = torch.where(inputs.padding_mask[second], 0.0, v)
    return first, second, u.flatten(), v.flatten()


def _sum_by_row(source: Tensor, rows: Tensor, shares: Tensor, table: Tensor, sum_rows: SumRows) -> Tensor:
    """The gradient of `table`: row r is the sum of shares * source[token] over the entries with rows = r.

    Args: source [tokens, H]; rows, shares [k * tokens], of token 0, 1, ... and again from 0.
    """
    gradient = torch.zeros_like(table)
    if rows.shape[0] == 0 or table.shape[1] == 0:
        return gradient
    inside = (rows >= 0) & (rows < table.shape[0])
    # Rows outside the table were NaN in the forward; here they end up nowhere.
    ordered, order = torch.where(inside, rows, 0).sort(stable=True)
    shares = torch.where(inside, shares, 0.0)[order]
    sum_rows(source, ordered, order % source.shape[0], shares, gradient)
    return gradient
