"""Knowledge distillation on the clean rows (Hinton et al. 2015, arXiv 1503.02531)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from mixkd_fast.losses import kd_loss
from mixkd_fast.methods.base import Method, Moment, supervised_loss

if TYPE_CHECKING:
    from mixkd_fast.data.batching import Batch
    from mixkd_fast.models import Encoder

Weight = Annotated[float, Field(ge=0)]
Temperature = Annotated[float, Field(gt=0)]
Distance = Literal["kl", "mse"]


class CleanRowDistillation(Method):
    """The terms of the clean rows, shared by KD and MixKD."""

    _factors: ClassVar[tuple[str, ...]] = ()
    """Weights that are not a term's: alone they train nothing."""
    mle_weight: Weight = 1.0
    """Weight of the supervised loss."""
    kd_weight: Weight = 1.0
    """Weight of the distance to the teacher."""
    temperature: Temperature = 2.0
    """tau of the softened distributions; the term is multiplied by tau^2. Unused by distance "mse"."""
    distance: Distance = "kl"
    """kl: temperature-scaled KL(teacher || student); mse: squared difference of the logits, mean over classes."""

    @model_validator(mode="after")
    def _trains_something(self) -> CleanRowDistillation:
        weights = [name for name in type(self).model_fields if name.endswith("_weight") and name not in self._factors]
        if not any(getattr(self, name) for name in weights):
            raise ValueError(f"{', '.join(weights)} are all 0: nothing would be trained; at least one must be positive")
        return self

    @property
    def needs_clean_teacher(self) -> bool:
        return self.kd_weight > 0

    def unused_temperature(self) -> list[str]:
        """For `without_effect` of methods whose only use of the temperature is the distance."""
        return self.unless_default(["temperature"], 'distance "mse" has none') if self.distance == "mse" else []

    def clean_terms(self, batch: Batch, student_logits: Tensor, teacher_logits: Tensor | None) -> dict[str, Tensor]:
        """Terms of the clean rows from logits [B, C]; the teacher's are needed at a positive kd_weight only."""
        terms = {}
        if self.mle_weight:
            terms["mle"] = self.mle_weight * supervised_loss(student_logits, batch)
        if teacher_logits is not None:
            terms["kd"] = self.kd_weight * distance(student_logits, teacher_logits, self.distance, self.temperature)
        return terms


class KD(CleanRowDistillation):
    """L = mle_weight * CE(S(x), y) + kd_weight * d(T(x), S(x)); d = tau^2 KL(T || S) at temperature tau, or MSE."""

    name: Literal["kd"] = "kd"
    """Discriminator of the method section."""

    @property
    def without_effect(self) -> list[str]:
        return self.unused_temperature()

    def terms(
        self, batch: Batch, student: Encoder, teacher: Any | None, extras: nn.Module | None, moment: Moment
    ) -> dict[str, Tensor]:
        assert teacher is not None
        # Asked first and read last: a teacher on a stream of its own works meanwhile.
        from_teacher = teacher.clean(batch) if self.needs_clean_teacher else None
        student_logits = student.clean(batch).logits
        return self.clean_terms(batch, student_logits, None if from_teacher is None else from_teacher.logits)


def distance(student_logits: Tensor, teacher_logits: Tensor, kind: Distance, temperature: float) -> Tensor:
    """d(T, S) of methods MixKD and KD, unreduced: [rows]. A regression's single output is always compared by MSE."""
    if kind == "mse" or student_logits.shape[-1] == 1:
        return kd_loss(student_logits, teacher_logits, divergence="mse", reduction="none")
    return kd_loss(student_logits, teacher_logits, temperature=temperature, reduction="none")
