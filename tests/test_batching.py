"""Batching: every row once an epoch, one global batch for any number of ranks, and padding that hides nothing."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from mixkd_fast.data.batching import Batch, Draw, EvaluationBatches, GlobalBatches, Padding, RowOrder, micro_batches
from mixkd_fast.data.tokenization import TokenRows
from mixkd_fast.errors import ConfigurationError, ModelError
from mixkd_fast.mixing import Mixing

PADDING = Padding(token_id=999)


def make_rows(num_rows: int, seed: int = 0, soft: bool = False, regression: bool = False) -> TokenRows:
    """Rows of 1 to 30 tokens; row i holds the tokens 1000 * i, 1000 * i + 1, ..., so that content tells the row."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 31, num_rows)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.concatenate([1000 * row + np.arange(length) for row, length in enumerate(lengths)]).astype(np.int32)
    labels = rng.uniform(0, 5, num_rows).astype(np.float32) if regression else rng.integers(0, 3, num_rows)
    return TokenRows(
        tokens=tokens,
        offsets=offsets,
        token_types=(tokens % 2).astype(np.uint8),
        labels=labels,
        soft_labels=rng.dirichlet(np.ones(3), num_rows).astype(np.float32) if soft else None,
        source_rows=np.arange(num_rows),
        max_length=30,
        num_truncated=0,
        content_hash="",
    )


def all_micro_batches(rows: TokenRows, draw: Draw, world: int, size: int) -> list[list[Batch]]:
    return [micro_batches(rows, draw, rank, world, size, PADDING) for rank in range(world)]


@pytest.mark.parametrize(("num_rows", "batch_size"), [(10, 4), (7, 7), (5, 16), (101, 8), (1, 3)])
def test_every_row_is_seen_once_an_epoch(num_rows: int, batch_size: int) -> None:
    batches = GlobalBatches(num_rows, batch_size, seed=3)
    stream = np.concatenate([batches.draw(step).row_ids for step in range(5 * num_rows)])
    for epoch in range(len(stream) // num_rows):
        part = stream[epoch * num_rows : (epoch + 1) * num_rows]
        assert sorted(part.tolist()) == list(range(num_rows))
    assert all(len(batches.draw(step).row_ids) == batch_size for step in range(20))


def test_epochs_and_seeds_differ() -> None:
    order = RowOrder(50, seed=1)
    assert order.permutation(0).tolist() != order.permutation(1).tolist()
    assert order.permutation(0).tolist() != RowOrder(50, seed=2).permutation(0).tolist()
    assert RowOrder(50, seed=-1).permutation(0).tolist() != order.permutation(0).tolist()


@pytest.mark.parametrize("pairing", ["batch", "dataset"])
def test_a_draw_depends_on_seed_and_step_alone(pairing: Any) -> None:
    mixing = Mixing(pairing=pairing, mixed_rows=2)
    forward = GlobalBatches(37, 8, seed=5, mixing=mixing)
    in_order = [forward.draw(step) for step in range(30)]
    # As after a resume: another object, steps in another order.
    other = GlobalBatches(37, 8, seed=5, mixing=mixing)
    for step in (29, 3, 17, 0, 3, 28):
        again = other.draw(step)
        np.testing.assert_array_equal(again.row_ids, in_order[step].row_ids)
        np.testing.assert_array_equal(again.partner_ids, in_order[step].partner_ids)
        np.testing.assert_array_equal(again.lam, in_order[step].lam)
    assert len({draw.lam.tobytes() for draw in in_order if draw.lam is not None}) == 30
    different = GlobalBatches(37, 8, seed=6, mixing=mixing).draw(0)
    assert different.lam is not None
    assert different.lam.tolist() != in_order[0].lam.tolist()


def test_options_of_mixing_leave_the_other_streams_alone() -> None:
    plain = GlobalBatches(37, 8, seed=5).draw(4)
    mixed = GlobalBatches(37, 8, seed=5, mixing=Mixing()).draw(4)
    elsewhere = GlobalBatches(37, 8, seed=5, mixing=Mixing(pairing="dataset")).draw(4)
    assert (plain.partner_ids, plain.lam) == (None, None)
    np.testing.assert_array_equal(plain.row_ids, mixed.row_ids)
    np.testing.assert_array_equal(mixed.lam, elsewhere.lam)


def test_partners_in_the_batch_are_permutations_of_it() -> None:
    batches = GlobalBatches(100, 16, seed=0, mixing=Mixing(mixed_rows=3))
    permutations = set()
    for step in range(12):
        draw = batches.draw(step)
        assert draw.partner_ids is not None
        for copy in draw.partner_ids.reshape(3, 16):
            assert sorted(copy.tolist()) == sorted(draw.row_ids.tolist())
            places = {row: place for place, row in enumerate(draw.row_ids.tolist())}
            permutations.add(tuple(places[row] for row in copy.tolist()) if len(places) == 16 else step)
    assert len(permutations) > 30


def test_partners_in_the_data_set_are_uniform_rows() -> None:
    batches = GlobalBatches(20, 16, seed=0, mixing=Mixing(pairing="dataset"))
    counts: Counter[int] = Counter()
    for step in range(500):
        partner_ids = batches.draw(step).partner_ids
        assert partner_ids is not None
        counts.update(partner_ids.tolist())
    assert counts.keys() == set(range(20))
    # 400 expected per row, standard deviation 19.5.
    assert max(abs(count - 400) for count in counts.values()) < 100


def test_lam_per_row_and_per_batch() -> None:
    row = GlobalBatches(50, 16, seed=0, mixing=Mixing()).draw(0).lam
    batch = GlobalBatches(50, 16, seed=0, mixing=Mixing(lam_per="batch", mixed_rows=2)).draw(0).lam
    assert row is not None
    assert batch is not None
    assert (row.dtype, len(row), len(set(row.tolist()))) == (np.float32, 16, 16)
    assert (len(batch), len(set(batch.tolist()))) == (32, 1)


Pairs = Counter[tuple[int, int, float]]


def pairs_of(draw: Draw) -> Pairs:
    """(first row, second row, lam) of every mixed row of a global batch."""
    assert draw.partner_ids is not None
    assert draw.lam is not None
    first = np.tile(draw.row_ids, len(draw.partner_ids) // len(draw.row_ids))
    return Counter(zip(first.tolist(), draw.partner_ids.tolist(), draw.lam.tolist(), strict=True))


def pairs_in(rows: TokenRows, batch: Batch) -> Pairs:
    """The same as read back from the content of a micro-batch."""
    assert batch.partner is not None
    assert batch.lam is not None

    def row_at(index: int) -> int:
        tokens = batch.input_ids[index][batch.attention_mask[index] == 1]
        row = int(tokens[0]) // 1000
        assert tokens.tolist() == rows.row(row).tolist()
        assert batch.labels[index] == rows.labels[row]
        assert batch.row_ids[index] == row
        return row

    lam = batch.lam.tolist()
    partners = batch.partner.tolist()
    return Counter((row_at(m % batch.num_rows), row_at(partner), lam[m]) for m, partner in enumerate(partners))


@pytest.mark.parametrize("pairing", ["batch", "dataset"])
@pytest.mark.parametrize(("num_rows", "mixed_rows"), [(60, 1), (60, 3), (9, 2)])
def test_ranks_share_the_global_batch_pair_by_pair(pairing: Any, num_rows: int, mixed_rows: int) -> None:
    rows = make_rows(num_rows)
    mixing = Mixing(pairing=pairing, mixed_rows=mixed_rows)
    batches = GlobalBatches(num_rows, 24, seed=1, mixing=mixing)
    for step in (0, 2, 7):
        draw = batches.draw(step)
        for world, size in [(1, 24), (1, 4), (2, 12), (2, 3), (3, 8), (4, 6), (24, 1)]:
            shares = all_micro_batches(rows, draw, world, size)
            assert {len(share) for share in shares} == {24 // (world * size)}
            found = [batch for share in shares for batch in share]
            assert sum((pairs_in(rows, batch) for batch in found), Counter()) == pairs_of(draw)
            clean = np.concatenate([batch.row_ids[: batch.num_rows].numpy() for batch in found])
            assert sorted(clean.tolist()) == sorted(draw.row_ids.tolist())


def test_the_slicing_is_fixed_by_accumulation_index_and_rank() -> None:
    rows, draw = make_rows(60), GlobalBatches(60, 24, seed=1).draw(0)
    shares = all_micro_batches(rows, draw, 2, 4)
    in_turn = [shares[rank][index].row_ids.tolist() for index in range(3) for rank in range(2)]
    assert [row for part in in_turn for row in part] == draw.row_ids.tolist()


def test_mixed_copy_k_of_clean_row_b_is_at_k_times_b_rows() -> None:
    rows = make_rows(60)
    draw = GlobalBatches(60, 8, seed=1, mixing=Mixing(mixed_rows=2)).draw(0)
    assert draw.partner_ids is not None
    assert draw.lam is not None
    (batch,) = micro_batches(rows, draw, 1, 2, 4, PADDING)
    assert batch.partner is not None
    assert batch.lam is not None
    places = [4, 5, 6, 7, 12, 13, 14, 15]
    assert batch.row_ids[batch.partner].tolist() == draw.partner_ids[places].tolist()
    assert batch.lam.tolist() == draw.lam[places].tolist()


def test_partners_from_elsewhere_are_appended_once() -> None:
    rows = make_rows(30)
    draw = Draw(np.array([3, 4, 5, 6]), np.array([9, 3, 9, 4, 7, 7, 5, 6]), np.linspace(0, 1, 8, dtype=np.float32))
    (batch,) = micro_batches(rows, draw, 0, 1, 4, PADDING)
    assert batch.num_rows == 4
    assert batch.row_ids.tolist() == [3, 4, 5, 6, 9, 7]
    assert batch.partner is not None
    assert batch.partner.tolist() == [4, 0, 4, 1, 5, 5, 2, 3]
    assert batch.num_tokens == rows.lengths[[3, 4, 5, 6]].sum()
    first, second = micro_batches(rows, draw, 0, 1, 2, PADDING)
    assert first.row_ids.tolist() == [3, 4, 9, 7]
    assert second.row_ids.tolist() == [5, 6, 9, 4]
    # A batch that straddles two epochs may hold a row twice.
    (twice,) = micro_batches(rows, Draw(np.array([3, 3]), np.array([3, 8]), np.ones(2, np.float32)), 0, 1, 2, PADDING)
    assert twice.row_ids.tolist() == [3, 3, 8]
    assert twice.partner is not None
    assert twice.partner.tolist() == [0, 2]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("multiple", [1, 8])
def test_padding_keeps_every_token_on_its_side(side: Any, multiple: int) -> None:
    rows = make_rows(12)
    padding = Padding(999, side, multiple)
    (batch,) = micro_batches(rows, Draw(np.arange(12), None, None), 0, 1, 12, padding)
    longest = int(rows.lengths.max())
    width = batch.input_ids.shape[1]
    assert width == (longest if multiple == 1 else min(-(-longest // 8) * 8, rows.max_length))
    assert batch.token_type_ids is not None
    for index in range(12):
        length = int(rows.lengths[index])
        inside = slice(0, length) if side == "right" else slice(width - length, width)
        mask = torch.zeros(width, dtype=torch.int64)
        mask[inside] = 1
        assert batch.attention_mask[index].tolist() == mask.tolist()
        assert batch.input_ids[index][inside].tolist() == rows.row(index).tolist()
        assert batch.token_type_ids[index][inside].tolist() == (rows.row(index) % 2).tolist()
        assert set(batch.input_ids[index][mask == 0].tolist()) <= {999}
        assert set(batch.token_type_ids[index][mask == 0].tolist()) <= {0}


def test_rounding_up_does_not_pass_max_length() -> None:
    rows = make_rows(40)
    assert rows.lengths.max() in range(25, 31)
    (batch,) = micro_batches(rows, Draw(np.arange(40), None, None), 0, 1, 40, PADDING)
    assert batch.input_ids.shape == (40, 30)


def test_labels_of_every_kind() -> None:
    draw = GlobalBatches(20, 6, seed=0, mixing=Mixing(pairing="dataset")).draw(0)
    for rows in (make_rows(20, soft=True), make_rows(20, regression=True)):
        (batch,) = micro_batches(rows, draw, 0, 1, 6, PADDING)
        row_ids = batch.row_ids.numpy()
        assert len(row_ids) > 6
        assert batch.labels.dtype == (torch.float32 if rows.soft_labels is None else torch.int64)
        np.testing.assert_array_equal(batch.labels.numpy(), rows.labels[row_ids])
        if rows.soft_labels is not None:
            assert batch.soft_labels is not None
            np.testing.assert_array_equal(batch.soft_labels.numpy(), rows.soft_labels[row_ids])


def test_a_batch_does_not_write_through_to_the_data() -> None:
    rows = make_rows(20)
    draw = Draw(np.arange(4), None, None)
    (batch,) = micro_batches(rows, draw, 0, 1, 4, PADDING)
    before = rows.tokens.copy(), rows.labels.copy()
    for tensor in (batch.input_ids, batch.labels, batch.row_ids):
        tensor.fill_(-7)
    np.testing.assert_array_equal(rows.tokens, before[0])
    np.testing.assert_array_equal(rows.labels, before[1])
    assert draw.row_ids.tolist() == [0, 1, 2, 3]


def test_to_moves_every_tensor() -> None:
    draw = GlobalBatches(20, 6, seed=0, mixing=Mixing()).draw(0)
    (batch,) = micro_batches(make_rows(20, soft=True), draw, 0, 1, 6, PADDING)
    moved = batch.to("meta")
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    on_host = {name for name, value in vars(moved).items() if isinstance(value, torch.Tensor) and value.is_cpu}
    assert len(tensors) == 10 and on_host == {"row_ids", "row_lengths", "mixed_lengths"}
    assert [tensor.device.type for tensor in tensors].count("meta") == 7
    assert moved.num_rows == 6


@pytest.mark.parametrize(("size", "world"), [(5, 1), (8, 2), (0, 1), (24, 2)])
def test_batch_arithmetic_that_does_not_divide_is_refused(size: int, world: int) -> None:
    draw = GlobalBatches(60, 24, seed=1).draw(0)
    with pytest.raises(ConfigurationError) as error:
        micro_batches(make_rows(60), draw, 0, world, size, PADDING)
    for word in ["training.batch_size is 24", f"training.micro_batch_size {size}", f"{world} ranks"]:
        assert word in str(error.value)


@pytest.mark.parametrize(("num_rows", "size", "world"), [(50, 8, 1), (50, 8, 2), (50, 8, 3), (3, 8, 4), (64, 8, 8)])
def test_evaluation_covers_every_row_once_with_equal_batch_counts(num_rows: int, size: int, world: int) -> None:
    rows = make_rows(num_rows)
    shares = [EvaluationBatches(rows, size, rank, world, PADDING) for rank in range(world)]
    found = [list(share) for share in shares]
    num_batches = math.ceil(math.ceil(num_rows / size) / world)
    assert {len(share) for share in shares} == {len(batches) for batches in found} == {num_batches}
    lengths = np.zeros(num_rows, dtype=np.int64)
    seen: Counter[int] = Counter()
    for batch in (batch for batches in found for batch in batches):
        assert batch.partner is None
        assert 1 <= batch.num_rows <= size
        ids = batch.row_ids[batch.valid].tolist()
        seen.update(ids)
        lengths[ids] = batch.attention_mask.sum(1)[batch.valid].numpy()
        for index in range(batch.num_rows):
            row = int(batch.row_ids[index]) if batch.valid[index] else 0
            assert batch.input_ids[index][batch.attention_mask[index] == 1].tolist() == rows.row(row).tolist()
    assert seen == Counter(range(num_rows))
    np.testing.assert_array_equal(lengths, rows.lengths)


def test_evaluation_batches_do_not_depend_on_the_number_of_ranks() -> None:
    rows = make_rows(50)

    def contents(world: int) -> set[tuple[int, ...]]:
        share = (EvaluationBatches(rows, 8, rank, world, PADDING) for rank in range(world))
        return {tuple(batch.row_ids.tolist()) for batches in share for batch in batches if batch.valid.all()}

    assert contents(1) == contents(2) == contents(5)
    longest = [int(rows.lengths[batch.row_ids.numpy()].max()) for batch in EvaluationBatches(rows, 8, 0, 1, PADDING)]
    assert longest == sorted(longest, reverse=True)


def test_padding_of_a_tokenizer() -> None:
    from test_tokenization import make_tokenizer

    tokenizer = make_tokenizer()
    assert Padding.of(tokenizer) == Padding(tokenizer.pad_token_id, "right", 8)
    tokenizer.padding_side = "left"
    assert Padding.of(tokenizer, multiple=1) == Padding(tokenizer.pad_token_id, "left", 1)
    tokenizer.pad_token = None
    with pytest.raises(ModelError, match="pad_token null"):
        Padding.of(tokenizer)


@pytest.mark.parametrize("arguments", [(0, 4), (4, 0)])
def test_empty_sizes_are_refused(arguments: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="is 0; allowed: at least 1"):
        GlobalBatches(*arguments, seed=0)
