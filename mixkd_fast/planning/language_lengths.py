"""Lengths of the rows of a causal_lm task: packed blocks, or instructions from its local files."""

from dataclasses import replace

import numpy as np

from mixkd_fast.configuration import Config, Task
from mixkd_fast.data.language_tokens import tokenize_language_rows
from mixkd_fast.data.loading import load_splits
from mixkd_fast.data.prompts import PromptStyle
from mixkd_fast.errors import MixKDError
from mixkd_fast.planning.models import plan_tokenizer
from mixkd_fast.planning.row_lengths import LARGEST_FILES_BYTES, SAMPLED_ROWS, RowLengths, files_bytes


def language_row_lengths(config: Config) -> RowLengths:
    """Of a sample of the task's rows where files and tokenizer are at hand; else every row is as long as allowed.

    Raises: ConfigurationError or DataError if the task or its files are wrong.
    """
    task = config.task
    if task.train_files is None or files_bytes(task) > LARGEST_FILES_BYTES:
        return _full(task, "assumed, every row as long as task.max_length")
    try:
        tokenizer = plan_tokenizer(config)
    except MixKDError as error:
        reason = str(error).partition(";")[0]
        return _full(task, f"assumed, every row as long as task.max_length: the tokenizer is not here ({reason})")
    rows = load_splits(task).train
    chosen = rows.select(np.random.default_rng(0).permutation(len(rows))[:SAMPLED_ROWS])
    tokens = tokenize_language_rows(chosen, tokenizer, task.max_length, None, PromptStyle.of(task))
    share = float(tokens.num_targets.sum() / tokens.lengths.sum())
    # Blocks of packed texts, or rows that are not left out.
    count = max(1, round(len(rows) * len(tokens) / len(chosen)))
    what = "documents, packed" if "text" in rows.column_names else "instructions, tokenised"
    source = f"{len(chosen):,} of the task's {len(rows):,} {what}; {share:.0%} of the tokens are learnt"
    return RowLengths(np.bincount(tokens.lengths - 1), count, task.max_length, source, share)


def _full(task: Task, source: str) -> RowLengths:
    counts = np.zeros(task.max_length, dtype=np.int64)
    counts[-1] = 1
    lengths = RowLengths(counts, None, task.max_length, source, 1.0 - 1.0 / task.max_length)
    return replace(lengths, num_rows=task.train_rows)
