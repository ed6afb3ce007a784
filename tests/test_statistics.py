"""The statistics of the quality benchmark against brute force, theory and known answers."""

import itertools

import numpy as np
import pytest

from benchmarks.statistics import (
    hierarchical_bootstrap,
    holm,
    mean_and_spread,
    pack,
    pack_losses,
    unpack,
    unpack_losses,
)


def test_bootstrap_has_the_distribution_of_all_resamples() -> None:
    """2 seeds x 4 rows: every one of the 2^2 * 4^4 equally likely resamples, written out."""
    first = np.array([[1.0, 0.2, 0.7, 0.1], [0.3, 0.9, 0.4, 0.6]])
    second = np.array([[0.1, 0.3, 0.2, 0.8], [0.2, 0.1, 0.9, 0.5]])
    found = hierarchical_bootstrap(first, second, resamples=400_000)
    every = [
        np.mean([[first[s, n] - second[s, n] for n in rows] for s in seeds])
        for seeds in itertools.product(range(2), repeat=2)
        for rows in itertools.product(range(4), repeat=4)
    ]
    assert found.difference == pytest.approx(np.mean(first - second))
    assert (found.lower, found.upper) == pytest.approx(tuple(np.percentile(every, [2.5, 97.5])), abs=0.01)
    tail = min(np.mean(np.array(every) <= 0), np.mean(np.array(every) >= 0))
    assert found.p_value == pytest.approx(2 * tail, abs=0.01)


def test_one_seed_gives_the_width_of_theory() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.random((1, 4000)) < 0.8, rng.random((1, 4000)) < 0.7
    found = hierarchical_bootstrap(first, second)
    per_row = first.astype(float) - second.astype(float)
    assert found.difference == pytest.approx(per_row.mean())
    assert (found.upper - found.lower) / 2 == pytest.approx(1.96 * per_row.std() / np.sqrt(4000), rel=0.05)
    assert found.p_value < 0.001


def test_seeds_that_disagree_widen_the_interval() -> None:
    """Rows alone leave no doubt here: all of it is between the seeds, and its width is theirs."""
    seeds = np.array([0.10, -0.05, 0.02, 0.08, -0.03, 0.04, 0.07, -0.01])
    first = np.repeat(seeds[:, None], 1000, axis=1)
    found = hierarchical_bootstrap(first, np.zeros_like(first))
    assert (found.upper - found.lower) / 2 == pytest.approx(1.96 * seeds.std() / np.sqrt(8), rel=0.05)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """300 experiments of 10 seeds x 300 rows with effects of seed, row and both, whose true difference is 0."""
    rng = np.random.default_rng(5)
    held = 0
    for number in range(300):
        seeds, rows = rng.normal(0, 0.3, (10, 1)), rng.normal(0, 2.0, (1, 300))
        first = seeds + rows + rng.normal(0, 1, (10, 300))
        found = hierarchical_bootstrap(first, np.zeros_like(first), resamples=400, seed=number)
        held += found.lower <= 0 <= found.upper
    assert 0.88 <= held / 300 <= 0.99


def test_equal_arms_are_exactly_equal() -> None:
    arm = np.random.default_rng(1).random((3, 200)) < 0.5
    found = hierarchical_bootstrap(arm, arm)
    assert (found.difference, found.lower, found.upper, found.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_pairing_is_used() -> None:
    """Two arms that differ in one row of a thousand: the interval is narrow, though each arm alone is uncertain."""
    first = np.random.default_rng(2).random((1, 1000)) < 0.5
    second = first.copy()
    second[0, 0] = ~second[0, 0]
    found = hierarchical_bootstrap(first, second)
    assert found.upper - found.lower < 0.005


@pytest.mark.parametrize("chunk", [1, 1 << 24])
def test_chunks_change_nothing_but_the_draw(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr("benchmarks.statistics._CHUNK_VALUES", chunk)
    first = np.random.default_rng(3).normal(0.1, 1, (4, 50))
    found = hierarchical_bootstrap(first, np.zeros_like(first), resamples=2000)
    assert found.lower == pytest.approx(-0.16, abs=0.15) and found.upper == pytest.approx(0.36, abs=0.15)


def test_arms_of_other_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="the same rows"):
        hierarchical_bootstrap(np.ones((1, 3), bool), np.ones((1, 4), bool))
    with pytest.raises(ValueError, match="at least one"):
        hierarchical_bootstrap(np.ones((0, 3)), np.ones((0, 3)))


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_spread_and_packing() -> None:
    assert mean_and_spread([1.0, 3.0]) == (2.0, pytest.approx(np.sqrt(2)))
    assert mean_and_spread([5.0]) == (5.0, 0.0)
    correct = np.random.default_rng(3).random(277) < 0.6
    assert (unpack(pack(correct), 277) == correct).all()
    losses = np.random.default_rng(4).exponential(size=277)
    np.testing.assert_allclose(unpack_losses(pack_losses(losses)), losses, rtol=2**-11, atol=2**-25)
    assert unpack_losses(pack_losses(np.array([1e9]))) == [65504.0]
