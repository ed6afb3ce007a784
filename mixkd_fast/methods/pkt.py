"""Probabilistic knowledge transfer with information flow: who is near whom in a batch, layer by layer.

Passalis, Tefas: Learning Deep Representations with Probabilistic Knowledge Transfer, ECCV 2018 (arXiv 1803.10837);
Passalis, Tzelepi, Tefas: Heterogeneous Knowledge Distillation using Information Flow Modeling, CVPR 2020
(arXiv 2005.00727).
Legend of shape suffixes: B clean rows of the micro-batch, H width.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mixkd_fast.methods.base import Moment, Setting
from mixkd_fast.methods.kd import Weight
from mixkd_fast.methods.layers import LayerComparison, Layers, first_token, in_full, matched_layers, mean_of_tokens

if TYPE_CHECKING:
    from mixkd_fast.data.batching import Batch
    from mixkd_fast.models import Encoder

Kernel = Literal["cosine", "student_t"]
# Opposite vectors have a cosine kernel of 0, whose logarithm is not finite.
_SMALLEST = 1e-7


class PKT(LayerComparison):
    """MixKD's objective + pkt_weight * sum over layers l and kernels k of w_l * J(P_kl, Q_kl).

    With K_ij the kernel of rows i and j of the micro-batch, (cos + 1) / 2 or 1 / (1 + distance), P_ij = K_ij / sum_j
    K_ij from the teacher's features and Q from the student's, row i costs J_i = sum_j (P_ij - Q_ij) log(P_ij / Q_ij),
    the Jeffreys divergence. w_l = 1 for the last pair of layers, inner_weight * inner_decay^epoch (whole epochs) for
    the others. Widths may differ. The rows of a micro-batch are compared with each other: micro-batches of another
    size give other losses, and one of a single row gives 0.
    """

    name: Literal["pkt"] = "pkt"
    """Discriminator of the method section."""
    kd_weight: Weight = 0.0
    """Weight of the distance to the teacher on the clean rows."""
    pkt_weight: Annotated[float, Field(gt=0)] = 1.0
    """Weight of the divergence between the kernels of all layers."""
    inner_weight: Weight = 100.0
    """Weight of the layers before the last in the first epoch."""
    inner_decay: Annotated[float, Field(gt=0, le=1)] = 0.7
    """Factor of that weight from epoch to epoch."""
    kernels: Annotated[list[Kernel], Field(min_length=1, max_length=2)] = Field(default=["cosine", "student_t"])
    """cosine: (cos + 1) / 2; student_t: 1 / (1 + Euclidean distance). Their divergences are added."""
    layers: Layers = "skip"
    """Teacher layers of the student's layers: "skip" takes every k-th, "last" the last ones; or a list of 0-based
    teacher layers (-1 is the last) for the student's first layers, whose last entry counts as the last pair."""
    features: Literal["mean", "first"] = "mean"
    """A row's features: the mean of its tokens' states, or the state of its first token ([CLS])."""

    def check(self, setting: Setting) -> None:
        """Raises: ModelError for layers that do not exist."""
        assert setting.teacher is not None
        student, teacher = setting.student.config, setting.teacher.model.config
        matched_layers(self.layers, student.num_hidden_layers, teacher.num_hidden_layers, include_last=True)

    def terms(
        self, batch: Batch, student: Encoder, teacher: Any | None, extras: nn.Module | None, moment: Moment
    ) -> dict[str, Tensor]:
        terms, own, theirs = self.objective_and_readings(batch, student, teacher)
        pairs = matched_layers(
            self.layers, len(own.hidden_states) - 1, len(theirs.hidden_states) - 1, include_last=True
        )
        inner = self.inner_weight * self.inner_decay ** math.floor(moment.epoch)
        pool = first_token if self.features == "first" else mean_of_tokens
        total = torch.zeros(batch.num_rows, device=own.logits.device)
        for pair in pairs:
            # State 0 is the embeddings' output.
            state = in_full(pool(own.hidden_states[pair[0] + 1], own.mask))
            target = in_full(pool(theirs.hidden_states[pair[1] + 1], theirs.mask))
            total = total + (1.0 if pair == pairs[-1] else inner) * kernel_divergence(state, target, self.kernels)
        return {**terms, "pkt": self.pkt_weight * total}


def kernel_divergence(student: Tensor, teacher: Tensor, kernels: list[Kernel]) -> Tensor:
    """J_i = sum_j (P_ij - Q_ij) log(P_ij / Q_ij) of every row, added over the kernels: [B, H], [B, H_T] -> [B]."""
    total = torch.zeros(len(student), dtype=student.dtype, device=student.device)
    for kernel in kernels:
        own, target = (_similarities(rows, kernel) for rows in (student, teacher))
        total = total + ((target - own) * (target.log() - own.log())).sum(1)
    return total


def _similarities(rows: Tensor, kernel: Kernel) -> Tensor:
    """Kernel of every row with every row, each row of it divided by its sum: [B, H] -> [B, B]."""
    with torch.autocast(rows.device.type, enabled=False):
        if kernel == "cosine":
            unit = F.normalize(rows, dim=1)
            similarity = ((unit @ unit.T + 1) / 2).clamp(min=_SMALLEST)
        else:
            # Without the shortcut by products, which loses small distances; its gradient at distance 0 is 0.
            similarity = 1 / (1 + torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist"))
        return similarity / similarity.sum(1, keepdim=True)
