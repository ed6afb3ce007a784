"""Lengths of the rows of a causal_lm task: packed blocks, or instructions from its local files."""

from dataclasses import replace

import numpy as np

from mixkd_fast.configuration import Config, Task
from mixkd_fast.data.language_tokens import tokenize_language_rows
from mixkd_fast.data.loading import load_splits
from mixkd_fast.data.prompts import PromptStyle
from mixkd_fast.data.tokenization import TokenRows
from mixkd_fast.errors import MixKDError
from mixkd_fast.planning.models import plan_tokenizer
from mixkd_fast.planning.row_lengths import LARGEST_FILES_BYTES, SAMPLED_ROWS, RowLengths, files_bytes, streamed_sample


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
    if task.streaming:
        tokens, num_rows = streamed_sample(config, tokenizer)
        return _measured(tokens, task, num_rows, f"{len(tokens):,} of {num_rows:,} streamed rows, tokenised")
    rows = load_splits(task).train
    chosen = rows.select(np.random.default_rng(0).permutation(len(rows))[:SAMPLED_ROWS])
    tokens = tokenize_language_rows(chosen, tokenizer, task.max_length, None, PromptStyle.of(task))
    # Blocks of packed texts, or rows that are not left out.
    count = max(1, round(len(rows) * len(tokens) / len(chosen)))
    what = "documents, packed" if "text" in rows.column_names else "instructions, tokenised"
    return _measured(tokens, task, count, f"{len(chosen):,} of the task's {len(rows):,} {what}")


def _measured(tokens: TokenRows, task: Task, num_rows: int, what: str) -> RowLengths:
    share = float(tokens.num_targets.sum() / tokens.lengths.sum())
    counts = np.bincount(tokens.lengths - 1)
    return RowLengths(counts, num_rows, task.max_length, f"{what}; {share:.0%} of the tokens are learnt", share)


def _full(task: Task, source: str) -> RowLengths:
    counts = np.zeros(task.max_length, dtype=np.int64)
    counts[-1] = 1
    lengths = RowLengths(counts, None, task.max_length, source, 1.0 - 1.0 / task.max_length)
    return replace(lengths, num_rows=task.train_rows)
