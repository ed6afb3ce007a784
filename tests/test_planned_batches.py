"""Batches of equally long rows as a stream of steps: every row, any rank count, any point of resumption."""

import numpy as np
import pytest
from numpy.typing import NDArray
from test_batching import PADDING, make_rows

from mixkd_fast.configuration import BatchArithmetic, Training
from mixkd_fast.data.batching import Draw, micro_batches
from mixkd_fast.data.planned_batches import PlannedBatches
from mixkd_fast.errors import ConfigurationError
from mixkd_fast.mixing import Mixing
from mixkd_fast.schedule import is_evaluation_step, stream_of, total_steps

ROWS = make_rows(403)


def stream(tokens: int | None = None, groups: int = 1, mixing: Mixing | None = None, seed: int = 3) -> PlannedBatches:
    return PlannedBatches(
        ROWS.lengths, 32, seed, mixing, window=128, tokens_per_micro_batch=tokens, micro_batches=groups
    )


def pieces_of(draw: Draw) -> list[NDArray[np.int64]]:
    """Rows of each micro-batch; without cuts, of the whole step."""
    return [draw.row_ids] if draw.cuts is None else np.split(draw.row_ids, draw.cuts[1:-1])


@pytest.mark.parametrize(("tokens", "groups"), [(None, 1), (96, 4)])
def test_an_epoch_has_each_row_at_most_once_and_little_padding(tokens: int | None, groups: int) -> None:
    batches = stream(tokens, groups)
    steps = batches.steps_in(1)
    draws = [batches.draw(step) for step in range(steps)]
    rows = np.concatenate([draw.row_ids for draw in draws])
    assert len(set(rows.tolist())) == len(rows) and len(rows) > len(ROWS) - 33
    pieces = [piece for draw in draws for piece in pieces_of(draw)]
    padded = sum(len(piece) * ROWS.lengths[piece].max() for piece in pieces)
    shuffled = np.random.default_rng(0).permutation(rows)
    random = sum(len(part) * ROWS.lengths[part].max() for part in np.array_split(shuffled, len(pieces)))
    assert padded < 1.35 * ROWS.lengths[rows].sum() < random


@pytest.mark.parametrize(("tokens", "groups"), [(None, 1), (96, 4)])
def test_no_row_sits_out_epoch_after_epoch(tokens: int | None, groups: int) -> None:
    """All rows in one window, which would leave the longest ones every time if they were what is left."""
    batches = PlannedBatches(ROWS.lengths, 32, 3, tokens_per_micro_batch=tokens, micro_batches=groups)
    counts = np.zeros(len(ROWS), dtype=np.int64)
    for step in range(batches.steps_in(8)):
        counts[batches.draw(step).row_ids] += 1
    assert counts.max() == 8
    # 19 of 403 rows sit out an epoch, others every time; with a budget none.
    assert counts.min() >= (1 if tokens is None else 8) and counts.mean() > 7.5


def test_steps_rows_and_epochs_add_up() -> None:
    batches = stream(96, 4)
    steps = batches.steps_in(3)
    seen = 0
    for step in range(steps):
        assert batches.rows_seen(step) == seen
        seen += len(batches.draw(step).row_ids)
    assert batches.epoch(steps) == 3.0 and batches.epoch(steps - 1) < 3 and batches.epoch(0) == 0
    assert batches.steps_in(2.5) < steps
    other = stream(96, 4)
    np.testing.assert_array_equal(other.draw(steps - 1).row_ids, batches.draw(steps - 1).row_ids)
    np.testing.assert_array_equal(other.draw(1).row_ids, batches.draw(1).row_ids)


def test_epochs_and_seeds_differ() -> None:
    batches = stream()
    first = [batches.draw(step).row_ids.tolist() for step in range(batches.steps_in(1))]
    second = [batches.draw(step).row_ids.tolist() for step in range(len(first), 2 * len(first))]
    assert not {tuple(rows) for rows in first} & {tuple(rows) for rows in second}
    assert stream(seed=4).draw(0).row_ids.tolist() != first[0]


@pytest.mark.parametrize(("world", "size"), [(2, 4), (4, 4), (4, 2)])
def test_no_rank_always_has_the_longest_rows(world: int, size: int) -> None:
    batches = stream()
    steps = batches.steps_in(4)
    tokens = np.zeros((steps, world))
    for step in range(steps):
        draw = batches.draw(step)
        for rank in range(world):
            share = micro_batches(ROWS, draw, rank, world, size, PADDING)
            tokens[step, rank] = sum(batch.num_tokens for batch in share)
    per_rank = tokens.sum(0)
    assert per_rank.max() < 1.05 * per_rank.min()
    longest = (tokens == tokens.max(1, keepdims=True)).mean(0)
    assert longest.max() < 2 / world


@pytest.mark.parametrize("mixing", [None, Mixing(mixed_rows=2)])
def test_ranks_and_micro_batches_share_the_rows_of_a_step(mixing: Mixing | None) -> None:
    draw = stream(mixing=mixing).draw(2)
    for world, size in ((1, 32), (2, 8), (4, 8)):
        shares = [micro_batches(ROWS, draw, rank, world, size, PADDING) for rank in range(world)]
        rows = [row for share in shares for batch in share for row in batch.row_ids[: batch.num_rows].tolist()]
        assert sorted(rows) == sorted(draw.row_ids.tolist())


def test_micro_batches_of_a_token_budget_differ_in_size_and_keep_to_it() -> None:
    batches = stream(96, 4, Mixing())
    for step in range(batches.steps_in(1)):
        draw = batches.draw(step)
        assert draw.cuts is not None and len(draw.cuts) == 5
        shares = [micro_batches(ROWS, draw, rank, 2, 8, PADDING) for rank in range(2)]
        assert [len(share) for share in shares] == [2, 2]
        for batch in (batch for share in shares for batch in share):
            rows = batch.row_ids[: batch.num_rows].numpy()
            width = -(-int(ROWS.lengths[rows].max()) // 8) * 8
            assert batch.num_rows <= 8 and batch.num_rows * width <= 96
            assert batch.num_tokens == ROWS.lengths[rows].sum()
            assert batch.partner is not None and set(batch.row_ids.tolist()) <= set(draw.row_ids.tolist())
    sizes = {len(batches.draw(step).row_ids) for step in range(10)}
    assert len(sizes) > 1


def test_the_training_section_chooses() -> None:
    arithmetic = BatchArithmetic(32, 8, 2, 2)
    training = Training(batching="length", batch_size=32, micro_batch_size=8, tokens_per_micro_batch=96, epochs=2)
    found = stream_of(training, ROWS.lengths, arithmetic, None, 8)
    assert isinstance(found, PlannedBatches)
    steps = total_steps(training, found)
    ends = [done for done in range(1, steps + 1) if is_evaluation_step(training, done, steps, found)]
    assert ends == [found.steps_in(1), steps]
    random = stream_of(Training(batch_size=32), ROWS.lengths, arithmetic, None, 8)
    assert not isinstance(random, PlannedBatches) and random.steps_in(1) == 13


def test_what_cannot_be_planned_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="403 training rows do not fill one step of 512 rows"):
        PlannedBatches(ROWS.lengths, 512, 0)
    with pytest.raises(ConfigurationError, match="403 training rows do not fill one step of 512 micro-batches"):
        stream(96, 512)
    with pytest.raises(ConfigurationError, match=r"training.tokens_per_micro_batch: tokens_per_batch is 16; allowed"):
        stream(16, 4)
    with pytest.raises(ValueError, match='tokens_per_micro_batch needs batching "length"'):
        Training(tokens_per_micro_batch=96)


def test_two_threads_in_different_epochs_get_what_one_gets() -> None:
    """The loop asks for rows and epochs of a step while the next batches are made elsewhere."""
    from concurrent.futures import ThreadPoolExecutor

    alone, shared = stream(), stream()
    steps = alone.steps_in(6)
    expected = [(alone.draw(step).row_ids.tolist(), alone.rows_seen(step), alone.epoch(step)) for step in range(steps)]

    def ask(order: range) -> list[tuple[list[int], int, float]]:
        return [(shared.draw(step).row_ids.tolist(), shared.rows_seen(step), shared.epoch(step)) for step in order]

    with ThreadPoolExecutor(4) as pool:
        orders = [range(steps), range(steps - 1, -1, -1), range(steps), range(steps - 1, -1, -1)]
        found = list(pool.map(ask, orders))
    for order, answers in zip(orders, found, strict=True):
        assert answers == [expected[step] for step in order]
