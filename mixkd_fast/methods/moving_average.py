"""An exponential moving average of a student's weights, for methods that compare it with its own past."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from mixkd_fast.models import Encoder


class MovingAverage(nn.Module):
    """A frozen copy in evaluation mode (no dropout), moved by `follow`: w <- decay * w + (1 - decay) * w_student.

    It is fp32 whatever the student's precision: steps of 1 - decay would be lost in bf16. So the copy is no submodule,
    which a conversion would reach, and its weights are checkpointed as this module's extra state.
    """

    def __init__(self, encoder: Encoder, decay: float) -> None:
        super().__init__()
        self.decay = decay
        model = copy.deepcopy(encoder.model).float().eval().requires_grad_(False)
        self._kept = (type(encoder)(model),)

    @property
    def encoder(self) -> Encoder:
        """The copy."""
        return self._kept[0]

    @torch.no_grad()
    def follow(self, encoder: Encoder) -> None:
        """Move towards the student's weights, which must be whole on this rank."""
        for own, theirs in zip(self.encoder.parameters(), encoder.parameters(), strict=True):
            own.lerp_(theirs.float(), 1 - self.decay)

    def get_extra_state(self) -> dict[str, Tensor]:
        """The weights by name."""
        return {name: parameter.detach() for name, parameter in self.encoder.named_parameters()}

    @torch.no_grad()
    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take on what `get_extra_state` gave."""
        for name, parameter in self.encoder.named_parameters():
            parameter.copy_(state[name])


def is_partitioned(encoder: Encoder) -> bool:
    """Whether ZeRO-3 has partitioned the weights over the ranks."""
    return any(hasattr(parameter, "ds_id") for parameter in encoder.parameters())
