"""Comparing two students on the same evaluation rows over the same seeds.

Legend of shape suffixes: S seeds, N evaluation rows, R resamples.
"""

import base64
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
    """Two-sided, of no difference; never below 2 / (resamples + 1)."""


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    """Mean and sample standard deviation over seeds (0 for one seed)."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def hierarchical_bootstrap(first_SN: Values, second_SN: Values, resamples: int = 10_000, seed: int = 0) -> Difference:
    """Difference of means first - second with its 95 % percentile interval over new seeds and new rows.

    D[s, n] = first[s, n] - second[s, n]. A resample draws S seeds and, on its own, N rows with replacement, and takes
    the mean of D over the drawn seeds x the drawn rows: every seed is measured on the same rows, so both ways cross
    (Owen 2007, "The pigeonhole bootstrap"). A seed stands for everything it draws: initial weights, row order,
    dropout, lambda, and the subset of the training rows where there is one. With one seed the interval speaks of rows
    alone. S drawn seeds vary (S - 1) / S times as much as seeds do, so few seeds give somewhat narrow intervals.

    Args: figures [S, N] of two arms, seed by seed and row by row.
    Raises: ValueError for arms of different shape, or without a row or a seed.
    """
    if first_SN.shape != second_SN.shape:
        raise ValueError(f"arms of different shape: {first_SN.shape} and {second_SN.shape}; the same rows are needed")
    if first_SN.ndim != 2 or not first_SN.size:
        raise ValueError(f"arms of shape {first_SN.shape}: [seeds, rows] with at least one of each is needed")
    difference_SN = first_SN.astype(np.float64) - second_SN.astype(np.float64)
    num_seeds, num_rows = difference_SN.shape
    rng = np.random.default_rng(seed)
    seeds_RS = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=resamples)
    # Rows that differ alike under every seed are interchangeable: only how often each kind comes up is drawn.
    kinds_SK, counts = np.unique(difference_SN, axis=1, return_counts=True)
    chunk = max(1, _CHUNK_VALUES // len(counts))
    drawn = [
        np.einsum(
            "rs,sk,rk->r",
            (some_RS := seeds_RS[start : start + chunk]).astype(np.float64),
            kinds_SK,
            rng.multinomial(num_rows, counts / num_rows, size=len(some_RS)).astype(np.float64),
            optimize=True,
        )
        for start in range(0, resamples, chunk)
    ]
    means_R = np.concatenate(drawn) / (num_seeds * num_rows)
    lower, upper = np.percentile(means_R, [2.5, 97.5])
    # Sums of the same terms in another order differ in their last bits: a difference of nothing is no difference.
    nothing = 1e-12 * max(1.0, float(np.abs(difference_SN).max()))
    tail = min(int((means_R <= nothing).sum()), int((means_R >= -nothing).sum()))
    p_value = min(1.0, 2 * (tail + 1) / (resamples + 1))
    return Difference(float(difference_SN.mean()), float(lower), float(upper), p_value)


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
