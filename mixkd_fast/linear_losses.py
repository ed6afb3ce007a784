"""`linear_kd_loss`: the distillation loss of two heads' hidden states, and its `nn.Module` face. Needs torch only.

Legend of shape suffixes: `...` the rows (any leading shape), H_S and H_T widths of hidden states, C and C_T classes, K
kept classes of a top-k teacher.
"""

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from mixkd_fast.ops import (
    DivergenceName,
    HeadInputs,
    LinearInputs,
    LinearLimits,
    LinearResults,
    Reduction,
    RowOptions,
    TopK,
    checks,
    linear_checks,
)


class LinearKDLossParts(NamedTuple):
    """A loss and what it is made of: loss = kd + ce, reduced alike; kd_rows and ce_rows are the weighted rows [...].

    `loss` alone carries a gradient. Rows that are dropped are 0.
    """

    loss: Tensor
    kd: Tensor
    ce: Tensor
    kd_rows: Tensor
    ce_rows: Tensor


@overload
def linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | TopK | None,
    teacher_weight: Tensor | None,
    labels: Tensor | None = None,
    partner_labels: Tensor | None = None,
    lam: Tensor | float | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
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
    max_logits_mib: float = 512,
    logit_free: bool = False,
    process_group: Any = None,
    backend: str = "auto",
) -> Tensor: ...
@overload
def linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | TopK | None,
    teacher_weight: Tensor | None,
    labels: Tensor | None = None,
    partner_labels: Tensor | None = None,
    lam: Tensor | float | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
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
    max_logits_mib: float = 512,
    logit_free: bool = False,
    process_group: Any = None,
    backend: str = "auto",
) -> LinearKDLossParts: ...
@overload
def linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | TopK | None,
    teacher_weight: Tensor | None,
    labels: Tensor | None = None,
    partner_labels: Tensor | None = None,
    lam: Tensor | float | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
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
    max_logits_mib: float = 512,
    logit_free: bool = False,
    process_group: Any = None,
    backend: str = "auto",
) -> Tensor | LinearKDLossParts: ...
def linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | TopK | None,
    teacher_weight: Tensor | None,
    labels: Tensor | None = None,
    partner_labels: Tensor | None = None,
    lam: Tensor | float | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
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
    max_logits_mib: float = 512,
    logit_free: bool = False,
    process_group: Any = None,
    backend: str = "auto",
) -> Tensor | LinearKDLossParts:
    """`kd_loss` of the logits of two heads, of which never more than a part is in memory.

    z_S = student_scale (student_hidden student_weight^T + student_bias), then student_softcap tanh(z_S /
    student_softcap) where there is a soft-cap; z_T alike. Of a row r, with p = softmax(z_T / tau), q = softmax(z_S /
    tau): loss_r = w_r (kd_weight tau^2 D(p_r, q_r) + ce_weight [lam_r CE(z_r, labels_r) + (1 - lam_r) CE(z_r,
    partner_labels_r)]). The heads are multiplied a chunk of rows at a time; the fused loss turns the student's chunk of
    logits into its gradient where it stands, which is multiplied on at once: loss and gradients come from the forward.
    With reduction "none" the backward does it, for only then the weights of the rows are known.

    Gradients reach student_hidden, student_weight and student_bias; what needs none is not computed (a frozen head
    costs no product). The teacher gets none and builds no autograd state. A tied embedding may be given as
    student_weight: its gradient adds to the embedding's. Rows that are dropped may hold NaN, their gradient
    is 0. On a CPU they cost neither product nor traffic. On a GPU the rows that count come first, in chunks of
    max_logits_mib: once the first is launched, the host waits to hear how many rows count, and launches no chunk behind
    the last of them. A call of one chunk does not wait, nor one that a CUDA graph captures: there all rows cost.

    Args:
        student_hidden: floating [..., H_S].
        student_weight: floating [C, H_S]. Where hidden states and weight differ in dtype, the product is taken in the
            wider one; on a GPU under autocast in autocast's. Logits, losses and weight gradients are summed in fp32
            (fp64 if an input is fp64), never rounded to half precision before a softmax.
        teacher_hidden: floating [..., H_T], or a `TopK`; None only at kd_weight 0.
        teacher_weight: floating [C_T, H_T]; None with a `TopK` or without a teacher. If C_T is not C the classes both
            have are compared and the rest is left out of both softmaxes; CE uses all C.
        student_bias, teacher_bias: floating [C], [C_T].
        student_softcap, teacher_softcap: cap > 0 of the logits, as Gemma has; None = none.
        student_scale, teacher_scale: factor of the logits before the soft-cap, not 0, as Cohere's logit_scale.
        max_logits_mib: MiB of logits (of student, teacher and gradient together) that may exist at a time, > 0. One row
            always fits. Larger chunks read the heads' weights less often.
        logit_free: the vocabulary is cut as well: at most 64 MiB (or max_logits_mib, if less) of logits and of what is
            computed from them exist, whatever C. Statistics are gathered tile by tile and the tiles computed again:
            more products, less memory. Not for adaptive_kl and a `TopK`; under torch.compile the graph breaks.
        process_group: a `torch.distributed` group whose ranks hold a part of the vocabulary each: with B = ceil(max(C,
            C_T) / ranks), rank r holds the classes r B to (r + 1) B - 1 of both heads, as far as a head has them (see
            `vocabulary_slice`). Hidden states, labels and weights of rows are the same on all ranks; labels number the
            whole vocabulary. Statistics and the gradient of the hidden states are summed over the ranks; the gradients
            of weight and bias are those of the rank's slice. Not for adaptive_kl and a `TopK`; under
            torch.compile the graph breaks.
        labels, partner_labels, lam, temperature, divergence, beta, alpha, ab_alpha, ab_beta, detach_mixture, kd_weight,
            ce_weight, row_weights, ignore_index, reduction, normalizer: as of `kd_loss`. tau^2 is applied (not for
            mse). "mean" divides by the sum of w_r of rows that are not dropped, or by `normalizer`.
        return_parts: return `LinearKDLossParts` instead of the loss.
        backend: "auto" or a name of `mixkd_fast.ops.backends`. "reference" holds whole logits whatever max_logits_mib;
            logit_free and process_group are PyTorch operations in every backend.

    Returns: a scalar, or [...] for "none"; fp32 (fp64 for fp64 input). All rows dropped: 0 with gradient 0.

    Differentiable once, backwards: a second derivative and forward mode raise, but for backend "reference".

    Raises: as `kd_loss`; ValueError also for heads that do not fit their hidden states, and limits out of range.

    Sources: `kd_loss`; online statistics, Milakov and Gimelshein 2018 (arXiv 1805.02867); losses chunk by chunk, Hsu et
    al. 2024 (arXiv 2410.10989) and Wijmans et al. 2024 (arXiv 2411.09009).
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
    )
    inputs = _inputs(
        HeadInputs(student_hidden, student_weight, student_bias, student_softcap, student_scale),
        (teacher_hidden, teacher_weight, teacher_bias, teacher_softcap, teacher_scale),
        (labels, partner_labels, lam, row_weights, normalizer),
    )
    limits = LinearLimits(max_logits_mib, logit_free, process_group)
    return _checked(inputs, options, reduction, ignore_index, limits, return_parts, backend)


def _inputs(student: HeadInputs, teacher: tuple[Any, ...], rows: tuple[Any, ...]) -> LinearInputs:
    """Raises ValueError for a teacher that is given by halves."""
    hidden, weight, bias, *_ = teacher
    if isinstance(hidden, Tensor):
        if weight is None:
            raise ValueError("teacher_weight is None; needed with teacher_hidden, unless that is a TopK")
        return LinearInputs(student, HeadInputs(*teacher), *rows)
    if weight is not None or bias is not None:
        given = "a TopK" if isinstance(hidden, TopK) else "None"
        name = "teacher_weight" if weight is not None else "teacher_bias"
        raise ValueError(f"{name} is given, but teacher_hidden is {given}; allowed: None")
    return LinearInputs(student, hidden, *rows)


def _checked(
    inputs: LinearInputs,
    options: RowOptions,
    reduction: Reduction,
    ignore_index: int,
    limits: LinearLimits,
    return_parts: bool,
    backend: str,
) -> Tensor | LinearKDLossParts:
    # Imported here, so that `python -m mixkd_fast.ops.backends` is not loaded by its own package first.
    from mixkd_fast.ops import backends

    checks.check_options(options, reduction)
    linear_checks.check_limits(limits, options.divergence)
    if inputs.normalizer is not None:
        checks.check_normalizer(inputs.normalizer, reduction)
    linear_checks.check_tensors(inputs, options, limits)
    device = inputs.student.hidden.device
    if device.type != "cpu" and not limits.in_tiles and checks.values_may_be_read(device):
        checks.kept_and_invalid_rows(linear_checks.as_logits(inputs), ignore_index, "hidden")
    double = linear_checks.compute_dtype(inputs) == torch.float64
    name = backends.resolve("linear_kd_loss", device.type, backend, double)
    if limits.in_tiles:
        results = _tiled(inputs, options, reduction, ignore_index, limits)
    else:
        results = backends.load("linear_kd_loss", name)(inputs, options, reduction, ignore_index, limits)
    return LinearKDLossParts(*results) if return_parts else results.loss


def _tiled(
    inputs: LinearInputs, options: RowOptions, reduction: Reduction, ignore_index: int, limits: LinearLimits
) -> LinearResults:
    from mixkd_fast.ops.linear_tiled import linear_kd_loss as tiled

    return tiled(inputs, options, reduction, ignore_index, limits)


# What torch.compiler.disable sets, without loading the compiler for those who do not use it.
vars(_tiled)["_torchdynamo_disable"] = True


def vocabulary_slice(num_classes: int, other_classes: int, rank: int, num_ranks: int) -> slice:
    """The rows of a head of `num_classes` that a rank holds, beside another head of `other_classes`.

    See `process_group` of `linear_kd_loss`: the same B = ceil(larger / num_ranks) classes on both sides.
    """
    size = -(-max(num_classes, other_classes) // num_ranks)
    return slice(min(num_classes, rank * size), min(num_classes, (rank + 1) * size))


class LinearKDLoss(nn.Module):
    """`linear_kd_loss` with its options fixed: see there for their meaning, ranges and errors."""

    def __init__(
        self,
        *,
        student_softcap: float | None = None,
        teacher_softcap: float | None = None,
        student_scale: float = 1.0,
        teacher_scale: float = 1.0,
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
        max_logits_mib: float = 512,
        logit_free: bool = False,
        process_group: Any = None,
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
        )
        self.limits = LinearLimits(max_logits_mib, logit_free, process_group)
        checks.check_options(self.options, reduction)
        linear_checks.check_limits(self.limits, divergence)
        self.student_head = (student_softcap, student_scale)
        self.teacher_head = (teacher_softcap, teacher_scale)
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction
        self.return_parts = return_parts
        self.backend = backend

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor | TopK | None,
        teacher_weight: Tensor | None,
        labels: Tensor | None = None,
        partner_labels: Tensor | None = None,
        lam: Tensor | float | None = None,
        *,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        row_weights: Tensor | None = None,
        normalizer: Tensor | float | None = None,
    ) -> Tensor | LinearKDLossParts:
        """`linear_kd_loss` of these tensors."""
        inputs = _inputs(
            HeadInputs(student_hidden, student_weight, student_bias, *self.student_head),
            (teacher_hidden, teacher_weight, teacher_bias, *self.teacher_head),
            (labels, partner_labels, lam, row_weights, normalizer),
        )
        return _checked(
            inputs, self.options, self.reduction, self.ignore_index, self.limits, self.return_parts, self.backend
        )

    def extra_repr(self) -> str:
        """The options that differ from their defaults."""
        given = {**self.options._asdict(), **self.limits._asdict()}
        defaults = {**RowOptions._field_defaults, **LinearLimits._field_defaults}
        changed = [f"{name}={value!r}" for name, value in given.items() if value != defaults[name]]
        return ", ".join([*changed, f"reduction={self.reduction!r}"])


__all__ = ["LinearKDLoss", "LinearKDLossParts", "linear_kd_loss", "vocabulary_slice"]
