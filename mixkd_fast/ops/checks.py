"""What `kd_loss` accepts: shapes, dtypes, ranges; checked once, at the boundary."""

import math
import os
from typing import Literal, get_args

import torch
from torch import Tensor

from mixkd_fast.ops import DivergenceName, RowOptions, TopK

Reduction = Literal["mean", "sum", "none"]


def check_options(options: RowOptions, reduction: str, normalizer: Tensor | float | None) -> None:
    """Raise ValueError, naming field, value and what is allowed."""

    def refuse(field: str, value: object, allowed: str) -> None:
        raise ValueError(f"{field} is {value!r}; allowed: {allowed}")

    if options.divergence not in get_args(DivergenceName):
        refuse("divergence", options.divergence, ", ".join(get_args(DivergenceName)))
    if not 0 < options.temperature < math.inf:
        refuse("temperature", options.temperature, "a finite number above 0")
    if not 0 <= options.beta <= 1:
        refuse("beta", options.beta, "a number from 0 to 1")
    if not 0 <= options.alpha < 1:
        refuse("alpha", options.alpha, "a number from 0 to below 1")
    for field, value in options._asdict().items():
        if field in ("ab_alpha", "ab_beta", "kd_weight", "ce_weight") and not math.isfinite(value):
            refuse(field, value, "a finite number")
    if options.detach_mixture and options.divergence != "skew_reverse_kl":
        refuse("detach_mixture", True, f"False for {options.divergence}; it is an option of skew_reverse_kl")
    if reduction not in get_args(Reduction):
        refuse("reduction", reduction, ", ".join(get_args(Reduction)))
    if normalizer is None:
        return
    if reduction != "mean":
        refuse("normalizer", normalizer, f"None with reduction {reduction!r}; it is the divisor of 'mean'")
    if isinstance(normalizer, Tensor) and normalizer.numel() != 1:
        refuse("normalizer", f"a tensor of shape {tuple(normalizer.shape)}", "a number or one element")


def check_tensors(
    student_logits: Tensor,
    teacher: Tensor | TopK | None,
    labels: Tensor | None,
    partner_labels: Tensor | None,
    lam: Tensor | float | None,
    row_weights: Tensor | None,
    options: RowOptions,
) -> None:
    """Raise ValueError for shapes, dtypes and combinations that are not those of `kd_loss`."""

    def check(name: str, tensor: Tensor, shape: tuple[int, ...], integer: bool, last: str = "") -> None:
        """`last` names a free last dimension."""
        actual = tuple(tensor.shape[:-1] if last else tensor.shape)
        if actual != shape or (last and (tensor.dim() == 0 or tensor.shape[-1] == 0)):
            wanted = ", ".join([*map(str, shape), *([f"{last} >= 1"] if last else [])])
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; allowed: [{wanted}]")
        is_integer = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
        if is_integer != integer or not (integer or tensor.is_floating_point()):
            raise ValueError(f"{name} is {tensor.dtype}; allowed: {'an integer' if integer else 'a floating'} dtype")

    rows = tuple(student_logits.shape[:-1])
    check("student_logits", student_logits, rows, False, "C")
    if isinstance(teacher, TopK):
        check("teacher_logits.indices", teacher.indices, rows, True, "K")
        check("teacher_logits.logprobs", teacher.logprobs, tuple(teacher.indices.shape), False)
        if options.divergence == "mse":
            raise ValueError("divergence is 'mse', which compares logits; a TopK teacher has none")
    elif teacher is not None:
        check("teacher_logits", teacher, rows, False, "C")
    elif options.kd_weight != 0:
        raise ValueError(f"teacher_logits is None; allowed only with kd_weight 0, not {options.kd_weight}")
    if labels is not None:
        check("labels", labels, rows, True)
    elif options.ce_weight != 0 or partner_labels is not None:
        raise ValueError("labels is None; needed with a ce_weight other than 0 and with partner_labels")
    if (partner_labels is None) != (lam is None):
        raise ValueError("partner_labels and lam belong together; give both or neither")
    if partner_labels is not None:
        check("partner_labels", partner_labels, rows, True)
    if isinstance(lam, Tensor) and lam.dim() > 0:
        check("lam", lam, rows, False)
    if row_weights is not None:
        check("row_weights", row_weights, rows, False)


def kept_and_invalid_rows(
    student_logits: Tensor,
    teacher: Tensor | TopK | None,
    labels: Tensor | None,
    partner_labels: Tensor | None,
    row_weights: Tensor | None,
    ignore_index: int,
) -> tuple[Tensor | None, Tensor | None]:
    """(keep, invalid), bool [...] or None: rows that count, and rows with a class number out of range.

    Raises: ValueError for such a row where the values may be read (see `kd_loss`).
    """
    num_classes = student_logits.shape[-1]
    keep = None if row_weights is None else row_weights.detach() != 0
    invalid: Tensor | None = None
    must_raise = not torch.compiler.is_compiling() and (
        student_logits.device.type == "cpu"
        or (student_logits.device.type != "meta" and os.environ.get("MIXKD_FAST_CHECK") == "1")
    )

    def note_invalid(name: str, classes: Tensor, bad: Tensor, allowed: str) -> None:
        nonlocal invalid
        if must_raise and bool(bad.any()):
            raise ValueError(f"{name} holds {classes[bad][0].item()}; allowed: {allowed}")
        bad_rows = bad if bad.shape == student_logits.shape[:-1] else bad.any(-1)
        invalid = bad_rows if invalid is None else invalid | bad_rows

    for name, classes in (("labels", labels), ("partner_labels", partner_labels)):
        if classes is not None:
            counted = classes != ignore_index
            keep = counted if keep is None else keep & counted
            bad = counted & ((classes < 0) | (classes >= num_classes))
            note_invalid(name, classes, bad, f"0 to {num_classes - 1}, or ignore_index {ignore_index}")
    if isinstance(teacher, TopK):
        bad = (teacher.indices < 0) | (teacher.indices >= num_classes)
        if keep is not None:
            bad = bad & keep.unsqueeze(-1)
        note_invalid("teacher_logits.indices", teacher.indices, bad, f"0 to {num_classes - 1}")
    return keep, invalid
