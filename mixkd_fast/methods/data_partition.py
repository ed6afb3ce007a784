"""Data-partition distillation: each row learns from the teacher or from the student as it was at the start."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from mixkd_fast.methods.base import Moment, Setting, supervised_loss
from mixkd_fast.methods.kd import distance
from mixkd_fast.methods.rows import RowDistillation, RowTable, evaluating, label_probability

if TYPE_CHECKING:
    from mixkd_fast.data.batching import Batch


class DataPartition(RowDistillation):
    """L = mle_weight * CE(S(x), y) + kd_weight * d(z, S(x)), z the logits of the better source of each row.

    The sources are the teacher and the frozen initial student, and the better one gives the label more probability
    at temperature 1 (with soft labels s: the larger sum of s_c p_c); the teacher where both give the same. The
    initial student's logits of all training rows are computed once, without dropout, before the first step, and kept
    in the checkpoint. It must know the task: a new classifier's probabilities mean nothing.
    """

    name: Literal["data_partition"] = "data_partition"
    """Discriminator of the method section."""

    def build(self, setting: Setting) -> nn.Module:
        student = setting.student
        with evaluating(student):
            logits = setting.collect(lambda batch: student.clean(batch).logits)
        return RowTable(torch.from_numpy(logits))

    @property
    def not_planned(self) -> list[str]:
        return ["one forward of the student over all training rows before the first step"]

    def row_terms(
        self, batch: Batch, student_logits: Tensor, teacher_logits: Tensor, extras: nn.Module | None, moment: Moment
    ) -> dict[str, Tensor]:
        assert isinstance(extras, RowTable)
        source = better_source(teacher_logits, extras.rows(batch), batch)
        terms = {"kd": self.kd_weight * distance(student_logits, source, self.distance, self.temperature)}
        if self.mle_weight:
            terms["mle"] = self.mle_weight * supervised_loss(student_logits, batch)
        return terms


def better_source(teacher_logits: Tensor, initial_logits: Tensor, batch: Batch) -> Tensor:
    """Per clean row the logits of the source that gives the label more probability: [B, C] fp32."""
    from_teacher = label_probability(teacher_logits, batch) >= label_probability(initial_logits, batch)
    return torch.where(from_teacher[:, None], teacher_logits.detach().float(), initial_logits)
