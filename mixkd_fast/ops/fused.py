"""`kd_loss` by one of the compiled ops: from any shape and dtype to the op's [N, C] and back.

Legend of shape suffixes: `...` the rows (any leading shape), N their number, C classes.
"""

from typing import Any, get_args

import torch
from torch import Tensor

from mixkd_fast.ops import DivergenceName, LossInputs, Reduction, RowOptions, TopK
from mixkd_fast.ops.checks import readable
from mixkd_fast.ops.schema import OVERLOADS, KDLossFunction, call_kernel, fits_in_place, refuse_forward_mode

DIVERGENCE_INDEX = {name: index for index, name in enumerate(get_args(DivergenceName))}
REDUCTION_INDEX = {name: index for index, name in enumerate(get_args(Reduction))}
CLASS_NAMES = ("labels", "partner_labels", "teacher_logits.indices")
"""What holds class numbers, as the kernels' errors call it."""
RowArguments = tuple[int, float, float, float, float, float, bool, float, float, bool, int]
"""The arguments of the ops from divergence to ignore_index."""


def kd_loss(
    inputs: LossInputs, options: RowOptions, reduction: Reduction, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`mixkd_fast.ops.KDLossBackend` by the C++ kernels of the tensors' device."""
    return _call("kd_loss", inputs, options, reduction, ignore_index)


def kd_loss_triton(
    inputs: LossInputs, options: RowOptions, reduction: Reduction, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`mixkd_fast.ops.KDLossBackend` by the Triton kernels."""
    return _call("kd_loss_triton", inputs, options, reduction, ignore_index)


def _call(
    name: str, inputs: LossInputs, options: RowOptions, reduction: Reduction, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    student_logits, teacher, labels, partner_labels, lam, row_weights, normalizer = inputs
    rows = student_logits.shape[:-1]
    flat = _matrix(student_logits)
    indices = None
    tail_mass = True
    compute = torch.float32 if student_logits.dtype != torch.float64 else torch.float64
    if isinstance(teacher, TopK):
        indices, logprobs, tail_mass = teacher
        if logprobs.dtype == torch.float64:
            compute = torch.float64
        indices = indices.reshape(-1, indices.shape[-1]).long().contiguous()
        teacher_logits = logprobs.detach().to(compute).reshape(indices.shape).contiguous()
    elif teacher is not None:
        teacher_logits = _matrix(teacher.detach() if teacher.requires_grad else teacher)
        if teacher.dtype == torch.float64:
            compute = torch.float64
    else:
        teacher_logits = None
    if compute == torch.float64 and (name != "kd_loss" or student_logits.device.type != "cpu"):
        raise ValueError("student_logits or teacher_logits is torch.float64; allowed: float32, bfloat16, float16")

    compiling = torch.compiler.is_compiling()
    if not compiling:
        refuse_forward_mode("kd_loss", (student_logits,))
    need_grad = student_logits.requires_grad and torch.is_grad_enabled()
    labels, partner_labels = flat_rows(labels, torch.int64), flat_rows(partner_labels, torch.int64)
    row_weights = flat_rows(row_weights, compute)
    divisor = None
    if student_logits.dtype == torch.float16 and reduction == "mean":
        # A mean's gradient in half precision may be too small for it: the sum's is kept, and divided in the backward.
        divisor = divisor_of(flat, labels, partner_labels, row_weights, normalizer, ignore_index)
        reduction, normalizer = "sum", None
    arguments: tuple[Any, ...] = (
        teacher_logits,
        indices,
        labels,
        partner_labels,
        flat_lam(lam, rows, compute, flat.device),
        row_weights,
        _normalizer(normalizer, compute, flat.device),
        *row_arguments(options, tail_mass, ignore_index),
        REDUCTION_INDEX[reduction],
        need_grad,
        not compiling,
    )
    try:
        if compiling:
            loss, kd, ce, _ = OVERLOADS[name](flat, *arguments)
        elif need_grad:
            parts: list[Tensor] = []
            reusable = options.inplace and not _is_of_a_leaf(student_logits)
            in_place = reusable and fits_in_place(name, student_logits, arguments)
            loss = KDLossFunction.apply(flat, arguments, name, parts, in_place)
            kd, ce = parts
        else:
            loss, kd, ce, _ = call_kernel(name, flat, arguments)
    except RuntimeError as error:
        raise readable(error, CLASS_NAMES) from None
    if divisor is not None:
        loss, kd, ce = loss / divisor, kd / divisor, ce / divisor
    if reduction == "none" and len(rows) != 1:
        loss, kd, ce = loss.view(rows), kd.view(rows), ce.view(rows)
    return loss, kd, ce


def row_arguments(options: RowOptions, tail_mass: bool, ignore_index: int) -> RowArguments:
    """See `RowArguments`."""
    return (
        DIVERGENCE_INDEX[options.divergence],
        options.temperature,
        options.beta,
        options.alpha,
        options.ab_alpha,
        options.ab_beta,
        options.detach_mixture,
        options.kd_weight,
        options.ce_weight,
        tail_mass,
        ignore_index,
    )


def _is_of_a_leaf(logits: Tensor) -> bool:
    """Whether the memory of the logits is a leaf's: somebody's parameter, not theirs to reuse."""
    base = logits._base
    return logits.is_leaf or (base is not None and base.is_leaf)


def _matrix(logits: Tensor) -> Tensor:
    """[..., C] as [N, C] with classes next to each other; a copy only where no view can be that."""
    if logits.dim() != 2:
        logits = logits.reshape(-1, logits.shape[-1])
    return logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()


def flat_rows(values: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """[...] as contiguous [N] of `dtype`."""
    if values is None:
        return None
    if values.requires_grad:
        values = values.detach()
    if values.dtype != dtype:
        values = values.to(dtype)
    if values.dim() != 1:
        values = values.reshape(-1)
    return values.contiguous()


def flat_lam(lam: Tensor | float | None, rows: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """[N], filled on the device if it is one number: a copy from host memory would wait for it."""
    if lam is None:
        return None
    if not isinstance(lam, Tensor):
        return torch.full((rows.numel(),), lam, dtype=dtype, device=device)
    return flat_rows(lam if lam.dim() > 0 else lam.expand(rows), dtype)


def _normalizer(normalizer: Tensor | float | None, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """[] on the device, without waiting for it."""
    if normalizer is None:
        return None
    if isinstance(normalizer, Tensor):
        # To a GPU without waiting; from one the number must have arrived before it is read.
        return normalizer.detach().to(device=device, dtype=dtype, non_blocking=device.type != "cpu").reshape(())
    return torch.full((), normalizer, dtype=dtype, device=device)


def divisor_of(
    student_logits: Tensor,
    labels: Tensor | None,
    partner_labels: Tensor | None,
    row_weights: Tensor | None,
    normalizer: Tensor | float | None,
    ignore_index: int,
) -> Tensor:
    """What "mean" divides by, fp32 []: the normalizer, or the weight of the rows that are not dropped; 1 for 0.

    Args: student_logits [N, C], the others [N]. Nothing waits for the device.
    """
    device = student_logits.device
    given = _normalizer(normalizer, torch.float32, device)
    if given is None:
        counted = row_weights
        for classes in (labels, partner_labels):
            if classes is not None:
                kept = classes != ignore_index
                counted = kept.float() if counted is None else torch.where(kept, counted, 0.0)
        if counted is None:
            return torch.full((), max(1, student_logits.shape[0]), dtype=torch.float32, device=device)
        given = counted.sum(dtype=torch.float32)
    return torch.where(given == 0, 1.0, given)
