"""What a model's last layer computes, and how far two of them are apart: attention maps, relations, hidden states.

Relations are those of MiniLM-v2 (Wang et al. 2021, arXiv 2012.15828).
Legend of shape suffixes: O rows, L positions, H width, h heads, d width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixkd_fast.encoder_readings import Reading
from mixkd_fast.errors import ModelError
from mixkd_fast.losses import relation_kl
from mixkd_fast.methods.layers import in_full


class LastLayer(NamedTuple):
    """What the last layer computes."""

    mask: Tensor
    """[O, L]: not 0 at tokens."""
    hidden: Tensor
    """[O, L, H]"""
    query: Tensor | None = None
    """[O, h, L, d]; None, as key and value, if the attention is not compared."""
    key: Tensor | None = None
    value: Tensor | None = None

    @classmethod
    def of(cls, reading: Reading, layer: int = -1) -> LastLayer:
        """The last layer of a reading, or another that stands for it; with its projections if those were read."""
        number = layer % (len(reading.hidden_states) - 1)
        part = reading.projections.get(number)
        mask, hidden = reading.mask, reading.hidden_states[number + 1]
        return cls(mask, hidden) if part is None else cls(mask, hidden, part.query, part.key, part.value)

    def rows(self, rows: Tensor) -> LastLayer:
        """Some rows, in this order."""
        return self._mapped(lambda values: values[rows])

    def joined(self, other: LastLayer) -> LastLayer:
        """These rows, then the other's."""
        ours, theirs = (self.query, self.key, self.value), (other.query, other.key, other.value)
        attention = (None if a is None or b is None else torch.cat([a, b]) for a, b in zip(ours, theirs, strict=True))
        return LastLayer(torch.cat([self.mask, other.mask]), torch.cat([self.hidden, other.hidden]), *attention)

    def detached(self) -> LastLayer:
        """Without gradients."""
        return self._mapped(Tensor.detach)

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> LastLayer:
        attention = (None if values is None else change(values) for values in (self.query, self.key, self.value))
        return LastLayer(change(self.mask), change(self.hidden), *attention)


def last_number(model: Any) -> int:
    """The 0-based number of the last layer of an `Encoder` or a `FrozenTeacher`."""
    return int(model.model.config.num_hidden_layers) - 1


def check_relation_heads(asked: int | None, student: Any, teacher: Any) -> None:
    """Raises: ModelError where the heads asked for, else the student's own number, do not divide both widths.

    Args: student, teacher = configurations of transformers' models.
    """
    cut = asked or student.num_attention_heads
    widths = student.hidden_size, teacher.hidden_size
    if widths[0] % cut or widths[1] % cut:
        raise ModelError(
            f"method.relation_heads = {cut}: must divide the student's width {widths[0]} and the teacher's "
            f"{widths[1]}; allowed: a divisor of {math.gcd(*widths)}"
        )


def map_distance(own: LastLayer, target: LastLayer) -> Tensor:
    """KL of target's attention maps, softmax(QK^T / sqrt(d)), from own; mean over heads, sum over tokens: [O]."""
    assert own.query is not None and own.key is not None
    assert target.query is not None and target.key is not None
    return relation_kl(own.query, own.key, target.query, target.key, own.mask, target.mask)


def relation_distance(own: LastLayer, target: LastLayer, heads: int) -> Tensor:
    """The same of the relations QQ^T, KK^T and VV^T, added; both cut anew into so many heads."""
    total = torch.zeros(len(own.mask), device=own.mask.device)
    for mine, theirs in ((own.query, target.query), (own.key, target.key), (own.value, target.value)):
        assert mine is not None and theirs is not None
        mine, theirs = _cut_anew(mine, heads), _cut_anew(theirs, heads)
        total = total + relation_kl(mine, mine, theirs, theirs, own.mask, target.mask)
    return total


def hidden_distance(own: LastLayer, target: LastLayer) -> Tensor:
    """Squared difference of the hidden states, mean over width, sum over the tokens of both: [O]."""
    distance = (in_full(own.hidden) - in_full(target.hidden)).square().mean(-1)
    summed: Tensor = torch.where(own.mask.ne(0) & target.mask.ne(0), distance, 0).sum(1)
    return summed


def _cut_anew(values: Tensor, heads: int) -> Tensor:
    """[O, h, L, d] -> [O, heads, L, h * d / heads], the heads side by side and cut again."""
    cut: Tensor = values.transpose(1, 2).flatten(2).unflatten(-1, (heads, -1))
    return cut.transpose(1, 2)
