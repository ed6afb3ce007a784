"""kd_loss for rows wider than registers: a row is split over programs, and its second reading hits the L2 cache.

Work item i is tile i % splits of row i // splits. Program i takes the statistics of item i, then sums D and v of item
i - lag, then writes the gradient of item i - 2 lag (forward KL, whose sum of v is -1, goes without the middle phase).
So logits are read again while lag * tile bytes, a part of the L2 cache, lie in between: once from memory. A phase
waits until every program of its row has passed the phase before; those have a smaller number or are the program
itself, and numbers are drawn when a program starts, so a waiting program never waits for one that cannot start.
All sums are taken in a fixed order: the result is deterministic.
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
    row_facts,
)

# Rows of the statistics buffer [7, num_rows, num_splits]. mse counts its classes in the place of the student's sum.
STUDENT_MAX = tl.constexpr(0)
STUDENT_SUM = tl.constexpr(1)
TEACHER_MAX = tl.constexpr(2)
TEACHER_SUM = tl.constexpr(3)
CLASS_MAX = tl.constexpr(4)
CLASS_SUM = tl.constexpr(5)
V_SUM = tl.constexpr(6)
NUM_STATISTICS = 7


@triton.jit
def load_tile(logits, columns, end, EVICTION: tl.constexpr):
    """Classes `columns` of a row in fp32, -inf from `end` on."""
    return tl.load(logits + columns, mask=columns < end, other=float("-inf"), eviction_policy=EVICTION).to(tl.float32)


@triton.jit
def store_sums(statistics, item, num_items, x, inverse_temperature, PLACE: tl.constexpr):
    """Maximum and sum of exp((x - max) / tau) of a tile."""
    high = tl.max(x, axis=0)
    tl.store(statistics + PLACE * num_items + item, high)
    total = tl.sum(exponentials(x, high, inverse_temperature), axis=0)
    tl.store(statistics + (PLACE + 1) * num_items + item, total)


@triton.jit
def load_sums(statistics, first, num_items, num_splits, inverse_temperature, PLACE: tl.constexpr, SPLITS: tl.constexpr):
    """(max, sum) of a row from those of its tiles, of which `first` is the first."""
    splits = tl.arange(0, SPLITS)
    # .cg: past the L1 cache, which does not see what other programs write.
    places = statistics + PLACE * num_items + first + splits
    mask = splits < num_splits
    highs = tl.load(places, mask=mask, other=float("-inf"), cache_modifier=".cg")
    totals = tl.load(places + num_items, mask=mask, other=0.0, cache_modifier=".cg")
    high = tl.max(highs, axis=0)
    return high, tl.sum(totals * tl.exp((highs - high) * inverse_temperature), axis=0)


@triton.jit
def load_total(values, first, num_splits, SPLITS: tl.constexpr):
    """The sum of a row's values, one per tile."""
    splits = tl.arange(0, SPLITS)
    return tl.sum(tl.load(values + first + splits, mask=splits < num_splits, other=0.0, cache_modifier=".cg"), axis=0)


@triton.jit
def announce(counter):
    """Tell that this program has written its part of a row; everything written before is visible with it."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release")


@triton.jit
def wait_for(counter, num_splits):
    """Return when all programs of a row have announced their part."""
    while tl.atomic_add(counter, 0, sem="acquire") < num_splits:
        pass
    tl.debug_barrier()


@triton.jit
def tile_terms(
    s, t, high_s, total_s, high_t, total_t, inverse_temperature,
    beta, log_weight_p, log_weight_q, ab_alpha, ab_beta, forward_share, reverse_share,
    DIVERGENCE: tl.constexpr, DETACH_MIXTURE: tl.constexpr, AB_LIMITS: tl.constexpr,
):  # fmt: skip
    """(q, summand of D, v) of a tile; not for mse."""
    q = exponentials(s, high_s, inverse_temperature) * (1.0 / total_s)
    p = exponentials(t, high_t, inverse_temperature) * (1.0 / total_t)
    log_q = (s - high_s) * inverse_temperature - tl.log(total_s)
    log_p = (t - high_t) * inverse_temperature - tl.log(total_t)
    value, v = class_terms(
        p, q, log_p, log_q, beta, log_weight_p, log_weight_q, ab_alpha, ab_beta, forward_share, reverse_share,
        DIVERGENCE, DETACH_MIXTURE, AB_LIMITS,
    )  # fmt: skip
    return q, value, v


@triton.jit
def kd_loss_wide_kernel(
    student_logits, teacher_logits, labels, partner_labels, lam, row_weights, divisor, label_logits,
    adaptive_shares, progress, statistics, grad_logits, kd_parts, ce_rows,
    num_rows, num_splits, lag, num_classes, num_shared, student_stride, teacher_stride, ignore_index,
    inverse_temperature, kd_factor, kd_grad_factor, ce_weight,
    beta, log_weight_p, log_weight_q, ab_alpha, ab_beta,
    DIVERGENCE: tl.constexpr, DETACH_MIXTURE: tl.constexpr, AB_LIMITS: tl.constexpr, CROSS_ENTROPY: tl.constexpr,
    NEED_GRAD: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One program of the pipeline. progress: int32 zeros [1 + 2 num_rows]; kd_parts [num_rows, num_splits]."""
    HAS_SUMS: tl.constexpr = (DIVERGENCE != NO_DIVERGENCE) and (DIVERGENCE != MSE)
    HAS_MIDDLE: tl.constexpr = HAS_SUMS and (DIVERGENCE != FORWARD_KL)
    num_items = tl.cast(num_rows, tl.int64) * num_splits  # an argument of 1 is a plain number here
    ticket = tl.atomic_add(progress, 1, sem="relaxed").to(tl.int64)

    if ticket < num_items:
        row = ticket // num_splits
        columns = (ticket % num_splits).to(tl.int32) * TILE + tl.arange(0, TILE)
        keep, _ = row_facts(row, row < num_rows, labels, partner_labels, row_weights, ignore_index, num_classes)
        if keep:
            # These lines are read again: keep them in the L2 cache.
            s = load_tile(student_logits + row * student_stride, columns, num_classes, "evict_last")
            shared_s = tl.where(columns < num_shared, s, float("-inf"))
            if DIVERGENCE != NO_DIVERGENCE:
                t = load_tile(teacher_logits + row * teacher_stride, columns, num_shared, "evict_last")
                if DIVERGENCE == MSE:
                    masked = (shared_s == float("-inf")) | (t == float("-inf"))
                    count = tl.sum(tl.where(masked, 0.0, 1.0), axis=0)
                    tl.store(statistics + STUDENT_SUM * num_items + ticket, count)
                else:
                    store_sums(statistics, ticket, num_items, shared_s, inverse_temperature, STUDENT_MAX)
                    store_sums(statistics, ticket, num_items, t, inverse_temperature, TEACHER_MAX)
            if CROSS_ENTROPY != NO_CROSS_ENTROPY and CROSS_ENTROPY != SHARED_SOFTMAX:
                store_sums(statistics, ticket, num_items, s, 1.0, CLASS_MAX)
            announce(progress + 1 + row)

    item = ticket - lag
    if HAS_MIDDLE:
        if (item >= 0) & (item < num_items):
            row = item // num_splits
            first = row * num_splits
            columns = (item - first).to(tl.int32) * TILE + tl.arange(0, TILE)
            keep, _ = row_facts(row, row < num_rows, labels, partner_labels, row_weights, ignore_index, num_classes)
            if keep:
                s = load_tile(student_logits + row * student_stride, columns, num_shared, "evict_last")
                t = load_tile(teacher_logits + row * teacher_stride, columns, num_shared, "evict_last")
                forward_share = 0.0
                reverse_share = 0.0
                if DIVERGENCE == ADAPTIVE_KL:
                    forward_share = tl.load(adaptive_shares + row)
                    reverse_share = tl.load(adaptive_shares + num_rows + row)
                wait_for(progress + 1 + row, num_splits)
                high_s, total_s = load_sums(
                    statistics, first, num_items, num_splits, inverse_temperature, STUDENT_MAX, SPLITS
                )
                high_t, total_t = load_sums(
                    statistics, first, num_items, num_splits, inverse_temperature, TEACHER_MAX, SPLITS
                )
                q, value, v = tile_terms(
                    s, t, high_s, total_s, high_t, total_t, inverse_temperature,
                    beta, log_weight_p, log_weight_q, ab_alpha, ab_beta, forward_share, reverse_share,
                    DIVERGENCE, DETACH_MIXTURE, AB_LIMITS,
                )  # fmt: skip
                tl.store(kd_parts + item, tl.sum(value, axis=0))
                tl.store(statistics + V_SUM * num_items + item, tl.sum(v, axis=0))
                announce(progress + 1 + num_rows + row)
        item -= lag

    if (item >= 0) & (item < num_items):
        row = item // num_splits
        first = row * num_splits
        columns = (item - first).to(tl.int32) * TILE + tl.arange(0, TILE)
        keep, weight = row_facts(row, row < num_rows, labels, partner_labels, row_weights, ignore_index, num_classes)
        if divisor is not None:
            total_weight = tl.load(divisor).to(tl.float32)
            weight = weight / tl.where(total_weight == 0.0, 1.0, total_weight)
        gradient = tl.zeros([TILE], tl.float32)
        kd = 0.0
        ce = 0.0
        if keep:
            students = student_logits + row * student_stride
            s = load_tile(students, columns, num_classes, "evict_first")
            shared_s = tl.where(columns < num_shared, s, float("-inf"))
            if DIVERGENCE != NO_DIVERGENCE:
                t = load_tile(teacher_logits + row * teacher_stride, columns, num_shared, "evict_first")
            forward_share = 0.0
            reverse_share = 0.0
            if DIVERGENCE == ADAPTIVE_KL:
                forward_share = tl.load(adaptive_shares + row)
                reverse_share = tl.load(adaptive_shares + num_rows + row)
            wait_for(progress + 1 + (num_rows if HAS_MIDDLE else 0) + row, num_splits)
            if DIVERGENCE == MSE:
                masked = (shared_s == float("-inf")) | (t == float("-inf"))
                count = load_total(statistics + STUDENT_SUM * num_items, first, num_splits, SPLITS)
                kd_weight = weight / tl.maximum(count, 1.0)
                gap = tl.where(masked, 0.0, shared_s - t)
                kd = tl.sum(gap * gap, axis=0) * kd_weight * kd_factor
                gradient = kd_grad_factor * kd_weight * 2.0 * gap
            if HAS_SUMS:
                high_s, total_s = load_sums(
                    statistics, first, num_items, num_splits, inverse_temperature, STUDENT_MAX, SPLITS
                )
                high_t, total_t = load_sums(
                    statistics, first, num_items, num_splits, inverse_temperature, TEACHER_MAX, SPLITS
                )
                q, value, v = tile_terms(
                    shared_s, t, high_s, total_s, high_t, total_t, inverse_temperature,
                    beta, log_weight_p, log_weight_q, ab_alpha, ab_beta, forward_share, reverse_share,
                    DIVERGENCE, DETACH_MIXTURE, AB_LIMITS,
                )  # fmt: skip
                kd_weight = tl.where((total_s > 0.0) & (total_t > 0.0), weight, float("nan"))
                if HAS_MIDDLE:
                    sum_v = load_total(statistics + V_SUM * num_items, first, num_splits, SPLITS)
                    kd = tl.load(kd_parts + item, cache_modifier=".cg") * kd_weight * kd_factor
                else:
                    sum_v = -1.0
                    kd = tl.sum(value, axis=0) * kd_weight * kd_factor
                gradient = kd_grad_factor * kd_weight * (v - q * sum_v)
            if DIVERGENCE == NO_DIVERGENCE:
                kd = 0.0 * weight
            if CROSS_ENTROPY != NO_CROSS_ENTROPY:
                if CROSS_ENTROPY == SHARED_SOFTMAX:
                    softmax = q
                    high = high_s
                    total = total_s
                else:
                    high, total = load_sums(statistics, first, num_items, num_splits, 1.0, CLASS_MAX, SPLITS)
                    softmax = exponentials(s, high, 1.0) * (1.0 / total)
                loss = cross_entropy(
                    row, keep, students, labels, partner_labels, lam, label_logits, num_rows, num_classes, high,
                    tl.log(total),
                )  # fmt: skip
                ce = ce_weight * weight * loss
                target = hard_targets(row, keep, columns, labels, partner_labels, lam, num_classes)
                gradient += ce_weight * weight * (softmax - target)
            else:
                ce = 0.0 * weight
            gradient += tl.where(weight == weight, 0.0, weight)
        tl.store(kd_parts + item, kd)
        if item == first:
            tl.store(ce_rows + row, ce)
        if NEED_GRAD:
            places = grad_logits + row * num_classes + columns
            stored = gradient.to(grad_logits.dtype.element_ty)
            tl.store(places, stored, mask=columns < num_classes, eviction_policy="evict_first")


@triton.jit
def adaptive_shares_kernel(
    student_logits, teacher_logits, labels, partner_labels, row_weights, adaptive_shares,
    num_rows, num_classes, num_shared, student_stride, teacher_stride, ignore_index, inverse_temperature,
    TILE: tl.constexpr,
):  # fmt: skip
    """adaptive_shares [2, num_rows]: weights of KL(p || q) and KL(q || p), see triton_kd_narrow.adaptive_shares.

    One program per row; its 30 steps of bisection read the teacher's row again each.
    """
    row = tl.program_id(0).to(tl.int64)
    keep, _ = row_facts(row, row < num_rows, labels, partner_labels, row_weights, ignore_index, num_classes)
    if keep:
        students = student_logits + row * student_stride
        teachers = teacher_logits + row * teacher_stride
        places = tl.arange(0, TILE)
        high_s = tl.full([TILE], float("-inf"), tl.float32)
        high_t = tl.full([TILE], float("-inf"), tl.float32)
        for start in range(0, num_shared, TILE):
            high_s = tl.maximum(high_s, load_tile(students, start + places, num_shared, "evict_last"))
            high_t = tl.maximum(high_t, load_tile(teachers, start + places, num_shared, "evict_last"))
        row_high_s = tl.max(high_s, axis=0)
        row_high_t = tl.max(high_t, axis=0)
        sums_s = tl.zeros([TILE], tl.float32)
        sums_t = tl.zeros([TILE], tl.float32)
        for start in range(0, num_shared, TILE):
            s = load_tile(students, start + places, num_shared, "evict_last")
            t = load_tile(teachers, start + places, num_shared, "evict_last")
            sums_s += exponentials(s, row_high_s, inverse_temperature)
            sums_t += exponentials(t, row_high_t, inverse_temperature)
        total_s = tl.sum(sums_s, axis=0)
        total_t = tl.sum(sums_t, axis=0)
        half = 0.5 * total_t

        low = 0
        high = 0x3F800001
        for _bisection in range(30):
            middle = low + (high - low) // 2
            masses = tl.zeros([TILE], tl.float32)
            for start in range(0, num_shared, TILE):
                t = load_tile(teachers, start + places, num_shared, "evict_last")
                weights = exponentials(t, row_high_t, inverse_temperature)
                masses += tl.where(weights.to(tl.int32, bitcast=True) >= middle, weights, 0.0)
            enough = tl.sum(masses, axis=0) > half
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle)
        above = tl.zeros([TILE], tl.float32)
        for start in range(0, num_shared, TILE):
            t = load_tile(teachers, start + places, num_shared, "evict_last")
            weights = exponentials(t, row_high_t, inverse_temperature)
            above += tl.where(weights.to(tl.int32, bitcast=True) > low, weights, 0.0)
        mass_above = tl.sum(above, axis=0)
        smallest = low.to(tl.float32, bitcast=True)

        ties_before = 0
        heads = tl.zeros([TILE], tl.float32)
        tails = tl.zeros([TILE], tl.float32)
        for start in range(0, num_shared, TILE):
            s = load_tile(students, start + places, num_shared, "evict_first")
            t = load_tile(teachers, start + places, num_shared, "evict_first")
            weights = exponentials(t, row_high_t, inverse_temperature)
            bits = weights.to(tl.int32, bitcast=True)
            tied = (bits == low).to(tl.int32)
            earlier = (ties_before + tl.cumsum(tied, axis=0) - tied).to(tl.float32)
            in_head = (bits > low) | ((tied != 0) & (mass_above + earlier * smallest <= half))
            p = weights * (1.0 / total_t)
            distance = tl.abs(p - exponentials(s, row_high_s, inverse_temperature) * (1.0 / total_s))
            heads += tl.where(in_head, distance, 0.0)
            tails += tl.where(in_head, 0.0, distance)
            ties_before += tl.sum(tied, axis=0)
        head = tl.sum(heads, axis=0)
        tail = tl.sum(tails, axis=0)
        whole = head + tail
        whole = tl.where(whole == 0.0, 1.0, whole)
        tl.store(adaptive_shares + row, head / whole)
        tl.store(adaptive_shares + num_rows + row, tail / whole)
