"""The mean answer of several teachers, or of one teacher's dropout passes, as the target (Bayesian teacher).

Ensembles: Hinton et al. 2015 (arXiv 1503.02531); Monte-Carlo dropout as a Bayesian teacher: Gal and Ghahramani 2016
(arXiv 1506.02142).
Legend of shape suffixes: N answers that are averaged, O rows of a forward, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mixkd_fast.methods.base import Moment, Setting
from mixkd_fast.methods.mixkd import MixedRowDistillation

if TYPE_CHECKING:
    from mixkd_fast.data.batching import Batch
    from mixkd_fast.models import Encoder

Name = Annotated[str, Field(min_length=1)]


class Members(nn.Module):
    """The further teachers. Frozen, and in a tuple: no submodules, so neither trained nor checkpointed."""

    def __init__(self, teachers: tuple[Any, ...]) -> None:
        super().__init__()
        self.teachers = teachers


class Ensemble(MixedRowDistillation):
    """L = mle_weight * CE(S(x), y) + kd_weight * tau^2 KL(p || q), p = mean_n softmax(z_n / tau).

    q = softmax(z_S / tau); n runs over teacher.model and `teachers`, each asked once, or `dropout_passes` times with
    its dropout at work. With distance "mse" and in a regression the target is the mean of the logits. sm_weight and
    tmkd_weight add MixKD's terms; on mixed rows p is the same mean over the answers to the mixed input. The run reports
    the ensemble's own metrics (with NLL and ECE, at tau = 1) as the teacher's.
    """

    name: Literal["ensemble"] = "ensemble"
    """Discriminator of the method section."""
    teachers: list[Name] = Field(default=[])
    """Hub names or folders of further teachers beside teacher.model, of the same task and tokenizer."""
    dropout_passes: Annotated[int, Field(ge=0, le=64)] = 0
    """Forwards of every teacher with its dropout at work (Monte-Carlo dropout); 0 asks each once without dropout."""

    @model_validator(mode="after")
    def _averages_something(self) -> Ensemble:
        if not self.teachers and self.dropout_passes < 2:
            raise ValueError(
                f"teachers is empty and dropout_passes is {self.dropout_passes}: there is nothing to average; name "
                'further teachers, set dropout_passes to 2 or more, or use method "kd"'
            )
        return self

    @property
    def needs_clean_teacher(self) -> bool:
        # What is drawn anew at every step cannot be kept.
        return super().needs_clean_teacher and self.dropout_passes == 0

    def build(self, setting: Setting) -> Members:
        """Load the further teachers."""
        loaded = [setting.load_teacher(name, f"method.teachers.{i}") for i, name in enumerate(self.teachers)]
        return Members(tuple(loaded))

    def teacher_logits(self, batch: Batch, teacher: Any, extras: nn.Module | None) -> Tensor:
        answers, _ = zip(*self._asked(batch, teacher, extras, True, False), strict=True)
        return mean_answer(_stacked(answers), 1.0)

    def terms(
        self, batch: Batch, student: Encoder, teacher: Any | None, extras: nn.Module | None, moment: Moment
    ) -> dict[str, Tensor]:
        # Asked first and read last: a teacher on a stream of its own works meanwhile.
        asked = self._asked(batch, teacher, extras, self.kd_weight > 0, self.tmkd_weight > 0)
        clean, mixed = self.outputs_of(student, batch, self.needs_clean_student, self.mixing() is not None)
        own = [None if output is None else output.logits for output in (clean, mixed)]
        teacher_clean, teacher_mixed = (self._target(answers) for answers in zip(*asked, strict=True))
        return self.objective(batch, own[0], own[1], teacher_clean, teacher_mixed)

    def _target(self, answers: tuple[Any, ...]) -> Tensor | None:
        """Logits [O, C] whose distance to the student's is that of the mean answer; None where nobody was asked."""
        if answers[0] is None:
            return None
        answers_NOC = _stacked(answers)
        return answers_NOC.mean(0) if self.distance == "mse" else mean_answer(answers_NOC, self.temperature)

    def _asked(
        self, batch: Batch, teacher: Any, extras: nn.Module | None, clean: bool, mixed: bool
    ) -> list[tuple[Any, Any]]:
        """What every teacher gives for the clean and for the mixed rows; None for rows that are not asked for."""
        assert isinstance(extras, Members)
        # Kept logits are those of the first teacher, asked without dropout.
        without = replace(batch, teacher_logits=None)
        if self.dropout_passes:
            return [
                (
                    one.sampled(without, self.dropout_passes) if clean else None,
                    one.sampled(without, self.dropout_passes, self) if mixed else None,
                )
                for one in (teacher, *extras.teachers)
            ]
        first = self.outputs_of(teacher, batch, clean, mixed)
        return [first, *(self.outputs_of(further, without, clean, mixed) for further in extras.teachers)]


def _stacked(answers: Sequence[Any]) -> Tensor:
    """Outputs with logits [O, C], or sampled logits [passes, O, C]: all as fp32 [N, O, C]."""
    return torch.cat([one if isinstance(one, Tensor) else one.logits[None].float() for one in answers])


def mean_answer(answers_NOC: Tensor, temperature: float) -> Tensor:
    """Logits z with softmax(z / tau) = mean_n softmax(z_n / tau): tau * log of the mean, taken with logsumexp.

    Args: answers_NOC = logits [N, O, C]. Returns: [O, C] fp32; for C = 1 (a regression) the mean of the outputs.
    """
    if answers_NOC.shape[-1] == 1:
        return answers_NOC.mean(0)
    log_p = (answers_NOC / temperature).log_softmax(-1)
    return temperature * (log_p.logsumexp(0) - math.log(len(answers_NOC)))
