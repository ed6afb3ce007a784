"""Distillation of causal language models, token by token (Hinton et al. 2015, arXiv 1503.02531; MixKD on words)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from mixkd_fast.methods.base import Moment
from mixkd_fast.methods.language import LanguageMethod
from mixkd_fast.mixing import Mixing

if TYPE_CHECKING:
    from mixkd_fast.data.batching import Batch


class LanguageKD(LanguageMethod, Mixing):
    """L = (1 - w) CE(S(x), y) + w tau^2 D(T(x), S(x)) + sm_weight L_SM + tmkd_weight tau^2 D(T(x'), S(x')).

    A mean over the targets (answers, or all tokens of plain text) of the whole batch; w = kd_weight, D = divergence.
    The last two terms are MixKD on word embeddings and experimental: x' = lam e(x_i) + (1 - lam) e(x_j) at every
    position, each model in its own table; L_SM = lam CE(S(x'), y_i) + (1 - lam) CE(S(x'), y_j). They are means over the
    positions that both rows of a pair learn from.
    """

    takes_stored_teacher: ClassVar[bool] = True
    name: Literal["lm_kd"] = "lm_kd"
    """Discriminator of the method section."""
    kd_weight: Annotated[float, Field(ge=0, le=1)] = 0.5
    """w: the share of the teacher; 1 - w is the share of the labels."""
    sm_weight: Annotated[float, Field(ge=0)] = 0.0
    """Experimental: weight of the supervised loss on mixed rows."""
    tmkd_weight: Annotated[float, Field(ge=0)] = 0.0
    """Experimental: weight of the distance to the teacher on mixed rows."""

    @model_validator(mode="after")
    def _mixes_words(self) -> LanguageKD:
        if self.position != "before_layer_norm":
            raise ValueError(f'position is "{self.position}"; allowed for lm_kd: "before_layer_norm"')
        return self

    def mixing(self) -> Mixing | None:
        return self if self.sm_weight > 0 or self.tmkd_weight > 0 else None

    @property
    def needs_mixed_teacher(self) -> bool:
        return self.tmkd_weight > 0

    def terms(
        self, batch: Batch, student: Any, teacher: Any | None, extras: nn.Module | None, moment: Moment
    ) -> dict[str, Tensor]:
        terms = self.token_terms(batch, student, teacher, ce_weight=1 - self.kd_weight, kd_weight=self.kd_weight)
        if self.mixing() is None:
            return terms
        mixed = self.token_terms(
            batch, student, teacher, ce_weight=self.sm_weight, kd_weight=self.tmkd_weight, mixing=self
        )
        return terms | {{"ce": "sm", "kd": "tmkd"}[name]: term for name, term in mixed.items()}
