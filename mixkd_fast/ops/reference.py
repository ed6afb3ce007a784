"""The row losses in eager PyTorch: the truth that every other backend is tested against.

p = softmax(z_T / temperature) is the teacher, q = softmax(z_S / temperature) the student; each function
states its formula. Probabilities stay logarithms for as long as possible; a class with probability 0
contributes 0, also to the gradient, wherever the limit is 0. Works in fp32, or fp64 if one input is fp64, on
any device. Where the formula is infinite (forward_kl with a class that only the student masks) the row is
infinite.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mixkd_fast.ops import DivergenceName, LossInputs, Reduction, RowOptions, TopK
from mixkd_fast.ops.checks import kept_and_invalid_rows

INFINITY = float("inf")


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) = sum a (log a - log b) over the last dimension, 0 log 0 = 0."""
    a = log_a.exp()
    gap = torch.where(a == 0, 0.0, log_a - log_b)
    return (a * gap).sum(-1)


def _log_mixture(log_a: Tensor, log_b: Tensor, weight_a: float) -> Tensor:
    """log(weight_a * a + (1 - weight_a) * b) for 0 < weight_a < 1, with a finite gradient where a = b = 0."""
    log_a, log_b = log_a + math.log(weight_a), log_b + math.log1p(-weight_a)
    empty = (log_a == -INFINITY) & (log_b == -INFINITY)
    mixture = torch.logaddexp(torch.where(empty, 0.0, log_a), log_b)
    return torch.where(empty, -INFINITY, mixture)


def forward_kl(log_p: Tensor, log_q: Tensor, options: RowOptions) -> Tensor:
    """KL(p || q) (Hinton et al. 2015)."""
    return _kl(log_p, log_q)


def reverse_kl(log_p: Tensor, log_q: Tensor, options: RowOptions) -> Tensor:
    """KL(q || p) (MiniLLM, Gu et al. 2024)."""
    return _kl(log_q, log_p)


def jsd(log_p: Tensor, log_q: Tensor, options: RowOptions) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q (GKD, Agarwal et al. 2024).

    beta = 0 is KL(p || q) and beta = 1 is KL(q || p): the limits of D / beta and D / (1 - beta).
    """
    if options.beta == 0:
        return _kl(log_p, log_q)
    if options.beta == 1:
        return _kl(log_q, log_p)
    log_m = _log_mixture(log_p, log_q, options.beta)
    return options.beta * _kl(log_p, log_m) + (1 - options.beta) * _kl(log_q, log_m)


def skew_forward_kl(log_p: Tensor, log_q: Tensor, options: RowOptions) -> Tensor:
    """KL(p || a p + (1 - a) q), a = options.alpha (DistiLLM, Ko et al. 2024)."""
    return _kl(log_p, _log_mixture(log_p, log_q, options.alpha) if options.alpha else log_q)


def skew_reverse_kl(log_p: Tensor, log_q: Tensor, options: RowOptions) -> Tensor:
    """KL(q || (1 - a) p + a q), a = options.alpha (DistiLLM).

    detach_mixture lets no gradient through the q inside the mixture (DistiLLM-2, Ko et al. 2025).
    """
    if not options.alpha:
        return _kl(log_q, log_p)
    mixed_log_q = log_q.detach() if options.detach_mixture else log_q
    return _kl(log_q, _log_mixture(mixed_log_q, log_p, options.alpha))


def alpha_beta(log_p: Tensor, log_q: Tensor, options: RowOptions) -> Tensor:
    """-1/(a b) sum [p^a q^b - a/s p^s - b/s q^s] with s = a + b (ABKD, Wang et al. 2025).

    a = ab_alpha, b = ab_beta; limits at 0 after Cichocki et al. 2011. Rearranged, for |a| >= |b|, to
    1/a sum [(q^s - p^s)/s - (p^a q^b - p^s)/b], else the same with (p, a) and (q, b) exchanged: then b = 0
    and s = 0 are plain limits of one quotient, and nothing cancels near them.
    """
    a, b = options.ab_alpha, options.ab_beta
    masked = (log_p == -INFINITY) & (log_q == -INFINITY)
    log_p, log_q = torch.where(masked, 0.0, log_p), torch.where(masked, 0.0, log_q)
    if a == 0 and b == 0:
        terms = (log_p - log_q).square() / 2
    else:
        if abs(a) < abs(b):
            log_p, log_q, a, b = log_q, log_p, b, a
        s = a + b
        log_ps = s * log_p if s != 0 else torch.zeros_like(log_p)
        log_qs = s * log_q if s != 0 else log_ps
        log_pa_qb = a * log_p + b * log_q if b != 0 else log_ps
        gap = log_q - log_p
        terms = (_slope(log_ps, log_qs, s, gap) - _slope(log_ps, log_pa_qb, b, gap)) / a
    return torch.where(masked, 0.0, terms).sum(-1)


def _slope(log_power: Tensor, log_moved: Tensor, x: float, gap: Tensor) -> Tensor:
    """(moved - power) / x where log_moved = log_power + x * gap; the limit power * gap at x = 0."""
    power = log_power.exp()
    if x == 0:
        return power * torch.where(power == 0, 0.0, gap)
    near = (x * gap).abs() < 1
    # Each branch sees only what it can bear: an infinity in the branch not taken would be NaN in backward.
    small = power * torch.expm1(torch.where(near, x * gap, 0.0))
    return torch.where(near, small, log_moved.exp() - power) / x


def adaptive_kl(log_p: Tensor, log_q: Tensor, options: RowOptions) -> Tensor:
    """(g_h KL(p || q) + g_t KL(q || p)) / (g_h + g_t), weights detached (AKL, Wu et al. 2024).

    The head is the smallest set of likeliest classes by p with mass above 0.5, ties by lower class index;
    g_h and g_t are sum |p - q| over head and tail. 0 where g_h + g_t = 0.
    """
    p, distance = log_p.exp(), (log_p.exp() - log_q.detach().exp()).abs()
    sorted_p, order = p.sort(dim=-1, descending=True, stable=True)
    mass_before = sorted_p.cumsum(-1).roll(1, -1)
    mass_before[..., 0] = 0
    sorted_distance = distance.gather(-1, order)
    head = torch.where(mass_before <= 0.5, sorted_distance, 0.0).sum(-1)
    tail = torch.where(mass_before <= 0.5, 0.0, sorted_distance).sum(-1)
    whole = head + tail
    whole = torch.where(whole == 0, 1.0, whole)
    forward = torch.where(head == 0, 0.0, _kl(log_p, log_q))
    reverse = torch.where(tail == 0, 0.0, _kl(log_q, log_p))
    return head / whole * forward + tail / whole * reverse


def tvd(log_p: Tensor, log_q: Tensor, options: RowOptions) -> Tensor:
    """Total variation distance, 1/2 sum |p - q|; a class with p = q has subgradient 0."""
    return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2


def mse(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Squared difference of logits, mean over classes that neither side masks; no temperature, no tau^2."""
    masked = (student_logits == -INFINITY) | (teacher_logits == -INFINITY)
    gap = torch.where(masked, 0.0, student_logits) - torch.where(masked, 0.0, teacher_logits)
    return gap.square().sum(-1) / (~masked).sum(-1).clamp(min=1)


DIVERGENCES: dict[DivergenceName, Callable[[Tensor, Tensor, RowOptions], Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "alpha_beta": alpha_beta,
    "adaptive_kl": adaptive_kl,
    "tvd": tvd,
}


def top_k_log_probabilities(student_logits: Tensor, teacher: TopK) -> tuple[Tensor, Tensor]:
    """(log p, log q) over the K classes of `teacher`, and a last bucket for all other classes if tail_mass.

    Args: student_logits [..., C], already divided by the temperature.
    Returns: [..., K + 1] twice; [..., K] if K = C or not tail_mass, both renormalised over the K classes.
    """
    logprobs = teacher.logprobs
    # An index out of range was reported before or makes the row NaN; the clamp keeps the reading in bounds.
    indices = teacher.indices.long().clamp(0, student_logits.shape[-1] - 1)
    if not teacher.tail_mass or indices.shape[-1] >= student_logits.shape[-1]:
        return logprobs.log_softmax(-1), student_logits.gather(-1, indices).log_softmax(-1)
    log_q = student_logits.log_softmax(-1)
    others = log_q.scatter(-1, indices, -INFINITY)
    nothing = (others == -INFINITY).all(-1, keepdim=True)
    log_q_rest = torch.where(nothing, -INFINITY, torch.where(nothing, 0.0, others).logsumexp(-1, keepdim=True))
    # 1 - sum is rounding noise below a few ulp: a floor keeps its logarithm finite unless no class is left.
    epsilon = torch.finfo(logprobs.dtype).eps
    p_rest = 1 - logprobs.exp().sum(-1, keepdim=True)
    floor = torch.where(nothing, 0.0, epsilon).to(p_rest.dtype)
    p_rest = torch.where(p_rest <= 16 * epsilon, floor, p_rest)
    return torch.cat([logprobs, p_rest.log()], -1), torch.cat([log_q.gather(-1, indices), log_q_rest], -1)


def kd_rows(student_logits: Tensor, teacher: Tensor | TopK, options: RowOptions) -> Tensor:
    """tau^2 D(p, q) of every row, [...]; classes that only one side has are left out of both softmaxes."""
    if isinstance(teacher, TopK):
        log_p, log_q = top_k_log_probabilities(student_logits / options.temperature, teacher)
    else:
        shared = min(student_logits.shape[-1], teacher.shape[-1])
        student_logits, teacher = student_logits[..., :shared], teacher[..., :shared]
        if options.divergence == "mse":
            return mse(student_logits, teacher)
        log_p = (teacher / options.temperature).log_softmax(-1)
        log_q = (student_logits / options.temperature).log_softmax(-1)
    return options.temperature**2 * DIVERGENCES[options.divergence](log_p, log_q, options)


def ce_rows(student_logits: Tensor, labels: Tensor, partner_labels: Tensor | None, lam: Tensor | None) -> Tensor:
    """lam CE(s, labels) + (1 - lam) CE(s, partner_labels) at temperature 1, [...]; weight 0 drops a term."""
    log_q = student_logits.log_softmax(-1)

    def cross_entropy(labels: Tensor) -> Tensor:
        in_range = labels.long().clamp(0, student_logits.shape[-1] - 1)
        return -log_q.gather(-1, in_range.unsqueeze(-1)).squeeze(-1)

    if partner_labels is None or lam is None:
        return cross_entropy(labels)
    first = lam * torch.where(lam == 0, 0.0, cross_entropy(labels))
    second = (1 - lam) * torch.where(lam == 1, 0.0, cross_entropy(partner_labels))
    return first + second


def row_losses(
    inputs: LossInputs, options: RowOptions, keep: Tensor | None, invalid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(kd, ce) of every row [...] before row weights; 0 with gradient 0 where not keep, NaN where invalid.

    Args: keep, invalid bool [...], None for no such row. `options.inplace` changes nothing here.
    """
    student_logits, teacher, labels, partner_labels, lam, *_ = inputs
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    teacher_values = teacher.logprobs if isinstance(teacher, TopK) else teacher
    if teacher_values is not None:
        dtype = torch.promote_types(dtype, teacher_values.dtype)
        teacher_values = teacher_values.detach().to(dtype)
    student = student_logits.to(dtype)
    if keep is not None:
        # Not only the loss of a dropped row but also what feeds it: NaN * 0 in backward would be NaN.
        student = torch.where(keep.unsqueeze(-1), student, 0.0)
        if teacher_values is not None:
            teacher_values = torch.where(keep.unsqueeze(-1), teacher_values, 0.0)

    kd = ce = student[..., :0].sum(-1)
    if options.kd_weight != 0 and teacher_values is not None:
        softened = teacher._replace(logprobs=teacher_values) if isinstance(teacher, TopK) else teacher_values
        kd = options.kd_weight * kd_rows(student, softened, options)
    if options.ce_weight != 0 and labels is not None:
        if lam is not None:
            # A number is filled in on the device: a copy from host memory would wait for it.
            lam = (
                lam.detach().to(dtype)
                if isinstance(lam, Tensor)
                else torch.full((), lam, dtype=dtype, device=kd.device)
            )
        ce = options.ce_weight * ce_rows(student, labels, partner_labels, lam)
    if invalid is not None:
        poison = torch.where(invalid, float("nan"), 1.0).to(dtype)
        kd, ce = kd * poison, ce * poison
    if keep is not None:
        kd, ce = torch.where(keep, kd, 0.0), torch.where(keep, ce, 0.0)
    return kd, ce


def kd_loss(
    inputs: LossInputs, options: RowOptions, reduction: Reduction, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`mixkd_fast.ops.KDLossBackend` in eager PyTorch."""
    keep, invalid = kept_and_invalid_rows(inputs, ignore_index)
    kd, ce = row_losses(inputs, options, keep, invalid)
    weights = None if inputs.row_weights is None else inputs.row_weights.detach().to(kd.dtype)
    if weights is not None:
        kd, ce = kd * weights, ce * weights
        if keep is not None:
            kd, ce = torch.where(keep, kd, 0.0), torch.where(keep, ce, 0.0)
    if reduction == "mean":
        divisor = divisor_of_rows(kd, weights, keep, inputs.normalizer)
        kd, ce = kd.sum() / divisor, ce.sum() / divisor
    elif reduction == "sum":
        kd, ce = kd.sum(), ce.sum()
    return kd + ce, kd.detach(), ce.detach()


def divisor_of_rows(
    rows: Tensor, weights: Tensor | None, keep: Tensor | None, normalizer: Tensor | float | None
) -> Tensor:
    """What "mean" divides by, 0 replaced by 1: then there is nothing to divide. rows, weights, keep: [...]."""
    if normalizer is not None:
        divisor = torch.as_tensor(normalizer, dtype=rows.dtype).detach().reshape(())
    elif weights is not None:
        divisor = (weights if keep is None else torch.where(keep, weights, 0.0)).sum()
    elif keep is not None:
        divisor = keep.sum().to(rows.dtype)
    else:
        divisor = torch.as_tensor(max(rows.numel(), 1), dtype=rows.dtype)
    return torch.where(divisor == 0, 1.0, divisor)
