"""`linear_kd_loss` in eager PyTorch: whole logits of both heads, then the row losses of `reference.py`.

z = scale (h W^T + b), then cap tanh(z / cap) where there is a soft-cap; in fp32, or fp64 if one input is fp64, on any
device. Legend of shape suffixes: `...` the rows, H width of hidden states, C classes.
"""

import torch
from torch import Tensor

from mixkd_fast.ops import (
    HeadInputs,
    LinearInputs,
    LinearLimits,
    LinearResults,
    LossInputs,
    Reduction,
    RowOptions,
    TopK,
    reference,
)
from mixkd_fast.ops.linear_checks import compute_dtype, kept_rows


def head_logits(head: HeadInputs, keep: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[..., C] of a head; a row that does not count is as if its hidden state were 0, NaN or not."""
    hidden = head.hidden.to(dtype)
    if keep is not None:
        hidden = torch.where(keep.unsqueeze(-1), hidden, 0.0)
    logits = hidden @ head.weight.to(dtype).T
    if head.bias is not None:
        logits = logits + head.bias.to(dtype)
    if head.scale != 1:
        logits = logits * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def linear_kd_loss(
    inputs: LinearInputs, options: RowOptions, reduction: Reduction, ignore_index: int, limits: LinearLimits
) -> LinearResults:
    """`mixkd_fast.ops.LinearKDLossBackend` in eager PyTorch; no limit on memory is kept."""
    dtype, keep = compute_dtype(inputs), kept_rows(inputs, ignore_index)
    teacher = inputs.teacher
    # A head's own rounding under autocast is what this op is there to avoid.
    with torch.autocast(inputs.student.hidden.device.type, enabled=False):
        student_logits = head_logits(inputs.student, keep, dtype)
        if isinstance(teacher, HeadInputs):
            with torch.no_grad():
                teacher_logits: Tensor | TopK | None = head_logits(teacher, keep, dtype)
        else:
            teacher_logits = teacher
        kept = (inputs.labels, inputs.partner_labels, inputs.lam, inputs.row_weights)
        rows = LossInputs(student_logits, teacher_logits, *kept)
        loss, kd, ce = reference.kd_loss(rows, options, "none", ignore_index)
    return reduced(loss, kd, ce, inputs, reduction, keep)


def reduced(
    loss: Tensor, kd_rows: Tensor, ce_rows: Tensor, inputs: LinearInputs, reduction: Reduction, keep: Tensor | None
) -> LinearResults:
    """The results from the rows [...], `loss` alone with a gradient; `loss` may be summed already."""
    if reduction == "none":
        return LinearResults(loss, kd_rows, ce_rows, kd_rows, ce_rows)
    loss, kd, ce = loss.sum() if loss.dim() else loss, kd_rows.sum(), ce_rows.sum()
    if reduction == "mean":
        weights = None if inputs.row_weights is None else inputs.row_weights.detach().to(kd_rows.dtype)
        divisor = reference.divisor_of_rows(kd_rows, weights, keep, inputs.normalizer)
        loss, kd, ce = loss / divisor, kd / divisor, ce / divisor
    return LinearResults(loss, kd, ce, kd_rows, ce_rows)
