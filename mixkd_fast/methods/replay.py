"""DistiLLM's adaptive off-policy schedule: how much the student writes, and what it has written.

Everything here is the same on every rank: the rows of all ranks are gathered, so that a checkpoint, which holds one
rank's copy, resumes on any number of them.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from mixkd_fast.data.next_tokens import response_mask
from mixkd_fast.methods.base import Moment, Setting
from mixkd_fast.methods.student_rows import BRANCH, REPLAY, Writer, generator

if TYPE_CHECKING:
    from mixkd_fast.data.batching import Batch

Branch = Literal["generate", "replay", "dataset"]


class WrittenRow(NamedTuple):
    """A row as the buffer keeps it, without padding."""

    tokens: Tensor
    """int32 [length], on the CPU: prompt and answer."""
    prompt_length: int
    row_id: int
    """Row of the data set that the prompt came from, for messages."""


def branch_of(r: float, phi: float, done: float, below_capacity: bool) -> Branch:
    """Where a step's rows come from.

    Args: r = the step's draw from U(0, 1); done = t / T, the share of the steps that are over; below_capacity =
    whether the buffer has room.
    """
    if r < phi * (1 - done) or (r < phi and below_capacity):
        return "generate"
    return "replay" if r < phi else "dataset"


class ReplayBuffer(nn.Module):
    """phi, the last validation loss, and the last `capacity` rows that the student wrote, of all ranks.

    All of it is checkpointed as extra state, on the CPU and in full precision: a conversion of the module to bf16 or
    fp16 does not reach it. Memory: at most capacity x max_length x 4 bytes.
    """

    def __init__(self, writer: Writer, setting: Setting, capacity: int, phi_step: float, loss_margin: float) -> None:
        super().__init__()
        self.writer, self.capacity, self.phi_step, self.loss_margin = writer, capacity, phi_step, loss_margin
        self.phi = 0.0
        self.previous_loss: float | None = None
        self.rows: deque[WrittenRow] = deque(maxlen=capacity)
        self._gather = setting.gather
        self._decided: tuple[int, Branch] | None = None

    def evaluated(self, loss: float) -> None:
        """If loss >= the loss it is compared with + loss_margin: phi <- min(phi + phi_step, 1), and it takes its place.

        The first one is what the next is compared with.
        """
        if self.previous_loss is None:
            self.previous_loss = loss
        elif loss >= self.previous_loss + self.loss_margin:
            self.phi, self.previous_loss = min(self.phi + self.phi_step, 1.0), loss

    def branch(self, moment: Moment) -> Branch:
        """Where the rows of this step come from; the same for all its micro-batches, whatever the first one pushes."""
        if self._decided is None or self._decided[0] != moment.step:
            r = generator(self.writer.seed, BRANCH, moment.step).random()
            done = moment.step / moment.total_steps
            self._decided = moment.step, branch_of(r, self.phi, done, len(self.rows) < self.capacity)
        return self._decided[1]

    def push(self, batch: Batch) -> None:
        """Keep a batch's rows, and those that the other ranks push now; the oldest go. Collective."""
        assert batch.row_lengths is not None and batch.prompt_lengths is not None
        tokens = batch.input_ids.to("cpu", torch.int32)
        numbers = zip(batch.row_lengths.tolist(), batch.prompt_lengths.tolist(), batch.row_ids.tolist(), strict=True)
        here = [
            WrittenRow(row[:length].clone(), prompt, row_id)
            for row, (length, prompt, row_id) in zip(tokens, numbers, strict=True)
        ]
        for rows in self._gather(here):
            self.rows.extend(rows)

    def replayed(self, batch: Batch, moment: Moment) -> Batch:
        """As many rows of the buffer as the batch has, drawn by (seed, step, first row of the micro-batch)."""
        draws = generator(self.writer.seed, REPLAY, moment.step, int(batch.row_ids[0]))
        count = batch.num_rows
        chosen = [self.rows[place] for place in draws.choice(len(self.rows), count, replace=count > len(self.rows))]
        tokens = [row.tokens.long() for row in chosen]
        ids = pad_sequence(tokens, batch_first=True, padding_value=self.writer.pad_id)
        mask = pad_sequence([torch.ones_like(row) for row in tokens], batch_first=True)
        prompts = torch.tensor([row.prompt_length for row in chosen])
        row_ids = torch.tensor([row.row_id for row in chosen])
        rows = self.writer.batch_of(type(batch), ids, mask, response_mask(prompts, mask), prompts, row_ids)
        return rows.to(batch.input_ids.device)

    def get_extra_state(self) -> dict[str, Any]:
        """phi, the last loss and the rows, for a checkpoint."""
        return {
            "phi": self.phi,
            "previous_loss": self.previous_loss,
            "tokens": torch.cat([row.tokens for row in self.rows]) if self.rows else torch.zeros(0, dtype=torch.int32),
            "lengths": torch.tensor([len(row.tokens) for row in self.rows], dtype=torch.int64),
            "prompt_lengths": torch.tensor([row.prompt_length for row in self.rows], dtype=torch.int64),
            "row_ids": torch.tensor([row.row_id for row in self.rows], dtype=torch.int64),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take on what `get_extra_state` gave."""
        self.phi, self.previous_loss = state["phi"], state["previous_loss"]
        parts = state["tokens"].cpu().split(state["lengths"].tolist()) if len(state["lengths"]) else []
        numbers = zip(parts, state["prompt_lengths"].tolist(), state["row_ids"].tolist(), strict=True)
        self.rows = deque((WrittenRow(*row) for row in numbers), maxlen=self.capacity)
        self._decided = None
