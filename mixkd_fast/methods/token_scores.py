"""How probable student and teacher find given tokens, without logits of all positions in memory.

Legend of shape suffixes: B clean rows of the micro-batch, L positions, H width, C classes both models have.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mixkd_fast.losses import linear_kd_loss

if TYPE_CHECKING:
    from mixkd_fast.causal_lm import CausalLM, Head
    from mixkd_fast.data.batching import Batch
    from mixkd_fast.frozen_teacher import FrozenTeacher

IGNORED = -100
"""Label of a position that is not scored; as in `data.next_tokens`."""


class Side(NamedTuple):
    """A model's hidden states [B, L, H] and its output layer, cut to the classes that both models have."""

    hidden: Tensor
    head: Head


@contextmanager
def both_sides(batch: Batch, student: CausalLM, teacher: FrozenTeacher) -> Iterator[tuple[Side, Side, Tensor]]:
    """Student, teacher and the labels [B, L] that both can score; the teacher's head is whole inside.

    Padded vocabularies may differ in size. As in the divergences, p and q are then distributions over the classes that
    both have; a label beyond them becomes IGNORED.
    """
    teacher_hidden = teacher.hidden(batch)
    student_hidden = student.hidden(batch)
    with teacher.gathered_head():
        ours, theirs = student.head(), teacher.head()
        classes = min(ours.weight.shape[0], theirs.weight.shape[0])
        labels = batch.labels[: batch.num_rows]
        labels = torch.where(labels < classes, labels, IGNORED)
        yield Side(student_hidden, _first(ours, classes)), Side(teacher_hidden, _first(theirs, classes)), labels


def _first(head: Head, classes: int) -> Head:
    if head.weight.shape[0] == classes:
        return head
    return head._replace(weight=head.weight[:classes], bias=None if head.bias is None else head.bias[:classes])


def token_nll(side: Side, labels: Tensor, max_logits_mib: int) -> Tensor:
    """-log softmax(z)[label] of every position, 0 where the label is IGNORED: [B, L], with the side's gradient.

    The forward keeps no logits; the backward, which alone knows what each token weighs, makes them again.
    """
    hidden, head = side
    return linear_kd_loss(
        hidden,
        head.weight,
        None,
        None,
        labels,
        student_bias=head.bias,
        student_softcap=head.softcap,
        student_scale=head.scale,
        kd_weight=0.0,
        ce_weight=1.0,
        reduction="none",
        max_logits_mib=max_logits_mib,
    )


def log_probabilities(student: Side, teacher: Side, labels: Tensor, max_logits_mib: int) -> tuple[Tensor, Tensor]:
    """log q (with gradient) and log p (without) of the labels, 0 where they are IGNORED: [B, L] each."""
    with torch.no_grad():
        log_p = -token_nll(teacher, labels, max_logits_mib)
    return -token_nll(student, labels, max_logits_mib), log_p
