"""Label revision and data selection (Lan et al. 2024, arXiv 2404.03693)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from mixkd_fast.methods.base import Moment, Setting, supervised_loss
from mixkd_fast.methods.kd import distance
from mixkd_fast.methods.row_selection import best_rows, gradient_dots
from mixkd_fast.methods.rows import RowDistillation, RowTable

if TYPE_CHECKING:
    from mixkd_fast.data.batching import Batch


class LabelRevision(RowDistillation):
    """L = mle_weight * CE_n + kd_weight * chosen_n * tau^2 KL(p~_n || q_n), p~ the teacher's answer put right.

    Where the teacher's best class is not the label: p~ = beta * p + (1 - beta) * onehot(y) with
    beta = eta / (p_max - p_y + 1), else p~ = p; p = softmax(z_T / tau), the distribution that is distilled. eta < 1
    makes y the best class of p~. With soft labels y is the row's class number, which they only name where there is no
    other. Data selection: chosen_n is 1 for the best select_share of all rows by `gradient_dots`, a surrogate for the
    paper's influence score, which is not public.
    """

    name: Literal["label_revision"] = "label_revision"
    """Discriminator of the method section."""
    distance: Literal["kl"] = "kl"
    """Only "kl": a revised answer is a distribution, not logits."""
    eta: Annotated[float, Field(gt=0, lt=1)] = 0.8
    """How much of the teacher's answer stays where it errs; the label is the best class for any eta below 1."""
    select_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the training rows that learn from the teacher; the others learn from their labels alone."""

    @model_validator(mode="after")
    def _all_rows_train(self) -> LabelRevision:
        if self.select_share < 1 and not self.mle_weight:
            raise ValueError(
                f"mle_weight is 0 and select_share {self.select_share}: rows that are not chosen would train nothing; "
                "allowed: a positive mle_weight, or select_share 1"
            )
        return self

    def build(self, setting: Setting) -> nn.Module | None:
        if self.select_share == 1:
            return None

        def target(batch: Batch, teacher_logits: Tensor) -> Tensor:
            return (self._revised(batch, teacher_logits) / self.temperature).softmax(-1)

        scores = gradient_dots(setting, self.temperature, target)
        return RowTable(best_rows(scores, self.select_share))

    @property
    def not_planned(self) -> list[str]:
        passes = "two forwards of the student and one of the teacher over all training rows before the first step"
        return [passes] if self.select_share < 1 else []

    def row_terms(
        self, batch: Batch, student_logits: Tensor, teacher_logits: Tensor, extras: nn.Module | None, moment: Moment
    ) -> dict[str, Tensor]:
        revised = self._revised(batch, teacher_logits)
        kd = self.kd_weight * distance(student_logits, revised, self.distance, self.temperature)
        if extras is not None:
            assert isinstance(extras, RowTable)
            kd = kd * extras.rows(batch)[:, 0]
        terms = {"kd": kd}
        if self.mle_weight:
            terms["mle"] = self.mle_weight * supervised_loss(student_logits, batch)
        return terms

    def _revised(self, batch: Batch, teacher_logits: Tensor) -> Tensor:
        return revised_logits(teacher_logits, batch.labels[: batch.num_rows], self.temperature, self.eta)


def revised_logits(teacher_logits: Tensor, labels: Tensor, temperature: float, eta: float) -> Tensor:
    """Logits whose softmax at `temperature` is p~ (see `LabelRevision`); the teacher's own where it is right.

    Args: teacher_logits [B, C]; labels int64 [B]. Returns: [B, C], fp32 or fp64, without a gradient.
    """
    logits = teacher_logits.detach()
    logits = logits if logits.dtype == torch.float64 else logits.float()
    log_p = (logits / temperature).log_softmax(-1)
    p_max, best = log_p.exp().max(-1, keepdim=True)
    beta = eta / (p_max - log_p.exp().gather(-1, labels[:, None]) + 1)
    kept = beta.log() + log_p
    # log(beta * p + (1 - beta)) at the label, without leaving logarithms.
    lifted = torch.logaddexp(kept, torch.log1p(-beta))
    is_label = F.one_hot(labels, logits.shape[-1]).bool()
    revised = temperature * torch.where(is_label, lifted, kept)
    return torch.where(best == labels[:, None], logits, revised)
