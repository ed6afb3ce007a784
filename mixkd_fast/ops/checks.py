"""What `kd_loss` accepts: shapes, dtypes, ranges; checked once, at the boundary."""

import functools
import math
import os
import re
from collections.abc import Iterable
from typing import get_args

import torch
from torch import Tensor

from mixkd_fast.ops import DivergenceName, LossInputs, Reduction, RowOptions, TopK

FLOATING = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})
INTEGER = frozenset({torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})


def refuse(field: str, value: object, allowed: str) -> None:
    """Raise the ValueError of this package: field, value, what is allowed."""
    raise ValueError(f"{field} is {value!r}; allowed: {allowed}")


def readable(error: Exception, names: tuple[str, ...]) -> Exception:
    """The ValueError for what a kernel says of an index out of range in a field of `names`, or the error itself."""
    said = re.search(rf"({'|'.join(map(re.escape, names))}) holds .*", str(error))
    return ValueError(said[0]) if said else error


def check_options(options: RowOptions, reduction: str) -> None:
    """Raise ValueError, naming field, value and what is allowed."""
    if options.divergence not in get_args(DivergenceName):
        refuse("divergence", options.divergence, ", ".join(get_args(DivergenceName)))
    if not 0 < options.temperature < math.inf:
        refuse("temperature", options.temperature, "a finite number above 0")
    if not 0 <= options.beta <= 1:
        refuse("beta", options.beta, "a number from 0 to 1")
    if not 0 <= options.alpha < 1:
        refuse("alpha", options.alpha, "a number from 0 to below 1")
    for field, value in options._asdict().items():
        # Compared and not math.isfinite: torch.compile traces numbers that it keeps open.
        if field in ("ab_alpha", "ab_beta", "kd_weight", "ce_weight") and not -math.inf < value < math.inf:
            refuse(field, value, "a finite number")
    if options.detach_mixture and options.divergence != "skew_reverse_kl":
        refuse("detach_mixture", True, f"False for {options.divergence}; it is an option of skew_reverse_kl")
    if reduction not in get_args(Reduction):
        refuse("reduction", reduction, ", ".join(get_args(Reduction)))


check_options_once = functools.lru_cache(maxsize=256)(check_options)
"""`check_options`, remembering what it let pass: a training loop calls with the same options at every step."""


def check_normalizer(normalizer: Tensor | float, reduction: str) -> None:
    """Raise ValueError for a normalizer that "mean" cannot divide by."""
    if reduction != "mean":
        refuse("normalizer", normalizer, f"None with reduction {reduction!r}; it is the divisor of 'mean'")
    if isinstance(normalizer, Tensor) and normalizer.numel() != 1:
        refuse("normalizer", f"a tensor of shape {tuple(normalizer.shape)}", "a number or one element")


def check_tensors(inputs: LossInputs, options: RowOptions, kind: str = "logits") -> None:
    """Raise ValueError for shapes, dtypes and combinations that are not those of `kd_loss`.

    Args: kind = what the caller gave, of which `inputs` holds the logits: errors speak of student_{kind}.
    """
    student_logits, teacher, labels, partner_labels, lam, row_weights, _ = inputs
    rows = student_logits.shape[:-1]
    _check_logits(f"student_{kind}", student_logits, rows)
    if isinstance(teacher, TopK):
        _check_logits(f"teacher_{kind}.indices", teacher.indices, rows, "K", INTEGER)
        _check_rows(f"teacher_{kind}.logprobs", teacher.logprobs, teacher.indices.shape, FLOATING)
        if options.divergence == "mse":
            raise ValueError("divergence is 'mse', which compares logits; a TopK teacher has none")
    elif teacher is not None:
        _check_logits(f"teacher_{kind}", teacher, rows)
    elif options.kd_weight != 0:
        raise ValueError(f"teacher_{kind} is None; allowed only with kd_weight 0, not {options.kd_weight}")
    if labels is not None:
        _check_rows("labels", labels, rows, INTEGER)
    elif options.ce_weight != 0 or partner_labels is not None:
        raise ValueError("labels is None; needed with a ce_weight other than 0 and with partner_labels")
    if (partner_labels is None) != (lam is None):
        raise ValueError("partner_labels and lam belong together; give both or neither")
    if partner_labels is not None:
        _check_rows("partner_labels", partner_labels, rows, INTEGER)
    if isinstance(lam, Tensor) and lam.dim() > 0:
        _check_rows("lam", lam, rows, FLOATING)
    if row_weights is not None:
        _check_rows("row_weights", row_weights, rows, FLOATING)
    device = student_logits.device
    if isinstance(teacher, TopK):
        parts = {f"teacher_{kind}.indices": teacher.indices, f"teacher_{kind}.logprobs": teacher.logprobs}
        check_devices(device, parts.items(), f"student_{kind}")
        teacher = None
    for tensor in (teacher, labels, partner_labels, lam, row_weights):
        if isinstance(tensor, Tensor) and tensor.device != device:
            names = (f"teacher_{kind}", "labels", "partner_labels", "lam", "row_weights")
            tensors = (teacher, labels, partner_labels, lam, row_weights)
            check_devices(device, zip(names, tensors, strict=True), f"student_{kind}")


def check_devices(device: torch.device, tensors: Iterable[tuple[str, object]], of: str) -> None:
    """Raise ValueError for a tensor that is not on `device`, where the tensor `of` is; others than tensors pass."""
    for name, tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}; allowed: {device}, the device of {of}")


def _check_rows(name: str, tensor: Tensor, shape: torch.Size, dtypes: frozenset[torch.dtype]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; allowed: [{', '.join(map(str, shape))}]")
    _check_dtype(name, tensor, dtypes)


def _check_logits(
    name: str, tensor: Tensor, rows: torch.Size, last: str = "C", dtypes: frozenset[torch.dtype] = FLOATING
) -> None:
    """`last` names the free last dimension."""
    if tensor.dim() == 0 or tensor.shape[:-1] != rows or tensor.shape[-1] == 0:
        allowed = ", ".join([*map(str, rows), f"{last} >= 1"])
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; allowed: [{allowed}]")
    _check_dtype(name, tensor, dtypes)


def _check_dtype(name: str, tensor: Tensor, dtypes: frozenset[torch.dtype]) -> None:
    if tensor.dtype not in dtypes:
        allowed = "an integer" if dtypes is INTEGER else "a floating"
        raise ValueError(f"{name} is {tensor.dtype}; allowed: {allowed} dtype")


def values_may_be_read(device: torch.device) -> bool:
    """Whether a class number out of range is an error here, for which values are read; else the row is NaN."""
    if torch.compiler.is_compiling() or device.type == "meta":
        return False
    return device.type == "cpu" or os.environ.get("MIXKD_FAST_CHECK") == "1"


def check_indices(name: str, indices: Tensor | None, size: int) -> None:
    """Raise ValueError for an index that is not in a table of `size` rows, where values may be read."""
    if indices is None or not values_may_be_read(indices.device):
        return
    indices = indices.long()  # a size may not fit into a narrower dtype
    bad = (indices < 0) | (indices >= size)
    if bool(bad.any()):
        raise ValueError(f"{name} holds {indices[bad][0].item()}; allowed: 0 to {size - 1}")


def kept_and_invalid_rows(
    inputs: LossInputs, ignore_index: int, kind: str = "logits"
) -> tuple[Tensor | None, Tensor | None]:
    """(keep, invalid), bool [...] or None: rows that count, and rows with a class number out of range.

    Raises: ValueError for such a row where the values may be read (see `kd_loss`).
    """
    student_logits, teacher, labels, partner_labels, _, row_weights, _ = inputs
    num_classes = student_logits.shape[-1]
    keep = None if row_weights is None else row_weights.detach() != 0
    invalid: Tensor | None = None
    must_raise = values_may_be_read(student_logits.device)

    def note_invalid(name: str, classes: Tensor, bad: Tensor, allowed: str) -> None:
        nonlocal invalid
        if must_raise and bool(bad.any()):
            raise ValueError(f"{name} holds {classes[bad][0].item()}; allowed: {allowed}")
        bad_rows = bad if bad.shape == student_logits.shape[:-1] else bad.any(-1)
        invalid = bad_rows if invalid is None else invalid | bad_rows

    for name, classes in (("labels", labels), ("partner_labels", partner_labels)):
        if classes is not None:
            classes = classes.long()  # neither the number of classes nor ignore_index need fit into a narrower dtype
            counted = classes != ignore_index
            keep = counted if keep is None else keep & counted
            bad = counted & ((classes < 0) | (classes >= num_classes))
            note_invalid(name, classes, bad, f"0 to {num_classes - 1}, or ignore_index {ignore_index}")
    if isinstance(teacher, TopK):
        indices = teacher.indices.long()
        bad = (indices < 0) | (indices >= num_classes)
        if keep is not None:
            bad = bad & keep.unsqueeze(-1)
        note_invalid(f"teacher_{kind}.indices", indices, bad, f"0 to {num_classes - 1}")
    return keep, invalid
