"""Extra training rows (back-translation, generated text): labelled by a teacher, filtered, counted.

Legend of shape suffixes: E extra rows as read, C classes.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from numpy.typing import NDArray
from scipy.special import softmax

from mixkd_fast.configuration import Task
from mixkd_fast.data.loading import Splits
from mixkd_fast.errors import DataError, ModelError


@dataclass(frozen=True)
class ExtraRows:
    """What became of the rows of `task.extra_train_files`. A dropped row counts once, under the first reason."""

    labels: str
    """"file" or "teacher"."""
    read: int
    low_confidence: int
    """Dropped by extra_min_confidence."""
    disagreeing: int
    """Dropped by extra_agreement."""
    over_limit: int
    """Dropped by extra_max_rows."""

    @property
    def kept(self) -> int:
        """Rows that are trained on."""
        return self.read - self.low_confidence - self.disagreeing - self.over_limit

    def facts(self) -> dict[str, str | int]:
        """For the run's data summary; every name begins with "extra_"."""
        return {
            "extra_labels": self.labels,
            "extra_rows_read": self.read,
            "extra_rows_low_confidence": self.low_confidence,
            "extra_rows_disagreeing": self.disagreeing,
            "extra_rows_over_limit": self.over_limit,
        }

    def describe(self) -> str:
        """One line for the start of a run."""
        dropped = {
            "of low confidence": self.low_confidence,
            "the teacher disagrees with": self.disagreeing,
            "over extra_max_rows": self.over_limit,
        }
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in dropped.items() if count)
        shown = f"{self.kept:,} of {self.read:,} extra rows kept" + (f" (dropped: {reasons})" if reasons else "")
        return shown + ("; labels from the teacher" if self.labels == "teacher" else "")


def select_extra_rows(
    task: Task, splits: Splits, logits_EC: NDArray[np.floating[Any]] | None
) -> tuple[Splits, ExtraRows]:
    """The splits with the extra rows that pass the task's filters, under the labels that it asks for.

    With p = softmax(logits) at temperature 1, a row passes if max p >= extra_min_confidence and, under extra_agreement,
    argmax p is its label; of those that pass, extra_max_rows are drawn (seeded by subset_seed). Under extra_labels
    "teacher" p becomes the row's soft label and argmax p its class; in a regression the one output is its label.

    Args: logits_EC, the teacher's of the extra rows, in their order ([E, 1] for a regression); None if the task does
    not ask the teacher.
    Raises: ModelError for logits that are not finite; DataError for another number of classes than the task's.
    """
    table: pa.Table = splits.train.with_format("arrow")[:].replace_schema_metadata(None)
    num_main, num_extra = len(table) - splits.num_extra_rows, splits.num_extra_rows
    main, extra = table.slice(0, num_main), table.slice(num_main)
    confident = agreeing = np.ones(num_extra, dtype=bool)
    if logits_EC is not None:
        _check_logits(logits_EC, num_extra, splits.spec.num_labels)
        if splits.spec.kind == "regression":
            extra = _replaced(extra, "label", pa.array(logits_EC[:, 0].astype(np.float32)))
        else:
            p_EC = softmax(logits_EC.astype(np.float64), axis=1)
            predicted = p_EC.argmax(axis=1)
            if task.extra_min_confidence is not None:
                confident = p_EC.max(axis=1) >= task.extra_min_confidence
            if task.extra_agreement:
                agreeing = predicted == extra["label"].to_numpy()
            if task.extra_labels == "teacher":
                extra = _replaced(extra, "label", pa.array(predicted.astype(np.int64)))
                extra = _replaced(extra, "soft_labels", _fixed_lists(p_EC.astype(np.float32)))
                main = _with_soft_labels(main, splits.spec.num_labels)
    passing = np.flatnonzero(confident & agreeing)
    kept = passing
    if task.extra_max_rows is not None and len(passing) > task.extra_max_rows:
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(task.subset_seed % 2**64)))
        kept = np.sort(rng.permutation(passing)[: task.extra_max_rows])
    counts = ExtraRows(
        labels=task.extra_labels,
        read=num_extra,
        low_confidence=int((~confident).sum()),
        disagreeing=int((confident & ~agreeing).sum()),
        over_limit=len(passing) - len(kept),
    )
    rows = Dataset(pa.concat_tables([main, extra.take(pa.array(kept)).select(main.column_names)]))
    return replace(splits, train=rows, num_extra_rows=len(kept)), counts


def _check_logits(logits_EC: NDArray[np.floating[Any]], num_rows: int, num_labels: int) -> None:
    if logits_EC.shape != (num_rows, num_labels):
        raise DataError(
            f"task.extra_train_files: the teacher gives {logits_EC.shape[1]} outputs for a row, and the task has "
            f"{num_labels}; only a teacher of this task can label or judge its rows"
        )
    bad = np.flatnonzero(~np.isfinite(logits_EC).all(axis=1))
    if bad.size:
        raise ModelError(f"teacher: gives logits that are not finite for extra row {int(bad[0])} (counted from 0)")


def _with_soft_labels(table: pa.Table, num_labels: int) -> pa.Table:
    """The table as it is if its rows have probabilities, else with their classes as one-hot ones."""
    if "soft_labels" in table.column_names:
        return table
    one_hot = np.eye(num_labels, dtype=np.float32)[table["label"].to_numpy()]
    return _replaced(table, "soft_labels", _fixed_lists(one_hot))


def _fixed_lists(values: NDArray[np.float32]) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])


def _replaced(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    if name not in table.column_names:
        return table.append_column(name, values)
    return table.set_column(table.column_names.index(name), name, values)
