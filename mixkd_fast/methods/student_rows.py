"""Rows that a model writes: the prompts of a batch, continued, as a batch to train on (on-policy distillation).

Legend of shape suffixes: B clean rows, L positions, P positions of the longest prompt, T generated tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mixkd_fast.data.next_tokens import (
    generated_mask,
    left_padded_prompts,
    next_token_labels,
    response_mask,
    with_answers,
)
from mixkd_fast.language_task import Sampling, vocabulary_size
from mixkd_fast.methods.base import Setting
from mixkd_fast.section import Section

if TYPE_CHECKING:
    from mixkd_fast.data.batching import Batch

Generate = Callable[..., Tensor]
"""`CausalLM.generate` of the student, `FrozenTeacher.generate` of the teacher."""
# One stream of random numbers per purpose.
BRANCH, STUDENT, TEACHER, REPLAY, TEXT = 10, 11, 12, 13, 14
NOT_PLANNED = "the writing of the student's rows: a forward per token, keys and values of all layers, longer rows"
"""For `Method.not_planned`."""
_MULTIPLE = 8  # as `Padding`


class DrawnSampling(Sampling):
    """How the rows to train on are generated."""

    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Tokens are drawn at this temperature; 0 takes the most probable token each time."""


class OnPolicy(Section):
    """Options of methods that train on rows which the student writes."""

    generation: DrawnSampling = DrawnSampling()
    """How the prompts of a batch are continued; a row also ends where it reaches task.max_length."""
    prompt_share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Plain text has no prompts: this share of a block, from its beginning, is continued in their place."""


def generator(seed: int, purpose: int, *numbers: int) -> np.random.Generator:
    """The random numbers of one purpose at one step (and row); independent of all others, alike on every rank."""
    sequence = np.random.SeedSequence(seed % 2**64, spawn_key=(purpose, *(max(0, number) for number in numbers)))
    return np.random.Generator(np.random.Philox(sequence))


class Writer(nn.Module):
    """Turns the prompts of a batch and a model into rows to train on. It has no parameters and no state."""

    def __init__(self, setting: Setting, options: OnPolicy) -> None:
        super().__init__()
        tokenizer = setting.tokenizer
        self.options, self.seed, self.max_length = options, setting.seed, setting.rows.max_length
        self.pad_id, self.eos_id = int(tokenizer.pad_token_id), tokenizer.eos_token_id
        self.num_tokens = vocabulary_size(tokenizer)

    def write(self, batch: Batch, generate: Generate, purpose: int, step: int) -> Batch:
        """The batch's prompts with a model's continuations in the place of their answers.

        The draws depend on (seed, step, first row of the micro-batch): on how the batch is cut into micro-batches, not
        on the number of ranks. Collective if the model is partitioned.
        """
        return self.joined(batch, *self.continued(batch, generate, purpose, step))

    def continued(self, batch: Batch, generate: Generate, purpose: int, step: int) -> tuple[Tensor, Tensor]:
        """Continuations of the prompts and which of their tokens count, int64 [B, T] both.

        A row counts up to its end-of-text token, and no further than where it fills max_length: not at all where its
        prompt does.
        """
        prompt_ids, prompt_mask, _ = self._prompts(batch)
        room = (self.max_length - self._prompt_lengths(batch)).clamp(min=0)
        most = max(1, min(self.options.generation.max_new_tokens, int(room.max())))
        sampling = self.options.generation.model_copy(update={"max_new_tokens": most})
        draws = generator(self.seed, purpose, step, int(batch.row_ids[0]))
        eos_ids = torch.tensor([self.eos_id], dtype=torch.int64, device=prompt_ids.device)
        seed = int(draws.integers(2**63))
        generated = generate(prompt_ids, prompt_mask, sampling, seed, eos_ids, self.pad_id, self.num_tokens)
        within = torch.arange(generated.shape[1]) < room[:, None]
        return generated, generated_mask(generated, eos_ids) * within.to(generated.device)

    def given(self, batch: Batch) -> Batch:
        """The batch with its own answers to the prompts that `write` continues.

        Of plain text the prompt is the first share of a block, which then is not learnt.
        """
        rows = slice(0, batch.num_rows)
        assert batch.prompt_lengths is not None
        if bool((batch.prompt_lengths[rows] > 0).all()):
            return batch
        lengths, ids, mask = self._prompt_lengths(batch), batch.input_ids[rows], batch.attention_mask[rows]
        labels = next_token_labels(ids, response_mask(lengths, mask), mask)
        return replace(batch, labels=labels, prompt_lengths=lengths)

    def joined(self, batch: Batch, generated: Tensor, kept: Tensor) -> Batch:
        """The prompts with these continuations, as a batch to train on: see `batch_of`."""
        prompt_ids, prompt_mask, lengths = self._prompts(batch)
        rows = with_answers(prompt_ids, prompt_mask, generated, kept, self.pad_id)
        return self.batch_of(type(batch), *rows, lengths, batch.row_ids[: batch.num_rows])

    def batch_of(
        self,
        kind: type[Batch],
        input_ids: Tensor,
        attention_mask: Tensor,
        response_mask: Tensor,
        prompt_lengths: Tensor,
        row_ids: Tensor,
    ) -> Batch:
        """A batch of these rows, padded on the right, int64 [B, L], with nothing of any other batch.

        Labels come from `next_token_labels`, and the width is rounded up, as for rows of a data set. The run sets
        `mean_targets`.
        Args: kind = `Batch`; prompt_lengths, row_ids int64 [B] on the CPU.
        """
        lengths = attention_mask.sum(1).cpu()
        longest = int(lengths.max())
        width = max(longest, min(-(-longest // _MULTIPLE) * _MULTIPLE, self.max_length))
        ids = _of_width(input_ids, width, self.pad_id)
        attention_mask = _of_width(attention_mask, width, 0)
        return kind(
            input_ids=ids,
            attention_mask=attention_mask,
            token_type_ids=None,
            labels=next_token_labels(ids, _of_width(response_mask, width, 0), attention_mask),
            soft_labels=None,
            row_ids=row_ids,
            partner=None,
            lam=None,
            num_rows=len(ids),
            num_tokens=int(lengths.sum()),
            row_lengths=lengths,
            prompt_lengths=prompt_lengths,
        )

    def _prompts(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Prompts padded on the left and their mask, int64 [B, P], and their lengths, int64 [B] on the CPU.

        One that fills max_length lacks its last token: a model has a position for one token more, which counts nothing.
        """
        lengths = self._prompt_lengths(batch).clamp(max=max(1, self.max_length - 1))
        return *left_padded_prompts(batch.input_ids[: batch.num_rows], lengths, self.pad_id), lengths

    def _prompt_lengths(self, batch: Batch) -> Tensor:
        """int64 [B] on the CPU."""
        rows = slice(0, batch.num_rows)
        assert batch.prompt_lengths is not None and batch.row_lengths is not None
        given, whole = batch.prompt_lengths[rows], batch.row_lengths[rows]
        begun = (whole * self.options.prompt_share).long().clamp(min=1)
        return torch.where(given > 0, given, begun)


def _of_width(tensor: Tensor, width: int, value: int) -> Tensor:
    """[B, L] cut or filled up on the right: [B, width]."""
    return F.pad(tensor[:, :width], (0, max(0, width - tensor.shape[1])), value=value)


def draws_student(seed: int, step: int, share: float) -> bool:
    """Whether the step trains on the student's rows: with this probability, alike for all ranks and micro-batches."""
    return bool(generator(seed, BRANCH, step).random() < share)


def writer_of(extras: Any) -> Writer:
    """The extras of a method as the `Writer` that they are."""
    assert isinstance(extras, Writer)
    return extras
