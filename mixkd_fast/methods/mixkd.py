"""MixKD: distillation on interpolated rows (Liang et al., ICLR 2021, arXiv 2011.00593)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from mixkd_fast.methods.base import Moment, mixed_supervised_loss, per_clean_row
from mixkd_fast.methods.kd import CleanRowDistillation, Weight, distance
from mixkd_fast.mixing import Mixing

if TYPE_CHECKING:
    from mixkd_fast.data.batching import Batch
    from mixkd_fast.models import Encoder


class MixedRowDistillation(CleanRowDistillation, Mixing):
    """MixKD's objective without its name: the base of methods that can be combined with it.

    L = mle_weight * CE(S(x), y) + kd_weight * d(T(x), S(x)) + sm_weight * L_SM + tmkd_weight * d(T(x'), S(x')).
    """

    sm_weight: Weight = 0.0
    """alpha_SM: weight of the supervised loss on the mixed rows with mixed labels."""
    tmkd_weight: Weight = 0.0
    """alpha_TMKD: weight of the distance to the teacher on the mixed rows."""

    def mixing(self) -> Mixing | None:
        return self if self.needs_mixed_student else None

    @property
    def without_effect(self) -> list[str]:
        mixes = self.mixing() is not None
        return [] if mixes else self.unless_default(Mixing.model_fields, "no rows are mixed with these weights")

    def terms(
        self, batch: Batch, student: Encoder, teacher: Any | None, extras: nn.Module | None, moment: Moment
    ) -> dict[str, Tensor]:
        # Asked first and read last: a teacher on a stream of its own works meanwhile.
        teacher_clean, teacher_mixed = self.outputs_of(
            teacher, batch, self.needs_clean_teacher, self.needs_mixed_teacher
        )
        clean, mixed = self.outputs_of(student, batch, self.needs_clean_student, self.needs_mixed_student)
        return self.objective(batch, *(_logits(output) for output in (clean, mixed, teacher_clean, teacher_mixed)))

    @property
    def needs_mixed_teacher(self) -> bool:
        return self.tmkd_weight > 0

    @property
    def needs_clean_student(self) -> bool:
        return self.mle_weight > 0 or self.kd_weight > 0

    @property
    def needs_mixed_student(self) -> bool:
        """Whether the student's logits of the mixed rows enter the loss."""
        return self.sm_weight > 0 or self.tmkd_weight > 0

    def objective(
        self,
        batch: Batch,
        student_clean: Tensor | None,
        student_mixed: Tensor | None,
        teacher_clean: Tensor | None,
        teacher_mixed: Tensor | None,
    ) -> dict[str, Tensor]:
        """The terms from logits [B, C] of the clean and [M, C] of the mixed rows; None where a weight is 0."""
        terms = {}
        if student_clean is not None:
            terms = self.clean_terms(batch, student_clean, teacher_clean)
        if self.sm_weight and student_mixed is not None:
            terms["sm"] = self.sm_weight * mixed_supervised_loss(student_mixed, batch)
        if teacher_mixed is not None and student_mixed is not None:
            per_mixed_row = distance(student_mixed, teacher_mixed, self.distance, self.temperature)
            terms["tmkd"] = self.tmkd_weight * per_clean_row(per_mixed_row, batch)
        return terms

    def outputs_of(self, model: Any, batch: Batch, clean: bool, mixed: bool) -> tuple[Any, Any]:
        """What the model gives for the rows that are asked for, from one forward; None for the others."""
        if clean and mixed:
            outputs: tuple[Any, Any] = model.both(batch, self)
            return outputs
        return model.clean(batch) if clean else None, model.mixed(batch, self) if mixed else None


class MixKD(MixedRowDistillation):
    """L = mle_weight * CE(S(x), y) + kd_weight * d(T(x), S(x)) + sm_weight * L_SM + tmkd_weight * d(T(x'), S(x')).

    x' = lam * e(x_i) + (1 - lam) * e(x_j) on word embeddings, each model mixing in its own table with the same
    (i, j, lam); L_SM = lam * CE(S(x'), y_i) + (1 - lam) * CE(S(x'), y_j). The paper's rows TMKD and SM+TMKD have
    kd_weight 0; KD, KD+SM, TMKD, SM+TMKD and all of them together are settings of this one objective.
    """

    name: Literal["mixkd"] = "mixkd"
    """Discriminator of the method section."""
    kd_weight: Weight = 0.0
    """Weight of the distance to the teacher on the clean rows (0 in the paper)."""
    sm_weight: Weight = 1.0
    """alpha_SM: weight of the supervised loss on the mixed rows with mixed labels."""
    tmkd_weight: Weight = 1.0
    """alpha_TMKD: weight of the distance to the teacher on the mixed rows."""

    @property
    def without_effect(self) -> list[str]:
        return [*super().without_effect, *self.unused_temperature()]


def _logits(output: Any | None) -> Tensor | None:
    logits: Tensor | None = None if output is None else output.logits
    return logits
