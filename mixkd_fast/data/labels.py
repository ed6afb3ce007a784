"""What a label column may hold, and its way to class numbers, numbers or class probabilities.

Row numbers in messages count from 0 in the file or data set named (a header line is no row).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel
from numpy.typing import NDArray

from mixkd_fast.data.sources import Source
from mixkd_fast.data.tasks import quoted
from mixkd_fast.errors import DataError

MISSING = -1
"""Class number of a row without a hard label (null, "" or -1 in the file)."""
_SUM_TOLERANCE = 1e-3
_SHOWN_NAMES = 20


def infer_label_names(sources: Sequence[Source], column: str) -> tuple[str, ...]:
    """Class names in label order, from the training data: ClassLabel names, else "0".."C-1" for numbers and
    sorted distinct texts otherwise.

    Raises: DataError for fractions, gaps in the numbering, a mixture of numbers and texts, or a single class.
    """
    for source in sources:
        feature = source.rows.features[column]
        if isinstance(feature, ClassLabel):
            return tuple(feature.names)
    numbers: dict[int, _Seen] = {}
    texts: dict[str, _Seen] = {}
    for source in sources:
        values = _label_values(source, column)
        if pa.types.is_boolean(values.type):
            return ("false", "true")
        for value in pc.unique(values).to_pylist():
            seen = _Seen(source, column, values, value)
            number = _as_integer(value)
            if _is_missing(value):
                continue
            if number is not None:
                numbers.setdefault(number, seen)
            elif _is_number(value):
                raise DataError(f"{seen} is a number with a fraction; {_FRACTION}")
            else:
                texts.setdefault(str(value), seen)
    if not numbers and not texts:
        places = ", ".join(source.where for source in sources)
        raise DataError(f'{places}, column "{column}": no row has a label; at least two classes are needed')
    return _names_of(numbers, texts)


def class_numbers(source: Source, column: str, names: tuple[str, ...]) -> NDArray[np.int64]:
    """Class number of every row, MISSING where there is none: int64 [rows].

    Numbers are class numbers (unless all names are numbers themselves: then they are names), texts are names or
    class numbers, and a ClassLabel's names are matched by name, so that another order of the classes is no harm.
    Raises: DataError at the first row whose label is none of these.
    """
    feature = source.rows.features[column]
    values = _label_values(source, column)
    own_names: list[str] | None = None
    if isinstance(feature, ClassLabel):
        own_names = feature.names
        unknown = [name for name in feature.names if name not in names]
        if unknown:
            raise DataError(
                f'{source.where}, column "{column}" has the label names {shown(feature.names)}, the task has '
                f"{shown(names)}: {quoted(unknown)} is not among them. Set task.label_names to the names of the files"
            )
    distinct, row_values = _distinct(values)
    numbers = np.empty(len(distinct) + 1, dtype=np.int64)
    numbers[-1] = MISSING
    for index, value in enumerate(distinct):
        number = _class_of(value, names, own_names)
        if isinstance(number, str):
            row = int(np.flatnonzero(row_values == index)[0])
            raise DataError(f"{_place(source, row, column)} {value!r} {number}")
        numbers[index] = number
    return numbers[row_values]


def numbers(source: Source, column: str) -> NDArray[np.float32]:
    """Finite labels of a regression: float32 [rows].

    Raises: DataError at the first row whose label is not a finite number.
    """
    if isinstance(source.rows.features[column], ClassLabel):
        raise DataError(
            f'{source.where}, column "{column}" holds classes ({shown(source.rows.features[column].names)}), '
            'but the task is a regression; allowed: numbers, or task.kind "classification"'
        )
    values = _float_column(source, column, "label")
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        row = int(bad[0])
        value = source.column(column)[row].as_py()
        problem = "is missing" if value is None or value == "" else "is not finite"
        raise DataError(f"{_place(source, row, column)} {value!r} {problem}; allowed: finite numbers")
    return values.astype(np.float32)


def soft_labels(source: Source, columns: tuple[str, ...]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Class probabilities: float32 [rows, C], scaled to the sum 1 exactly, and which rows have them: bool [rows].

    A row has none if all its columns are empty. Raises: DataError at the first row that has some, is negative or
    not finite, or is further than 1e-3 from the sum 1.
    """
    table = np.stack([_float_column(source, column, "probability") for column in columns], axis=1)
    empty = np.isnan(table)
    has: NDArray[np.bool_] = np.logical_not(empty.all(axis=1))
    total = np.where(empty, 0.0, table).sum(axis=1)
    with np.errstate(invalid="ignore"):
        wrong = (has & empty.any(axis=1)) | (table < 0).any(axis=1)
        wrong |= has & ~(np.abs(total - 1) <= _SUM_TOLERANCE)
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        values = table[row].tolist()
        missing = [column for column, value in zip(columns, values, strict=True) if np.isnan(value)]
        problem = f"lack {quoted(missing)}" if missing else f"sum to {total[row]:.6g}"
        negative = [column for column, value in zip(columns, values, strict=True) if value < 0]
        problem = f"are negative in {quoted(negative)}" if negative else problem
        raise DataError(
            f"{source.where}, row {row} (counted from 0): the soft labels {values} of the columns {quoted(columns)} "
            f"{problem}; allowed: probabilities >= 0 of every class with the sum 1 (within {_SUM_TOLERANCE})"
        )
    scaled = np.divide(table, total[:, None], out=np.zeros_like(table), where=has[:, None])
    return scaled.astype(np.float32), has


_FRACTION = 'allowed: class numbers or names (task.kind "regression" takes any number)'


@dataclass(frozen=True)
class _Seen:
    """A label value where it was first met; its text, with the row looked up, begins an error message."""

    source: Source
    column: str
    values: pa.Array
    value: object

    def __str__(self) -> str:
        row = pc.index(self.values, pa.scalar(self.value, self.values.type)).as_py()
        return f"{_place(self.source, row, self.column)} {self.value!r}"


def _names_of(numbers: dict[int, _Seen], texts: dict[str, _Seen]) -> tuple[str, ...]:
    if numbers and texts:
        raise DataError(
            f"{next(iter(texts.values()))} is text, but {next(iter(numbers.values()))} is a number; "
            "allowed: only numbers, only names, or both with task.label_names set"
        )
    if len(numbers) + len(texts) < 2:
        only = next(iter([*numbers.values(), *texts.values()]))
        raise DataError(f"{only} is the only one in the training rows; at least two classes are needed")
    if texts:
        return tuple(sorted(texts))
    if sorted(numbers) != list(range(len(numbers))):
        extreme = min(numbers) if min(numbers) < 0 else max(numbers)
        raise DataError(
            f"{numbers[extreme]} is outside the range: the {len(numbers)} distinct labels are not numbered "
            f"0..{len(numbers) - 1}. Renumber them, or set task.label_names"
        )
    return tuple(str(number) for number in range(len(numbers)))


def _class_of(value: object, names: tuple[str, ...], own_names: list[str] | None) -> int | str:
    """The class number of a value, or what is wrong with it."""
    names_are_numbers = all(_as_integer(name) is not None for name in names)
    allowed = f"allowed: {shown(names)}" if names_are_numbers else f"allowed: 0..{len(names) - 1} or {shown(names)}"
    if own_names is not None:
        assert isinstance(value, int)
        if value == MISSING:
            return MISSING
        if not 0 <= value < len(own_names):
            return f"is outside the range; allowed: 0..{len(own_names) - 1} ({shown(own_names)})"
        return names.index(own_names[value])
    if isinstance(value, bool):
        return int(value) if len(names) == 2 else f"is true or false, but there are {len(names)} classes; {allowed}"
    if str(value) in names:
        return names.index(str(value))
    if _is_missing(value):
        return MISSING
    number = _as_integer(value)
    if number is None and _is_number(value):
        return f'is a number with a fraction; {allowed} (task.kind "regression" takes any number)'
    if number is None:
        return f"is {'text, where a number is expected' if names_are_numbers else 'not a label name'}; {allowed}"
    return number if not names_are_numbers and 0 <= number < len(names) else f"is outside the range; {allowed}"


def _label_values(source: Source, column: str) -> pa.Array:
    values = source.column(column)
    kind = values.type
    if pa.types.is_dictionary(kind):
        values, kind = values.dictionary_decode(), kind.value_type
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        filled = np.flatnonzero(~values.is_null().to_numpy(zero_copy_only=False))
        row = int(filled[0]) if filled.size else 0
        nan = "not a number" if filled.size and values[row].as_py() != values[row].as_py() else "of a fractional type"
        raise DataError(f"{_place(source, row, column)} {values[row].as_py()!r} is {nan} ({kind}); {_FRACTION}")
    if not _is_plain(kind):
        raise DataError(_mixed(source, column, _FRACTION))
    return values


def _float_column(source: Source, column: str, what: str) -> NDArray[np.float64]:
    """A numeric column, or texts that are numbers: float64 [rows], NaN where empty."""
    values = source.column(column)
    kind = values.type
    if pa.types.is_dictionary(kind):
        values, kind = values.dictionary_decode(), kind.value_type
    if pa.types.is_boolean(kind) or not (_is_plain(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)):
        raise DataError(_mixed(source, column, "allowed: numbers", what))
    if _is_text(kind):
        distinct, row_values = _distinct(values)
        parsed = np.full(len(distinct) + 1, np.nan)
        for index, text in enumerate(distinct):
            try:
                parsed[index] = float(text) if text.strip() else np.nan
            except ValueError as error:
                row = int(np.flatnonzero(row_values == index)[0])
                raise DataError(
                    f"{_place(source, row, column, what)} {text!r} is text, where a number is expected; "
                    f"allowed: a finite {'number' if what == 'label' else what}"
                ) from error
        return parsed[row_values]
    return np.asarray(pc.fill_null(pc.cast(values, pa.float64()), float("nan")).to_numpy(zero_copy_only=False))


def _mixed(source: Source, column: str, allowed: str, what: str = "label") -> str:
    """Words for a column whose values are not all of one plain kind."""
    values = source.rows[column][:]
    kinds = [type(value).__name__ for value in values]
    odd = next((row for row, kind in enumerate(kinds) if kind != kinds[0] and values[row] is not None), 0)
    other = f", where row 0 holds {kinds[0]}" if kinds[odd] != kinds[0] else ""
    return f"{_place(source, odd, column, what)} {values[odd]!r} is of the wrong kind ({kinds[odd]}{other}); {allowed}"


def _distinct(values: pa.Array) -> tuple[list[Any], NDArray[np.int64]]:
    """Distinct values in the order of their first row, and which of them each row holds (-1 for null)."""
    encoded = pc.dictionary_encode(values)
    indices = pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False)
    return encoded.dictionary.to_pylist(), indices.astype(np.int64)


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_plain(kind: pa.DataType) -> bool:
    return _is_text(kind) or any(test(kind) for test in (pa.types.is_integer, pa.types.is_boolean, pa.types.is_null))


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, str) and value.strip() in ("", "-1")) or _as_integer(value) == -1


def _as_integer(value: object) -> int | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, str):
        text = value.strip()
        digits = text.removeprefix("-")
        return int(text) if digits.isascii() and digits.isdecimal() else None
    return None


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return not isinstance(value, str) or value.strip().lower().lstrip("+-") not in ("nan", "inf", "infinity")


def shown(names: Sequence[str]) -> str:
    """Names for a message, the first ones only if there are many."""
    more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    return quoted(names[:_SHOWN_NAMES]) + more


def _place(source: Source, row: int, column: str, what: str = "label") -> str:
    return f'{source.where}, row {row} (counted from 0), column "{column}": {what}'
