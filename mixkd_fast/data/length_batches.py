"""Batches of rows of near-equal length: random from epoch to epoch, little padding, every rank with like work.

The plan of an epoch is a pure function of (lengths, options, seed, epoch), the same on every platform and for both
planners: `mixkd_fast._host` (C++) and the same steps in numpy. So any process can make it again, and a resumed one goes
on at `start_batch`. Batches of a fixed number of rows are made so:

1. All rows in a random order; `window` of them at a time join the pool of rows that have no batch yet.
2. The pool is sorted by length and cut into batches. Whole groups of batches leave the pool, the rest waits for the
   next window; at the end the rest is a group of its own, or dropped.
3. Groups change places, then the batches within each group.

Batches of a token budget differ in rows; so that groups do not, a group has batches of every length:

1. All rows in a random order, cut into windows of equally many rows, `window` or more, of several groups each.
2. A window is sorted by length. As many groups as it needs share its rows: it is cut into just as many batches, all of
   them filled to the same share of the budget.
3. Batches are dealt to groups from the shortest to the longest, one to each group in turn; the one of fewest rows goes
   to the group that has most so far. So two groups of a window differ by less rows than the largest batch has.
4. As 3. above.

Legend of shape suffixes: N rows, M batches, P rows of a pool, W rows of a window, S groups of a window.
"""

import bisect
import functools
import importlib
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Planner = Literal["auto", "host", "numpy"]
_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_ROWS, _GROUPS, _BATCHES = 0, 1, 2
# Batches are filled to so many 1024ths of the budget; in sums of 1 / rows, one is 2^20.
_FULL, _ONE = 1024, 2**20
_GROUPS_PER_WINDOW = 16


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
        window: rows that are sorted by length together; larger pads less and is less random. With tokens_per_batch more
            of them, if they fill less than 16 groups.
        group_size: batches of one optimizer step over all ranks, num_ranks * accumulation; they are of near-equal size,
            and so, with tokens_per_batch, are the groups. Batch g * group_size + i is the i-th of step g. A last group
            without enough batches is made whole by halving its largest ones, as far as it has rows.
        drop_last: leave out the rows that are left when no full group of full batches can be made of them: random ones
            of each epoch. With tokens_per_batch, where batches need not be full, there are such only where groups of a
            row per batch are left.
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
    if tokens_per_batch:
        widths_N = -(-lengths_N.astype(np.int64) // pad_multiple) * pad_multiple
        room_N = np.minimum(tokens_per_batch // widths_N, min(rows_per_batch or len(lengths_N), len(lengths_N)))
        batches = _batches_of_tokens(lengths_N, room_N, window, group_size, drop_last, seed, epoch)
    else:
        batches = _batches_of_rows(lengths_N, rows_per_batch, window, group_size, drop_last, seed, epoch)
    num_groups = len(batches) // group_size
    shuffled_batches: list[NDArray[np.int64]] = []
    for group in [*_permutation(seed, epoch, _GROUPS, 0, num_groups).tolist(), num_groups]:
        members = batches[group * group_size : (group + 1) * group_size]
        places = _permutation(seed, epoch, _BATCHES, group * group_size, len(members))
        shuffled_batches += [members[place] for place in places.tolist()]
    offsets = np.zeros(len(batches) + 1, dtype=np.int64)
    np.cumsum([len(batch) for batch in shuffled_batches], out=offsets[1:])
    return (np.concatenate(shuffled_batches) if batches else np.zeros(0, dtype=np.int64)), offsets


def _batches_of_rows(
    lengths_N: NDArray[np.int32],
    rows_per_batch: int,
    window: int,
    group_size: int,
    drop_last: bool,
    seed: int,
    epoch: int,
) -> list[NDArray[np.int64]]:
    """Groups of batches, before they change places."""
    num_rows = len(lengths_N)
    shuffled = _permutation(seed, epoch, _ROWS, 0, num_rows)
    if drop_last:
        # The rest is random rows; what sorting leaves are the longest ones, every epoch.
        num_rows -= num_rows % (rows_per_batch * group_size)
    pool_P = shuffled[:0]
    batches: list[NDArray[np.int64]] = []
    start = 0
    while start < num_rows:
        end = min(start + max(window, len(pool_P)), num_rows)
        pool_P = _by_length(np.concatenate([pool_P, shuffled[start:end]]), lengths_N)
        complete = len(pool_P) // rows_per_batch // group_size * group_size * rows_per_batch
        batches += np.split(pool_P[:complete], range(rows_per_batch, complete, rows_per_batch)) if complete else []
        pool_P = pool_P[complete:]
        start = end
    if len(pool_P) and not drop_last:
        cuts = [*range(rows_per_batch, len(pool_P), rows_per_batch), len(pool_P)]
        _split(cuts, group_size)
        batches += np.split(pool_P, cuts)[: len(cuts)]
    return batches


def _batches_of_tokens(
    lengths_N: NDArray[np.int32],
    room_N: NDArray[np.int64],
    window: int,
    group_size: int,
    drop_last: bool,
    seed: int,
    epoch: int,
) -> list[NDArray[np.int64]]:
    """Groups of batches, before they change places. Args: room_N = rows of a batch whose longest this row is."""
    num_rows = len(lengths_N)
    shuffled = _permutation(seed, epoch, _ROWS, 0, num_rows)
    about_groups = int((_ONE // room_N).sum()) // _ONE // group_size
    num_windows = max(1, min(num_rows // window, about_groups // _GROUPS_PER_WINDOW))
    bounds = [num_rows // group_size * place // num_windows * group_size for place in range(num_windows)]
    batches: list[NDArray[np.int64]] = []
    for start, end in pairwise([*bounds, num_rows]):
        rows_W = _by_length(shuffled[start:end], lengths_N)
        num_batches = -(-len(_greedy(_ends(room_N[rows_W], _FULL))) // group_size) * group_size
        rest = shuffled[:0]
        if num_batches > len(rows_W):
            # Not a row for every batch, which only the last window can come to: random rows are left.
            end, rest = end - len(rows_W) % group_size, shuffled[end - len(rows_W) % group_size : end]
            rows_W = _by_length(shuffled[start:end], lengths_N)
            num_batches = -(-len(_greedy(_ends(room_N[rows_W], _FULL))) // group_size) * group_size
        cuts = [0, *_even_cuts(room_N[rows_W], num_batches)]
        for batch in _dealt(np.diff(cuts), group_size):
            batches.append(rows_W[cuts[batch] : cuts[batch + 1]])
        batches += [] if drop_last else [rest[place : place + 1] for place in range(len(rest))]
    return batches


def _by_length(rows: NDArray[np.int64], lengths_N: NDArray[np.int32]) -> NDArray[np.int64]:
    """The same rows from the shortest to the longest; equally long ones stay in their order."""
    return rows[np.argsort(lengths_N[rows], kind="stable")]


def _ends(room_W: NDArray[np.int64], fill: int) -> NDArray[np.int64]:
    """[W]: where a batch ends that begins at this row of a sorted window, filled to fill / 1024 but for its one row."""
    places_W = np.arange(len(room_W))
    # A batch that ends behind row w may not begin before this; the later it ends, the later.
    begins_W = places_W + 1 - np.maximum(room_W * fill // _FULL, 1)
    ends_W: NDArray[np.int64] = np.searchsorted(begins_W, places_W, side="right")
    return ends_W


def _greedy(ends_W: NDArray[np.int64], begin: int = 0) -> list[int]:
    """Where the batches from row `begin` on end, each as large as it may be."""
    end_of = ends_W.tolist()
    cuts = []
    while begin < len(end_of):
        begin = end_of[begin]
        cuts.append(begin)
    return cuts


def _even_cuts(room_W: NDArray[np.int64], num_batches: int) -> list[int]:
    """Where the batches of a sorted window end, num_batches of them, filled alike.

    Args: num_batches = as many as full batches, or more, up to one for each row.
    """
    fill = bisect.bisect_left(range(_FULL + 1), True, key=lambda some: len(_greedy(_ends(room_W, some))) <= num_batches)
    looser_W = _ends(room_W, fill)
    cuts = _greedy(looser_W)
    if len(cuts) < num_batches:
        # One fill gives too few, the next one too many: the first batches by one and the others by the other are
        # between, and one batch more by the tighter gives no or one batch more.
        tighter = [0, *_greedy(_ends(room_W, fill - 1))]
        place = bisect.bisect_left(
            range(len(tighter)), num_batches, key=lambda some: some + len(_greedy(looser_W, tighter[some]))
        )
        cuts = tighter[1 : place + 1] + _greedy(looser_W, tighter[place])
    if len(cuts) > 1:
        # The last one is what is left: it takes of the one before it, up to half of both.
        both = cuts[-1] - ([0, *cuts])[-3]
        cuts[-2] = min(cuts[-2], cuts[-1] - min(both // 2, max(int(room_W[-1]) * fill // _FULL, 1)))
    return cuts


def _dealt(sizes_M: NDArray[np.int64], group_size: int) -> list[int]:
    """The numbers of batches, group after group, so that groups have like rows and batches of every length."""
    num_groups = len(sizes_M) // group_size
    rows_S = np.zeros(num_groups, dtype=np.int64)
    dealt = np.zeros((num_groups, group_size), dtype=np.int64)
    for turn in range(group_size):
        sizes_S = sizes_M[turn * num_groups : (turn + 1) * num_groups]
        fewest_first, most_first = np.argsort(sizes_S, kind="stable"), np.argsort(-rows_S, kind="stable")
        dealt[most_first, turn] = turn * num_groups + fewest_first
        rows_S[most_first] += sizes_S[fewest_first]
    numbers: list[int] = dealt.ravel().tolist()
    return numbers


def _split(cuts: list[int], group_size: int) -> None:
    """Halve the batch of most rows until there are group_size of them, or none has two rows."""
    while len(cuts) < group_size:
        sizes = [end - begin for begin, end in zip([0, *cuts[:-1]], cuts, strict=True)]
        largest = sizes.index(max(sizes))
        if sizes[largest] < 2:
            return
        cuts.insert(largest, cuts[largest] - sizes[largest] // 2)
