"""Comparing two students on the same evaluation rows over the same seeds.

Legend of shape suffixes: S seeds, N evaluation rows, R resamples.
"""

import base64
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, t

Values = NDArray[Any]
"""Figures of single rows [S, N]: whether the answer is right, or a loss."""
_CHUNK_VALUES = 1 << 24


@dataclass(frozen=True)
class Difference:
    """Mean of the first arm less mean of the second."""

    difference: float
    lower: float
    upper: float
    """Ends of the 95 % interval."""
    p_value: float
    """Two-sided, of no difference."""


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    """Mean and sample standard deviation over seeds (0 for one seed)."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def paired_bootstrap(first_SN: Values, second_SN: Values, resamples: int = 10_000, seed: int = 0) -> Difference:
    """Difference of means first - second with its 95 % interval over new seeds and new rows.

    D[s, n] = first[s, n] - second[s, n] is a mean, an effect of the seed, one of the row, and a rest: every seed is
    measured on the same rows, so both cross. A seed stands for everything it draws: initial weights, row order,
    dropout, lambda, and the subset of the training rows where there is one. With one seed the interval speaks of rows
    alone. The variance of the mean is (MS_s + MS_n - MS_e) / (S N), with the mean squares of the two-way table and no
    negative variance of seeds or rows (Searle, Casella and McCulloch 1992, "Variance Components"); it has nu degrees
    of freedom (Satterthwaite 1946).

    A resample draws S of the seeds' means and N of the rows' means with replacement. Both are scaled to their share of
    that variance first (Davison and Hinkley 1997, "Bootstrap Methods", 3.8): S drawn seeds vary only (S - 1) / S times
    as much as seeds do, and the rest is in the means of seeds and of rows. The 2.5 and 97.5 % points are moved away
    from the difference by t_nu / z, Student's quantile over the normal one, since few seeds say little of their own
    variance. The p value is Student's.

    Args: figures [S, N] of two arms, seed by seed and row by row.
    Raises: ValueError for arms of different shape, without a seed, or with fewer than two rows.
    """
    if first_SN.shape != second_SN.shape:
        raise ValueError(f"arms of different shape: {first_SN.shape} and {second_SN.shape}; the same rows are needed")
    if first_SN.ndim != 2 or len(first_SN) < 1 or first_SN.shape[1] < 2:
        raise ValueError(f"arms of shape {first_SN.shape}: [seeds, rows] with at least one seed and two rows is needed")
    difference_SN = first_SN.astype(np.float64) - second_SN.astype(np.float64)
    num_seeds, num_rows = difference_SN.shape
    mean = float(difference_SN.mean())
    seeds_S, rows_N = difference_SN.mean(1) - mean, difference_SN.mean(0) - mean
    rest_SN = difference_SN - mean - seeds_S[:, None] - rows_N
    squares = [num_rows * (seeds_S**2).sum(), num_seeds * (rows_N**2).sum(), (rest_SN**2).sum()]
    freedoms = np.maximum([num_seeds - 1, num_rows - 1, (num_seeds - 1) * (num_rows - 1)], 1)
    of_seeds, of_rows, of_rest = np.array(squares) / freedoms
    own_seeds, own_rows = of_seeds > of_rest, of_rows > of_rest  # else there is no effect of their own to be seen
    shares = np.array([own_seeds * of_seeds, own_rows * of_rows, (1 - own_seeds - own_rows) * of_rest])
    # Sums of the same terms in another order differ in their last bits: a difference of nothing is no difference.
    nothing = 1e-12 * max(1.0, float(np.abs(difference_SN).max()))
    mean = mean if abs(mean) > nothing else 0.0
    variance = shares.sum() / difference_SN.size
    if variance <= nothing**2:
        return Difference(mean, mean, mean, 0.0 if mean else 1.0)
    freedom = shares.sum() ** 2 / (shares**2 / freedoms).sum()
    rng = np.random.default_rng(seed)
    drawn_R = _means_of_draws(seeds_S, shares[0] / difference_SN.size, resamples, rng)
    drawn_R += _means_of_draws(rows_N, shares[1:].sum() / difference_SN.size, resamples, rng)
    if not drawn_R.any():  # seeds and rows have equal means, and only the rest differs
        drawn_R = rng.normal(0.0, np.sqrt(variance), resamples)
    lower, upper = mean + np.percentile(drawn_R, [2.5, 97.5]) * t.ppf(0.975, freedom) / norm.ppf(0.975)
    return Difference(mean, float(lower), float(upper), float(2 * t.sf(abs(mean) / np.sqrt(variance), freedom)))


def _means_of_draws(
    deviations: NDArray[np.float64], variance: float, resamples: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Means [R] of as many draws with replacement as there are deviations from 0, scaled to a variance."""
    num = len(deviations)
    spread = deviations.std() / np.sqrt(num)
    if not spread or variance <= 0:
        return np.zeros(resamples)
    # Equal ones are interchangeable: where there are few kinds, it is faster to draw how often each comes up.
    kinds, counts = np.unique(deviations, return_counts=True)
    few = 20 * len(kinds) < num
    chunk = max(1, _CHUNK_VALUES // (len(kinds) if few else num))
    sums = []
    for start in range(0, resamples, chunk):
        count = min(chunk, resamples - start)
        if few:
            sums.append(rng.multinomial(num, counts / num, size=count) @ kinds)
        else:
            sums.append(deviations[rng.integers(0, num, size=(count, num), dtype=np.int32)].sum(1))
    means: NDArray[np.float64] = np.concatenate(sums) / num * (np.sqrt(variance) / spread)
    return means


def holm(p_values: list[float]) -> list[float]:
    """p values adjusted for as many comparisons as there are (Holm 1979): below 0.05, the family errs once in 20.

    The k-th smallest of m, counted from 0, becomes the largest of (m - j) * p_j for j <= k, at most 1.
    """
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for position, number in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, (len(p_values) - position) * p_values[number])
        adjusted[number] = min(1.0, largest)
    return adjusted


def pack(correct: NDArray[np.bool_]) -> str:
    """Booleans as hexadecimal text, 8 rows per byte."""
    return np.packbits(correct).tobytes().hex()


def unpack(text: str, num_rows: int) -> NDArray[np.bool_]:
    """What `pack` packed."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), dtype=np.uint8))[:num_rows].astype(bool)


def pack_losses(losses: NDArray[np.floating[Any]]) -> str:
    """Losses of single rows [N], at most 65,504, as base64 text of fp16: three digits of each."""
    return base64.b64encode(np.minimum(losses, np.finfo(np.float16).max).astype("<f2").tobytes()).decode()


def unpack_losses(text: str) -> NDArray[np.float64]:
    """What `pack_losses` packed, fp64 [N]."""
    return np.frombuffer(base64.b64decode(text), dtype="<f2").astype(np.float64)
