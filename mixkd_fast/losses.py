"""Distillation losses for any PyTorch trainer: a function and its `nn.Module` face. Needs torch only.

Legend of shape suffixes: `...` the rows (any leading shape), C classes, K kept classes of a top-k teacher; O rows of
tokens, h heads, L positions, d width of a head.
"""

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from mixkd_fast.linear_losses import LinearKDLoss, LinearKDLossParts, linear_kd_loss, vocabulary_slice
from mixkd_fast.ops import DivergenceName, LossInputs, Reduction, RowOptions, TopK, checks, relation_checks


class KDLossParts(NamedTuple):
    """A loss and its two summands: loss = kd + ce. `kd` and `ce` are weighted, reduced alike and detached."""

    loss: Tensor
    kd: Tensor
    ce: Tensor


@overload
def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | TopK | None,
    labels: Tensor | None = None,
    partner_labels: Tensor | None = None,
    lam: Tensor | float | None = None,
    *,
    temperature: float = 1.0,
    divergence: DivergenceName = "forward_kl",
    beta: float = 0.5,
    alpha: float = 0.1,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    row_weights: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    normalizer: Tensor | float | None = None,
    return_parts: Literal[False] = False,
    ab_alpha: float = 0.2,
    ab_beta: float = 0.7,
    detach_mixture: bool = False,
    inplace: bool = False,
    backend: str = "auto",
) -> Tensor: ...
@overload
def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | TopK | None,
    labels: Tensor | None = None,
    partner_labels: Tensor | None = None,
    lam: Tensor | float | None = None,
    *,
    temperature: float = 1.0,
    divergence: DivergenceName = "forward_kl",
    beta: float = 0.5,
    alpha: float = 0.1,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    row_weights: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    normalizer: Tensor | float | None = None,
    return_parts: Literal[True],
    ab_alpha: float = 0.2,
    ab_beta: float = 0.7,
    detach_mixture: bool = False,
    inplace: bool = False,
    backend: str = "auto",
) -> KDLossParts: ...
@overload
def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | TopK | None,
    labels: Tensor | None = None,
    partner_labels: Tensor | None = None,
    lam: Tensor | float | None = None,
    *,
    temperature: float = 1.0,
    divergence: DivergenceName = "forward_kl",
    beta: float = 0.5,
    alpha: float = 0.1,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    row_weights: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    normalizer: Tensor | float | None = None,
    return_parts: bool,
    ab_alpha: float = 0.2,
    ab_beta: float = 0.7,
    detach_mixture: bool = False,
    inplace: bool = False,
    backend: str = "auto",
) -> Tensor | KDLossParts: ...
def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | TopK | None,
    labels: Tensor | None = None,
    partner_labels: Tensor | None = None,
    lam: Tensor | float | None = None,
    *,
    temperature: float = 1.0,
    divergence: DivergenceName = "forward_kl",
    beta: float = 0.5,
    alpha: float = 0.1,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    row_weights: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    normalizer: Tensor | float | None = None,
    return_parts: bool = False,
    ab_alpha: float = 0.2,
    ab_beta: float = 0.7,
    detach_mixture: bool = False,
    inplace: bool = False,
    backend: str = "auto",
) -> Tensor | KDLossParts:
    """Distillation loss and both hard-label terms of mixup, from one reading of the logits.

    loss_r = w_r (kd_weight tau^2 D(p_r, q_r)
                  + ce_weight [lam_r CE(s_r, labels_r) + (1 - lam_r) CE(s_r, partner_labels_r)])
    with p = softmax(z_T / tau), q = softmax(z_S / tau); tau^2 is applied (not for mse); CE is at tau = 1.
    Only student_logits receives a gradient. Arithmetic in fp32, or fp64 if student or teacher is fp64.

    Args:
        student_logits: floating [..., C].
        teacher_logits: floating [..., C_T], of any floating dtype, or a `TopK`; None only at kd_weight 0. If
            C_T is not C the classes both have are compared and the rest is left out of both softmaxes; CE
            uses all C.
        labels: integer [...], in [0, C) or ignore_index. A row labelled ignore_index is dropped whole, its KD
            term too, also at ce_weight 0: loss 0, gradient 0, not counted by "mean". Without labels no row is
            ignored.
        partner_labels: integer [...], labels of the rows mixed in; ignore_index here drops the row as well.
        lam: floating [...] or one number, weight of `labels`; belongs to `partner_labels`.
        temperature: tau > 0.
        divergence: forward_kl, reverse_kl, jsd (beta in [0, 1]), skew_forward_kl and skew_reverse_kl (alpha
            in [0, 1)), alpha_beta (ab_alpha, ab_beta), adaptive_kl, tvd, mse (of logits, mean over classes,
            not for a TopK).
        row_weights: floating [...], w_r; a row of weight 0 is dropped. Default 1.
        reduction: "mean" divides by the sum of w_r of rows that are not dropped; "sum"; "none" gives [...].
        normalizer: with "mean", replaces the divisor: the number of tokens (or rows) of the whole
            accumulated, cross-rank batch, as a number or a tensor of one element. A divisor of 0 counts as 1.
        return_parts: return `KDLossParts` instead of the loss.
        detach_mixture: skew_reverse_kl only: no gradient through the q inside the mixture (DistiLLM-2).
        inplace: lets the gradient overwrite student_logits, which nobody may read any more: half the memory. Done by
            the kernels for contiguous logits that are no leaf (of a `TopK`: on the CPU only); else, and under
            torch.compile, the gradient has memory of its own.
        backend: "auto" or a name of `mixkd_fast.ops.backends`.

    Returns: a scalar, or [...] for "none"; fp32 (fp64 for fp64 input). All rows dropped: 0 with gradient 0.

    Differentiable once, backwards: a second derivative and forward mode raise, but for backend "reference".

    A row with NaN or +inf gives NaN for that row. -inf (a masked class) is legal; if only one side masks a
    class the loss is infinite where the formula is, with an undefined gradient for reverse_kl.

    Raises: ValueError for shapes, dtypes and options out of their range; for labels (or TopK indices) outside
    [0, C) on the CPU, or anywhere with MIXKD_FAST_CHECK=1 in the environment. Otherwise, and under
    torch.compile, such a row is NaN: the device is not waited for. RuntimeError for a backend that is not
    available.

    Sources: Hinton et al. 2015; MixKD, Liang et al. 2021 (arXiv 2011.00593); else `ops/reference.py`.
    """
    options = RowOptions(
        temperature=temperature,
        divergence=divergence,
        beta=beta,
        alpha=alpha,
        kd_weight=kd_weight,
        ce_weight=ce_weight,
        ab_alpha=ab_alpha,
        ab_beta=ab_beta,
        detach_mixture=detach_mixture,
        inplace=inplace,
    )
    inputs = LossInputs(student_logits, teacher_logits, labels, partner_labels, lam, row_weights, normalizer)
    return _checked(inputs, options, reduction, ignore_index, return_parts, backend)


def _checked(
    inputs: LossInputs, options: RowOptions, reduction: Reduction, ignore_index: int, return_parts: bool, backend: str
) -> Tensor | KDLossParts:
    # Imported here, so that `python -m mixkd_fast.ops.backends` is not loaded by its own package first.
    from mixkd_fast.ops import backends

    # The cache of the options is nothing that torch.compile could trace.
    (checks.check_options if torch.compiler.is_compiling() else checks.check_options_once)(options, reduction)
    if inputs.normalizer is not None:
        checks.check_normalizer(inputs.normalizer, reduction)
    checks.check_tensors(inputs, options)
    device = inputs.student_logits.device
    if device.type != "cpu" and checks.values_may_be_read(device):
        checks.kept_and_invalid_rows(inputs, ignore_index)
    name = backends.resolve("kd_loss", device.type, backend, _needs_double(inputs))
    loss, kd, ce = backends.load("kd_loss", name)(inputs, options, reduction, ignore_index)
    return KDLossParts(loss, kd, ce) if return_parts else loss


def _needs_double(inputs: LossInputs) -> bool:
    teacher = inputs.teacher.logprobs if isinstance(inputs.teacher, TopK) else inputs.teacher
    return inputs.student_logits.dtype == torch.float64 or (teacher is not None and teacher.dtype == torch.float64)


class KDLoss(nn.Module):
    """`kd_loss` with its options fixed: see there for their meaning, ranges and errors."""

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        divergence: DivergenceName = "forward_kl",
        beta: float = 0.5,
        alpha: float = 0.1,
        kd_weight: float = 1.0,
        ce_weight: float = 0.0,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        return_parts: bool = False,
        ab_alpha: float = 0.2,
        ab_beta: float = 0.7,
        detach_mixture: bool = False,
        inplace: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.options = RowOptions(
            temperature=temperature,
            divergence=divergence,
            beta=beta,
            alpha=alpha,
            kd_weight=kd_weight,
            ce_weight=ce_weight,
            ab_alpha=ab_alpha,
            ab_beta=ab_beta,
            detach_mixture=detach_mixture,
            inplace=inplace,
        )
        checks.check_options(self.options, reduction)
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction
        self.return_parts = return_parts
        self.backend = backend

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | TopK | None,
        labels: Tensor | None = None,
        partner_labels: Tensor | None = None,
        lam: Tensor | float | None = None,
        *,
        row_weights: Tensor | None = None,
        normalizer: Tensor | float | None = None,
    ) -> Tensor | KDLossParts:
        """`kd_loss` of these tensors."""
        inputs = LossInputs(student_logits, teacher_logits, labels, partner_labels, lam, row_weights, normalizer)
        return _checked(inputs, self.options, self.reduction, self.ignore_index, self.return_parts, self.backend)

    def extra_repr(self) -> str:
        """The options that differ from their defaults."""
        defaults = RowOptions._field_defaults
        changed = [f"{name}={value!r}" for name, value in self.options._asdict().items() if value != defaults[name]]
        return ", ".join([*changed, f"reduction={self.reduction!r}"])


def relation_kl(
    student_first: Tensor,
    student_second: Tensor,
    teacher_first: Tensor,
    teacher_second: Tensor,
    student_mask: Tensor,
    teacher_mask: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Divergence of attention relations: of the teacher's attention-like distributions from the student's.

    loss_o = 1/h sum over heads a and over tokens i of KL(p_ai || q_ai)
    with p_ai = softmax over tokens j of teacher_first_ai . teacher_second_aj / sqrt(d_T) and q_ai the same of the
    student. `first` and `second` are queries and keys for attention transfer; the same tensor twice for the relations
    QQ^T, KK^T, VV^T of MiniLM-v2 (then its two gradients add up). With grad_o from above, per token i:
    dS = (q - p) grad_o / (h sqrt(d_S)), d first = dS . second, d second = dS^T . first.

    Arithmetic in fp32, or fp64 if student or teacher is fp64. Cross entropy in the place of KL differs by the entropy
    of p, which has no gradient. The kernels hold the relations of a few queries at a time, never [O, h, L, L]; the
    reference does.

    Args:
        student_first, student_second: floating [O, h, L, d_S], both of one dtype and of any strides: a transposed view
            of a linear layer's output is fine.
        teacher_first, teacher_second: floating [O, h, L, d_T], both of one dtype. No gradient, no autograd state.
        student_mask: bool, integer or floating [O, L], not 0 where there is a token.
        teacher_mask: the same of the teacher; None = student_mask.
        backend: "auto" or a name of `mixkd_fast.ops.backends`.

    Tokens that only one of the masks has are left out, as queries and as keys: both softmaxes run over the keys that
    both have. (A key of the teacher alone has q = 0: the divergence would be infinite.) What stands in padding is not
    looked at, NaN neither; a NaN in a token makes its row NaN and no other. A row without tokens is 0 with gradient 0.

    Returns: [O] in the dtype of the arithmetic, a sum over tokens and a mean over heads: the reduction is the caller's.
    0 where student and teacher agree. Differentiable once, backwards: a second derivative and forward mode raise, but
    for backend "reference".

    Raises: ValueError for shapes, dtypes and devices that do not fit together; RuntimeError for a missing backend.

    Sources: MiniLM-v2, Wang et al. 2021 (arXiv 2012.15828); CR-ILD, Ko et al. 2023 (arXiv 2302.01530).
    """
    from mixkd_fast.ops import backends

    inputs = relation_checks.checked_inputs(
        student_first, student_second, teacher_first, teacher_second, student_mask, teacher_mask
    )
    double = inputs.compute_dtype == torch.float64
    name = backends.resolve("relation_kl", student_first.device.type, backend, double)
    loss: Tensor = backends.load("relation_kl", name)(inputs)
    return loss


__all__ = [
    "KDLoss",
    "KDLossParts",
    "LinearKDLoss",
    "LinearKDLossParts",
    "TopK",
    "kd_loss",
    "linear_kd_loss",
    "relation_kl",
    "vocabulary_slice",
]
