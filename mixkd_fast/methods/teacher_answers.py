"""The teacher's answers to every prompt of the training rows, written once.

Legend of shape suffixes: N training rows, B clean rows, W most tokens of an answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from mixkd_fast.methods.base import Setting
from mixkd_fast.methods.student_rows import TEACHER, Generate, Writer

if TYPE_CHECKING:
    from mixkd_fast.data.batching import Batch

_NONE = -1


class TeacherAnswers(nn.Module):
    """Answers in row order, the same on every rank; checkpointed as extra state, so that a resumed run has them.

    Memory: 4 bytes per token of all answers; while they are written, 4 bytes x N x generation.max_new_tokens.
    """

    def __init__(self, writer: Writer, setting: Setting) -> None:
        super().__init__()
        self.writer = writer
        self._collect = setting.collect
        self.tokens: Tensor | None = None
        """int32 [tokens of all answers], on the CPU; None until they are written."""
        self.offsets: Tensor | None = None
        """int64 [N + 1]"""

    def write(self, generate: Generate) -> None:
        """Have all answers written, every rank its share, unless they are there. Collective."""
        if self.tokens is not None:
            return
        width = self.writer.options.generation.max_new_tokens

        def answers(batch: Batch) -> Tensor:
            """[B, W]"""
            generated, kept = self.writer.continued(batch, generate, TEACHER, 0)
            filled = torch.full((batch.num_rows, width), _NONE, device=generated.device)
            filled[:, : generated.shape[1]] = generated.where(kept != 0, _NONE)
            return filled

        # As float32, which holds every number of a vocabulary exactly.
        answers_NW = self._collect(answers)
        kept_NW = answers_NW >= 0
        self.tokens = torch.from_numpy(answers_NW[kept_NW].astype(np.int32))
        self.offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(kept_NW.sum(1))]).astype(np.int64))

    def answered(self, batch: Batch) -> Batch:
        """The batch's prompts with the teacher's answers."""
        assert self.tokens is not None and self.offsets is not None
        numbers = batch.row_ids[: batch.num_rows]
        bounds = zip(self.offsets[numbers].tolist(), self.offsets[numbers + 1].tolist(), strict=True)
        return self.joined(batch, [self.tokens[start:end].long() for start, end in bounds])

    def joined(self, batch: Batch, answers: list[Tensor]) -> Batch:
        """The batch's prompts with these answers, int64 [tokens] each, on the CPU."""
        device = batch.input_ids.device
        kept = pad_sequence([torch.ones_like(answer) for answer in answers], batch_first=True)
        generated = pad_sequence(answers, batch_first=True, padding_value=self.writer.pad_id)
        return self.writer.joined(batch, generated.to(device), kept.to(device))

    def get_extra_state(self) -> dict[str, Any]:
        """The answers, for a checkpoint."""
        return {"tokens": self.tokens, "offsets": self.offsets}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take on what `get_extra_state` gave."""
        self.tokens, self.offsets = (
            None if tensor is None else tensor.cpu() for tensor in (state["tokens"], state["offsets"])
        )
