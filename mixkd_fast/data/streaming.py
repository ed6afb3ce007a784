"""Rows of a corpus that is larger than memory, read and tokenised while training, each rank its own part.

The order is a function of (seed, epoch). An epoch puts all blocks (see `shard_index`) in a random order, end to end,
and cuts this line into as many equal lanes as a step has micro-batches (over all ranks); the few rows that are left
sit that epoch out. A lane shuffles `window` rows at a time and gives them out in turn. Micro-batch m of every step
comes from lane m, wherever that micro-batch is computed: the rows of a step are the same for every number of ranks
that divides the number of micro-batches, and a rank reads the blocks of its own lanes alone. The position of a step is
computed from the index, so a resumed run reads from the window it stopped in.

In memory: per lane of this rank one window of token rows, and the block that was read last.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from mixkd_fast import distributed
from mixkd_fast.data.batching import Batch, Draw, Padding, micro_batches
from mixkd_fast.data.shard_index import ShardIndex
from mixkd_fast.data.tokenization import TokenRows
from mixkd_fast.errors import ConfigurationError
from mixkd_fast.mixing import Mixing, draw_lam

# Streams of random numbers, apart from those of `batching`.
_BLOCKS, _WINDOW, _PARTNERS, _LAM = 16, 17, 18, 19
_SAMPLE_ROWS = 256
_SAMPLED_BLOCKS = 8
_PER_TOKEN = ("tokens", "token_types")
_PER_ROW = ("labels", "soft_labels", "source_rows", "prompt_lengths")


@dataclass
class Reading:
    """What has been read so far, for reports and tests."""

    rows: int = 0
    """Rows tokenised; a row that two windows need is one each time."""
    blocks: int = 0
    most_rows_held: int = 0
    """Rows in memory at once, tokenised or not."""
    truncated: int = 0
    dropped: int = 0


class StreamedRows:
    """The training rows of a run that streams them: what `TokenRows` and `GlobalBatches` are to other runs.

    Only one thread may ask for rows. Whatever needs all rows at once is refused.
    """

    source_rows = None
    """Row numbers are those of the user's data."""

    def __init__(
        self,
        index: ShardIndex,
        tokenise: Callable[[pa.Table, str], TokenRows],
        *,
        batch_size: int,
        micro_batch_size: int,
        seed: int,
        window: int,
        max_length: int,
        mixing: Mixing | None = None,
    ) -> None:
        """Args:
            tokenise: raw rows and the words that name them in messages -> token rows, one for one.
            batch_size, micro_batch_size: rows of a step over all ranks, and of one micro-batch.
            window: rows of a lane that are shuffled together.

        Raises: ConfigurationError for fewer rows than one batch, and for partners from the whole data set.
        """
        if index.num_rows < batch_size:
            raise ConfigurationError(f"training.batch_size = {batch_size}: task.train_files have {index.num_rows} rows")
        if mixing is not None and mixing.pairing != "batch":
            raise ConfigurationError(
                f'method.pairing = "{mixing.pairing}": task.streaming has no rows but the batch\'s at hand; allowed: '
                '"batch" (here: of the same micro-batch)'
            )
        self.index, self.max_length = index, max_length
        self.content_hash = index.digest
        self.reading = Reading()
        self._tokenise, self._mixing, self._seed, self._window = tokenise, mixing, seed % 2**64, window
        self._batch_size, self._micro_batch_size = batch_size, micro_batch_size
        self.num_lanes = batch_size // micro_batch_size
        self._lane_rows = index.num_rows // self.num_lanes
        self._lanes: dict[int, _Lane] = {}
        self._orders: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    def __len__(self) -> int:
        return self.index.num_rows

    def rows_seen(self, step: int) -> int:
        """Rows of all steps before this one."""
        return step * self._batch_size

    def epoch(self, step: int) -> float:
        """Epochs that are over when this step begins."""
        return step * self._micro_batch_size / self._lane_rows

    def steps_in(self, epochs: float) -> int:
        """Optimizer steps of so many epochs, at least 1."""
        return max(1, int(np.ceil(epochs * self._lane_rows / self._micro_batch_size)))

    @cached_property
    def mean_length(self) -> float:
        """Tokens of a row on average, of the first rows of the first file."""
        count = min(_SAMPLE_ROWS, int(self.index.rows[0]))
        return self._block_rows(0, self.index.read(0), 0, count).mean_length

    def sample(self, count: int) -> TokenRows:
        """At most so many rows from random blocks of all files, some of each."""
        most, left, parts = -(-count // _SAMPLED_BLOCKS), count, []
        for block in np.random.default_rng(0).permutation(len(self.index.rows)).tolist():
            taken = min(left, max(most, -(-count // len(self.index.rows))), int(self.index.rows[block]))
            if taken == 0:
                break
            parts.append(self._block_rows(block, self.index.read(block), 0, taken))
            left -= taken
        return _joined(parts)

    @property
    def num_truncated(self) -> int:
        """Rows so far, of this rank, that were longer than max_length."""
        return self.reading.truncated

    @property
    def num_dropped(self) -> int:
        """Rows so far, of this rank, whose prompt leaves no room for an answer."""
        return self.reading.dropped

    def rows(self, step: int, lane: int) -> TokenRows:
        """The rows of one micro-batch; `source_rows` are their numbers, counted through all files."""
        start, left, parts = step * self._micro_batch_size, self._micro_batch_size, []
        source = self._lanes.setdefault(lane, _Lane())
        while left > 0:
            epoch, position = divmod(start, self._lane_rows)
            number, first = divmod(position, self._window)
            if source.window != (epoch, number):
                source.window, source.shuffled = (epoch, number), None  # the old one goes before the new one comes
                source.shuffled = self._read_window(source, lane, epoch, number)
                self._account()
            assert source.shuffled is not None
            end = min(first + left, len(source.shuffled))
            parts.append(_take(source.shuffled, slice(first, end)))
            start, left = start + end - first, left - (end - first)
        return _joined(parts)

    def batches(self, step: int, rank: int, world: int, padding: Padding) -> list[Batch]:
        """A rank's micro-batches of a step, in the order of accumulation, as `batching.micro_batches` gives them.

        Partners are rows of the same micro-batch. Means over the step's whole batch are those of each micro-batch
        until `share_means`.
        """
        made = []
        lam = None
        if self._mixing is not None:
            count = self._batch_size * self._mixing.mixed_rows
            lam = draw_lam(self._mixing, count, self._generator(_LAM, step)).reshape(-1, self._batch_size)
        for lane in range(rank, self.num_lanes, world):
            rows = self.rows(step, lane)
            ids, size = np.arange(len(rows)), len(rows)
            draw = Draw(ids, None, None)
            if self._mixing is not None and lam is not None:
                rng = self._generator(_PARTNERS, step, lane)
                partners = np.concatenate([rng.permutation(ids) for _ in range(self._mixing.mixed_rows)])
                draw = Draw(ids, partners, lam[:, lane * size : (lane + 1) * size].ravel())
            (batch,) = micro_batches(rows, draw, 0, 1, size, padding)
            batch.row_ids = torch.from_numpy(rows.source_rows[batch.row_ids.numpy()])
            made.append(batch)
        return made

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Of no use here. Raises: ConfigurationError."""
        raise self._refusal()

    @property
    def labels(self) -> NDArray[np.int64]:
        """Of no use here. Raises: ConfigurationError."""
        raise self._refusal()

    tokens = offsets = lengths

    def _refusal(self) -> ConfigurationError:
        return ConfigurationError(
            "task.streaming = true: this method or option needs all training rows at once, and they are read as "
            "training goes on; choose another, or task.streaming = false"
        )

    def _read_window(self, source: "_Lane", lane: int, epoch: int, number: int) -> TokenRows:
        """The rows of a lane's window in their shuffled order."""
        order, ends = self._order(epoch)
        low = lane * self._lane_rows + number * self._window
        high = min(low + self._window, (lane + 1) * self._lane_rows)
        parts = []
        while low < high:
            place = int(np.searchsorted(ends, low, side="right"))
            block, end = int(order[place]), min(int(ends[place]), high)
            first = low - int(ends[place] - self.index.rows[block])
            if source.block != block:
                source.block, source.table = block, None
                source.table = self.index.read(block)
                self.reading.blocks += 1
            parts.append(self._block_rows(block, source.table, first, end - low))
            low = end
        rows = _joined(parts)
        permutation = self._generator(_WINDOW, epoch, lane, number).permutation(len(rows))
        return _take(rows, permutation)

    def _block_rows(self, block: int, table: pa.Table, first: int, count: int) -> TokenRows:
        path, start = self.index.place(block)
        where = f'file "{path}" (task.train_files), from row {start + first} on'
        rows = self._tokenise(table.slice(first, count), where)
        numbers = self.index.first_rows[block] + first + np.arange(count)
        self.reading.rows += count
        self.reading.truncated += rows.num_truncated
        self.reading.dropped += rows.num_dropped
        return replace(rows, source_rows=numbers)

    def _order(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The blocks of an epoch in their order, and where in its line of rows each of them ends."""
        if epoch not in self._orders:
            while len(self._orders) >= 2:
                del self._orders[min(self._orders)]
            order = self._generator(_BLOCKS, epoch).permutation(len(self.index.rows))
            self._orders[epoch] = order, np.cumsum(self.index.rows[order])
        return self._orders[epoch]

    def _account(self) -> None:
        held = sum(lane.num_held for lane in self._lanes.values())
        self.reading.most_rows_held = max(self.reading.most_rows_held, held)

    def _generator(self, *key: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(np.random.SeedSequence(self._seed, spawn_key=key)))


@dataclass
class _Lane:
    """What a lane holds in memory."""

    window: tuple[int, int] | None = None
    shuffled: TokenRows | None = None
    block: int | None = None
    table: pa.Table | None = None

    @property
    def num_held(self) -> int:
        """Rows, tokenised or not."""
        return sum(0 if rows is None else len(rows) for rows in (self.shuffled, self.table))


def share_means(batches: Sequence[Batch]) -> None:
    """Bring the batches' means over one micro-batch to means over the step's whole batch. Collective.

    All micro-batches have equally many rows.
    """
    names = [field.name for field in fields(Batch) if field.name.startswith("mean_")]
    names = [name for name in names if getattr(batches[0], name) is not None]
    sums = [sum(getattr(batch, name) for batch in batches) for name in names]
    totals = distributed.sum_on_host(torch.tensor([*sums, len(batches)], dtype=torch.float64)).tolist()
    for batch in batches:
        for name, total in zip(names, totals[:-1], strict=True):
            setattr(batch, name, total / totals[-1])


def _take(rows: TokenRows, chosen: NDArray[np.int64] | slice) -> TokenRows:
    """Some of the rows, in the order given; copies, so that the rest can go."""
    numbers = np.arange(len(rows))[chosen]
    lengths = rows.lengths[numbers]
    offsets = _ends_to_offsets(np.cumsum(lengths))
    # Position i of the result is row i's start in the old tokens plus its distance from its start in the new ones.
    flat = np.repeat(rows.offsets[numbers] - offsets[:-1], lengths) + np.arange(offsets[-1])
    changes: dict[str, Any] = {name: array[flat] for name, array in _present(rows, _PER_TOKEN)}
    changes |= {name: array[numbers] for name, array in _present(rows, _PER_ROW)}
    return replace(rows, offsets=offsets, num_truncated=0, **changes)


def _joined(parts: Sequence[TokenRows]) -> TokenRows:
    """The rows of several, in turn."""
    if len(parts) == 1:
        return parts[0]
    lengths = np.concatenate([part.lengths for part in parts])
    names = [name for name, _ in _present(parts[0], _PER_TOKEN + _PER_ROW)]
    changes: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    return replace(parts[0], offsets=_ends_to_offsets(np.cumsum(lengths)), num_truncated=0, **changes)


def _present(rows: TokenRows, names: Sequence[str]) -> list[tuple[str, NDArray[Any]]]:
    return [(name, getattr(rows, name)) for name in names if getattr(rows, name) is not None]


def _ends_to_offsets(ends: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([[0], ends]).astype(np.int64)
