"""`linear_kd_loss` by the fused kernels of kd_loss: from any shape and dtype to the op's rows, and back.

Legend of shape suffixes: `...` the rows (any leading shape), N their number, H width of hidden states, C classes.
"""

import torch
from torch import Tensor

from mixkd_fast.ops import (
    HeadInputs,
    LinearInputs,
    LinearLimits,
    LinearResults,
    Reduction,
    RowOptions,
    TopK,
    linear_checks,
    linear_products,
    linear_schema,
)
from mixkd_fast.ops.checks import readable
from mixkd_fast.ops.fused import CLASS_NAMES, flat_lam, flat_rows, row_arguments
from mixkd_fast.ops.linear_reference import reduced
from mixkd_fast.ops.schema import refuse_forward_mode


def linear_kd_loss(
    inputs: LinearInputs, options: RowOptions, reduction: Reduction, ignore_index: int, limits: LinearLimits
) -> LinearResults:
    """`mixkd_fast.ops.LinearKDLossBackend` by the C++ kernels of the tensors' device."""
    return _call("kd_loss", inputs, options, reduction, ignore_index, limits)


def linear_kd_loss_triton(
    inputs: LinearInputs, options: RowOptions, reduction: Reduction, ignore_index: int, limits: LinearLimits
) -> LinearResults:
    """`mixkd_fast.ops.LinearKDLossBackend` by the Triton kernels."""
    return _call("kd_loss_triton", inputs, options, reduction, ignore_index, limits)


def _call(
    kernel: str,
    inputs: LinearInputs,
    options: RowOptions,
    reduction: Reduction,
    ignore_index: int,
    limits: LinearLimits,
) -> LinearResults:
    call = arguments_of(kernel, inputs, options, ignore_index, limits)
    dtype, device = call.row_dtype(), call.student_hidden.device
    if dtype == torch.float64 and (kernel != "kd_loss" or device.type != "cpu"):
        raise ValueError("an input is torch.float64; allowed: float32, bfloat16, float16")
    compiling = torch.compiler.is_compiling()
    if not compiling:
        refuse_forward_mode("linear_kd_loss", call[:3])
    needs = linear_schema.needs_of(call)
    try:
        if reduction == "none":
            loss, kd, ce = torch.ops.mixkd_fast.linear_kd_loss_rows(*call)
        elif compiling or not needs:
            loss, kd, ce, *_ = torch.ops.mixkd_fast.linear_kd_loss(*call, needs)
        else:
            parts: list[Tensor] = []
            loss = linear_schema.LinearKDLossFunction.apply(*call[:3], call, needs, parts)
            kd, ce = parts
    except (RuntimeError, ValueError) as error:
        raise _spoken(error) from None
    rows = inputs.student.hidden.shape[:-1]
    if len(rows) != 1:
        kd, ce = kd.view(rows), ce.view(rows)
        loss = loss.view(rows) if reduction == "none" else loss
    return reduced(loss, kd, ce, inputs, reduction, linear_checks.kept_rows(inputs, ignore_index))


def _spoken(error: Exception) -> Exception:
    """What a kernel says of its logits, in the words of hidden states."""
    said = readable(error, CLASS_NAMES)
    return said if said is error else type(said)(str(said).replace("teacher_logits.", "teacher_hidden."))


def arguments_of(
    kernel: str, inputs: LinearInputs, options: RowOptions, ignore_index: int, limits: LinearLimits
) -> linear_schema.Arguments:
    """The op's arguments: rows flattened, numbers on the device, each side with the dtype of its products."""
    student, teacher = inputs.student, inputs.teacher
    rows, device = student.hidden.shape[:-1], student.hidden.device
    dtype = linear_products.product_dtype(*student[:3])
    head = teacher if isinstance(teacher, HeadInputs) else None
    logprobs = indices = None
    teacher_dtype = dtype
    tail_mass = True
    compute = linear_products.logits_dtype(dtype)
    if isinstance(teacher, TopK):
        compute = torch.promote_types(compute, teacher.logprobs.dtype)
        count = teacher.indices.shape[-1]
        indices = teacher.indices.reshape(-1, count).long().contiguous()
        logprobs = teacher.logprobs.detach().to(compute).reshape(-1, count).contiguous()
        tail_mass = teacher.tail_mass
    elif teacher is not None:
        teacher_dtype = linear_products.product_dtype(*teacher[:3])
        compute = torch.promote_types(compute, linear_products.logits_dtype(teacher_dtype))
    return linear_schema.Arguments(
        _matrix(student.hidden),
        student.weight,
        student.bias,
        None if head is None else _matrix(head.hidden.detach()),
        None if head is None else head.weight.detach(),
        None if head is None or head.bias is None else head.bias.detach(),
        logprobs,
        indices,
        flat_rows(inputs.labels, torch.int64),
        flat_rows(inputs.partner_labels, torch.int64),
        flat_lam(inputs.lam, rows, compute, device),
        flat_rows(inputs.row_weights, compute),
        student.softcap,
        None if head is None else head.softcap,
        student.scale,
        1.0 if head is None else head.scale,
        dtype,
        teacher_dtype,
        *row_arguments(options, tail_mass, ignore_index),
        kernel,
        max(1, int(limits.max_logits_mib * 2**20)),
        not torch.compiler.is_compiling(),
    )


def _matrix(hidden: Tensor) -> Tensor:
    return hidden if hidden.dim() == 2 else hidden.reshape(-1, hidden.shape[-1])
