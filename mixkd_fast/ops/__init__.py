"""What every backend of an op agrees on: the options, the teacher as top-k, the signatures.

Legend of shape suffixes: `...` any leading row shape, C classes, K kept classes of a top-k teacher.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

DivergenceName = Literal[
    "forward_kl",
    "reverse_kl",
    "jsd",
    "skew_forward_kl",
    "skew_reverse_kl",
    "alpha_beta",
    "adaptive_kl",
    "tvd",
    "mse",
]

Reduction = Literal["mean", "sum", "none"]


class TopK(NamedTuple):
    """A teacher of which only the K likeliest classes are known.

    Args:
        indices: integer [..., K], distinct classes of a row, each in [0, student classes).
        logprobs: floating [..., K], log softmax(z_T / temperature) over the teacher's *whole* vocabulary at
            those classes, at the temperature the loss is called with: the softmax at another temperature
            cannot be recovered from K values.
        tail_mass: True compares K + 1 buckets, the last one holding the rest of the mass on both sides. False
            renormalises both sides over the K classes.
    """

    indices: Tensor
    logprobs: Tensor
    tail_mass: bool = True

    @classmethod
    def from_logits(cls, teacher_logits: Tensor, k: int, *, temperature: float = 1.0, tail_mass: bool = True) -> "TopK":
        """The k likeliest classes of teacher_logits [..., C] at `temperature`, logprobs in fp32 or fp64."""
        logits = teacher_logits.detach()
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logprobs, indices = (logits / temperature).log_softmax(-1).topk(k, dim=-1)
        return cls(indices, logprobs, tail_mass)


class RowOptions(NamedTuple):
    """The options that change a row's loss; meanings and ranges as in `mixkd_fast.losses.kd_loss`."""

    temperature: float = 1.0
    divergence: DivergenceName = "forward_kl"
    beta: float = 0.5
    alpha: float = 0.1
    kd_weight: float = 1.0
    ce_weight: float = 0.0
    ab_alpha: float = 0.2
    ab_beta: float = 0.7
    detach_mixture: bool = False
    inplace: bool = False


class LossInputs(NamedTuple):
    """Checked tensors of one call, as `mixkd_fast.losses.kd_loss` got them. Only `student_logits` receives a gradient.

    student_logits [..., C]; teacher None only at kd_weight 0; labels, partner_labels integer [...], both or
    labels alone or none; lam [...] or one number, with partner_labels; row_weights [...]; normalizer of one element.
    """

    student_logits: Tensor
    teacher: Tensor | TopK | None
    labels: Tensor | None = None
    partner_labels: Tensor | None = None
    lam: Tensor | float | None = None
    row_weights: Tensor | None = None
    normalizer: Tensor | float | None = None


KDLossBackend = Callable[[LossInputs, RowOptions, Reduction, int], tuple[Tensor, Tensor, Tensor]]
"""A backend of kd_loss: (inputs, options, reduction, ignore_index) -> (loss, kd, ce), loss = kd + ce, the parts
detached; [] for "mean" and "sum", [...] for "none"; fp32, or fp64 if student or teacher is. A dropped row is 0 with
gradient 0."""


class HeadInputs(NamedTuple):
    """One side of `mixkd_fast.losses.linear_kd_loss`: z = scale (hidden weight^T + bias), then the soft-cap.

    hidden [..., H]; weight [C, H]; bias [C]; softcap: cap tanh(z / cap).
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0


class LinearInputs(NamedTuple):
    """Checked tensors of one call of `mixkd_fast.losses.linear_kd_loss`; from labels on as `LossInputs`.

    Only the student's hidden states, weight and bias receive gradients; teacher None only at kd_weight 0.
    """

    student: HeadInputs
    teacher: HeadInputs | TopK | None
    labels: Tensor | None = None
    partner_labels: Tensor | None = None
    lam: Tensor | float | None = None
    row_weights: Tensor | None = None
    normalizer: Tensor | float | None = None


class LinearLimits(NamedTuple):
    """Where the logits of a call may be; meanings as in `mixkd_fast.losses.linear_kd_loss`."""

    max_logits_mib: float = 512
    logit_free: bool = False
    process_group: Any = None

    @property
    def in_tiles(self) -> bool:
        """Whether statistics of a row are put together from parts of the vocabulary."""
        return self.logit_free or self.process_group is not None


class LinearResults(NamedTuple):
    """What a backend of linear_kd_loss returns: loss = kd + ce, reduced; the weighted rows [...] of both.

    `loss` alone carries the gradient. fp32, or fp64 if an input is. A dropped row is 0 with gradient 0.
    """

    loss: Tensor
    kd: Tensor
    ce: Tensor
    kd_rows: Tensor
    ce_rows: Tensor


LinearKDLossBackend = Callable[[LinearInputs, RowOptions, Reduction, int, LinearLimits], LinearResults]
"""A backend of linear_kd_loss: (inputs, options, reduction, ignore_index, limits) -> results."""


class MixInputs(NamedTuple):
    """Checked arguments of one call of `mixkd_fast.mix.mix_embeddings`, in the order of the op's schema.

    input_ids int64 [R, L]; weight [V, H]; partner int64 [M]; lam [M] in the compute dtype; padding_mask bool [R, L];
    position_weight [P, H]; token_type_ids int64 [R, L] with token_type_weight [T, H]; position_ids int64 [O, L], or
    None for 0 to L - 1; LayerNorm's weight and bias [H]; num_rows B: mixed row m has clean row m % B as its first. All
    contiguous; the output has O = M rows, or B + M with include_clean.
    """

    input_ids: Tensor
    weight: Tensor
    partner: Tensor
    lam: Tensor
    padding_mask: Tensor | None
    position_weight: Tensor | None
    token_type_ids: Tensor | None
    token_type_weight: Tensor | None
    position_ids: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    norm_eps: float
    use_norm: bool
    num_rows: int
    include_clean: bool


class RelationInputs(NamedTuple):
    """Checked arguments of one call of `mixkd_fast.losses.relation_kl`. Only the student's tensors receive gradients.

    student_first and student_second [O, h, L, d_S], teacher_first and teacher_second [O, h, L, d_T], of any strides,
    each pair of one dtype; keep bool [O, L]: the tokens of both masks.
    """

    student_first: Tensor
    student_second: Tensor
    teacher_first: Tensor
    teacher_second: Tensor
    keep: Tensor

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of the arithmetic and the loss: fp64 if student or teacher is, else fp32."""
        double = torch.float64 in (self.student_first.dtype, self.teacher_first.dtype)
        return torch.float64 if double else torch.float32
