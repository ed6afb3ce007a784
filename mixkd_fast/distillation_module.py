"""What the engine trains: the student, a method's own modules, and the loss, as one module."""

from typing import Any

import torch
from torch import Tensor, nn

from mixkd_fast.causal_lm import CausalLM
from mixkd_fast.data.batching import Batch
from mixkd_fast.methods import Method, Moment
from mixkd_fast.models import Encoder


class DistillationModule(nn.Module):
    """Student, the method's own modules, and the loss: one forward per micro-batch, as ZeRO-3's hooks want it.

    autocast: compute in bf16 what is safe, with fp32 weights; for bf16 without ZeRO, where DeepSpeed's own wrapper
    keeps two copies of the weights and gathers their gradients parameter by parameter.
    """

    autocast = False

    def __init__(
        self, student: Encoder | CausalLM, teacher: Any | None, extras: nn.Module | None, method: Method
    ) -> None:
        super().__init__()
        # Which of both faces it is, the method knows.
        self.student: Any = student
        self.extras = extras
        self.method = method
        self._frozen = (teacher,)  # in a tuple: no submodule, so no parameters of this module

    @property
    def students(self) -> list[Encoder]:
        """The student, and those that the method trains beside it."""
        return [self.student, *self.method.more_students(self.extras)]

    def forward(self, batch: Batch, moment: Moment | None, student: int = 0) -> tuple[Tensor, list[str]]:
        """Loss terms stacked [terms, B] fp32 and their names; without a moment the logits [B, C] of an evaluation
        (of a causal language model the answers [B, 3]).

        Args: student = which of the students is evaluated.
        """
        with torch.autocast(batch.input_ids.device.type, torch.bfloat16, enabled=self.autocast):
            return self._forward(batch, moment, student)

    def _forward(self, batch: Batch, moment: Moment | None, student: int) -> tuple[Tensor, list[str]]:
        if moment is None:
            model: Any = self.students[student]
            answers = model.answers(batch) if isinstance(model, CausalLM) else model.clean(batch).logits
            return answers.float(), []
        terms = self.method.terms(batch, self.student, self._frozen[0], self.extras, moment)
        return torch.stack([term.float() for term in terms.values()]), list(terms)
