"""kd_loss for rows that fit in registers: many rows per program, each logit read once, one launch.

Tile [R, C]: R rows, C classes padded to a power of two; row values are [R, 1]. Also the head of adaptive_kl on tiles.
"""

import triton
import triton.language as tl

from mixkd_fast.ops.triton_math import (
    ADAPTIVE_KL,
    FORWARD_KL,
    MSE,
    NO_CROSS_ENTROPY,
    NO_DIVERGENCE,
    SHARED_SOFTMAX,
    class_terms,
    cross_entropy,
    exponentials,
    hard_targets,
    head_threshold,
    row_facts,
)

# What a program writes: the sums of its rows for a later reduction, its rows, or (a single program) the result.
PARTIAL_SUMS = tl.constexpr(0)
ROWS_THEMSELVES = tl.constexpr(1)
FINAL_SUMS = tl.constexpr(2)

# What "mean" divides by: nothing, a scalar in memory, or (a single program) the weights of the rows at hand.
NO_DIVISOR = tl.constexpr(0)
GIVEN_DIVISOR = tl.constexpr(1)
OWN_ROWS = tl.constexpr(2)


@triton.jit
def adaptive_shares(weights_t, mass_t, p, q):
    """Weights of KL(p || q) and KL(q || p), [R, 1] each: the distance |p - q| over head and tail, as shares.

    weights_t: exp((t - max) / tau) [R, C], 0 beyond the row; mass_t: their sum [R, 1].
    """
    half = 0.5 * mass_t
    threshold = head_threshold(weights_t, half, 1)
    bits = weights_t.to(tl.int32, bitcast=True)
    above = tl.sum(tl.where(bits > threshold, weights_t, 0.0), axis=1, keep_dims=True)
    # Ties at the threshold enter in class order for as long as the mass before them is at most one half.
    tied = (bits == threshold).to(tl.int32)
    ties_before = (tl.cumsum(tied, axis=1) - tied).to(tl.float32)
    smallest = threshold.to(tl.float32, bitcast=True)
    in_head = (bits > threshold) | ((tied != 0) & (above + ties_before * smallest <= half))
    distance = tl.abs(p - q)
    head = tl.sum(tl.where(in_head, distance, 0.0), axis=1, keep_dims=True)
    tail = tl.sum(tl.where(in_head, 0.0, distance), axis=1, keep_dims=True)
    whole = head + tail
    whole = tl.where(whole == 0.0, 1.0, whole)
    return head / whole, tail / whole


@triton.jit
def softmax_parts(x, inverse_temperature):
    """(weights [R, C], their sum, log of it, max) of exp((x - max) / tau); sums are [R, 1]."""
    high = tl.max(x, axis=1, keep_dims=True)
    weights = exponentials(x, high, inverse_temperature)
    total = tl.sum(weights, axis=1, keep_dims=True)
    return weights, total, tl.log(total), high


@triton.jit
def poison_of(total):
    """0 for a row whose softmax has the sum `total`, NaN where that is NaN or nothing."""
    return tl.where(total > 0.0, 0.0, float("nan"))


@triton.jit
def kd_loss_narrow_kernel(
    student_logits, teacher_logits, labels, partner_labels, lam, row_weights, divisor, label_logits,
    grad_logits, loss_out, kd_out, ce_out,
    num_rows, num_classes, num_shared, student_stride, teacher_stride, ignore_index,
    inverse_temperature, kd_factor, kd_grad_factor, ce_weight,
    beta, log_weight_p, log_weight_q, ab_alpha, ab_beta,
    DIVERGENCE: tl.constexpr, DETACH_MIXTURE: tl.constexpr, AB_LIMITS: tl.constexpr, CROSS_ENTROPY: tl.constexpr,
    OUTPUT: tl.constexpr, DIVISOR: tl.constexpr, NEED_GRAD: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """Loss and gradient of ROWS rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, CLASSES)[None, :]
    in_range = row < num_rows
    keep, weight = row_facts(row, in_range, labels, partner_labels, row_weights, ignore_index, num_classes)
    if DIVISOR == GIVEN_DIVISOR:
        total_weight = tl.load(divisor).to(tl.float32)
        weight = weight / tl.where(total_weight == 0.0, 1.0, total_weight)
    if DIVISOR == OWN_ROWS:
        counted = tl.where(in_range, 1.0, 0.0)
        if row_weights is not None:
            counted = tl.load(row_weights + row, mask=in_range, other=0.0).to(tl.float32)
        total_weight = tl.sum(tl.where(keep, counted, 0.0))
        weight = weight / tl.where(total_weight == 0.0, 1.0, total_weight)

    students = student_logits + row * student_stride
    # A dropped row is not read: its lanes are masked off.
    s = tl.load(students + columns, mask=keep & (columns < num_classes), other=float("-inf")).to(tl.float32)
    gradient = tl.zeros_like(s)
    kd = tl.zeros_like(weight)
    ce = tl.zeros_like(weight)
    if DIVERGENCE != NO_DIVERGENCE:
        is_shared = columns < num_shared
        teachers = teacher_logits + row * teacher_stride
        t = tl.load(teachers + columns, mask=keep & is_shared, other=float("-inf")).to(tl.float32)
        shared_s = tl.where(is_shared, s, float("-inf"))
        if DIVERGENCE == MSE:
            masked = (shared_s == float("-inf")) | (t == float("-inf"))
            count = tl.sum(tl.where(masked, 0.0, 1.0), axis=1, keep_dims=True)
            gap = tl.where(masked, 0.0, shared_s - t)
            kd_weight = weight / tl.maximum(count, 1.0)
            kd = tl.sum(gap * gap, axis=1, keep_dims=True)
            gradient = kd_grad_factor * kd_weight * 2.0 * gap
        else:
            weights_s, total_s, log_total_s, high_s = softmax_parts(shared_s, inverse_temperature)
            weights_t, total_t, log_total_t, high_t = softmax_parts(t, inverse_temperature)
            q = weights_s / total_s
            p = weights_t / total_t
            log_q = (shared_s - high_s) * inverse_temperature - log_total_s
            log_p = (t - high_t) * inverse_temperature - log_total_t
            forward_share = 0.0
            reverse_share = 0.0
            if DIVERGENCE == ADAPTIVE_KL:
                forward_share, reverse_share = adaptive_shares(weights_t, total_t, p, q)
            value, v = class_terms(
                p, q, log_p, log_q, beta, log_weight_p, log_weight_q, ab_alpha, ab_beta, forward_share, reverse_share,
                DIVERGENCE, DETACH_MIXTURE, AB_LIMITS,
            )  # fmt: skip
            kd = tl.sum(value, axis=1, keep_dims=True)
            sum_v = -1.0 if DIVERGENCE == FORWARD_KL else tl.sum(v, axis=1, keep_dims=True)
            kd_weight = weight + poison_of(total_s) + poison_of(total_t)
            gradient = kd_grad_factor * kd_weight * (v - q * sum_v)
        kd = kd * kd_weight * kd_factor
    else:
        kd = kd * weight

    if CROSS_ENTROPY != NO_CROSS_ENTROPY:
        if CROSS_ENTROPY == SHARED_SOFTMAX:
            softmax = q
            log_total = log_total_s
            high = high_s
        else:
            weights_c, total_c, log_total, high = softmax_parts(s, 1.0)
            softmax = weights_c / total_c
        ce = cross_entropy(
            row, keep, students, labels, partner_labels, lam, label_logits, num_rows, num_classes, high, log_total
        )
        target = hard_targets(row, keep, columns, labels, partner_labels, lam, num_classes)
        gradient += ce_weight * weight * (softmax - target)
        ce = ce * ce_weight
    ce = ce * weight

    if NEED_GRAD:
        # A class number out of range, or NaN, must also reach a row without terms.
        gradient = tl.where(keep, gradient + tl.where(weight == weight, 0.0, weight), 0.0)
        places = grad_logits + row * num_classes + columns
        tl.store(places, gradient.to(grad_logits.dtype.element_ty), mask=in_range & (columns < num_classes))
    kd = tl.where(keep, kd, 0.0)
    ce = tl.where(keep, ce, 0.0)
    if OUTPUT == ROWS_THEMSELVES:
        tl.store(loss_out + row, kd + ce, mask=in_range)
        tl.store(kd_out + row, kd, mask=in_range)
        tl.store(ce_out + row, ce, mask=in_range)
    else:
        kd_sum = tl.sum(kd)
        ce_sum = tl.sum(ce)
        tl.store(kd_out + tl.program_id(0), kd_sum)
        tl.store(ce_out + tl.program_id(0), ce_sum)
        if OUTPUT == FINAL_SUMS:
            tl.store(loss_out, kd_sum + ce_sum)
