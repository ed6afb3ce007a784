"""Plain fine-tuning on the labels; it makes teachers, and is the baseline of every comparison."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor, nn

from mixkd_fast.methods.base import Kind, Method, Moment, supervised_loss
from mixkd_fast.methods.language import token_terms

if TYPE_CHECKING:
    from mixkd_fast.data.batching import Batch


class FineTune(Method):
    """L = CE(S(x), y); squared error for regression; the mean over tokens for a causal language model.

    A teacher, if given, is only compared with.
    """

    uses_teacher: ClassVar[bool] = False
    kinds: ClassVar[tuple[Kind, ...]] = ("classification", "regression", "causal_lm")
    name: Literal["finetune"] = "finetune"
    """Discriminator of the method section."""

    def terms(
        self, batch: Batch, student: Any, teacher: Any | None, extras: nn.Module | None, moment: Moment
    ) -> dict[str, Tensor]:
        if batch.labels.dim() == 2:
            return {"mle": token_terms(batch, student, None, ce_weight=1.0)["ce"]}
        return {"mle": supervised_loss(student.clean(batch).logits, batch)}
