"""MiniPLM: train on texts that a large model finds likelier than a small one does (Gu et al., arXiv 2410.17215)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from mixkd_fast.errors import DataError
from mixkd_fast.methods.base import Kind, Method, Moment, RowChoice, RowScores
from mixkd_fast.methods.language import token_terms

if TYPE_CHECKING:
    from mixkd_fast.data.batching import Batch


class MiniPLM(Method):
    """L = CE(S(x), y), the mean over tokens, on the rows with the highest score = NLL_reference(x) - NLL_teacher(x).

    NLL is the mean negative log-likelihood of a row's targets: a document (or the answer to an instruction) as one
    sequence, as `mixkd-fast teach --kind nll` has scored it. Such a row is one that the teacher has learnt and a small
    model has not: what is easy for both, and noise for both, scores low. The teacher does not run in training, and
    the student may have another tokenizer.
    """

    uses_teacher: ClassVar[bool] = False
    kinds: ClassVar[tuple[Kind, ...]] = ("causal_lm",)
    name: Literal["miniplm"] = "miniplm"
    """Discriminator of the method section."""
    teacher_nll: Annotated[str, Field(min_length=1)]
    """Folder of the teacher's scores of the training rows."""
    reference_nll: Annotated[str, Field(min_length=1)]
    """Folder of the small reference model's scores of the same rows, with the same tokenizer and max_length."""
    ratio: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the scored rows that is kept: those of the highest scores, in the order of the corpus."""

    def choose_rows(self, scores: Callable[[str, str], RowScores]) -> RowChoice:
        teacher = scores(self.teacher_nll, "method.teacher_nll")
        reference = scores(self.reference_nll, "method.reference_nll")
        return difference_sampling(teacher, reference, self.ratio)

    def terms(
        self, batch: Batch, student: Any, teacher: Any | None, extras: nn.Module | None, moment: Moment
    ) -> dict[str, Tensor]:
        return {"mle": token_terms(batch, student, None, ce_weight=1.0)["ce"]}


def difference_sampling(teacher: RowScores, reference: RowScores, ratio: float) -> RowChoice:
    """Scores NLL_reference - NLL_teacher, and the round(ratio * N) highest of them, at least one.

    Equal scores: the earlier row. Raises: DataError if the two scored different rows or sequences.
    """
    if teacher.read_by != reference.read_by or not np.array_equal(teacher.rows, reference.rows):
        raise DataError(
            "method.reference_nll: its model read the rows with another tokenizer or max_length, or otherwise written "
            "(task.prompt_template, task.chat_template), than the teacher, so their scores cannot be compared; score "
            "both by one configuration"
        )
    scores: NDArray[np.float64] = reference.mean_nll - teacher.mean_nll
    count = max(1, round(ratio * len(scores)))
    kept = np.zeros(len(scores), dtype=np.bool_)
    kept[np.argsort(-scores, kind="stable")[:count]] = True
    return RowChoice(teacher.rows, scores, kept)
