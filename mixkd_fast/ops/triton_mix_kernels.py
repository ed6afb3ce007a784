"""The Triton kernels of mix_embeddings: the mixed rows, LayerNorm's gradient, sums of gradients by table row.

Definition and order of operations: `mixkd_fast.ops.mix_reference`. A program handles whole tokens: H columns at once.
"""

import triton
import triton.language as tl


@triton.jit
def pair_at(index, partner, lam, num_rows, length, num_clean, num_leading):
    """(first row, second row, weight of the first, whether both exist) of output token `index`."""
    row = index // length
    is_clean = row < num_leading
    mixed = tl.where(is_clean, 0, row - num_leading)
    first = tl.where(is_clean, row, mixed % num_clean)
    other = tl.load(partner + mixed, mask=row >= num_leading, other=0)
    share = tl.load(lam + mixed, mask=row >= num_leading, other=1.0).to(tl.float32)
    second = tl.where(is_clean, row, other)
    there = (second >= 0) & (second < num_rows)
    return first, tl.where(there, second, 0), share, there


@triton.jit
def table_index(indices, place, size):
    """(index that is safe to read at, whether the one in memory is inside the table)."""
    index = tl.load(indices + place)
    inside = (index >= 0) & (index < size)
    return tl.where(inside, index, 0), inside


@triton.jit
def table_row(table, index, columns, is_column, share, width):
    """share * a table's row in fp32; 0 without a look at it for share 0."""
    wanted = tl.where(is_column, share, 0.0) != 0.0
    return tl.load(table + index * width + columns, mask=wanted, other=0.0).to(tl.float32) * share


@triton.jit
def mixed_row(
    index, columns, is_column, input_ids, weight, partner, lam, padding_mask, position_weight, token_type_ids,
    token_type_weight, position_ids, num_rows, length, width, num_words, num_positions, num_types, num_clean,
    num_leading,
):  # fmt: skip
    """x of output token `index`, before LayerNorm; NaN if an index is outside its table."""
    first, second, share, valid = pair_at(index, partner, lam, num_rows, length, num_clean, num_leading)
    place = index % length
    first_place = first * length + place
    second_place = second * length + place
    u = share
    v = 1.0 - share
    if padding_mask is not None:
        u = tl.where(tl.load(padding_mask + first_place) != 0, 0.0, u)
        v = tl.where(tl.load(padding_mask + second_place) != 0, 0.0, v)
    # Of a row that is not in its table nothing is read: the table may be empty.
    first_word, inside = table_index(input_ids, first_place, num_words)
    second_word, also = table_index(input_ids, second_place, num_words)
    valid = valid & inside & also
    x = table_row(weight, first_word, columns, is_column & inside, u, width)
    x += table_row(weight, second_word, columns, is_column & also, v, width)
    if token_type_weight is not None:
        first_type, inside = table_index(token_type_ids, first_place, num_types)
        second_type, also = table_index(token_type_ids, second_place, num_types)
        valid = valid & inside & also
        added = table_row(token_type_weight, first_type, columns, is_column & inside, u, width)
        added += table_row(token_type_weight, second_type, columns, is_column & also, v, width)
        if position_weight is None:
            x += added
    if position_weight is not None:
        position = place
        whole = 1.0
        if position_ids is not None:
            position, inside = table_index(position_ids, index, num_positions)
            valid = valid & inside
            whole = tl.where(inside, 1.0, 0.0)
        of_place = table_row(position_weight, position, columns, is_column, whole, width)
        if token_type_weight is not None:
            of_place += added
        x += of_place
    return tl.where(valid, x, float("nan"))


@triton.jit
def forward_kernel(
    input_ids, weight, partner, lam, padding_mask, position_weight, token_type_ids, token_type_weight, position_ids,
    norm_weight, norm_bias, output, mean, rstd,
    num_rows, length, width, num_words, num_positions, num_types, num_clean, num_leading, norm_eps,
    USE_NORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token of the output."""
    index = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    is_column = columns < width
    x = mixed_row(
        index, columns, is_column, input_ids, weight, partner, lam, padding_mask, position_weight, token_type_ids,
        token_type_weight, position_ids, num_rows, length, width, num_words, num_positions, num_types, num_clean,
        num_leading,
    )  # fmt: skip
    if USE_NORM:
        average = tl.sum(tl.where(is_column, x, 0.0), axis=0) / width
        centred = tl.where(is_column, x - average, 0.0)
        scale = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / width + norm_eps)
        tl.store(mean + index, average)
        tl.store(rstd + index, scale)
        x = centred * scale
        if norm_weight is not None:
            x *= tl.load(norm_weight + columns, mask=is_column, other=0.0).to(tl.float32)
        if norm_bias is not None:
            x += tl.load(norm_bias + columns, mask=is_column, other=0.0).to(tl.float32)
    tl.store(output + index * width + columns, x.to(output.dtype.element_ty), mask=is_column)


@triton.jit
def norm_backward_kernel(
    grad_output, input_ids, weight, partner, lam, padding_mask, position_weight, token_type_ids, token_type_weight,
    position_ids, norm_weight, mean, rstd, grad_x, norm_sums,
    num_tokens, num_rows, length, width, num_words, num_positions, num_types, num_clean, num_leading, tokens_each,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """grad_x [tokens, H] of tokens_each tokens, and their share of norm_sums [programs, 2, H]: of weight and bias."""
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    is_column = columns < width
    gain = tl.full([BLOCK], 1.0, tl.float32)
    if norm_weight is not None:
        gain = tl.load(norm_weight + columns, mask=is_column, other=0.0).to(tl.float32)
    weight_sum = tl.zeros([BLOCK], tl.float32)
    bias_sum = tl.zeros([BLOCK], tl.float32)
    for step in range(0, tokens_each):
        index = program * tokens_each + step
        if index < num_tokens:
            x = mixed_row(
                index, columns, is_column, input_ids, weight, partner, lam, padding_mask, position_weight,
                token_type_ids, token_type_weight, position_ids, num_rows, length, width, num_words, num_positions,
                num_types, num_clean, num_leading,
            )  # fmt: skip
            scale = tl.load(rstd + index)
            normalized = tl.where(is_column, (x - tl.load(mean + index)) * scale, 0.0)
            incoming = tl.load(grad_output + index * width + columns, mask=is_column, other=0.0).to(tl.float32)
            weight_sum += incoming * normalized
            bias_sum += incoming
            scaled = incoming * gain
            of_mean = tl.sum(scaled, axis=0) / width
            of_product = tl.sum(scaled * normalized, axis=0) / width
            gradient = scale * (scaled - of_mean - normalized * of_product)
            tl.store(grad_x + index * width + columns, gradient, mask=is_column)
    tl.store(norm_sums + (program * 2) * width + columns, weight_sum, mask=is_column)
    tl.store(norm_sums + (program * 2 + 1) * width + columns, bias_sum, mask=is_column)


@triton.jit
def sum_runs_kernel(
    source, rows, tokens, shares, table, partials, num_entries, width, ENTRIES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """table[r] = sum of shares * source[tokens] over the entries of row r, entries sorted by row: ENTRIES of them.

    A run of equal rows that lies whole in this chunk is written at once. Of one that began before, the part goes to
    partials[chunk, 0]; of one that begins here and goes on, to partials[chunk, 1].
    """
    chunk = tl.program_id(0).to(tl.int64)
    begin = chunk * ENTRIES
    end = tl.minimum(begin + ENTRIES, num_entries)
    columns = tl.arange(0, BLOCK)
    is_column = columns < width
    total = tl.zeros([BLOCK], tl.float32)
    before = tl.load(rows + begin - 1, mask=begin > 0, other=-1)
    for step in range(0, ENTRIES):
        entry = begin + step
        if entry < end:
            row = tl.load(rows + entry)
            share = tl.load(shares + entry)
            token = tl.load(tokens + entry)
            total += table_row(source, token, columns, is_column, share, width)
            following = tl.load(rows + entry + 1, mask=entry + 1 < num_entries, other=-1)
            if (entry + 1 == end) | (following != row):
                if before == row:
                    tl.store(partials + (chunk * 2) * width + columns, total, mask=is_column)
                elif following == row:
                    tl.store(partials + (chunk * 2 + 1) * width + columns, total, mask=is_column)
                else:
                    tl.store(table + row * width + columns, total.to(table.dtype.element_ty), mask=is_column)
                total = tl.zeros([BLOCK], tl.float32)


@triton.jit
def join_runs_kernel(rows, table, partials, num_entries, width, ENTRIES: tl.constexpr, BLOCK: tl.constexpr):
    """Adds up the run that begins in a chunk and goes on, if there is one, in the order of the chunks."""
    chunk = tl.program_id(0).to(tl.int64)
    begin = chunk * ENTRIES
    end = tl.minimum(begin + ENTRIES, num_entries)
    row = tl.load(rows + end - 1)
    goes_on = tl.load(rows + end, mask=end < num_entries, other=-1) == row
    before = tl.load(rows + begin - 1, mask=begin > 0, other=-1)
    if goes_on & (before != row):
        columns = tl.arange(0, BLOCK)
        is_column = columns < width
        total = tl.load(partials + (chunk * 2 + 1) * width + columns, mask=is_column, other=0.0)
        following = chunk + 1
        while goes_on:
            total += tl.load(partials + (following * 2) * width + columns, mask=is_column, other=0.0)
            last = tl.minimum((following + 1) * ENTRIES, num_entries)
            ends_here = tl.load(rows + last - 1) != row
            goes_on = (~ends_here) & (tl.load(rows + last, mask=last < num_entries, other=-1) == row)
            following += 1
        tl.store(table + row * width + columns, total.to(table.dtype.element_ty), mask=is_column)
