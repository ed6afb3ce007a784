"""Plain fine-tuning on the labels; it makes teachers, and is the baseline of every comparison."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor, nn

from mixkd_fast.methods.base import Method, Moment, supervised_loss

if TYPE_CHECKING:
    from mixkd_fast.data.batching import Batch
    from mixkd_fast.models import Encoder


class FineTune(Method):
    """L = CE(S(x), y); squared error for regression. A teacher, if given, is only compared with."""

    uses_teacher: ClassVar[bool] = False
    name: Literal["finetune"] = "finetune"
    """Discriminator of the method section."""

    def terms(
        self, batch: Batch, student: Encoder, teacher: Any | None, extras: nn.Module | None, moment: Moment
    ) -> dict[str, Tensor]:
        return {"mle": supervised_loss(student.clean(batch).logits, batch)}
