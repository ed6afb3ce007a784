"""Checked, uniform rows from wherever the data is, and the share of them a run trains on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from numpy.typing import NDArray

from mixkd_fast.configuration import Task
from mixkd_fast.data import labels as label_columns
from mixkd_fast.data import language_columns
from mixkd_fast.data.shards import rows_of_part
from mixkd_fast.data.sources import Source, demo, from_object, is_blank, read_files, read_hub, texts_of
from mixkd_fast.data.tasks import TaskSpec, detect_columns, resolve
from mixkd_fast.errors import ConfigurationError, DataError

_REGRESSION_BINS = 10


@dataclass(frozen=True)
class Splits:
    """A task's data. Every data set has the columns

    text (str), text_pair (str; pairs only), label (int64 class number, or float32 for a regression; -1 or NaN for
    an extra row that its teacher will label), soft_labels
    (C float32 with the sum 1; training rows only, if any of them has its own) and row (int64: the row's number in the
    split before a subset was drawn; extra training rows count on).
    Those of a causal language model have the columns of `language_columns` instead.
    """

    spec: TaskSpec
    train: Dataset
    evaluation: dict[str, Dataset]
    num_extra_rows: int
    """How many of the training rows, the last ones, come from `extra_train_files`."""


def load_splits(
    task: Task, train: Dataset | None = None, evaluation: Dataset | Mapping[str, Dataset] | None = None
) -> Splits:
    """Training and evaluation rows of a task, checked row by row.

    Args: train, evaluation: rows that replace those the task names; one evaluation data set is called "validation".
    Raises: ConfigurationError for contradictory fields; DataError naming the file or split, the column, the row
    (counted from 0), the value and what is allowed.
    """
    spec = resolve(task, in_memory=train is not None)
    if evaluation is None and spec.evaluation_files is None and (train is not None or spec.train_files is not None):
        replaced = "the training rows are passed as an object" if train is not None else "task.train_files is set"
        raise ConfigurationError(
            f'{replaced}, but task.evaluation_files is null: name the rows to evaluate on, as {{"validation": '
            '["dev.tsv"]}' + (", or pass evaluation" if train is not None else "")
        )
    train_sources, evaluation_sources = _open(spec, train, evaluation, want_train=True)
    if spec.kind == "causal_lm":
        return _language_splits(spec, train_sources, evaluation_sources)
    spec = detect_columns(spec, train_sources[0].rows.column_names, train_sources[0].where)
    extra_sources = read_files(spec.extra_train_files, "extra_train_files")
    labelled_sources = [*train_sources, *extra_sources] if spec.reads_extra_labels else train_sources
    soft_columns = _present_soft_columns(spec, labelled_sources)
    if spec.kind == "classification" and spec.label_names is None:
        spec = replace(spec, label_names=_label_names(spec, train_sources, soft_columns))
    if soft_columns and len(soft_columns) != spec.num_labels:
        raise ConfigurationError(
            f"task.soft_label_columns has {len(soft_columns)} columns, but there are {spec.num_labels} classes "
            f"({', '.join(spec.label_names or ())}): one column per class, in label order, is needed"
        )
    main = _concatenate([normalise(spec, source, soft_columns) for source in train_sources])
    main = _subset(spec, main)
    if spec.partition is not None:
        main = main.take(pa.array(rows_of_part(_strata(spec, main, _REGRESSION_BINS), spec.partition)))
    extra = [normalise(spec, source, soft_columns, spec.reads_extra_labels) for source in extra_sources]
    num_extra_rows = sum(len(table) for table in extra)
    num_train_rows = sum(len(source.rows) for source in train_sources)
    if extra:
        main = pa.concat_tables([main, _shift_rows(_concatenate(extra), num_train_rows)])
    return Splits(spec, Dataset(main), _evaluation_rows(spec, evaluation_sources), num_extra_rows)


def load_evaluation(
    task: Task, evaluation: Dataset | Mapping[str, Dataset] | None = None
) -> tuple[TaskSpec, dict[str, Dataset]]:
    """Evaluation rows alone, for measuring a finished model; the columns are those of `Splits`.

    Raises: as `load_splits`; ConfigurationError also if the class names are neither known nor in the data.
    """
    own_rows = evaluation is not None or task.evaluation_files is not None
    spec = resolve(task, in_memory=own_rows and task.train_files is None and task.hub is None)
    _, sources = _open(spec, None, evaluation, want_train=False)
    first = next(iter(sources.values()))[0]
    if spec.kind == "causal_lm":
        spec = language_columns.detect(spec, first)
        return spec, _language_evaluation(spec, sources)
    spec = detect_columns(spec, first.rows.column_names, first.where)
    if spec.kind == "classification" and spec.label_names is None:
        first.require(spec.label_column, "label_column")
        names = getattr(first.rows.features[spec.label_column], "names", None)
        if names is None:
            raise ConfigurationError(
                f'task.label_names is null and {first.where}, column "{spec.label_column}" carries no class names: '
                "set task.label_names to the model's classes, in label order"
            )
        spec = replace(spec, label_names=tuple(names))
    return spec, _evaluation_rows(spec, sources)


def _language_splits(
    spec: TaskSpec, train_sources: Sequence[Source], evaluation_sources: Mapping[str, Sequence[Source]]
) -> Splits:
    """Documents, or instructions and their answers."""
    spec = language_columns.detect(spec, train_sources[0])
    main = _subset(spec, _concatenate([language_columns.normalise(spec, source) for source in train_sources]))
    return Splits(spec, Dataset(main), _language_evaluation(spec, evaluation_sources), 0)


def _language_evaluation(spec: TaskSpec, sources: Mapping[str, Sequence[Source]]) -> dict[str, Dataset]:
    tables = {
        split: _concatenate([language_columns.normalise(spec, source) for source in of])
        for split, of in sources.items()
    }
    return {split: Dataset(table.slice(0, spec.evaluation_rows)) for split, table in tables.items()}


def stratified_rows(strata: NDArray[np.int64], num_wanted: int, seed: int) -> NDArray[np.int64]:
    """A seeded draw that keeps the shares of the strata: sorted row numbers, int64 [num_wanted].

    Every stratum gives at least one row; the rest follows the largest remainders. A larger draw of the same seed
    starts from the same rows of each stratum.
    Args: strata int64 [rows]; distinct strata <= num_wanted <= rows.
    """
    values, counts = np.unique(strata, return_counts=True)
    assert len(values) <= num_wanted <= len(strata)
    ideal = counts * (num_wanted / len(strata))
    quota = np.clip(np.floor(ideal).astype(np.int64), 1, counts)
    while quota.sum() != num_wanted:
        missing = quota.sum() < num_wanted
        open_strata = quota < counts if missing else quota > 1
        distance = np.where(open_strata, (ideal - quota) if missing else (quota - ideal), -np.inf)
        quota[int(np.argmax(distance))] += 1 if missing else -1
    chosen = []
    for value, number in zip(values, quota, strict=True):
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed % 2**64, spawn_key=(int(value),))))
        chosen.append(rng.permutation(np.flatnonzero(strata == value))[:number])
    return np.sort(np.concatenate(chosen))


def _open(
    spec: TaskSpec,
    train: Dataset | None,
    evaluation: Dataset | Mapping[str, Dataset] | None,
    want_train: bool,
) -> tuple[list[Source], dict[str, list[Source]]]:
    """The raw training sources (none unless wanted) and the raw evaluation sources of every split."""
    train_sources: list[Source] = []
    evaluation_sources: dict[str, list[Source]] = {}
    if train is not None:
        train_sources = [from_object(train, "train")]
    elif want_train and spec.train_files is not None:
        train_sources = read_files(spec.train_files, "train_files")
    if isinstance(evaluation, Mapping):
        if not evaluation:
            raise DataError("evaluation is {}; at least one data set is needed")
        evaluation_sources = {
            str(split): [from_object(rows, f'evaluation["{split}"]')] for split, rows in evaluation.items()
        }
    elif evaluation is not None:
        evaluation_sources = {"validation": [from_object(evaluation, "evaluation")]}
    elif spec.evaluation_files is not None:
        evaluation_sources = {
            split: read_files(files, f'evaluation_files["{split}"]') for split, files in spec.evaluation_files.items()
        }
    need_train, need_evaluation = want_train and not train_sources, not evaluation_sources
    if need_train or need_evaluation:
        if spec.hub is None and (spec.name != "demo" or spec.train_files is not None):
            raise ConfigurationError(
                'task.evaluation_files is null: name the files to evaluate on, as {"validation": ["dev.tsv"]}'
            )
        found = read_hub(spec, need_train, need_evaluation) if spec.hub else demo(need_train, need_evaluation)
        train_sources = [found[0]] if found[0] is not None else train_sources
        evaluation_sources |= {split: [source] for split, source in found[1].items()}
    return train_sources, evaluation_sources


def _label_names(spec: TaskSpec, sources: Sequence[Source], soft_columns: tuple[str, ...] | None) -> tuple[str, ...]:
    """Class names found in the training sources; the soft label columns name the classes if there is nothing else."""
    labelled = [source for source in sources if spec.label_column in source.rows.column_names]
    if soft_columns is not None and not labelled:
        return soft_columns
    for source in sources if soft_columns is None else labelled:
        source.require(spec.label_column, "label_column")
    return label_columns.infer_label_names(labelled, spec.label_column)


def _present_soft_columns(spec: TaskSpec, sources: Sequence[Source]) -> tuple[str, ...] | None:
    """The soft label columns; every training file has all of them or none, and at least one has them."""
    columns = spec.soft_label_columns
    if columns is None:
        return None
    having = [source for source in sources if set(columns) & set(source.rows.column_names)]
    for source in having or sources[:1]:
        for column in columns:
            source.require(column, "soft_label_columns")
    return columns


def normalise(spec: TaskSpec, source: Source, soft_columns: tuple[str, ...] | None, labelled: bool = True) -> pa.Table:
    """The uniform columns of one source (see `Splits`); `row` is the number in it. Unlabelled rows hold placeholders.

    Raises: as `load_splits`.
    """
    assert spec.text_column is not None
    columns = {"text": texts_of(source, spec.text_column, "text_column")}
    blank = is_blank(columns["text"])
    if spec.text_pair_column is not None:
        columns["text_pair"] = texts_of(source, spec.text_pair_column, "text_pair_column")
        blank &= is_blank(columns["text_pair"])
    if blank.any():
        raise DataError(
            f"{source.where}, row {int(np.argmax(blank))} (counted from 0): the text is empty "
            f'(column "{spec.text_column}"); at least one character is needed'
        )
    if not labelled:
        columns |= _placeholders(spec, len(source.rows), soft_columns)
    elif spec.kind == "regression":
        source.require(spec.label_column, "label_column")
        columns["label"] = pa.array(label_columns.numbers(source, spec.label_column))
    else:
        columns |= _class_columns(spec, source, soft_columns)
    columns["row"] = pa.array(np.arange(len(source.rows), dtype=np.int64))
    return pa.table(columns)


def _placeholders(spec: TaskSpec, num_rows: int, soft_columns: tuple[str, ...] | None) -> dict[str, pa.Array]:
    """Label columns that say nothing yet."""
    if spec.kind == "regression":
        return {"label": pa.array(np.full(num_rows, np.nan, dtype=np.float32))}
    columns = {"label": pa.array(np.full(num_rows, label_columns.MISSING, dtype=np.int64))}
    if soft_columns is not None:
        nothing = pa.array(np.zeros(num_rows * spec.num_labels, dtype=np.float32))
        columns["soft_labels"] = pa.FixedSizeListArray.from_arrays(nothing, spec.num_labels)
    return columns


def _class_columns(spec: TaskSpec, source: Source, soft_columns: tuple[str, ...] | None) -> dict[str, pa.Array]:
    assert spec.label_names is not None
    num_rows, num_labels = len(source.rows), spec.num_labels
    soft = np.zeros((num_rows, num_labels), dtype=np.float32)
    has_soft = np.zeros(num_rows, dtype=bool)
    if soft_columns is not None and soft_columns[0] in source.rows.column_names:
        soft, has_soft = label_columns.soft_labels(source, soft_columns)
    if has_soft.all() and spec.label_column not in source.rows.column_names:
        hard = np.full(num_rows, label_columns.MISSING, dtype=np.int64)
    else:
        source.require(spec.label_column, "label_column")
        hard = label_columns.class_numbers(source, spec.label_column, spec.label_names)
    # A row that only has probabilities counts under its most probable class where one class is needed.
    hard = np.where((hard == label_columns.MISSING) & has_soft, soft.argmax(axis=1), hard)
    unlabelled = np.flatnonzero(hard == label_columns.MISSING)
    if unlabelled.size:
        row = int(unlabelled[0])
        value = source.column(spec.label_column)[row].as_py()
        raise DataError(
            f'{source.where}, row {row} (counted from 0), column "{spec.label_column}": label {value!r} marks an '
            f"unlabelled row ({unlabelled.size} in all); allowed: 0..{num_labels - 1} or "
            f"{label_columns.shown(spec.label_names)}. Remove the rows without a label"
        )
    columns = {"label": pa.array(hard)}
    if soft_columns is not None:
        soft = np.where(has_soft[:, None], soft, np.eye(num_labels, dtype=np.float32)[hard])
        columns["soft_labels"] = pa.FixedSizeListArray.from_arrays(pa.array(soft.ravel()), num_labels)
    return columns


def _concatenate(tables: Sequence[pa.Table]) -> pa.Table:
    """One table whose `row` counts through all of them."""
    starts = np.cumsum([0, *(len(table) for table in tables)])
    return pa.concat_tables([_shift_rows(table, start) for table, start in zip(tables, starts, strict=False)])


def _shift_rows(table: pa.Table, start: int) -> pa.Table:
    position = table.column_names.index("row")
    return table.set_column(position, "row", pc.add(table["row"], pa.scalar(int(start), pa.int64())))


def _subset(spec: TaskSpec, table: pa.Table) -> pa.Table:
    """The stratified draw of train_rows or train_fraction, in the original order."""
    wanted = spec.train_rows
    field = f"task.train_rows is {wanted}"
    if spec.train_fraction is not None:
        wanted = max(1, round(spec.train_fraction * len(table)))
        field = f"task.train_fraction is {spec.train_fraction}, which makes {wanted}"
    if wanted is None or wanted == len(table):
        return table
    if wanted > len(table):
        raise DataError(f"{field}, but there are only {len(table)} training rows; allowed: 1..{len(table)}")
    strata = _strata(spec, table, min(_REGRESSION_BINS, wanted))
    if spec.kind == "classification":
        num_classes = len(np.unique(strata))
        if wanted < num_classes:
            raise DataError(
                f"{field} rows, but the training rows have {num_classes} classes and each needs one; "
                f"allowed: {num_classes}..{len(table)} rows"
            )
    return table.take(pa.array(stratified_rows(strata, wanted, spec.subset_seed)))


def _strata(spec: TaskSpec, table: pa.Table, bins: int) -> NDArray[np.int64]:
    """What a draw keeps the shares of: the classes, or bins of equally many rows of like label in a regression."""
    if spec.kind == "causal_lm":
        return np.zeros(len(table), dtype=np.int64)
    values: NDArray[Any] = table["label"].to_numpy()
    if spec.kind == "classification":
        return values
    ranks = np.empty(len(values), dtype=np.int64)
    ranks[np.argsort(values, kind="stable")] = np.arange(len(values))
    return ranks * bins // len(values)


def _evaluation_rows(spec: TaskSpec, sources: Mapping[str, Sequence[Source]]) -> dict[str, Dataset]:
    # Evaluation is measured against hard labels, so soft ones are not read.
    tables = {split: _concatenate([normalise(spec, source, None) for source in of]) for split, of in sources.items()}
    return {split: Dataset(table.slice(0, spec.evaluation_rows)) for split, table in tables.items()}
