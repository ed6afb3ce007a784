"""`linear_kd_loss` with logit_free or process_group: the call, its autograd, and which classes a rank has.

Legend of shape suffixes: `...` the rows (any leading shape), N their number, H width of hidden states, C classes.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mixkd_fast.ops import LinearInputs, LinearLimits, LinearResults, Reduction, RowOptions, checks, linear_checks
from mixkd_fast.ops.linear_chunks import BIAS, HIDDEN, WEIGHT, RowValues
from mixkd_fast.ops.linear_fused import arguments_of
from mixkd_fast.ops.linear_reference import reduced
from mixkd_fast.ops.linear_schema import (
    Arguments,
    computing_on,
    needs_of,
    save_arguments,
    saved_arguments,
    scaled_gradients,
)
from mixkd_fast.ops.linear_tiles import TiledJob
from mixkd_fast.ops.linear_tiles import linear_kd_loss as run
from mixkd_fast.ops.schema import graph_is_kept, refuse_forward_mode, refusing_a_second_derivative


class Vocabulary(NamedTuple):
    """The classes of this rank's slice begin at `start`; the student has `total` in all. Numbers or tensors []."""

    start: int | Tensor
    total: int | Tensor


class Setting(NamedTuple):
    """What a call has besides its tensors."""

    vocabulary: Vocabulary
    options: RowOptions
    limits: LinearLimits
    invalid: Tensor | None


def vocabulary_of(inputs: LinearInputs, group: Any) -> Vocabulary:
    """What this rank's slice is of the whole; sizes are exchanged without the host looking at them, but on a CPU.

    Raises: ValueError, where values may be read, for slices that do not begin with the same class on both sides.
    """
    classes = inputs.student.weight.shape[0]
    if group is None:
        return Vocabulary(0, classes)
    teacher = getattr(inputs.teacher, "weight", None)
    of_teacher = classes if teacher is None else teacher.shape[0]
    own = inputs.student.hidden.new_empty(2, dtype=torch.int64)
    # Filled on the device: a copy from host memory would wait for it.
    own[0], own[1] = classes, of_teacher
    ranks = own.new_empty((dist.get_world_size(group), 2))
    dist.all_gather(list(ranks.unbind()), own, group=group)
    ends = ranks.cumsum(0)
    rank = dist.get_rank(group)
    if checks.values_may_be_read(own.device):
        starts, sizes = (ends - ranks).tolist(), ranks.tolist()
        apart = [r for r, (s, t) in enumerate(starts) if s != t and min(sizes[r]) > 0]
        if apart or sum(map(min, sizes)) != min(ends[-1].tolist()):
            allowed = "slices of one size for all classes that both heads have (see vocabulary_slice)"
            raise ValueError(f"the ranks' classes of student and teacher are {sizes}; allowed: {allowed}")
        return Vocabulary(starts[rank][0], int(ends[-1, 0]))
    return Vocabulary(ends[rank, 0] - classes, ends[-1, 0])


def linear_kd_loss(
    inputs: LinearInputs, options: RowOptions, reduction: Reduction, ignore_index: int, limits: LinearLimits
) -> LinearResults:
    """`mixkd_fast.ops.LinearKDLossBackend` from tiles of the vocabulary, in PyTorch's operations on any device."""
    call = arguments_of("", inputs, options, ignore_index, limits)
    refuse_forward_mode("linear_kd_loss", call[:3])
    vocabulary = vocabulary_of(inputs, limits.process_group)
    keep = linear_checks.kept_rows(inputs, ignore_index)
    setting = Setting(vocabulary, options, limits, _invalid_rows(call, vocabulary.total))
    needs = needs_of(call)
    parts: list[Tensor] = []
    by_row = reduction == "none"
    loss = TiledFunction.apply(*call[:3], call, setting, needs, by_row, parts)
    rows = inputs.student.hidden.shape[:-1]
    kd, ce = (value.view(rows) for value in parts)
    return reduced(loss.view(rows) if by_row else loss, kd, ce, inputs, reduction, keep)


def _invalid_rows(call: Arguments, total: int | Tensor) -> Tensor | None:
    """bool [N], rows with a label that is no class, or None if there are no labels.

    Raises: ValueError for such a label where values may be read.
    """
    keep, invalid = call.keep(), None
    for name, labels in (("labels", call.labels), ("partner_labels", call.partner_labels)):
        if labels is None:
            continue
        bad = (labels != call.ignore_index) & ((labels < 0) | (labels >= total))
        if checks.values_may_be_read(labels.device) and bool(bad.any()):
            value, last = labels[bad][0].item(), int(total) - 1
            raise ValueError(f"{name} holds {value}; allowed: 0 to {last}, or ignore_index {call.ignore_index}")
        invalid = bad if invalid is None else invalid | bad
    return invalid if invalid is None or keep is None else invalid & keep


def _job(call: Arguments, setting: Setting) -> TiledJob:
    student, teacher = call.sides()
    return TiledJob(
        student,
        teacher,
        RowValues(*call[6:12]),
        call.keep(),
        setting.invalid,
        setting.vocabulary.start,
        setting.options,
        call.row_dtype(),
        call.max_bytes,
        setting.limits.logit_free,
        setting.limits.process_group,
    )


def _run(call: Arguments, setting: Setting, needs: int) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    with computing_on(call.student_hidden):
        return run(_job(call.detached(), setting), needs)


class TiledFunction(torch.autograd.Function):
    """The sum of the rows, whose gradients the forward computes; or the rows, whose gradients the backward does."""

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_weight: Tensor,
        student_bias: Tensor | None,
        call: Arguments,
        setting: Setting,
        needs: int,
        by_row: bool,
        parts: list[Tensor],
    ) -> Tensor:
        """The first three are those of `call`, given by themselves for autograd to see."""
        kd, ce, gradients = _run(call, setting, 0 if by_row else needs)
        parts += (kd, ce)
        ctx.needs, ctx.by_row = needs, by_row
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in call[:3]]
        if by_row:
            save_arguments(ctx, (student_hidden, student_weight, student_bias, *call[3:]))
            ctx.setting = setting
            return kd + ce
        loss = kd.sum() + ce.sum()
        ctx.save_for_backward(loss, *gradients)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients by hidden states, weight and bias; there is no second derivative."""
        if not ctx.by_row:
            loss, *saved = ctx.saved_tensors
            reuse = not graph_is_kept() and not torch.is_grad_enabled()
            found = scaled_gradients(ctx.needs, saved, ctx.dtypes, loss, grad_output, reuse)
            return *found, *(None,) * 5
        call = saved_arguments(ctx)
        weights = grad_output if call.row_weights is None else call.row_weights * grad_output
        _, _, gradients = _run(call._replace(row_weights=weights.contiguous()), ctx.setting, ctx.needs)
        wanted = [g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True) if g is not None]
        if torch.is_grad_enabled():
            sources = [x for x in (*call[:3], grad_output) if x is not None and x.requires_grad]
            wanted = refusing_a_second_derivative("linear_kd_loss", wanted, sources)
        each = iter(wanted)
        return *(next(each) if ctx.needs & bit else None for bit in _BITS), *(None,) * 5


_BITS = (HIDDEN, WEIGHT, BIAS)
