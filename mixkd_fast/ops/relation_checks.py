"""What `relation_kl` accepts: shapes, dtypes, devices; checked once, at the boundary."""

import torch
from torch import Tensor

from mixkd_fast.ops import RelationInputs
from mixkd_fast.ops.checks import FLOATING, INTEGER, check_devices, refuse


def checked_inputs(
    student_first: Tensor,
    student_second: Tensor,
    teacher_first: Tensor,
    teacher_second: Tensor,
    student_mask: Tensor,
    teacher_mask: Tensor | None,
) -> RelationInputs:
    """The arguments of `mixkd_fast.losses.relation_kl` as every backend takes them, the teacher's detached.

    Raises: ValueError for shapes, dtypes and devices that do not fit together.
    """
    if student_first.dim() != 4 or 0 in (student_first.shape[1], student_first.shape[3]):
        raise ValueError(f"student_first has shape {tuple(student_first.shape)}; allowed: [O, h >= 1, L, d >= 1]")
    rows, heads, length, width = student_first.shape
    _check_shape("student_second", student_second, (rows, heads, length, width))
    _check_shape("teacher_first", teacher_first, (rows, heads, length, None))
    _check_shape("teacher_second", teacher_second, tuple(teacher_first.shape))
    _check_pair("student", student_first, student_second)
    _check_pair("teacher", teacher_first, teacher_second)
    _check_mask("student_mask", student_mask, rows, length)
    given = {
        "student_second": student_second,
        "teacher_first": teacher_first,
        "teacher_second": teacher_second,
        "student_mask": student_mask,
        "teacher_mask": teacher_mask,
    }
    check_devices(student_first.device, given.items(), "student_first")
    keep = student_mask != 0
    if teacher_mask is not None:
        _check_mask("teacher_mask", teacher_mask, rows, length)
        keep = keep & (teacher_mask != 0)
    return RelationInputs(student_first, student_second, teacher_first.detach(), teacher_second.detach(), keep)


def _check_shape(name: str, tensor: Tensor, shape: tuple[int | None, ...]) -> None:
    """None stands for any size from 1."""

    def fits(size: int | None, have: int) -> bool:
        return have >= 1 if size is None else have == size

    if tensor.dim() != len(shape) or not all(map(fits, shape, tensor.shape)):
        wanted = ", ".join("d >= 1" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; allowed: [{wanted}]")


def _check_pair(side: str, first: Tensor, second: Tensor) -> None:
    if first.dtype not in FLOATING:
        refuse(f"{side}_first", first.dtype, "float32, bfloat16, float16 or float64")
    if second.dtype != first.dtype:
        refuse(f"{side}_second", second.dtype, f"{first.dtype}, the dtype of {side}_first")


def _check_mask(name: str, mask: Tensor, rows: int, length: int) -> None:
    if tuple(mask.shape) != (rows, length):
        raise ValueError(f"{name} has shape {tuple(mask.shape)}; allowed: [{rows}, {length}]")
    if mask.dtype != torch.bool and mask.dtype not in INTEGER | FLOATING:
        refuse(name, mask.dtype, "torch.bool, an integer or a floating dtype; not 0 = token")
