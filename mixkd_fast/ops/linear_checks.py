"""What `linear_kd_loss` accepts, and which of its rows count.

Legend of shape suffixes: `...` the rows (any leading shape), H width of hidden states, C classes.
"""

import math
from typing import Any

import torch
from torch import Tensor

from mixkd_fast.ops import HeadInputs, LinearInputs, LinearLimits, LossInputs, RowOptions, TopK, checks


def check_limits(limits: LinearLimits, divergence: str) -> None:
    """Raise ValueError for limits out of their range, or that the divergence cannot keep."""
    if not 0 < limits.max_logits_mib < math.inf:
        checks.refuse("max_logits_mib", limits.max_logits_mib, "a finite number above 0, in MiB")
    if limits.in_tiles and divergence == "adaptive_kl":
        field = "logit_free" if limits.logit_free else "process_group"
        raise ValueError(f"{field} cannot be had with divergence 'adaptive_kl', which sorts the classes of a row")


def check_tensors(inputs: LinearInputs, options: RowOptions, limits: LinearLimits) -> None:
    """Raise ValueError for shapes, dtypes, devices and combinations that are not those of `linear_kd_loss`."""
    sliced = limits.process_group is not None
    _check_head("student", inputs.student, sliced)
    teacher = inputs.teacher
    if isinstance(teacher, HeadInputs):
        _check_head("teacher", teacher, sliced)
        rows = inputs.student.hidden.shape[:-1]
        if teacher.hidden.shape[:-1] != rows:
            allowed = ", ".join([*map(str, rows), "H >= 1"])
            raise ValueError(f"teacher_hidden has shape {tuple(teacher.hidden.shape)}; allowed: [{allowed}]")
        device = inputs.student.hidden.device
        checks.check_devices(device, [("teacher_weight", teacher.weight)], "student_hidden")
    elif teacher is not None and limits.in_tiles:
        field = "logit_free" if limits.logit_free else "process_group"
        raise ValueError(f"{field} cannot be had with a TopK as teacher_hidden; allowed: hidden states and a head")
    checks.check_tensors(as_logits(inputs), options, "hidden")


def _check_head(side: str, head: HeadInputs, sliced: bool) -> None:
    """A rank of a process group may hold no class at all."""
    hidden, weight, bias, softcap, scale = head
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise ValueError(f"{side}_hidden has shape {tuple(hidden.shape)}; allowed: [..., H >= 1]")
    width = hidden.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != width or (weight.shape[0] == 0 and not sliced):
        raise ValueError(f"{side}_weight has shape {tuple(weight.shape)}; allowed: [C >= 1, {width}]")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{side}_bias has shape {tuple(bias.shape)}; allowed: [{weight.shape[0]}]")
    for name, tensor in ((f"{side}_hidden", hidden), (f"{side}_weight", weight), (f"{side}_bias", bias)):
        if tensor is not None and tensor.dtype not in checks.FLOATING:
            raise ValueError(f"{name} is {tensor.dtype}; allowed: a floating dtype")
    checks.check_devices(hidden.device, ((f"{side}_weight", weight), (f"{side}_bias", bias)), f"{side}_hidden")
    if softcap is not None and not 0 < softcap < math.inf:
        checks.refuse(f"{side}_softcap", softcap, "a finite number above 0, or None")
    if not -math.inf < scale < math.inf or scale == 0:
        checks.refuse(f"{side}_scale", scale, "a finite number other than 0")


def as_logits(inputs: LinearInputs, num_classes: int | None = None) -> LossInputs:
    """The inputs as `kd_loss` would have them, logits of the right shape, dtype and device, but without memory.

    Args: num_classes = classes of the student, where not those of its weight.
    """

    def stand_in(head: HeadInputs, classes: int) -> Tensor:
        hidden = head.hidden.detach()
        return hidden[..., :1].expand(*hidden.shape[:-1], max(classes, 1))

    teacher: Any = inputs.teacher
    if isinstance(teacher, HeadInputs):
        teacher = stand_in(teacher, teacher.weight.shape[0])
    student = stand_in(inputs.student, inputs.student.weight.shape[0] if num_classes is None else num_classes)
    return LossInputs(student, teacher, *inputs[2:])


def compute_dtype(inputs: LinearInputs) -> torch.dtype:
    """Of the arithmetic and the loss: fp64 if anything of student or teacher is, else fp32."""
    tensors: list[Tensor | None] = [*inputs.student[:3]]
    if isinstance(inputs.teacher, TopK):
        tensors.append(inputs.teacher.logprobs)
    elif inputs.teacher is not None:
        tensors += inputs.teacher[:3]
    double = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if double else torch.float32


def kept_rows(inputs: LinearInputs, ignore_index: int) -> Tensor | None:
    """bool [...], the rows that count; None if all do."""
    keep = None if inputs.row_weights is None else inputs.row_weights.detach() != 0
    for classes in (inputs.labels, inputs.partner_labels):
        if classes is not None:
            # ignore_index need not fit into a narrower dtype.
            counted = classes.long() != ignore_index
            keep = counted if keep is None else keep & counted
    return keep
