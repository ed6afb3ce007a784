"""RDD for text: labels weighed by how sure the teacher is of itself, then rows that only one of both finds hard."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from mixkd_fast.errors import ModelError
from mixkd_fast.methods.base import Moment, Setting, supervised_loss
from mixkd_fast.methods.kd import distance
from mixkd_fast.methods.rows import RowDistillation, label_probability

if TYPE_CHECKING:
    from mixkd_fast.data.batching import Batch
    from mixkd_fast.models import Encoder


class RDD(RowDistillation):
    """Stage 1: mle_weight * exp(-KL(p' || p'')) * CE_n, p' and p'' the teacher's answers in two dropout passes.

    Stage 2, on the rows with [p_T(y_n) <= hard_below] != [p_S(y_n) <= hard_below] alone: mle_weight * CE_n +
    kd_weight * d(T, S)_n; the other rows cost nothing. Everything is at temperature 1 but d. Weights and choice have no
    gradient, and the sum is divided by all rows. With soft labels p(y) is the sum of s_c p_c.
    """

    name: Literal["rdd"] = "rdd"
    """Discriminator of the method section."""
    stage_share: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of the steps that belong to stage 1; 0 leaves it out."""
    hard_below: Annotated[float, Field(gt=0, lt=1)] = 0.7
    """A row is hard for a model that gives its label no more probability than this."""

    @model_validator(mode="after")
    def _stages_train_something(self) -> RDD:
        if self.stage_share and not self.mle_weight:
            raise ValueError(
                "mle_weight is 0, and stage 1 trains on labels alone; allowed: a positive one, or stage_share 0"
            )
        return self

    def check(self, setting: Setting) -> None:
        """Raises: ModelError if stage 1 asks a teacher that has no dropout."""
        assert setting.teacher is not None
        if self.stage_share and setting.teacher.num_dropouts == 0:
            raise ModelError(
                f"method.stage_share = {self.stage_share}: stage 1 compares two dropout passes of the teacher, which "
                "has no dropout; use another teacher, or stage_share 0"
            )

    @property
    def not_planned(self) -> list[str]:
        passes = (
            f"two dropout passes of the teacher over the clean rows of the first {self.stage_share:.0%} of the steps"
        )
        return [passes] if self.stage_share else []

    def terms(
        self, batch: Batch, student: Encoder, teacher: Any | None, extras: nn.Module | None, moment: Moment
    ) -> dict[str, Tensor]:
        assert teacher is not None
        if moment.step >= self.stage_share * moment.total_steps:
            return super().terms(batch, student, teacher, extras, moment)
        teacher_mixed = self.outputs_of(teacher, batch, False, self.needs_mixed_teacher)[1]
        weight = agreement(teacher.sampled(batch, 2))
        from_student, student_mixed = self.outputs_of(student, batch, True, self.mixing() is not None)
        terms = {"mle": self.mle_weight * weight * supervised_loss(from_student.logits, batch)}
        return terms | self.mixed_terms(batch, student_mixed, teacher_mixed)

    def row_terms(
        self, batch: Batch, student_logits: Tensor, teacher_logits: Tensor, extras: nn.Module | None, moment: Moment
    ) -> dict[str, Tensor]:
        hard_for_teacher, hard_for_student = (
            label_probability(logits, batch) <= self.hard_below for logits in (teacher_logits, student_logits)
        )
        kept = (hard_for_teacher != hard_for_student).float()
        terms = {
            "kd": self.kd_weight * kept * distance(student_logits, teacher_logits, self.distance, self.temperature)
        }
        if self.mle_weight:
            terms["mle"] = self.mle_weight * kept * supervised_loss(student_logits, batch)
        return terms


def agreement(logits: Tensor) -> Tensor:
    """exp(-KL(p' || p'')) of two readings: [2, B, C] -> [B] in (0, 1], fp32, without a gradient."""
    log_p = logits.detach().float().log_softmax(-1)
    divergence = (log_p[0].exp() * (log_p[0] - log_p[1])).sum(-1)
    # Rounding may leave a divergence of equal readings a little below 0.
    return (-divergence.clamp(min=0.0)).exp()
