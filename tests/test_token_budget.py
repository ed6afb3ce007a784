"""A token budget with MNLI's lengths: every row once an epoch, like steps, weights that lengths hardly move."""

import numpy as np
import pytest
from numpy.typing import NDArray

from mixkd_fast.data.batching import Draw
from mixkd_fast.data.planned_batches import PlannedBatches
from mixkd_fast.mixing import Mixing
from mixkd_fast.planning.lengths import mnli_lengths

EPOCHS = 3
CASES = [
    (num_rows, micro_batches, rows)
    for num_rows in (2490, 3668)
    for micro_batches, rows in ((4, 32), (8, 1024), (16, 32), (16, 1024), (32, 1024), (64, 32))
]


def lengths_of(num_rows: int) -> NDArray[np.int64]:
    return mnli_lengths(128).draw(num_rows, np.random.default_rng(1)).astype(np.int64)


def stream(lengths: NDArray[np.int64], micro_batches: int, rows: int, seed: int = 0) -> PlannedBatches:
    return PlannedBatches(
        lengths,
        rows * micro_batches,
        seed,
        Mixing(),
        tokens_per_micro_batch=1024,
        micro_batches=micro_batches,
    )


def padded_tokens(lengths_N: NDArray[np.int64], draw: Draw) -> NDArray[np.int64]:
    """Rows x padded width of each micro-batch."""
    assert draw.cuts is not None
    widths = -(-np.maximum.reduceat(lengths_N, draw.cuts[:-1]) // 8) * 8
    return widths * np.diff(draw.cuts)


@pytest.mark.parametrize(("num_rows", "micro_batches", "rows"), CASES)
def test_steps_are_alike_and_every_row_counts(num_rows: int, micro_batches: int, rows: int) -> None:
    lengths = lengths_of(num_rows)
    batches = stream(lengths, micro_batches, rows)
    draws = [batches.draw(step) for step in range(batches.steps_in(EPOCHS))]
    seen, weights = np.zeros(num_rows, dtype=np.int64), np.zeros(num_rows)
    for draw in draws:
        seen[draw.row_ids] += 1
        weights[draw.row_ids] += 1 / len(draw.row_ids)
    assert (seen == EPOCHS).all()

    sizes = np.array([len(draw.row_ids) for draw in draws])
    largest = max(int(np.diff(draw.cuts).max()) for draw in draws if draw.cuts is not None)
    assert sizes.max() - sizes.min() < largest <= rows
    tokens = [padded_tokens(lengths[draw.row_ids], draw) for draw in draws]
    assert max(int(piece.max()) for piece in tokens) <= 1024
    step_tokens = [int(piece.sum()) for piece in tokens]
    assert max(step_tokens) < 1.25 * min(step_tokens)

    by_length = np.argsort(lengths, kind="stable")
    deciles = [float(weights[rows_of].mean()) for rows_of in np.array_split(by_length, 10)]
    assert max(deciles) < 1.1 * min(deciles)
    assert weights.max() < 1.15 * weights.mean()


@pytest.mark.parametrize(("micro_batches", "rows", "share"), [(4, 32, 1.1), (16, 1024, 1.05), (64, 32, 1.05)])
def test_partners_are_of_like_length(micro_batches: int, rows: int, share: float) -> None:
    lengths = lengths_of(2490)
    batches = stream(lengths, micro_batches, rows)
    own, mixed, alone = 0, 0, []
    for step in range(batches.steps_in(1)):
        draw = batches.draw(step)
        assert draw.partner_ids is not None
        assert sorted(draw.partner_ids.tolist()) == sorted(draw.row_ids.tolist())
        own += int(padded_tokens(lengths[draw.row_ids], draw).sum())
        longer = np.maximum(lengths[draw.row_ids], lengths[draw.partner_ids])
        mixed += int(padded_tokens(longer, draw).sum())
        alone += (draw.partner_ids == draw.row_ids).tolist()
    assert mixed < share * own
    assert np.mean(alone) < 0.1


def test_the_last_steps_are_not_small() -> None:
    """Also where a step is one micro-batch: what is left is shared by the last two."""
    lengths = lengths_of(3668)
    for rows in (32, 1024):
        batches = stream(lengths, 1, rows)
        sizes = [len(batches.draw(step).row_ids) for step in range(batches.steps_in(4))]
        assert min(sizes) >= 4


def test_rows_of_a_whole_budget_sit_out_at_random() -> None:
    """A row per micro-batch: 10 of 250 rows fill no step, others every epoch."""
    lengths = np.full(250, 128)
    lengths[:5] = 121
    batches = PlannedBatches(lengths, 48, 0, tokens_per_micro_batch=128, micro_batches=16)
    epochs = 12
    left = []
    for epoch in range(epochs):
        steps = range(batches.steps_in(epoch) if epoch else 0, batches.steps_in(epoch + 1))
        draws = [batches.draw(step).row_ids for step in steps]
        assert [len(rows) for rows in draws] == [16] * 15
        left.append(set(range(250)) - set(np.concatenate(draws).tolist()))
    assert all(len(rows) == 10 for rows in left)
    assert not set.intersection(*left) and len(set.union(*left)) > 50


def test_the_plan_is_a_function_of_seed_and_step() -> None:
    lengths = lengths_of(2490)
    first, second, other = stream(lengths, 16, 32), stream(lengths, 16, 32), stream(lengths, 16, 32, seed=1)
    steps = first.steps_in(2)
    for step in (steps - 1, 0, steps // 2):
        one, two = first.draw(step), second.draw(step)
        for name in ("row_ids", "partner_ids", "lam", "cuts"):
            np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
    assert first.draw(0).row_ids.tolist() != other.draw(0).row_ids.tolist()
