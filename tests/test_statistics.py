"""The statistics of the quality benchmark against brute force, theory and known answers."""

import itertools

import numpy as np
import pytest
from scipy import stats

from benchmarks.statistics import (
    holm,
    mean_and_spread,
    pack,
    pack_losses,
    paired_bootstrap,
    unpack,
    unpack_losses,
)


def test_bootstrap_has_the_distribution_of_all_resamples() -> None:
    """2 seeds x 4 rows: every one of the 2^2 * 4^4 equally likely resamples, written out."""
    differences = np.array([[1.0, 0.5, 0.7, 0.2], [0.6, 0.1, 0.4, -0.6]])
    found = paired_bootstrap(differences, np.zeros_like(differences), resamples=400_000)
    mean = differences.mean()
    seeds, rows = differences.mean(1) - mean, differences.mean(0) - mean
    rest = differences - mean - seeds[:, None] - rows
    of_seeds, of_rows, of_rest = 4 * (seeds**2).sum(), 2 * (rows**2).sum() / 3, (rest**2).sum() / 3
    assert min(of_seeds, of_rows) > of_rest  # else they have no variance of their own
    seeds *= np.sqrt(of_seeds / 8 / (seeds**2).mean() * 2)
    rows *= np.sqrt((of_rows - of_rest) / 8 / (rows**2).mean() * 4)
    every = [
        np.mean([seeds[s] for s in some_seeds]) + np.mean([rows[n] for n in some_rows])
        for some_seeds in itertools.product(range(2), repeat=2)
        for some_rows in itertools.product(range(4), repeat=4)
    ]
    variance = (of_seeds + of_rows - of_rest) / 8
    assert np.var(every) == pytest.approx(variance)
    freedom = (8 * variance) ** 2 / (of_seeds**2 + of_rows**2 / 3 + of_rest**2 / 3)
    ends = mean + np.percentile(every, [2.5, 97.5]) * stats.t.ppf(0.975, freedom) / stats.norm.ppf(0.975)
    assert found.difference == pytest.approx(mean)
    assert (found.lower, found.upper) == pytest.approx(tuple(ends), abs=0.01 * (ends[1] - ends[0]))
    assert found.p_value == pytest.approx(2 * stats.t.sf(mean / np.sqrt(variance), freedom))


def test_one_seed_gives_the_width_of_theory() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.random((1, 4000)) < 0.8, rng.random((1, 4000)) < 0.7
    found = paired_bootstrap(first, second)
    per_row = first.astype(float) - second.astype(float)
    assert found.difference == pytest.approx(per_row.mean())
    assert (found.upper - found.lower) / 2 == pytest.approx(1.96 * per_row.std() / np.sqrt(4000), rel=0.05)
    assert found.p_value < 0.001


def test_where_only_seeds_differ_it_is_the_t_test_of_their_means() -> None:
    """Rows alone leave no doubt here: all of it is between the seeds."""
    seeds = np.array([0.10, -0.05, 0.02, 0.08, -0.03, 0.04, 0.07, -0.01])
    first = np.repeat(seeds[:, None], 1000, axis=1)
    found, known = paired_bootstrap(first, np.zeros_like(first)), stats.ttest_1samp(seeds, 0.0)
    low, high = known.confidence_interval(0.95)
    assert found.upper - found.lower == pytest.approx(high - low, rel=0.05)
    assert found.p_value == pytest.approx(known.pvalue)


@pytest.mark.parametrize("num_seeds", [1, 2, 3, 5, 10])
@pytest.mark.parametrize(
    "of_seeds, of_rows, of_rest", [(0.3, 0.01, 0.01), (0.01, 2.0, 0.3), (0.1, 1.0, 1.0), (0.0, 0.0, 1.0)]
)
def test_intervals_and_p_values_err_as_often_as_they_say(
    num_seeds: int, of_seeds: float, of_rows: float, of_rest: float
) -> None:
    """300 experiments whose true difference is 0: 95 % of the intervals hold it, 5 % of the p values are below 0.05.

    Where neither seeds nor rows differ, fewer err: what looks like their variance is counted with the rest's.
    """
    rng = np.random.default_rng(5)
    held = rejected = 0
    for number in range(300):
        seeds = rng.normal(0, of_seeds, (num_seeds, 1)) if num_seeds > 1 else 0.0
        first = seeds + rng.normal(0, of_rows, (1, 100)) + rng.normal(0, of_rest, (num_seeds, 100))
        found = paired_bootstrap(first, np.zeros_like(first), resamples=400, seed=number)
        held += found.lower <= 0 <= found.upper
        rejected += found.p_value < 0.05
    # 3.5 standard errors of 300 experiments. Of two seeds it is sometimes not seen that they differ.
    most = 0.13 if num_seeds == 2 else 0.095
    assert 1 - most <= held / 300 and rejected / 300 <= most
    if of_seeds or of_rows:
        assert held / 300 <= 0.995 and rejected / 300 >= 0.005


def test_equal_arms_are_exactly_equal() -> None:
    arm = np.random.default_rng(1).random((3, 200)) < 0.5
    found = paired_bootstrap(arm, arm)
    assert (found.difference, found.lower, found.upper, found.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_where_seeds_and_rows_have_equal_means_the_rest_has_a_width() -> None:
    first = np.indices((2, 100)).sum(0) % 2 + 0.1
    found = paired_bootstrap(first, np.zeros_like(first))
    error = np.sqrt((first - 0.6).var() * 200 / 99 / 200)
    assert (found.upper - found.lower) / 2 == pytest.approx(stats.t.ppf(0.975, 99) * error, rel=0.05)


def test_pairing_is_used() -> None:
    """Two arms that differ in one row of a thousand: the interval is narrow, though each arm alone is uncertain."""
    first = np.random.default_rng(2).random((1, 1000)) < 0.5
    second = first.copy()
    second[0, 0] = ~second[0, 0]
    found = paired_bootstrap(first, second)
    assert found.upper - found.lower < 0.005


@pytest.mark.parametrize("chunk", [1, 1 << 24])
def test_chunks_change_nothing_but_the_draw(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr("benchmarks.statistics._CHUNK_VALUES", chunk)
    first = np.random.default_rng(3).normal(0.1, 1, (4, 50))
    found = paired_bootstrap(first, np.zeros_like(first), resamples=2000)
    whole = paired_bootstrap(first, np.zeros_like(first), resamples=2000, seed=1)
    assert (found.lower, found.upper) == pytest.approx((whole.lower, whole.upper), rel=0.15)


def test_arms_of_other_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="the same rows"):
        paired_bootstrap(np.ones((1, 3), bool), np.ones((1, 4), bool))
    with pytest.raises(ValueError, match="at least one seed"):
        paired_bootstrap(np.ones((0, 3)), np.ones((0, 3)))


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
