"""Which training rows belong to which shard: a pure function of the labels and a seed.

Legend of shape suffixes: N rows, K shards.
"""

import numpy as np
from numpy.typing import NDArray

from mixkd_fast.errors import DataError
from mixkd_fast.partition import Partition, Strategy


def rows_of_part(strata: NDArray[np.int64], partition: Partition) -> NDArray[np.int64]:
    """The sorted row numbers of the partition's own shard.

    Args: strata int64 [N], the rows' labels (bins of them in a regression).
    Raises: DataError if there are fewer rows than shards.
    """
    if partition.parts > len(strata):
        raise DataError(
            f"task.partition.parts is {partition.parts}, but there are only {len(strata)} training rows to divide; "
            f"allowed: 1..{len(strata)}"
        )
    shard_N = shard_of_rows(strata, partition.strategy, partition.parts, partition.alpha, partition.seed)
    return np.flatnonzero(shard_N == partition.part)


def shard_of_rows(
    strata: NDArray[np.int64], strategy: Strategy, num_shards: int, alpha: float, seed: int
) -> NDArray[np.int64]:
    """The shard of every row: int64 [N], each of 0..num_shards - 1 at least once.

    iid: a random order of the rows, cut into pieces whose sizes differ by at most one. quantity_skew: the same order
    cut into pieces of 1 + (N - K) q_k rows, q ~ Dirichlet(alpha), rounded by largest remainders. label_skew: for every
    stratum, in ascending order, its rows in random order are cut at the cumulative shares of its own q ~
    Dirichlet(alpha) (Hsu et al. 2019, arXiv 1909.06335); as long as a shard is empty, it gets a row of the largest one.

    Args: strata int64 [N]; num_shards <= N; alpha > 0.
    """
    num_rows = len(strata)
    assert 1 <= num_shards <= num_rows
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed % 2**64)))
    shard_N = np.empty(num_rows, dtype=np.int64)
    if strategy == "label_skew":
        for value in np.unique(strata):
            rows = rng.permutation(np.flatnonzero(strata == value))
            sizes = _rounded(_shares(rng, num_shards, alpha), len(rows))
            shard_N[rows] = np.repeat(np.arange(num_shards), sizes)
        _fill_empty(shard_N, num_shards, rng)
        return shard_N
    sizes = np.full(num_shards, num_rows // num_shards)
    sizes[: num_rows % num_shards] += 1
    order = rng.permutation(num_rows)
    if strategy == "quantity_skew":
        sizes = 1 + _rounded(_shares(rng, num_shards, alpha), num_rows - num_shards)
    shard_N[order] = np.repeat(np.arange(num_shards), sizes)
    return shard_N


def _shares(rng: np.random.Generator, num_shards: int, alpha: float) -> NDArray[np.float64]:
    return rng.dirichlet(np.full(num_shards, alpha))


def _rounded(shares_K: NDArray[np.float64], total: int) -> NDArray[np.int64]:
    """Whole numbers of the sum `total`, as near to the shares of it as largest remainders come: int64 [K]."""
    ideal = shares_K * total
    sizes = np.floor(ideal).astype(np.int64)
    missing = total - int(sizes.sum())
    sizes[np.argsort(sizes - ideal, kind="stable")[:missing]] += 1
    return sizes


def _fill_empty(shard_N: NDArray[np.int64], num_shards: int, rng: np.random.Generator) -> None:
    sizes = np.bincount(shard_N, minlength=num_shards)
    for shard in np.flatnonzero(sizes == 0):
        largest = int(np.argmax(sizes))
        shard_N[rng.choice(np.flatnonzero(shard_N == largest))] = shard
        sizes[largest] -= 1
        sizes[shard] += 1
