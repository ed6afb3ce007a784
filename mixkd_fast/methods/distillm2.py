"""DistiLLM-2: forward on the teacher's answers, reverse on the student's (Ko et al., ICML 2025, arXiv 2503.07067)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from mixkd_fast.methods.base import Moment, Setting
from mixkd_fast.methods.distillm import SkewedDistillation
from mixkd_fast.methods.language import token_terms
from mixkd_fast.methods.student_rows import NOT_PLANNED, STUDENT, Writer
from mixkd_fast.methods.teacher_answers import TeacherAnswers

if TYPE_CHECKING:
    from mixkd_fast.data.batching import Batch


class DistiLLM2(SkewedDistillation):
    """L = (2 - beta) tau^2 KL(p || a p + (1 - a) q) on y_T + beta tau^2 KL(q || (1 - a) p + a sg q) on y_S.

    Means over the tokens of the teacher's answers y_T and of the student's y_S to the same prompts, each over its own
    tokens; beta = 1 + 0.5 min(1, 2 t / T). The student writes y_S in every step; no gradient passes through the
    drawing.
    """

    name: Literal["distillm2"] = "distillm2"
    """Discriminator of the method section."""
    teacher_answers: Literal["dataset", "generated"] = "dataset"
    """y_T: the data set's own answers, for a data set that the teacher wrote; or written by the teacher in the first
    step, once per training row, as `generation` says, and then kept in the checkpoints."""
    detach_mixture: bool = True
    """sg: no gradient through the student inside the mixture of the second term."""

    @property
    def not_planned(self) -> list[str]:
        return [NOT_PLANNED, "the forwards of both models on these rows, beside those on the teacher's answers"]

    def build(self, setting: Setting) -> TeacherAnswers:
        """What writes rows, and the teacher's answers; nothing to train."""
        return TeacherAnswers(Writer(setting, self), setting)

    def prepare_batch(
        self, batch: Batch, student: Any, teacher: Any | None, extras: nn.Module | None, moment: Moment
    ) -> Batch:
        """y_T, with y_S as its companion."""
        assert teacher is not None and isinstance(extras, TeacherAnswers)
        if self.teacher_answers == "generated":
            extras.write(teacher.generate)
            rows = extras.answered(batch)
        else:
            rows = extras.writer.given(batch)
        rows.companion = extras.writer.write(batch, student.generate, STUDENT, moment.step)
        return rows

    def terms(
        self, batch: Batch, student: Any, teacher: Any | None, extras: nn.Module | None, moment: Moment
    ) -> dict[str, Tensor]:
        assert batch.companion is not None
        beta = 1 + 0.5 * min(1.0, 2 * moment.step / moment.total_steps)
        options = self.divergence_options()
        forward = token_terms(batch, student, teacher, kd_weight=2 - beta, divergence="skew_forward_kl", **options)
        reverse = token_terms(
            batch.companion,
            student,
            teacher,
            kd_weight=beta,
            divergence="skew_reverse_kl",
            detach_mixture=self.detach_mixture,
            **options,
        )
        return {"forward": forward["kd"], "reverse": reverse["kd"]}
