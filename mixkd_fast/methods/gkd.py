"""GKD: the student learns from the teacher on its own text (Agarwal et al., ICLR 2024, arXiv 2306.13649)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field
from torch import Tensor, nn

from mixkd_fast.methods.base import Moment, Setting
from mixkd_fast.methods.language import LanguageMethod
from mixkd_fast.methods.student_rows import NOT_PLANNED, STUDENT, OnPolicy, Writer, draws_student, writer_of
from mixkd_fast.ops import DivergenceName

if TYPE_CHECKING:
    from mixkd_fast.data.batching import Batch


class GKD(LanguageMethod, OnPolicy):
    """L = tau^2 D(T(x), S(x)), the mean over the answers' tokens; D = JSD(beta) by default.

    JSD(beta) = beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q. With probability lam_student the
    answers of a step are drawn from the student, without a gradient through the drawing; else they are the data set's.
    """

    name: Literal["gkd"] = "gkd"
    """Discriminator of the method section."""
    divergence: DivergenceName = "jsd"
    """Between teacher p and student q: jsd (with jsd_beta), forward_kl, reverse_kl, or any other of lm_kd."""
    lam_student: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Probability that a step trains on answers that the student writes; 0 is supervised, 1 wholly on-policy."""

    @property
    def not_planned(self) -> list[str]:
        return [NOT_PLANNED] if self.lam_student else []

    def build(self, setting: Setting) -> Writer:
        """What writes the student's rows; nothing to train."""
        return Writer(setting, self)

    def prepare_batch(
        self, batch: Batch, student: Any, teacher: Any | None, extras: nn.Module | None, moment: Moment
    ) -> Batch:
        """The student's answers to the batch's prompts, or the batch itself."""
        writer = writer_of(extras)
        if not draws_student(writer.seed, moment.step, self.lam_student):
            return batch
        return writer.write(batch, student.generate, STUDENT, moment.step)

    def terms(
        self, batch: Batch, student: Any, teacher: Any | None, extras: nn.Module | None, moment: Moment
    ) -> dict[str, Tensor]:
        return self.token_terms(batch, student, teacher, kd_weight=1.0)
