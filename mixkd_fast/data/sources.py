"""Raw rows before anything is known about their meaning: local files, hub data sets, and objects handed over."""

import csv
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Value, load_dataset
from numpy.typing import NDArray

from mixkd_fast.data.tasks import GLUE, TaskSpec, nearest, quoted
from mixkd_fast.errors import DataError

FORMATS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".txt": "text",
}


@dataclass(frozen=True)
class Source:
    """Raw rows and the words that name them in an error message."""

    where: str
    rows: Dataset

    def column(self, name: str) -> pa.Array:
        """The values of a column as one Arrow array."""
        values = self.rows.select_columns([name]).with_format("arrow")[:][name]
        return values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values

    def require(self, column: str, field: str) -> None:
        """Raise DataError, listing what is there, if a column is missing."""
        if column not in self.rows.column_names:
            raise DataError(
                f'{self.where} has no column "{column}" (task.{field}){nearest(column, self.rows.column_names)}; '
                f"it has: {quoted(self.rows.column_names)}"
            )


def read_files(paths: tuple[str, ...], field: str) -> list[Source]:
    """Read local files, each as a source of its own.

    Args: field, the configuration field that lists them, for messages.
    Raises: DataError for a missing, unreadable, malformed or empty file and for an unknown kind of file.
    """
    return [_read_file(path, field) for path in paths]


def from_object(rows: object, argument: str) -> Source:
    """Rows handed over by a script.

    Raises: DataError if it is not a `datasets.Dataset`, or has no rows.
    """
    if not isinstance(rows, Dataset):
        splits = f" with the splits {quoted(map(str, rows))}: pick one" if isinstance(rows, Mapping) else ""
        raise DataError(f"{argument} is a {type(rows).__name__}{splits}; allowed: datasets.Dataset")
    return _not_empty(Source(argument, rows))


def read_hub(spec: TaskSpec, train: bool, evaluation: bool) -> tuple[Source | None, dict[str, Source]]:
    """The training split and the evaluation splits of the task's hub data set, whichever are wanted.

    Raises: DataError if it cannot be had (saying which local files would replace it) or lacks a split.
    """
    assert spec.hub is not None
    name = f'hub data set "{spec.hub}"' + (f' (configuration "{spec.hub_config}")' if spec.hub_config else "")
    try:
        found: Mapping[str, Dataset] = load_dataset(spec.hub, spec.hub_config, revision=spec.revision)
    except Exception as error:
        raise DataError(f"cannot load the {name}: {_reason(error)}\n{_local_instead(spec)}") from error

    def split(wanted: str) -> Source:
        if wanted not in found:
            raise DataError(
                f'the {name} has no split "{wanted}"{nearest(wanted, found)}; it has: {quoted(found)}. '
                "Use task.train_files and task.evaluation_files to choose files yourself"
            )
        return _not_empty(Source(f'{name}, split "{wanted}"', found[wanted]))

    wanted = spec.evaluation_splits
    if wanted is None:
        wanted = tuple(key for key in found if key.startswith(("validation", "dev", "val")))
        wanted = wanted or (("test",) if "test" in found else ("validation",))
    return (
        split("train") if train else None,
        {key: split(key) for key in wanted} if evaluation else {},
    )


def demo(train: bool, evaluation: bool) -> tuple[Source | None, dict[str, Source]]:
    """The embedded demo task."""
    from mixkd_fast.data.demo import demo_dataset

    return (
        Source('demo task, split "train"', demo_dataset("train")) if train else None,
        {"validation": Source('demo task, split "validation"', demo_dataset("validation"))} if evaluation else {},
    )


def texts_of(source: Source, column: str, field: str) -> pa.Array:
    """A column of texts. Raises: DataError at the first row that holds something else, or nothing."""
    source.require(column, field)
    values = source.column(column)
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    wrong_type = not any(
        test(values.type) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    )
    if wrong_type or values.null_count:
        raw = source.rows[column][:]
        row = next((row for row, value in enumerate(raw) if not isinstance(value, str)), 0)
        raise DataError(
            f'{source.where}, row {row} (counted from 0), column "{column}": {raw[row]!r} is '
            f"{'empty' if raw[row] is None else 'of type ' + type(raw[row]).__name__}; allowed: text (task.{field})"
        )
    return pc.cast(values, pa.large_string())


def is_blank(texts: pa.Array) -> NDArray[np.bool_]:
    """Which texts are empty, or white space alone: bool [rows]."""
    lengths = pc.utf8_length(pc.utf8_trim_whitespace(texts))
    return np.asarray(pc.equal(lengths, 0).to_numpy(zero_copy_only=False))


def _read_file(path: str, field: str) -> Source:
    file = Path(path).expanduser()
    where = f'file "{path}" (task.{field})'
    if not file.is_file():
        siblings = [entry.name for entry in file.parent.iterdir()] if file.parent.is_dir() else []
        raise DataError(f"{where} does not exist{nearest(file.name, siblings)}; relative paths start at {Path.cwd()}")
    if file.suffix not in FORMATS:
        raise DataError(f'{where} has the ending "{file.suffix}"; allowed: {quoted(FORMATS)}')
    if file.stat().st_size == 0:
        raise DataError(f"{where} is empty; at least one row is needed")
    try:
        options = _csv_options(file, where) if FORMATS[file.suffix] == "csv" else {}
        if FORMATS[file.suffix] == "text":
            options = {"sample_by": "document"}
        with _no_progress_bar():
            found = load_dataset(FORMATS[file.suffix], data_files={"rows": [str(file)]}, **options)
    except DataError:
        raise
    except Exception as error:
        if "corresponds to no data" in str(error):
            raise DataError(f"{where} is empty; at least one row is needed") from error
        raise DataError(f"{where} cannot be read: {_reason(error)}") from error
    return _not_empty(Source(where, found["rows"]))


def _csv_options(file: Path, where: str) -> dict[str, Any]:
    """Read every field as text, so that "NA" stays a word and a label's type does not change between chunks."""
    # GLUE's TSV files hold stray quotes, which are text.
    options: dict[str, Any] = {"keep_default_na": False, "na_filter": False}
    if file.suffix == ".tsv":
        options |= {"sep": "\t", "quoting": csv.QUOTE_NONE}
    # Two lines without a header: pandas then refuses a first row that is longer than the header, instead of
    # taking its first field for an index and shifting all columns.
    start = pd.read_csv(file, header=None, nrows=2, dtype=str, **options)
    header = [str(name) for name in start.iloc[0]]
    if len(set(header)) < len(header):
        raise DataError(f"{where} has two columns of the same name; it has: {quoted(header)}")
    if len(start) < 2:
        raise DataError(f"{where} has a header and no rows; at least one row is needed")
    return options | {"features": Features({name: Value("string") for name in header})}


def _not_empty(source: Source) -> Source:
    if len(source.rows) == 0:
        raise DataError(f"{source.where} is empty; at least one row is needed")
    return source


def _reason(error: BaseException) -> str:
    """The error and what caused it, in one line."""
    cause = error.__cause__ or error.__context__
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return text if cause is None else f"{text} ({type(cause).__name__}: {' '.join(str(cause).split())})"


def _local_instead(spec: TaskSpec) -> str:
    """What to put on the disk when the hub cannot be reached."""
    columns = [spec.text_column, spec.text_pair_column, spec.label_column]
    if spec.text_column is None:
        columns = ["sentence", spec.label_column]
    splits = ", ".join(f'"{split}": ["{split}.parquet"]' for split in spec.evaluation_splits or ("validation",))
    return (
        "Without network, put the data on this machine and name the files: "
        f'task.train_files = ["train.parquet"] and task.evaluation_files = {{{splits}}} '
        "(csv, tsv, jsonl, json or parquet, "
        f"with the columns {quoted(name for name in columns if name is not None)})"
        + ("" if spec.hub == GLUE else "; leave task.hub, task.hub_config and task.revision out")
    )


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Reading a local file is quick and happens on every rank: no bar for it."""
    was_disabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not was_disabled:
            datasets.enable_progress_bars()
