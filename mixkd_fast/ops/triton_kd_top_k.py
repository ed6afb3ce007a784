"""kd_loss with a teacher of which only K classes are known: one program per row.

Lane k of a vector [LANES] holds kept class k; with a last bucket for all other classes, that is lane K. What the others
hold is summed without the kept classes: 1 minus a sum would cancel. A tile's kept classes are found by comparison.
"""

import triton
import triton.language as tl

from mixkd_fast.ops.triton_kd_narrow import adaptive_shares
from mixkd_fast.ops.triton_kd_wide import load_tile
from mixkd_fast.ops.triton_math import (
    ADAPTIVE_KL,
    NO_CROSS_ENTROPY,
    class_terms,
    cross_entropy,
    exponentials,
    hard_targets,
    row_facts,
)

EPSILON = tl.constexpr(1.1920929e-07)


@triton.jit
def is_kept(columns, indices):
    """Whether each of columns [TILE] is among indices [LANES]."""
    return tl.sum((columns[:, None] == indices[None, :]).to(tl.int32), axis=1) > 0


@triton.jit
def log_softmax(x):
    """log softmax of a vector of lanes; -inf stays."""
    high = tl.max(x, axis=0)
    total = tl.sum(exponentials(x, high, 1.0), axis=0)
    return (x - high) - tl.log(total)


@triton.jit
def kd_loss_top_k_kernel(
    student_logits, logprobs, indices, labels, partner_labels, lam, row_weights, divisor,
    grad_logits, kd_rows, ce_rows,
    num_rows, num_classes, num_top, student_stride, ignore_index,
    inverse_temperature, kd_factor, kd_grad_factor, ce_weight,
    beta, log_weight_p, log_weight_q, ab_alpha, ab_beta,
    DIVERGENCE: tl.constexpr, DETACH_MIXTURE: tl.constexpr, AB_LIMITS: tl.constexpr, CROSS_ENTROPY: tl.constexpr,
    HAS_TAIL: tl.constexpr, NEED_GRAD: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Loss and gradient of a row."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, LANES)
    tile = tl.arange(0, TILE)
    of_class = lanes < num_top
    students = student_logits + row * student_stride
    keep, weight = row_facts(row, row < num_rows, labels, partner_labels, row_weights, ignore_index, num_classes)
    kd = 0.0
    ce = 0.0
    kept = tl.load(indices + row * num_top + lanes, mask=of_class, other=-1)
    out_of_range = of_class & ((kept < 0) | (kept >= num_classes))
    if tl.sum(out_of_range.to(tl.int32), axis=0) > 0:
        weight = weight + float("nan")
    safe = tl.where(of_class & (~out_of_range), kept, 0)
    if divisor is not None:
        total_weight = tl.load(divisor).to(tl.float32)
        weight = weight / tl.where(total_weight == 0.0, 1.0, total_weight)
    if keep:
        s_kept = tl.load(students + safe, mask=of_class, other=float("-inf")).to(tl.float32)
        log_p = tl.load(logprobs + row * num_top + lanes, mask=of_class, other=float("-inf")).to(tl.float32)
        high = 0.0
        log_total = 0.0
        log_rest = float("-inf")
        if HAS_TAIL:
            highs = tl.full([TILE], float("-inf"), tl.float32)
            rest_highs = tl.full([TILE], float("-inf"), tl.float32)
            for start in range(0, num_classes, TILE):
                s = load_tile(students, start + tile, num_classes, "evict_last")
                highs = tl.maximum(highs, s)
                rest_highs = tl.maximum(rest_highs, tl.where(is_kept(start + tile, kept), float("-inf"), s))
            high = tl.max(highs, axis=0)
            rest_high = tl.max(rest_highs, axis=0)
            sums = tl.zeros([TILE], tl.float32)
            rest_sums = tl.zeros([TILE], tl.float32)
            for start in range(0, num_classes, TILE):
                s = load_tile(students, start + tile, num_classes, "evict_last")
                sums += exponentials(s, high, inverse_temperature)
                rest = tl.where(is_kept(start + tile, kept), float("-inf"), s)
                rest_sums += exponentials(rest, rest_high, inverse_temperature)
            log_total = tl.log(tl.sum(sums, axis=0))
            nothing = rest_high == float("-inf")
            inside = (rest_high - high) * inverse_temperature + tl.log(tl.sum(rest_sums, axis=0))
            log_rest = tl.where(nothing, float("-inf"), inside - log_total)
            p_rest = 1.0 - tl.sum(tl.exp(log_p), axis=0)
            p_rest = tl.where(p_rest <= 16.0 * EPSILON, tl.where(nothing, 0.0, EPSILON), p_rest)
            log_q = (s_kept - high) * inverse_temperature - log_total
            log_p = tl.where(lanes == num_top, tl.log(p_rest), log_p)
            log_q = tl.where(lanes == num_top, log_rest, log_q)
        else:
            log_p = log_softmax(log_p)
            log_q = log_softmax(s_kept * inverse_temperature)
        p = tl.exp(log_p)
        q = tl.exp(log_q)
        forward_share = 0.0
        reverse_share = 0.0
        if DIVERGENCE == ADAPTIVE_KL:
            one = tl.full([1, 1], 1.0, tl.float32)
            forward_tile, reverse_tile = adaptive_shares(p[None, :], one, p[None, :], q[None, :])
            forward_share = tl.sum(tl.sum(forward_tile, axis=1), axis=0)
            reverse_share = tl.sum(tl.sum(reverse_tile, axis=1), axis=0)
        value, v = class_terms(
            p, q, log_p, log_q, beta, log_weight_p, log_weight_q, ab_alpha, ab_beta, forward_share, reverse_share,
            DIVERGENCE, DETACH_MIXTURE, AB_LIMITS,
        )  # fmt: skip
        sum_v = tl.sum(v, axis=0)
        kd = tl.sum(value, axis=0) * weight * kd_factor
        rest_v = tl.sum(tl.where(lanes == num_top, v, 0.0), axis=0)

        high_c = 0.0
        total_c = 1.0
        if CROSS_ENTROPY != NO_CROSS_ENTROPY:
            highs_c = tl.full([TILE], float("-inf"), tl.float32)
            for start in range(0, num_classes, TILE):
                highs_c = tl.maximum(highs_c, load_tile(students, start + tile, num_classes, "evict_last"))
            high_c = tl.max(highs_c, axis=0)
            sums_c = tl.zeros([TILE], tl.float32)
            for start in range(0, num_classes, TILE):
                sums_c += exponentials(load_tile(students, start + tile, num_classes, "evict_last"), high_c, 1.0)
            total_c = tl.sum(sums_c, axis=0)
            loss = cross_entropy(
                row, keep, students, labels, partner_labels, lam, None, num_rows, num_classes, high_c, tl.log(total_c)
            )
            ce = ce_weight * weight * loss
        else:
            ce = 0.0 * weight

        if NEED_GRAD:
            for start in range(0, num_classes, TILE):
                columns = start + tile
                gradient = tl.zeros([TILE], tl.float32)
                s = load_tile(students, columns, num_classes, "evict_first")
                if HAS_TAIL:
                    log_q_s = (s - high) * inverse_temperature - log_total
                    # Kept classes are overwritten below; their share of the rest might be infinite.
                    share = tl.where(is_kept(columns, kept), 0.0, tl.exp(log_q_s - log_rest))
                    gradient = kd_grad_factor * weight * (rest_v * share - tl.exp(log_q_s) * sum_v)
                if CROSS_ENTROPY != NO_CROSS_ENTROPY:
                    target = hard_targets(row, keep, columns, labels, partner_labels, lam, num_classes)
                    gradient += ce_weight * weight * (exponentials(s, high_c, 1.0) / total_c - target)
                gradient += tl.where(weight == weight, 0.0, weight)
                places = grad_logits + row * num_classes + columns
                tl.store(places, gradient.to(grad_logits.dtype.element_ty), mask=columns < num_classes)
            tl.debug_barrier()
            gradient_k = kd_grad_factor * weight * (v - q * sum_v)
            if CROSS_ENTROPY != NO_CROSS_ENTROPY:
                target_k = hard_targets(row, keep, safe, labels, partner_labels, lam, num_classes)
                gradient_k += ce_weight * weight * (exponentials(s_kept, high_c, 1.0) / total_c - target_k)
            places_k = grad_logits + row * num_classes + safe
            tl.store(places_k, gradient_k.to(grad_logits.dtype.element_ty), mask=of_class & (~out_of_range))
    elif NEED_GRAD:
        for start in range(0, num_classes, TILE):
            places = grad_logits + row * num_classes + start + tile
            tl.store(places, tl.zeros([TILE], grad_logits.dtype.element_ty), mask=start + tile < num_classes)
    tl.store(kd_rows + row, kd)
    tl.store(ce_rows + row, ce)
