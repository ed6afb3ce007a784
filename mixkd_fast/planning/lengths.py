"""How long rows are, and how much padding their batches get: from the task's own local rows or MNLI's histogram."""

import json
from dataclasses import dataclass, replace
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray

from mixkd_fast.configuration import Config, Task
from mixkd_fast.data.length_batches import plan_batches
from mixkd_fast.data.loading import load_splits
from mixkd_fast.data.tokenization import tokenize_rows
from mixkd_fast.errors import MixKDError
from mixkd_fast.mixing import Mixing
from mixkd_fast.planning.language_lengths import language_row_lengths
from mixkd_fast.planning.models import plan_tokenizer
from mixkd_fast.planning.row_lengths import (
    LARGEST_FILES_BYTES,
    SAMPLED_ROWS,
    RowLengths,
    files_bytes,
    padded_width,
    streamed_sample,
)

_SAMPLED_BATCHES = 64
_KNOWN_ROWS = {
    "mnli": 392_702,
    "qqp": 363_846,
    "qnli": 104_743,
    "sst2": 67_349,
    "mrpc": 3_668,
    "rte": 2_490,
    "cola": 8_551,
    "stsb": 5_749,
}


@dataclass(frozen=True)
class BatchLengths:
    """A sample of micro-batches, as the models see them: [batches, rows], padding included."""

    clean: NDArray[np.int64]
    mixed: NDArray[np.int64]
    """[batches, rows * mixed_rows]; no columns without mixing."""
    real_tokens: float
    """Mean tokens of a clean row without padding."""

    @property
    def padding_overhead(self) -> float:
        """Share of padding in the clean rows: 0.25 means that a fifth of all positions is padding."""
        return float(self.clean.mean()) / self.real_tokens - 1.0


def mnli_lengths(max_length: int) -> RowLengths:
    """The shipped histogram of MNLI's pairs under a WordPiece tokenizer, rows cut at max_length tokens."""
    shipped = json.loads(files("mixkd_fast.planning").joinpath("mnli_lengths.json").read_text(encoding="utf-8"))
    counts = np.array(shipped["counts"], dtype=np.int64)
    return RowLengths(_cut(counts, max_length), None, max_length, "the shipped histogram of MNLI's pairs (WordPiece)")


def row_lengths(config: Config) -> RowLengths:
    """Lengths of the task's rows: a sample of its local rows if they are at hand, else MNLI's (or full rows of a LM).

    Raises: ConfigurationError or DataError if the task or its files are wrong.
    """
    task = config.task
    if task.kind == "causal_lm":
        return language_row_lengths(config)
    if not _is_local(task):
        known = mnli_lengths(task.max_length)
        return replace(known, num_rows=_num_rows(task, _KNOWN_ROWS.get(task.name)))
    try:
        tokenizer = plan_tokenizer(config)
    except MixKDError as error:
        known = mnli_lengths(task.max_length)
        why = f"{known.source}: the tokenizer of the task's own rows is not here ({error})"
        return replace(known, num_rows=_num_rows(task, None), source=why)
    if task.streaming:
        tokens, num_rows = streamed_sample(config, tokenizer)
        source = f"{len(tokens):,} of {num_rows:,} streamed rows, tokenised"
        return RowLengths(np.bincount(tokens.lengths - 1), num_rows, task.max_length, source)
    rows = load_splits(task).train
    chosen = rows.select(np.random.default_rng(0).permutation(len(rows))[:SAMPLED_ROWS])
    lengths = tokenize_rows(chosen, tokenizer, task.max_length, cache_dir=None).lengths
    counts = np.bincount(lengths - 1)
    source = f"{len(chosen):,} of the task's {len(rows):,} training rows, tokenised"
    return RowLengths(counts, len(rows), task.max_length, source)


def sample_batches(
    lengths: RowLengths,
    micro_batch_size: int,
    mixing: Mixing | None,
    is_length_planned: bool,
    batch_size: int,
    seed: int = 0,
) -> BatchLengths:
    """Micro-batches as the run makes them, with their padding.

    Args: is_length_planned = rows of like length are put together, and so are partners of the same batch; a
    micro-batch is as wide as its longest row or partner.
    """
    rng = np.random.default_rng(seed)
    lengths_N = lengths.draw(_SAMPLED_BATCHES * micro_batch_size, rng)
    mixed_rows = mixing.mixed_rows if mixing is not None else 0
    if is_length_planned:
        # The pool of a real epoch is deeper than this sample where micro-batches are small.
        lengths_N = np.concatenate([lengths_N, lengths.draw(max(0, 8192 - len(lengths_N)), rng)])
        plan = plan_batches(lengths_N, rows_per_batch=micro_batch_size, seed=seed, drop_last=True)
        batches = [lengths_N[plan.rows(batch)] for batch in range(plan.num_batches)]
        rows_BR = np.stack([batch for batch in batches if len(batch) == micro_batch_size])
    else:
        rows_BR = lengths_N.reshape(_SAMPLED_BATCHES, micro_batch_size)
    longest_B = rows_BR.max(axis=1)
    # In batches of like length a partner of the same batch is like the row, one of the whole data set is not.
    if not is_length_planned or (mixing is not None and mixing.pairing == "dataset"):
        partners = _num_partners(mixing, micro_batch_size, batch_size)
        others_BP = lengths.draw(len(rows_BR) * partners, rng).reshape(len(rows_BR), partners)
        longest_B = np.concatenate([rows_BR, others_BP], axis=1).max(axis=1)
    width_B = padded_width(longest_B, lengths.max_length)
    clean = np.repeat(width_B[:, None], micro_batch_size, axis=1)
    return BatchLengths(clean, np.tile(clean, (1, mixed_rows)), float(rows_BR.mean()))


def _num_partners(mixing: Mixing | None, micro_batch_size: int, batch_size: int) -> int:
    """Rows that a micro-batch holds only as partners of its clean rows."""
    if mixing is None:
        return 0
    outside = 1.0 if mixing.pairing == "dataset" else 1.0 - micro_batch_size / batch_size
    return round(mixing.mixed_rows * micro_batch_size * outside)


def _is_local(task: Task) -> bool:
    """Whether the training rows can be read here and now, quickly."""
    if task.train_files is None:
        return task.name == "demo" and task.hub is None
    return files_bytes(task) <= LARGEST_FILES_BYTES


def _num_rows(task: Task, known: int | None) -> int | None:
    """Training rows of a task whose data is not read."""
    if task.train_files is not None or task.hub is not None:
        known = None
    if task.train_rows is not None:
        return task.train_rows
    return None if known is None else max(1, round(known * (task.train_fraction or 1.0)))


def _cut(counts: NDArray[np.int64], max_length: int) -> NDArray[np.int64]:
    if max_length >= len(counts):
        return counts
    cut: NDArray[np.int64] = counts[:max_length].copy()
    cut[-1] += counts[max_length:].sum()
    return cut
