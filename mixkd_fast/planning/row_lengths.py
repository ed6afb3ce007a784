"""The distribution of the training rows' lengths, as a plan needs it."""

from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixkd_fast.configuration import Config, Task
from mixkd_fast.data.batching import Padding
from mixkd_fast.data.loading import load_evaluation
from mixkd_fast.data.stream_loading import open_stream
from mixkd_fast.data.tokenization import TokenRows, default_cache_dir

SAMPLED_ROWS = 2000
"""Local rows that are tokenised for a plan."""
LARGEST_FILES_BYTES = 64 * 2**20
"""Local files that are larger together are not read for a plan."""


@dataclass(frozen=True)
class RowLengths:
    """The distribution of the training rows' lengths in tokens."""

    counts: NDArray[np.int64]
    """[longest]: counts[k] rows have k + 1 tokens."""
    num_rows: int | None
    """Rows of an epoch; None where they are not known before the data is loaded."""
    max_length: int
    """task.max_length: no row, and no padding, is longer."""
    source: str
    """Where this is known from."""
    target_share: float = 1.0
    """Of a causal_lm: share of the tokens that the loss is taken over."""

    @property
    def widest(self) -> int:
        """Positions of the widest batch."""
        return int(padded_width(np.array([self.longest]), self.max_length)[0])

    @property
    def mean(self) -> float:
        """Tokens of a mean row."""
        return float(np.average(np.arange(1, len(self.counts) + 1), weights=self.counts))

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return int(np.flatnonzero(self.counts)[-1]) + 1

    def draw(self, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Lengths of `count` random rows."""
        return 1 + rng.choice(len(self.counts), size=count, p=self.counts / self.counts.sum())


def padded_width(longest: NDArray[np.int64], max_length: int) -> NDArray[np.int64]:
    """Width of batches whose longest rows have these lengths: rounded up as the collation does it."""
    rounded = -(-longest // Padding.multiple) * Padding.multiple
    width: NDArray[np.int64] = np.maximum(longest, np.minimum(rounded, max_length))
    return width


def files_bytes(task: Task) -> int:
    """Size of the task's local training files that would have to be read for a plan.

    Of Parquet files that are streamed only their footers and some row groups are.
    """
    names = [*(task.train_files or ()), *task.extra_train_files]
    paths = [Path(path).expanduser() for path in names]
    if task.streaming:
        paths = [Path(found) for path in paths for found in glob(str(path)) if not found.endswith(".parquet")]
    return sum(path.stat().st_size for path in paths if path.is_file())


def streamed_sample(config: Config, tokenizer: Any) -> tuple[TokenRows, int]:
    """Some of the rows that a run would stream, as it would make them, and the number of all of them.

    Raises: as `open_stream`.
    """
    task = config.task
    spec, _ = load_evaluation(task)
    cache_dir = Path(task.cache_dir) if task.cache_dir else default_cache_dir()
    stream = open_stream(config, spec, tokenizer, config.training.batch_size, cache_dir)
    return stream.sample(SAMPLED_ROWS), len(stream)
