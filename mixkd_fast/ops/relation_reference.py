"""`relation_kl` in eager PyTorch: the truth that every other backend is tested against.

With S = F_S G_S^T / sqrt(d_S) and T = F_T G_T^T / sqrt(d_T) of one head (F `first`, G `second`), over the keys j that
`keep` has: p_i = softmax_j T_ij, q_i = softmax_j S_ij, and for every row
loss = 1/h sum over heads and kept i of sum_j p_ij (log p_ij - log q_ij). Its gradient is
dS = (q - p) grad_output / (h sqrt(d_S)), dF_S = dS G_S, dG_S = dS^T F_S; the teacher has none.

Legend of shape suffixes: O rows, h heads, L positions, d width of a head.
"""

import math

import torch
from torch import Tensor

from mixkd_fast.ops import RelationInputs


def relation_kl(inputs: RelationInputs) -> Tensor:
    """The loss of every row [O] of checked inputs, in fp32 (fp64 for fp64 input), differentiable in the student's."""
    compute = inputs.compute_dtype
    keep = inputs.keep[:, None, :]
    # Autocast would round the products to bf16 before the softmax.
    with torch.autocast(inputs.keep.device.type, enabled=False):
        with torch.no_grad():
            log_p = _log_relation(inputs.teacher_first, inputs.teacher_second, keep, compute)
            p = log_p.exp()
        log_q = _log_relation(inputs.student_first, inputs.student_second, keep, compute)
        rows_OhL = (p * (log_p - log_q)).sum(-1)
        return torch.where(keep, rows_OhL, 0.0).sum((1, 2)) / inputs.student_first.shape[1]


def _log_relation(first: Tensor, second: Tensor, keep_O1L: Tensor, compute: torch.dtype) -> Tensor:
    """log softmax of first . second / sqrt(d), [O, h, L, L]; finite where a query or key is not kept."""
    # Replaced before the product: what stands in padding, NaN even, must reach neither value nor gradient.
    first, second = (torch.where(keep_O1L[..., None], side.to(compute), 0.0) for side in (first, second))
    scores = first @ second.transpose(-1, -2) / math.sqrt(first.shape[-1])
    # The least number and not -inf: p (log p - log q) of an excluded key is 0 * 0 and of a row without keys finite.
    return scores.masked_fill(~keep_O1L[:, :, None, :], torch.finfo(compute).min).log_softmax(-1)
