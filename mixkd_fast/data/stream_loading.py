"""The training rows of a task that streams them: its files, and how their raw rows become token rows."""

from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset

from mixkd_fast.configuration import Config, Task
from mixkd_fast.data import language_columns
from mixkd_fast.data.language_tokens import tokenize_language_rows
from mixkd_fast.data.loading import normalise
from mixkd_fast.data.prompts import PromptStyle
from mixkd_fast.data.shard_index import ShardIndex, open_shards
from mixkd_fast.data.sources import Source
from mixkd_fast.data.streaming import StreamedRows
from mixkd_fast.data.tasks import TaskSpec, nearest, quoted
from mixkd_fast.data.tokenization import TokenRows, tokenize_rows
from mixkd_fast.errors import ConfigurationError, DataError
from mixkd_fast.methods import Method


def check_streaming(config: Config, has_object: bool) -> None:
    """Raise ConfigurationError for what contradicts streaming. Args: has_object = train is a data set in memory."""
    task, training = config.task, config.training
    if task.train_files is None or has_object:
        raise ConfigurationError("task.streaming = true: reads task.train_files; give them, and no train object")
    excluded = ("train_fraction", "train_rows", "partition", "extra_train_files")
    given = [f"task.{name}" for name in excluded if getattr(task, name)]
    given += ["teacher.offline"] * (config.teacher is not None and config.teacher.offline is not None)
    given += [f'method "{config.method.name}"'] * (type(config.method).choose_rows is not Method.choose_rows)
    given += ["training.batching"] * (training.batching != "random")
    if given:
        raise ConfigurationError(
            f"task.streaming = true and {', '.join(given)} exclude each other: all rows would have to be read first; "
            "leave one of them out"
        )


def open_stream(config: Config, spec: TaskSpec, tokenizer: Any, micro_batch_size: int, cache_dir: Path) -> StreamedRows:
    """The streamed training rows of a task. Plain text of a causal language model is not packed: a document is a row.

    Args: spec, of the evaluation rows, whose columns and class names the training files share.
    Raises: as `open_shards` and `StreamedRows`.
    """
    task, training = config.task, config.training
    assert task.train_files is not None
    index = open_shards(task.train_files, cache_dir)
    soft_columns = _soft_columns(spec, index)
    style = PromptStyle.of(task)
    _require_named_input(task, index)

    def tokenise(table: pa.Table, where: str) -> TokenRows:
        if spec.kind == "causal_lm":
            rows = Dataset(language_columns.normalise(spec, Source(where, Dataset(table)), streamed=True))
            return tokenize_language_rows(rows, tokenizer, task.max_length, None, style, one_for_one=True)
        rows = Dataset(normalise(spec, Source(where, Dataset(table)), soft_columns))
        return tokenize_rows(rows, tokenizer, task.max_length, None)

    return StreamedRows(
        index,
        tokenise,
        batch_size=training.batch_size,
        micro_batch_size=micro_batch_size,
        seed=training.seed,
        window=task.streaming_window,
        max_length=task.max_length,
        mixing=config.method.mixing(),
    )


def _soft_columns(spec: TaskSpec, index: ShardIndex) -> tuple[str, ...] | None:
    if spec.soft_label_columns is None:
        return None
    missing = set(spec.soft_label_columns) - set(index.columns)
    if missing:
        raise DataError(
            f'file "{index.paths[0]}" (task.train_files) has no column "{min(missing)}" (task.soft_label_columns)'
        )
    return spec.soft_label_columns


def _require_named_input(task: Task, index: ShardIndex) -> None:
    """Blocks may lack the input column that the evaluation rows have; one that the user names must be somewhere."""
    if task.input_column is not None and task.input_column not in index.columns:
        raise DataError(
            f'no file of task.train_files has a column "{task.input_column}" (task.input_column)'
            f"{nearest(task.input_column, index.columns)}; they have: {quoted(index.columns)}"
        )
