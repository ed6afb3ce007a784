"""DPKD: the teacher's answers preferred to the student's own (Li et al. 2024, arXiv 2406.19774).

Legend of shape suffixes: B clean rows of the micro-batch, L positions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mixkd_fast.methods.base import Kind, Method, Moment, Setting
from mixkd_fast.methods.student_rows import NOT_PLANNED, STUDENT, Generate, OnPolicy, Writer
from mixkd_fast.methods.teacher_answers import TeacherAnswers
from mixkd_fast.methods.token_scores import IGNORED, both_sides, log_probabilities

if TYPE_CHECKING:
    from mixkd_fast.data.batching import Batch


class BothAnswers(TeacherAnswers):
    """Also the student's answers, kept while they are younger than `write_every` steps.

    The same on every rank, and in the checkpoints: 4 bytes per token of the answers that are kept.
    """

    def __init__(self, setting: Setting, options: DPKD) -> None:
        super().__init__(Writer(setting, options), setting)
        self.write_every = options.write_every
        self._gather = setting.gather
        self.written: dict[int, tuple[int, Tensor]] = {}
        """Row -> the step that its answer was written in, and the answer, int32 [tokens]."""

    def students(self, batch: Batch, generate: Generate, step: int) -> Batch:
        """The batch's prompts with the student's answers, written now as far as they are due. Collective."""
        if self.write_every == 1:
            return self.writer.write(batch, generate, STUDENT, step)
        rows = batch.row_ids[: batch.num_rows].tolist()
        due = [row not in self.written or step - self.written[row][0] >= self.write_every for row in rows]
        # A partitioned student writes on all ranks or on none.
        if any(self._gather(any(due))):
            generated, kept = (one.cpu() for one in self.writer.continued(batch, generate, STUDENT, step))
            new = {
                row: (step, generated[place][kept[place] != 0].int()) for place, row in enumerate(rows) if due[place]
            }
            for part in self._gather(new):
                self.written |= part
            self.written = {row: of for row, of in self.written.items() if step - of[0] < self.write_every}
        return self.joined(batch, [self.written[row][1].long() for row in rows])

    def get_extra_state(self) -> dict[str, Any]:
        """All answers, for a checkpoint."""
        return super().get_extra_state() | {"written": self.written}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take on what `get_extra_state` gave."""
        super().set_extra_state(state)
        self.written = {row: (step, answer.cpu()) for row, (step, answer) in state["written"].items()}


class DPKD(Method, OnPolicy):
    """L = -log sigmoid(beta [log q(y_T) / p(y_T) - log q(y_S) / p(y_S)]) + lm_weight CE(q, y_T).

    Teacher p, student q; log q(y) is the sum over the tokens of an answer. y_T is the teacher's answer to a prompt, y_S
    one that the student writes, without a gradient through the drawing. The first term is a mean
    over prompts, the second over the tokens of y_T. Its gradient is that of log q(y_S) - log q(y_T), times
    beta sigmoid(-beta [...]).
    """

    kinds: ClassVar[tuple[Kind, ...]] = ("causal_lm",)
    name: Literal["dpkd"] = "dpkd"
    """Discriminator of the method section."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """How strongly a difference of log ratios is preferred."""
    length_normalization: bool = False
    """log q / p of an answer is the mean over its tokens, not their sum; beta then wants to be larger."""
    teacher_answers: Literal["dataset", "generated"] = "dataset"
    """y_T: the data set's own answers, for a data set that the teacher wrote; or written by the teacher in the first
    step, once per training row, as `generation` says, and then kept in the checkpoints."""
    write_every: Annotated[int, Field(gt=0)] = 1
    """Steps for which a y_S is used again when its prompt comes up; 1 writes it anew each time. Pays where the same
    prompts come up within so many steps: a whole number of epochs."""
    lm_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the cross entropy on y_T."""
    max_logits_mib: Annotated[int, Field(gt=0)] = 512
    """Most memory for logits at once, in MiB."""

    @property
    def not_planned(self) -> list[str]:
        return [NOT_PLANNED, "the forwards of both models on these rows, beside those on the teacher's answers"]

    def build(self, setting: Setting) -> BothAnswers:
        """What writes rows, and the answers that are kept; nothing to train."""
        return BothAnswers(setting, self)

    def prepare_batch(
        self, batch: Batch, student: Any, teacher: Any | None, extras: nn.Module | None, moment: Moment
    ) -> Batch:
        """y_T, with y_S as its companion."""
        assert teacher is not None and isinstance(extras, BothAnswers)
        if self.teacher_answers == "generated":
            extras.write(teacher.generate)
            rows = extras.answered(batch)
        else:
            rows = extras.writer.given(batch)
        rows.companion = extras.students(batch, student.generate, moment.step)
        return rows

    def terms(
        self, batch: Batch, student: Any, teacher: Any | None, extras: nn.Module | None, moment: Moment
    ) -> dict[str, Tensor]:
        assert teacher is not None and batch.companion is not None and batch.mean_targets is not None
        ratio_T, nll_T = self._log_ratio(batch, student, teacher)
        ratio_S, _ = self._log_ratio(batch.companion, student, teacher)
        terms = {"dpkd": F.softplus(-self.beta * (ratio_T - ratio_S))}  # -log sigmoid, of any size
        if self.lm_weight > 0:
            terms["lm"] = self.lm_weight * nll_T / (batch.mean_targets or 1.0)
        return terms

    def _log_ratio(self, rows: Batch, student: Any, teacher: Any) -> tuple[Tensor, Tensor]:
        """log q(y) / p(y) and -log q(y) of every answer: [B] each."""
        with both_sides(rows, student, teacher) as (ours, theirs, labels):
            log_q, log_p = log_probabilities(ours, theirs, labels, self.max_logits_mib)
        ratio = (log_q - log_p).sum(1)
        if self.length_normalization:
            ratio = ratio / (labels != IGNORED).sum(1).clamp(min=1)
        return ratio, -log_q.sum(1)
