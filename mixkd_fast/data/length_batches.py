"""Batches of rows of near-equal length: random from epoch to epoch, little padding, every rank with like work.

The plan of an epoch is a pure function of (lengths, options, seed, epoch), the same on every platform and for both
planners: `mixkd_fast._host` (C++) and the same steps in numpy. So any process can make it again, and a resumed one goes
on at `start_batch`. The steps:

1. All rows in a random order; `window` of them at a time join the pool of rows that have no batch yet.
2. The pool is sorted by length and cut into batches, each as large as the limits allow. Whole groups of batches leave
   the pool, the rest waits for the next window; at the end the rest is a group of its own, or dropped.
3. Groups change places, then the batches within each group.

Legend of shape suffixes: N rows, M batches.
"""

import bisect
import functools
import importlib
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Planner = Literal["auto", "host", "numpy"]
_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_ROWS, _GROUPS, _BATCHES = 0, 1, 2


class BatchPlan(NamedTuple):
    """The batches of an epoch, in order."""

    order: NDArray[np.int64]
    """[N]: row numbers, batch after batch; fewer than all rows with drop_last or start_batch."""
    offsets: NDArray[np.int64]
    """[M + 1]: batch b is order[offsets[b] : offsets[b + 1]]."""

    @property
    def num_batches(self) -> int:
        """M"""
        return len(self.offsets) - 1

    def rows(self, batch: int) -> NDArray[np.int64]:
        """Row numbers of one batch, from the shortest row to the longest."""
        if not 0 <= batch < self.num_batches:
            raise ValueError(f"batch is {batch}; allowed: 0 to {self.num_batches - 1}")
        return self.order[self.offsets[batch] : self.offsets[batch + 1]]


def plan_batches(
    lengths: ArrayLike,
    *,
    tokens_per_batch: int | None = None,
    rows_per_batch: int | None = None,
    seed: int,
    epoch: int = 0,
    window: int = 8192,
    pad_multiple: int = 8,
    group_size: int = 1,
    drop_last: bool = False,
    start_batch: int = 0,
    planner: Planner = "auto",
) -> BatchPlan:
    """Plan the batches of an epoch.

    Args:
        lengths: tokens of each row, integers [N], at least 1.
        tokens_per_batch: limit of rows * width, padding counted; the width of a batch is its longest row, rounded up
            to a multiple of pad_multiple. None: no limit.
        rows_per_batch: limit of rows. None: no limit; one of the two limits is needed.
        seed, epoch: 0 to 2^64 - 1; another epoch gives other batches.
        window: rows that are sorted by length together; larger pads less and is less random.
        group_size: batches of one optimizer step over all ranks, num_ranks * accumulation; they are of near-equal size.
            Batch g * group_size + i is the i-th of step g. A last group without enough batches is made whole by halving
            its largest ones, as far as it has rows.
        drop_last: leave out the rows that are left when no full group of full batches can be made of them: random ones
            of each epoch; with tokens_per_batch, where their number is not known, the longest of the last window.
        start_batch: the plan from this batch on: a resumed run takes the batches that it has not seen.
        planner: "host" is compiled, "numpy" makes the same plan a few times slower; "auto" takes the first there is.
    Raises: ValueError for an option or length out of range; RuntimeError, with the reason, if "host" is not there.
    """
    lengths_N = _checked_lengths(lengths)
    _check("tokens_per_batch", tokens_per_batch, 1, optional=True)
    _check("rows_per_batch", rows_per_batch, 1, optional=True)
    if tokens_per_batch is None and rows_per_batch is None:
        raise ValueError("tokens_per_batch and rows_per_batch are None; allowed: at least one of them a number")
    _check("window", window, 1)
    _check("pad_multiple", pad_multiple, 1)
    _check("group_size", group_size, 1)
    _check("seed", seed, 0, 2**64 - 1)
    _check("epoch", epoch, 0, 2**64 - 1)
    if tokens_per_batch is not None and len(lengths_N):
        longest = int(lengths_N.argmax())
        width = -(-int(lengths_N[longest]) // pad_multiple) * pad_multiple
        if width > tokens_per_batch:
            raise ValueError(
                f"tokens_per_batch is {tokens_per_batch}; allowed: at least {width}, the padded length of row {longest}"
            )
    if planner not in ("auto", "host", "numpy"):
        raise ValueError(f"planner is {planner!r}; allowed: auto, host, numpy")
    module, reason = _host()
    if planner == "host" and module is None:
        raise RuntimeError(f"planner 'host' is not available: {reason}")
    plan = _plan_in_numpy if planner == "numpy" or module is None else module.plan_batches
    order, offsets = plan(
        lengths_N, tokens_per_batch or 0, rows_per_batch or 0, window, pad_multiple, group_size, drop_last, seed, epoch
    )
    _check("start_batch", start_batch, 0, len(offsets) - 1)
    first = offsets[start_batch]
    return BatchPlan(order[first:], offsets[start_batch:] - first)


def why_not_compiled() -> str:
    """Why "auto" takes the numpy planner, or "" where it takes the compiled one."""
    return _host()[1]


@functools.cache
def _host() -> tuple[Any, str]:
    try:
        return importlib.import_module("mixkd_fast._host"), ""
    except ImportError as error:
        return None, f"mixkd_fast._host cannot be loaded: {error}"


def _check(name: str, value: Any, lowest: int, highest: int = 2**62, optional: bool = False) -> None:
    if optional and value is None:
        return
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or not lowest <= value <= highest:
        raise ValueError(f"{name} is {value!r}; allowed: {'None or ' if optional else ''}{lowest} to {highest}")


def _checked_lengths(lengths: ArrayLike) -> NDArray[np.int32]:
    array = np.asarray(lengths)
    if array.ndim != 1 or not (np.issubdtype(array.dtype, np.integer) or array.size == 0):
        raise ValueError(f"lengths is {array.dtype} of shape {array.shape}; allowed: integers of shape [rows]")
    if array.size and (array.min() < 1 or array.max() > 2**30):
        row = int(np.argmax((array < 1) | (array > 2**30)))
        raise ValueError(f"lengths[{row}] is {array[row]}; allowed: 1 to {2**30}")
    return np.ascontiguousarray(array, dtype=np.int32)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The output function of splitmix64 (Steele, Lea and Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return mixed


def _mix_one(x: int) -> int:
    return int(_mix(np.array([x & _MASK], dtype=np.uint64))[0])


def _permutation(seed: int, epoch: int, purpose: int, first: int, count: int) -> NDArray[np.int64]:
    """0 .. count - 1 sorted by one random number each."""
    stream = _mix_one(_mix_one(_mix_one(seed + _GOLDEN) + epoch) + purpose)
    numbers = np.arange(first + 1, first + count + 1, dtype=np.uint64)
    keys = _mix(np.array([stream], dtype=np.uint64) + numbers * np.uint64(_GOLDEN))
    return np.argsort(keys, kind="stable")


def _plan_in_numpy(
    lengths_N: NDArray[np.int32],
    tokens_per_batch: int,
    rows_per_batch: int,
    window: int,
    pad_multiple: int,
    group_size: int,
    drop_last: bool,
    seed: int,
    epoch: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    num_rows = len(lengths_N)
    widths_N = -(-lengths_N.astype(np.int64) // pad_multiple) * pad_multiple
    most_rows, most_tokens = rows_per_batch or num_rows + 1, tokens_per_batch or 2**62
    shuffled = _permutation(seed, epoch, _ROWS, 0, num_rows)
    if drop_last and not tokens_per_batch:
        # Where the rest is known beforehand it is random rows; what sorting leaves are the longest ones, every epoch.
        num_rows -= num_rows % (rows_per_batch * group_size)
    pool = shuffled[:0]
    batches: list[NDArray[np.int64]] = []
    start = 0
    while start < num_rows:
        end = min(start + max(window, len(pool)), num_rows)
        pool = np.concatenate([pool, shuffled[start:end]])
        pool = pool[np.argsort(lengths_N[pool], kind="stable")]
        cuts = _cut(widths_N[pool], most_tokens, most_rows)
        last_rows = cuts[-1] - ([0, *cuts])[-2] + 1
        is_full = last_rows > most_rows or last_rows * int(widths_N[pool[-1]]) > most_tokens
        complete = (len(cuts) - (not is_full)) // group_size * group_size
        batches += np.split(pool, cuts[:complete])[:complete]
        pool = pool[cuts[complete - 1] if complete else 0 :]
        start = end
    if len(pool) and not drop_last:
        cuts = _cut(widths_N[pool], most_tokens, most_rows)
        _split(cuts, group_size)
        batches += np.split(pool, cuts)[: len(cuts)]

    num_groups = len(batches) // group_size
    shuffled_batches: list[NDArray[np.int64]] = []
    for group in [*_permutation(seed, epoch, _GROUPS, 0, num_groups).tolist(), num_groups]:
        members = batches[group * group_size : (group + 1) * group_size]
        places = _permutation(seed, epoch, _BATCHES, group * group_size, len(members))
        shuffled_batches += [members[place] for place in places.tolist()]
    offsets = np.zeros(len(batches) + 1, dtype=np.int64)
    np.cumsum([len(batch) for batch in shuffled_batches], out=offsets[1:])
    return (np.concatenate(shuffled_batches) if batches else shuffled[:0]), offsets


def _cut(widths: NDArray[np.int64], most_tokens: int, most_rows: int) -> list[int]:
    """Where the batches of sorted rows end: each takes as many rows as it may."""
    width_of = widths.tolist()
    cuts = []
    begin = 0
    while begin < len(width_of):
        # A batch may not take more rows than if all of them were as short as its first.
        highest = min(begin + most_rows, begin + most_tokens // width_of[begin], len(width_of))
        following = range(begin + 1, highest + 1)
        # Rows and width both grow: the ends that exceed the limit come after all those that do not.
        begin += bisect.bisect_right(following, most_tokens, key=lambda end: (end - begin) * width_of[end - 1])
        cuts.append(begin)
    return cuts


def _split(cuts: list[int], group_size: int) -> None:
    """Halve the batch of most rows until there are group_size of them, or none has two rows."""
    while len(cuts) < group_size:
        sizes = [end - begin for begin, end in zip([0, *cuts[:-1]], cuts, strict=True)]
        largest = sizes.index(max(sizes))
        if sizes[largest] < 2:
            return
        cuts.insert(largest, cuts[largest] - sizes[largest] // 2)
