"""Writing files as other programs would, and loading columns, for the tests of loading and of subsets."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from mixkd_fast.configuration import Task
from mixkd_fast.data.loading import Splits, load_splits
from mixkd_fast.errors import DataError

COLUMNS = ["text", "text_pair", "label", "row"]


def write(path: Path, columns: dict[str, list[Any]]) -> str:
    """Write a file of the kind its name says, as other programs would."""
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        Dataset.from_dict(columns).to_csv(path)
    elif path.suffix == ".tsv":
        lines = [list(columns), *(list(map(str, row.values())) for row in rows)]
        path.write_text("".join("\t".join(line) + "\n" for line in lines))
    else:
        Dataset.from_dict(columns).to_parquet(path)
    return str(path)


def load(train: dict[str, list[Any]], evaluation: dict[str, list[Any]] | None = None, **fields: Any) -> Splits:
    """Load columns handed over as objects."""
    evaluation = evaluation if evaluation is not None else train
    return load_splits(Task(**fields), Dataset.from_dict(train), Dataset.from_dict(evaluation))


def refused(words: list[str], *args: Any, error: type[Exception] = DataError, **fields: Any) -> None:
    """Loading fails with a message that has all these words."""
    with pytest.raises(error) as caught:
        load(*args, **fields)
    for word in words:
        assert word in str(caught.value)


def three(labels: list[Any]) -> dict[str, list[Any]]:
    return {"text": ["a", "b", "c"], "label": labels}
