"""The row formulas of every divergence for Triton kernels: the second spelling of `mixkd_fast.ops.reference`.

With q = softmax(s / tau) and v_j = dD / d log q_j = q_j dD/dq_j, the gradient of tau^2 D by the logit s_j is
tau (v_j - q_j sum v); constants times q are left out of v, for they cancel. Everything here is elementwise, so a
kernel may hold rows as tiles [R, C] with row values [R, 1], or one row as [C] with scalars. fp32 throughout.
"""

import triton
import triton.language as tl

# In the order of mixkd_fast.ops.DivergenceName; NO_DIVERGENCE is a row without a teacher.
FORWARD_KL = tl.constexpr(0)
REVERSE_KL = tl.constexpr(1)
JSD = tl.constexpr(2)
SKEW_FORWARD_KL = tl.constexpr(3)
SKEW_REVERSE_KL = tl.constexpr(4)
ALPHA_BETA = tl.constexpr(5)
ADAPTIVE_KL = tl.constexpr(6)
TVD = tl.constexpr(7)
MSE = tl.constexpr(8)
NO_DIVERGENCE = tl.constexpr(9)

# How cross entropy gets its softmax: not at all, from the student's of the divergence (tau = 1), or with its own sums.
NO_CROSS_ENTROPY = tl.constexpr(0)
SHARED_SOFTMAX = tl.constexpr(1)
OWN_SOFTMAX = tl.constexpr(2)

# Bits of AB_LIMITS: which limits of alpha_beta hold. Compiled in, so that 0 * infinity never meets a logarithm. Plain
# numbers, which the interpreter can combine; kernels name them as literals.
A_IS_ZERO, B_IS_ZERO, SUM_IS_ZERO, EXCHANGED = 1, 2, 4, 8


@triton.jit
def log1p_of_unit(x):
    """log(1 + x) for x in [0, 1] by a polynomial: relative error 1.6e-7, also near 0, and no special function unit."""
    y = x * -0.00317605701 + 0.0195425265
    y = y * x - 0.0563736111
    y = y * x + 0.105436236
    y = y * x - 0.152696669
    y = y * x + 0.196632743
    y = y * x - 0.249516159
    y = y * x + 0.333297104
    y = y * x - 0.499998927
    return (y * x + 1.0) * x


@triton.jit
def expm1_over(x):
    """(e^x - 1) / x for |x| <= 1, its limit 1 at 0; relative error 1.2e-7."""
    y = x * 2.81264442e-06 + 2.54287224e-05
    y = y * x + 0.000198369889
    y = y * x + 0.00138841686
    y = y * x + 0.00833334494
    y = y * x + 0.0416667983
    y = y * x + 0.166666672
    y = y * x + 0.5
    return y * x + 1.0


@triton.jit
def exponentials(x, high, inverse_temperature):
    """exp((x - high) / tau); 0 for a masked class, also where the whole row is masked (high = -inf)."""
    base = tl.where(high == float("-inf"), 0.0, high)
    return tl.exp((x - base) * inverse_temperature)


@triton.jit
def kl_term(a, gap):
    """a gap with gap = log a - log b, and 0 where a = 0."""
    return tl.where(a == 0.0, 0.0, a * gap)


@triton.jit
def mixture(gap, log_weight_p, log_weight_q):
    """Of m = w_p p + w_q q with gap = log q - log p: log(m / p), log(m / q) and the share w_q q / m.

    By log(e^x + e^y) = max + log(1 + e^(min - max)), in differences of logarithms: m itself may underflow.
    """
    moved = log_weight_q + gap
    ratio = tl.exp(-tl.abs(moved - log_weight_p))
    rest = log1p_of_unit(ratio)
    larger_share = 1.0 / (1.0 + ratio)
    share_q = tl.where(moved > log_weight_p, larger_share, ratio * larger_share)
    over_p = tl.maximum(log_weight_p, moved) + rest
    over_q = tl.maximum(log_weight_p - gap, log_weight_q) + rest
    return over_p, over_q, share_q


@triton.jit
def slope(log_power, log_moved, x, gap, IS_LIMIT: tl.constexpr):
    """(e^log_moved - e^log_power) / x where log_moved = log_power + x gap; e^log_power gap at x = 0."""
    power = tl.exp(log_power)
    if IS_LIMIT:
        quotient = tl.where(power == 0.0, 0.0, power * gap)
    else:
        step = x * gap
        near = tl.abs(step) < 1.0
        # Rearranged near 0, where the difference would cancel: e^log_power gap (e^step - 1) / step.
        close = power * tl.where(near, gap, 0.0) * expm1_over(tl.where(near, step, 0.0))
        quotient = tl.where(near, close, (tl.exp(log_moved) - power) / x)
    return quotient


@triton.jit
def alpha_beta_terms(log_p, log_q, a, b, AB_LIMITS: tl.constexpr):
    """(value, v) of alpha_beta; see `mixkd_fast.ops.reference.alpha_beta` for the arrangement."""
    A_ZERO: tl.constexpr = (AB_LIMITS & 1) != 0
    B_ZERO: tl.constexpr = (AB_LIMITS & 2) != 0
    SUM_ZERO: tl.constexpr = (AB_LIMITS & 4) != 0
    masked = (log_p == float("-inf")) & (log_q == float("-inf"))
    log_p = tl.where(masked, 0.0, log_p)
    log_q = tl.where(masked, 0.0, log_q)
    gap = log_q - log_p
    if A_ZERO and B_ZERO:
        value = gap * gap * 0.5
        v = gap
    else:
        zeros = tl.zeros_like(log_p)
        log_pa = zeros if A_ZERO else a * log_p
        log_qb = zeros if B_ZERO else b * log_q
        log_ps = zeros if SUM_ZERO else (a + b) * log_p
        log_qs = zeros if SUM_ZERO else (a + b) * log_q
        log_mixed = log_pa + log_qb
        # v = (q^s - p^a q^b) / a: the slope from p^a q^b along a.
        v = slope(log_mixed, log_qs, a, gap, A_ZERO)
        # For |a| >= |b|: 1/a [(q^s - p^s)/s - (p^a q^b - p^s)/b]; else with both sides exchanged.
        if (AB_LIMITS & 8) != 0:
            first = slope(log_qs, log_ps, a + b, -gap, SUM_ZERO)
            value = (first - slope(log_qs, log_mixed, a, -gap, A_ZERO)) / b
        else:
            first = slope(log_ps, log_qs, a + b, gap, SUM_ZERO)
            value = (first - slope(log_ps, log_mixed, b, gap, B_ZERO)) / a
    return tl.where(masked, 0.0, value), tl.where(masked, 0.0, v)


@triton.jit
def class_terms(
    p, q, log_p, log_q, beta, log_weight_p, log_weight_q, ab_alpha, ab_beta, forward_weight, reverse_weight,
    DIVERGENCE: tl.constexpr, DETACH_MIXTURE: tl.constexpr, AB_LIMITS: tl.constexpr,
):  # fmt: skip
    """(a class's summand of D, its v). Both 0 for a class that neither side has (logarithms -inf, p = q = 0)."""
    gap = log_q - log_p
    if DIVERGENCE == FORWARD_KL:
        value = kl_term(p, -gap)
        v = -p
    elif DIVERGENCE == REVERSE_KL:
        value = kl_term(q, gap)
        v = value
    elif DIVERGENCE == JSD:
        over_p, over_q, share_q = mixture(gap, log_weight_p, log_weight_q)
        v = (1.0 - beta) * kl_term(q, -over_q)
        value = beta * kl_term(p, -over_p) + v
    elif DIVERGENCE == SKEW_FORWARD_KL:
        over_p, over_q, share_q = mixture(gap, log_weight_p, log_weight_q)
        value = kl_term(p, -over_p)
        v = kl_term(p, -share_q)
    elif DIVERGENCE == SKEW_REVERSE_KL:
        over_p, over_q, share_q = mixture(gap, log_weight_p, log_weight_q)
        value = kl_term(q, -over_q)
        v = value if DETACH_MIXTURE else value - kl_term(q, share_q)
    elif DIVERGENCE == ALPHA_BETA:
        value, v = alpha_beta_terms(log_p, log_q, ab_alpha, ab_beta, AB_LIMITS)
    elif DIVERGENCE == ADAPTIVE_KL:
        # A weight of 0 drops its side even where that is infinite.
        reverse = tl.where(reverse_weight == 0.0, 0.0, reverse_weight * kl_term(q, gap))
        value = reverse + tl.where(forward_weight == 0.0, 0.0, forward_weight * kl_term(p, -gap))
        v = reverse - forward_weight * p
    else:
        tl.static_assert(DIVERGENCE == TVD)
        value = 0.5 * tl.abs(p - q)
        v = q * tl.where(q > p, 0.5, tl.where(q < p, -0.5, 0.0))
    return value, v


@triton.jit
def head_threshold(weights, half, AXIS: tl.constexpr):
    """Bits of the smallest weight in the head of adaptive_kl: the largest w with mass of {weights >= w} > half.

    By bisection on the bits, which order like the numbers. weights: exp((t - max) / tau), in [0, 1].
    """
    bits = weights.to(tl.int32, bitcast=True)
    low = (half * 0.0).to(tl.int32)
    high = low + 0x3F800001
    for _ in range(30):
        middle = low + (high - low) // 2
        enough = tl.sum(tl.where(bits >= middle, weights, 0.0), axis=AXIS, keep_dims=True) > half
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return low


@triton.jit
def row_facts(row, in_range, labels, partner_labels, row_weights, ignore_index, num_classes):
    """(keep, weight) of rows: keep False drops the row; the weight of a row with a label out of range is NaN."""
    keep = in_range
    weight = tl.where(in_range, 1.0, 0.0)
    if row_weights is not None:
        weight = tl.load(row_weights + row, mask=in_range, other=0.0).to(tl.float32)
        keep = keep & (weight != 0.0)
    if labels is not None:
        label = tl.load(labels + row, mask=in_range, other=0)
        keep = keep & (label != ignore_index)
        weight = tl.where((label >= 0) & (label < num_classes), weight, float("nan"))
    if partner_labels is not None:
        label = tl.load(partner_labels + row, mask=in_range, other=0)
        keep = keep & (label != ignore_index)
        weight = tl.where((label >= 0) & (label < num_classes), weight, float("nan"))
    return keep, weight


@triton.jit
def hard_label(row, keep, labels, num_classes):
    """A label as an index that is safe to read at."""
    label = tl.load(labels + row, mask=keep, other=0)
    return tl.minimum(tl.maximum(label, 0), num_classes - 1)


@triton.jit
def cross_entropy(row, keep, logits, labels, partner_labels, lam, label_logits, num_rows, num_classes, high, log_sum):
    """lam CE(labels) + (1 - lam) CE(partner_labels) of rows at `logits`; a weight of 0 drops its term.

    label_logits: the logits at both labels [2, num_rows], read before others may overwrite them; or None.
    """
    if label_logits is not None:  # noqa: SIM108
        places = label_logits + row
    else:
        places = logits + hard_label(row, keep, labels, num_classes)
    loss = high - tl.load(places, mask=keep, other=0.0).to(tl.float32) + log_sum
    if partner_labels is not None:
        share = tl.load(lam + row, mask=keep, other=0.0).to(tl.float32)
        if label_logits is not None:
            others = label_logits + num_rows + row
        else:
            others = logits + hard_label(row, keep, partner_labels, num_classes)
        second = high - tl.load(others, mask=keep, other=0.0).to(tl.float32) + log_sum
        loss = tl.where(share == 0.0, 0.0, share * loss) + tl.where(share == 1.0, 0.0, (1.0 - share) * second)
    return loss


@triton.jit
def hard_targets(row, keep, columns, labels, partner_labels, lam, num_classes):
    """The mixed one-hot target of rows at classes `columns`."""
    label = hard_label(row, keep, labels, num_classes)
    target = tl.where(columns == label, 1.0, 0.0)
    if partner_labels is not None:
        share = tl.load(lam + row, mask=keep, other=0.0).to(tl.float32)
        label = hard_label(row, keep, partner_labels, num_classes)
        target = share * target + (1.0 - share) * tl.where(columns == label, 1.0, 0.0)
    return target
