"""Confidence-conditioned distillation: CCKD (Mishra and Sundaram 2021, arXiv 2107.06993)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from mixkd_fast.methods.base import Moment, supervised_loss
from mixkd_fast.methods.kd import distance
from mixkd_fast.methods.rows import RowDistillation, label_probability

if TYPE_CHECKING:
    from mixkd_fast.data.batching import Batch


class CCKD(RowDistillation):
    """The more probability the teacher gives a row's label, the more the row learns from it, else from the label.

    w_n = p_T(y_n) at temperature 1. Variant L: mle_weight * (1 - w_n) * CE_n + kd_weight * w_n * d(T, S)_n. Variant
    T: CE(q, w_n * softmax(z_T / tau) + (1 - w_n) * onehot(y_n)) with q = softmax(z_S), no tau^2; a cross entropy is
    linear in its target, so the same two terms and weights make it up. Neither w_n nor the choice of rows has a
    gradient. With soft labels w_n is the sum of s_c p_c, and the soft label takes the place of onehot(y_n).
    """

    name: Literal["cckd"] = "cckd"
    """Discriminator of the method section."""
    variant: Literal["L", "T"] = "L"
    """L weighs the two losses by the teacher's confidence; T makes one target of the teacher's answer and the label."""
    self_regulated: bool = False
    """Train only on rows that the student gets wrong, or whose two best classes are less than 1 - exp(-epoch / 100)
    apart in probability. The rows left out count in the divisor."""

    @model_validator(mode="after")
    def _distance_is_used(self) -> CCKD:
        if self.variant == "T" and self.distance != "kl":
            raise ValueError(f'distance is "{self.distance}", and variant "T" is a cross entropy; allowed: "kl"')
        return self

    def row_terms(
        self, batch: Batch, student_logits: Tensor, teacher_logits: Tensor, extras: nn.Module | None, moment: Moment
    ) -> dict[str, Tensor]:
        confidence = label_probability(teacher_logits, batch)
        doubt = 1 - confidence
        if self.self_regulated:
            taking_part = participates(student_logits, batch, moment.epoch).float()
            confidence, doubt = confidence * taking_part, doubt * taking_part
        terms = {"kd": self.kd_weight * confidence * self._from_teacher(student_logits, teacher_logits)}
        if self.mle_weight:
            terms["mle"] = self.mle_weight * doubt * supervised_loss(student_logits, batch)
        return terms

    def _from_teacher(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        if self.variant == "L":
            return distance(student_logits, teacher_logits, self.distance, self.temperature)
        softened = (teacher_logits.detach().float() / self.temperature).softmax(-1)
        return F.cross_entropy(student_logits.float(), softened, reduction="none")


def participates(student_logits: Tensor, batch: Batch, epoch: float) -> Tensor:
    """Self-regulation: which clean rows the student has still to learn: bool [B].

    A row is left out once it is right and p_1 - p_2 of its two best classes is at least 1 - exp(-0.01 * epoch).
    Args: student_logits [B, C] of the training forward, dropout included; epoch = epochs that are over, a fraction
    counts.
    """
    best = student_logits.detach().float().softmax(-1).topk(2, dim=-1)
    margin = best.values[:, 0] - best.values[:, 1]
    wrong = best.indices[:, 0] != batch.labels[: batch.num_rows]
    return wrong | (margin < -math.expm1(-0.01 * epoch))
