"""`mix_embeddings` in eager PyTorch: the truth that every other backend is tested against.

With u = lam keep_i and v = (1 - lam) keep_j (keep 0 where the row is padding and `padding_mask` is given),
x = (u W_i + v W_j) + (P + (u Y_i + v Y_j)), then LayerNorm; in fp32, or fp64 for fp64 tables, rounded once. In this
order lam = 1 gives the plain embedding exactly. A side of weight 0 is not looked at.

Legend of shape suffixes: R rows of ids, B clean rows, M mixed rows, O rows of the output (M, or B + M), L positions,
H width.
"""

import torch
from torch import Tensor

from mixkd_fast.ops import MixInputs
from mixkd_fast.ops.checks import check_indices


def mix_embeddings(inputs: MixInputs) -> Tensor:
    """The mixed embeddings [O, L, H] of checked inputs, differentiable in every table."""
    ids, weight, partner, lam, padding_mask, place_table, types, type_table, places, *_ = inputs
    num_rows = inputs.num_rows
    check_indices("partner", partner, ids.shape[0])
    check_indices("input_ids", ids, weight.shape[0])
    if type_table is not None:
        check_indices("token_type_ids", types, type_table.shape[0])
    if place_table is not None:
        check_indices("position_ids", places, place_table.shape[0])
    first = torch.arange(partner.shape[0], device=ids.device) % max(num_rows, 1)
    second, first_weight = partner, lam
    if inputs.include_clean:
        clean = torch.arange(num_rows, device=ids.device)
        first, second = torch.cat([clean, first]), torch.cat([clean, partner])
        first_weight = torch.cat([lam.new_ones(num_rows), lam])
    compute = torch.promote_types(weight.dtype, torch.float32)
    u = first_weight.to(compute)[:, None].expand(-1, ids.shape[1])
    v = 1 - u
    if padding_mask is not None:
        u = torch.where(padding_mask[first], 0.0, u)
        v = torch.where(padding_mask[second], 0.0, v)

    def weighted(table: Tensor, indices_RL: Tensor) -> Tensor:
        sides = []
        for rows, share in ((first, u), (second, v)):
            # The table and not the rows is converted: its gradient is summed before it is rounded.
            values = torch.nn.functional.embedding(indices_RL[rows], table.to(compute))
            sides.append(torch.where(share[..., None] == 0, 0.0, share[..., None] * values))
        return sides[0] + sides[1]

    x = weighted(weight, ids)
    added = None
    if place_table is not None:
        if places is None:
            places = torch.arange(ids.shape[1], device=ids.device).expand(len(first), -1)
        added = torch.nn.functional.embedding(places, place_table.to(compute))
    if type_table is not None and types is not None:
        of_types = weighted(type_table, types)
        added = of_types if added is None else added + of_types
    if added is not None:
        x = x + added
    if inputs.use_norm:
        gain, bias = (None if value is None else value.to(compute) for value in (inputs.norm_weight, inputs.norm_bias))
        x = torch.nn.functional.layer_norm(x, x.shape[-1:], gain, bias, inputs.norm_eps)
    return x.to(weight.dtype)
