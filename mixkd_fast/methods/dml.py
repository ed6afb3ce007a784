"""Deep mutual learning: students that teach each other (Zhang et al., CVPR 2018, arXiv 1706.00384)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from mixkd_fast.methods.base import Moment, Setting
from mixkd_fast.methods.kd import Temperature, Weight, distance
from mixkd_fast.methods.mixkd import MixedRowDistillation

if TYPE_CHECKING:
    from mixkd_fast.data.batching import Batch
    from mixkd_fast.models import Encoder


class DML(MixedRowDistillation):
    """L = sum_i L_i, L_i = mle_weight * CE(S_i(x), y) + mutual_weight / (K - 1) * sum_j!=i tau^2 KL(sg p_j || p_i).

    p_i = softmax(S_i(x) / tau) at tau = mutual_temperature; a regression compares by the squared difference. K students
    are trained at once: all answers come from the same weights, and one optimizer step moves every student (the
    paper moves one after the other). No teacher is needed; with one, kd_weight, sm_weight and tmkd_weight add to every
    L_i what they add in MixKD. Terms of students 2, 3, ... are named mle_2, mutual_2, ...
    """

    uses_teacher: ClassVar[bool] = False
    name: Literal["dml"] = "dml"
    """Discriminator of the method section."""
    students: Annotated[int, Field(ge=2, le=16)] = 2
    """K: how many students learn together; all are saved: student, student_2, student_3, ..."""
    mutual_weight: Weight = 1.0
    """Weight of the mean distance to the other students' answers on the clean rows."""
    mutual_temperature: Temperature = 1.0
    """tau between the students (1 in the paper); the term is multiplied by tau^2."""
    kd_weight: Weight = 0.0
    """Weight of every student's distance to a teacher on the clean rows; needs a teacher if positive."""

    @property
    def needs_teacher(self) -> bool:
        return self.kd_weight > 0 or self.tmkd_weight > 0

    @property
    def needs_clean_student(self) -> bool:
        return super().needs_clean_student or self.mutual_weight > 0

    def build(self, setting: Setting) -> nn.ModuleList:
        """Students 2 to K, each with its own draw of what is new in it."""
        return nn.ModuleList(setting.new_student(setting.seed + number) for number in range(1, self.students))

    def more_students(self, extras: nn.Module | None) -> list[Encoder]:
        assert isinstance(extras, nn.ModuleList)
        return cast("list[Encoder]", list(extras))

    def terms(
        self, batch: Batch, student: Encoder, teacher: Any | None, extras: nn.Module | None, moment: Moment
    ) -> dict[str, Tensor]:
        # Asked first and read last: a teacher on a stream of its own works meanwhile.
        of_teacher = self.outputs_of(teacher, batch, self.needs_clean_teacher, self.tmkd_weight > 0)
        mixes = self.mixing() is not None
        outputs = [
            self.outputs_of(one, batch, self.needs_clean_student, mixes)
            for one in (student, *self.more_students(extras))
        ]
        answers = [None if clean is None else clean.logits for clean, _ in outputs]
        teacher_clean, teacher_mixed = (None if output is None else output.logits for output in of_teacher)
        terms: dict[str, Tensor] = {}
        for number, (own, (_, mixed)) in enumerate(zip(answers, outputs, strict=True)):
            suffix = f"_{number + 1}" if number else ""
            mixed_logits = None if mixed is None else mixed.logits
            of_this = self.objective(batch, own, mixed_logits, teacher_clean, teacher_mixed)
            if self.mutual_weight and own is not None:
                of_this["mutual"] = self.mutual_weight * self._mutual(own, answers)
            terms |= {name + suffix: term for name, term in of_this.items()}
        return terms

    def _mutual(self, own: Tensor, answers: list[Tensor | None]) -> Tensor:
        """Mean distance of one student's answers to those of the others, which get no gradient: [B]."""
        others = [answer.detach() for answer in answers if answer is not None and answer is not own]
        distances = [distance(own, other, self.distance, self.mutual_temperature) for other in others]
        return torch.stack(distances).mean(0)
