"""The Triton kernels of relation_kl: statistics of both softmaxes by query, gradients by recomputing the scores.

Definition: `mixkd_fast.ops.relation_reference`. A program has BLOCK tokens of one row and head and meets the others
BLOCK at a time: [BLOCK, BLOCK] of the relations exists per program. Widths are read in pieces of CHUNK.
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-8e37)
"""Below every score, and finite also after a score is taken from it."""


@triton.jit
def piece(data, tokens, is_token, columns, width, stride_l, stride_d):
    """[tokens, columns] of one row and head in fp32; 0 where there is no token, whatever stands there."""
    places = tokens.to(tl.int64) * stride_l + columns.to(tl.int64) * stride_d
    return tl.load(data + places, mask=is_token & (columns < width), other=0.0).to(tl.float32)


@triton.jit
def products(
    first, second, queries, is_query, keys, is_key, width, first_l, first_d, second_l, second_d,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """first . second in fp32, [queries, keys]. PRECISION "tf32" is for bf16 and fp16: it holds them exactly."""
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    columns = tl.arange(0, CHUNK)
    for start in range(0, width, CHUNK):
        here = start + columns
        of_first = piece(first, queries[:, None], is_query[:, None], here[None, :], width, first_l, first_d)
        of_second = piece(second, keys[None, :], is_key[None, :], here[:, None], width, second_l, second_d)
        total = tl.dot(of_first, of_second, total, input_precision=PRECISION)
    return total


@triton.jit
def kept(keep, row, tokens, length):
    """Which of these positions hold tokens."""
    return tl.load(keep + row * length + tokens, mask=tokens < length, other=0) != 0


@triton.jit
def statistics_kernel(
    student_first, student_second, teacher_first, teacher_second, keep, values, statistics,
    sf_o, sf_h, sf_l, sf_d, ss_o, ss_h, ss_l, ss_d, tf_o, tf_h, tf_l, tf_d, ts_o, ts_h, ts_l, ts_d,
    num_queries, num_heads, length, num_blocks, student_width, teacher_width, student_scale, teacher_scale,
    STUDENT_PRECISION: tl.constexpr, TEACHER_PRECISION: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """values [O h L]: KL of each query; statistics [4, O h L]: maximum and 1 / sum of the student, of the teacher.

    One pass over the keys: with x a score minus its maximum so far, the sums of e^x and of e^xT (xT - xS) are moved to
    the new maxima where those grow.
    """
    program = tl.program_id(0).to(tl.int64)
    pair = program // num_blocks
    row, head = pair // num_heads, pair % num_heads
    queries = (program % num_blocks).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    is_query = kept(keep, row, queries, length)
    student_most = tl.full([BLOCK], LOWEST, tl.float32)
    teacher_most = tl.full([BLOCK], LOWEST, tl.float32)
    student_sum = tl.zeros([BLOCK], tl.float32)
    teacher_sum = tl.zeros([BLOCK], tl.float32)
    difference = tl.zeros([BLOCK], tl.float32)
    for start in range(0, length, BLOCK):
        keys = start + tl.arange(0, BLOCK)
        is_key = kept(keep, row, keys, length)
        if tl.max(is_key.to(tl.int32), axis=0) > 0:
            of_student = products(
                student_first + row * sf_o + head * sf_h, student_second + row * ss_o + head * ss_h, queries, is_query,
                keys, is_key, student_width, sf_l, sf_d, ss_l, ss_d, STUDENT_PRECISION, BLOCK, CHUNK,
            ) * student_scale  # fmt: skip
            of_teacher = products(
                teacher_first + row * tf_o + head * tf_h, teacher_second + row * ts_o + head * ts_h, queries, is_query,
                keys, is_key, teacher_width, tf_l, tf_d, ts_l, ts_d, TEACHER_PRECISION, BLOCK, CHUNK,
            ) * teacher_scale  # fmt: skip
            of_student = tl.where(is_key[None, :], of_student, LOWEST)
            of_teacher = tl.where(is_key[None, :], of_teacher, LOWEST)
            new_student = tl.maximum(student_most, tl.max(of_student, axis=1))
            new_teacher = tl.maximum(teacher_most, tl.max(of_teacher, axis=1))
            student_move = student_most - new_student
            teacher_move = teacher_most - new_teacher
            difference = tl.exp(teacher_move) * (difference + teacher_sum * (teacher_move - student_move))
            student_x = of_student - new_student[:, None]
            teacher_x = of_teacher - new_teacher[:, None]
            p = tl.where(is_key[None, :], tl.exp(teacher_x), 0.0)
            q = tl.where(is_key[None, :], tl.exp(student_x), 0.0)
            difference += tl.sum(p * (teacher_x - student_x), axis=1)
            student_sum = student_sum * tl.exp(student_move) + tl.sum(q, axis=1)
            teacher_sum = teacher_sum * tl.exp(teacher_move) + tl.sum(p, axis=1)
            student_most = new_student
            teacher_most = new_teacher
    # A query without keys is none either: there is no row of tokens without tokens.
    student_sum = tl.where(is_query, student_sum, 1.0)
    teacher_sum = tl.where(is_query, teacher_sum, 1.0)
    value = difference / teacher_sum + tl.log(student_sum / teacher_sum)
    places = pair * length + queries
    inside = queries < length
    tl.store(values + places, tl.where(is_query, value, 0.0), mask=inside)
    tl.store(statistics + places, student_most, mask=inside)
    tl.store(statistics + num_queries + places, 1.0 / student_sum, mask=inside)
    tl.store(statistics + 2 * num_queries + places, teacher_most, mask=inside)
    tl.store(statistics + 3 * num_queries + places, 1.0 / teacher_sum, mask=inside)


@triton.jit
def gradient_kernel(
    student_first, student_second, teacher_first, teacher_second, keep, statistics, grad_output, gradient,
    sf_o, sf_h, sf_l, sf_d, ss_o, ss_h, ss_l, ss_d, tf_o, tf_h, tf_l, tf_d, ts_o, ts_h, ts_l, ts_d,
    num_queries, num_heads, length, num_blocks, student_width, teacher_width, student_scale, teacher_scale, factor,
    OF_FIRST: tl.constexpr, PRECISION: tl.constexpr, STUDENT_PRECISION: tl.constexpr, TEACHER_PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """CHUNK columns of a gradient [O, L, h, d] for BLOCK tokens, times grad_output and `factor`.

    OF_FIRST: (q - p) . second, over blocks of keys; else (q - p)^T . first, over blocks of queries. The scores are made
    exactly as in the forward, queries by keys: one rounded otherwise would not fit the maximum that was kept.
    PRECISION of the last product: never plain TF32, which would cut q - p.
    """
    program = tl.program_id(0).to(tl.int64)
    pair = program // num_blocks
    row, head = pair // num_heads, pair % num_heads
    mine = (program % num_blocks).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    is_mine = kept(keep, row, mine, length)
    columns = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    total = tl.zeros([BLOCK, CHUNK], tl.float32)
    for start in range(0, length, BLOCK):
        others = start + tl.arange(0, BLOCK)
        is_other = kept(keep, row, others, length)
        if tl.max(is_other.to(tl.int32), axis=0) > 0:
            if OF_FIRST:
                queries, is_query, keys, is_key = mine, is_mine, others, is_other
            else:
                queries, is_query, keys, is_key = others, is_other, mine, is_mine
            of_student = products(
                student_first + row * sf_o + head * sf_h, student_second + row * ss_o + head * ss_h, queries, is_query,
                keys, is_key, student_width, sf_l, sf_d, ss_l, ss_d, STUDENT_PRECISION, BLOCK, CHUNK,
            ) * student_scale  # fmt: skip
            of_teacher = products(
                teacher_first + row * tf_o + head * tf_h, teacher_second + row * ts_o + head * ts_h, queries, is_query,
                keys, is_key, teacher_width, tf_l, tf_d, ts_l, ts_d, TEACHER_PRECISION, BLOCK, CHUNK,
            ) * teacher_scale  # fmt: skip
            places = pair * length + queries
            student_most = tl.load(statistics + places, mask=is_query, other=0.0)
            student_share = tl.load(statistics + num_queries + places, mask=is_query, other=0.0)
            teacher_most = tl.load(statistics + 2 * num_queries + places, mask=is_query, other=0.0)
            teacher_share = tl.load(statistics + 3 * num_queries + places, mask=is_query, other=0.0)
            q = tl.exp(of_student - student_most[:, None]) * student_share[:, None]
            p = tl.exp(of_teacher - teacher_most[:, None]) * teacher_share[:, None]
            change = tl.where(is_query[:, None] & is_key[None, :], q - p, 0.0)
            if OF_FIRST:
                values = piece(
                    student_second + row * ss_o + head * ss_h, keys[:, None], is_key[:, None], columns[None, :],
                    student_width, ss_l, ss_d,
                )  # fmt: skip
                total = tl.dot(change, values, total, input_precision=PRECISION)
            else:
                values = piece(
                    student_first + row * sf_o + head * sf_h, queries[:, None], is_query[:, None], columns[None, :],
                    student_width, sf_l, sf_d,
                )  # fmt: skip
                total = tl.dot(tl.trans(change), values, total, input_precision=PRECISION)
    total *= tl.load(grad_output + row) * factor
    places = ((row * length + mine[:, None]) * num_heads + head) * student_width + columns[None, :]
    inside = (mine[:, None] < length) & (columns[None, :] < student_width)
    found = tl.where(is_mine[:, None], total, 0.0)
    tl.store(gradient + places, found.to(gradient.dtype.element_ty), mask=inside)
