"""What methods that weigh, revise or choose rows have in common: p(y), numbers kept per row, and their objective.

Legend of shape suffixes: N training rows, B clean rows of the micro-batch, C classes, W numbers kept per row.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mixkd_fast.methods.base import Kind, Moment
from mixkd_fast.methods.mixkd import MixedRowDistillation

if TYPE_CHECKING:
    from mixkd_fast.data.batching import Batch
    from mixkd_fast.models import Encoder

PositiveWeight = Annotated[float, Field(gt=0)]


class RowDistillation(MixedRowDistillation):
    """Distillation whose terms of the clean rows treat each row in its own way; classification only.

    sm_weight and tmkd_weight add MixKD's terms of the mixed rows, which stay as they are.
    """

    kinds: ClassVar[tuple[Kind, ...]] = ("classification",)
    kd_weight: PositiveWeight = 1.0
    """Weight of the distance to the teacher on the clean rows."""

    @abstractmethod
    def row_terms(
        self, batch: Batch, student_logits: Tensor, teacher_logits: Tensor, extras: nn.Module | None, moment: Moment
    ) -> dict[str, Tensor]:
        """The terms [B] of the clean rows from logits [B, C]."""

    def terms(
        self, batch: Batch, student: Encoder, teacher: Any | None, extras: nn.Module | None, moment: Moment
    ) -> dict[str, Tensor]:
        # Asked first and read last: a teacher on a stream of its own works meanwhile.
        from_teacher, teacher_mixed = self.outputs_of(teacher, batch, True, self.needs_mixed_teacher)
        from_student, student_mixed = self.outputs_of(student, batch, True, self.mixing() is not None)
        terms = self.row_terms(batch, from_student.logits, from_teacher.logits, extras, moment)
        return terms | self.mixed_terms(batch, student_mixed, teacher_mixed)

    def mixed_terms(self, batch: Batch, student_mixed: Any | None, teacher_mixed: Any | None) -> dict[str, Tensor]:
        """MixKD's terms of the mixed rows from the models' outputs; None where a weight is 0."""
        student_logits, teacher_logits = (
            None if output is None else output.logits for output in (student_mixed, teacher_mixed)
        )
        return self.objective(batch, None, student_logits, None, teacher_logits)


def label_probability(logits: Tensor, batch: Batch) -> Tensor:
    """p(y) of each clean row at temperature 1: [B] fp32, without a gradient.

    With soft labels s it is the sum over classes of s_c p_c, which is p_y where s is one-hot.
    """
    return (logits.detach().float().softmax(-1) * label_distribution(batch, logits.shape[-1])).sum(-1)


def label_distribution(batch: Batch, num_classes: int) -> Tensor:
    """The targets of the clean rows as distributions: the soft labels, or one-hot rows: [B, C] fp32."""
    if batch.soft_labels is not None:
        return batch.soft_labels[: batch.num_rows]
    return F.one_hot(batch.labels[: batch.num_rows], num_classes).float()


class ExactTable(nn.Module):
    """Numbers that stay fp32 whatever the training precision is, checkpointed with the run."""

    bits: Tensor

    def __init__(self, values: Tensor) -> None:
        """Args: values fp32 [N, W]."""
        super().__init__()
        # As integers: DeepSpeed casts floating-point buffers to the training precision.
        self.register_buffer("bits", values.detach().float().contiguous().view(torch.int32))

    def __getitem__(self, numbers: Tensor) -> Tensor:
        """Rows by their numbers, int64 [B]: fp32 [B, W]."""
        return self.bits.index_select(0, numbers).view(torch.float32)


class RowTable(ExactTable):
    """W numbers for every training row."""

    def rows(self, batch: Batch) -> Tensor:
        """The numbers of the batch's clean rows: [B, W] fp32. An idle rank's row (-1) counts as row 0.

        Row numbers lie in pinned memory of the host and are copied as they are, so nothing waits for the device.
        """
        row_ids = batch.row_ids[: batch.num_rows].to(self.bits.device, non_blocking=True)
        return self[row_ids.clamp(min=0)]


@contextmanager
def evaluating(student: Encoder) -> Iterator[None]:
    """Within it the student's dropout is off and nothing is recorded for a backward pass."""
    was_training = student.training
    student.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        student.train(was_training)
