"""Comparing two classifiers on the same rows: paired bootstrap over rows, averaged over seeds."""

import numpy as np
from numpy.typing import NDArray

Correct = NDArray[np.bool_]


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    """Mean and sample standard deviation over seeds (0 for one seed)."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def paired_bootstrap(
    first_SN: Correct, second_SN: Correct, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """Difference of accuracies first - second with its 95 % interval.

    Args: correctness [seeds, rows] of two arms on the same rows, seed by seed. Rows are resampled with replacement
    (Efron's percentile interval); each resample takes the mean over seeds. The interval speaks of the rows drawn,
    not of new seeds.
    Returns: (difference, lower, upper).
    """
    if first_SN.shape != second_SN.shape:
        raise ValueError(f"arms of different shape: {first_SN.shape} and {second_SN.shape}; the same rows are needed")
    per_row_N = first_SN.astype(np.float64).mean(0) - second_SN.astype(np.float64).mean(0)
    rng = np.random.default_rng(seed)
    values, counts = np.unique(per_row_N, return_counts=True)
    # Resampling rows is drawing how often each distinct difference comes up.
    draws = rng.multinomial(len(per_row_N), counts / len(per_row_N), size=resamples) @ values / len(per_row_N)
    lower, upper = np.percentile(draws, [2.5, 97.5])
    return float(per_row_N.mean()), float(lower), float(upper)


def pack(correct: Correct) -> str:
    """Booleans as hexadecimal text, 8 rows per byte."""
    return np.packbits(correct).tobytes().hex()


def unpack(text: str, num_rows: int) -> Correct:
    """What `pack` packed."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), dtype=np.uint8))[:num_rows].astype(bool)
