"""Patient knowledge distillation (Sun et al. 2019, arXiv 1908.09355): [CLS] states of inner layers are imitated too.

Legend of shape suffixes: B clean rows of the micro-batch, H width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mixkd_fast.encoder_readings import Reading
from mixkd_fast.errors import ModelError
from mixkd_fast.methods.base import Moment, Setting
from mixkd_fast.methods.kd import Temperature, Weight
from mixkd_fast.methods.layers import (
    LayerComparison,
    Layers,
    first_token,
    in_full,
    matched_layers,
    new_projection,
)

if TYPE_CHECKING:
    from mixkd_fast.data.batching import Batch
    from mixkd_fast.models import Encoder


class PKD(LayerComparison):
    """MixKD's objective + pkd_weight * mean over pairs (s, t) and width of (P h_s / |P h_s| - h_t / |h_t|)^2.

    h are the states of the first token ([CLS]) of the clean rows after student layer s and teacher layer t, P the
    identity or a trained projection. The released code takes the mean over layers and width, which the weights of the
    paper's grid (10, 100, 500, 1000) go with; the paper writes sums. The paper's alpha is kd_weight, and mle_weight
    is 1 - alpha.
    """

    name: Literal["pkd"] = "pkd"
    """Discriminator of the method section."""
    mle_weight: Weight = 0.5
    """Weight of the supervised loss: 1 - alpha of the paper."""
    kd_weight: Weight = 0.5
    """Weight of the distance to the teacher on the clean rows: alpha of the paper (0.2, 0.5 or 0.7)."""
    temperature: Temperature = 10.0
    """tau of the softened distributions (5, 10 or 20 in the paper); the term is multiplied by tau^2."""
    pkd_weight: Annotated[float, Field(gt=0)] = 100.0
    """beta: weight of the distance between the layers."""
    layers: Layers = "skip"
    """Teacher layers of the student's layers but the last: "skip" takes every k-th, "last" the last ones; or a list of
    0-based teacher layers (-1 is the last) for the student's first layers, which may reach its last one."""
    layer_reduction: Literal["mean", "sum"] = "mean"
    """Mean over the pairs of layers, as the released code does, or their sum, as the paper writes."""
    projection: Literal["none", "linear"] = "none"
    """linear: a trained map without bias per pair of layers, from the student's width to the teacher's."""

    def build(self, setting: Setting) -> nn.Module | None:
        """Raises: ModelError for layers that do not exist, and for widths that differ without a projection."""
        assert setting.teacher is not None
        student, teacher = setting.student.config, setting.teacher.model.config
        pairs = matched_layers(self.layers, student.num_hidden_layers, teacher.num_hidden_layers, include_last=False)
        widths = student.hidden_size, teacher.hidden_size
        if self.projection == "none":
            if widths[0] != widths[1]:
                raise ModelError(
                    f'method.projection = "none": the student is {widths[0]} wide and the teacher {widths[1]}, and '
                    'their states cannot be compared; allowed: "linear", or a student of the same width'
                )
            return None
        generator = torch.Generator().manual_seed(setting.seed)
        return nn.ModuleList([new_projection(*widths, generator) for _ in pairs]).to(setting.device)

    def terms(
        self, batch: Batch, student: Encoder, teacher: Any | None, extras: nn.Module | None, moment: Moment
    ) -> dict[str, Tensor]:
        terms, own, theirs = self.objective_and_readings(batch, student, teacher)
        return {**terms, "pkd": self.pkd_weight * self._patience(own, theirs, extras)}

    def _patience(self, own: Reading, theirs: Reading, extras: nn.Module | None) -> Tensor:
        """[B]"""
        counts = len(own.hidden_states) - 1, len(theirs.hidden_states) - 1
        distances = []
        for pair, (student_layer, teacher_layer) in enumerate(matched_layers(self.layers, *counts, include_last=False)):
            # State 0 is the embeddings' output.
            state = first_token(own.hidden_states[student_layer + 1], own.mask)
            target = first_token(theirs.hidden_states[teacher_layer + 1], theirs.mask)
            if isinstance(extras, nn.ModuleList):
                state = extras[pair](state)
            state, target = (F.normalize(in_full(vectors), dim=-1) for vectors in (state, target))
            distances.append((state - target).square().mean(-1))
        stacked = torch.stack(distances)
        return stacked.mean(0) if self.layer_reduction == "mean" else stacked.sum(0)
