"""Subsets of the training rows, evaluation alone, and real GLUE files."""

import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loading_cases import COLUMNS, load, refused, three, write

from mixkd_fast.configuration import Task
from mixkd_fast.data.loading import load_evaluation, load_splits, stratified_rows
from mixkd_fast.errors import ConfigurationError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets_cache")


def many(num_rows: int) -> dict[str, list[Any]]:
    labels = [0 if row % 10 else row // 10 % 2 + 1 for row in range(num_rows)]
    return {"text": [f"text {row}" for row in range(num_rows)], "label": labels}


@pytest.mark.parametrize(("fields", "count"), [({"train_rows": 100}, 100), ({"train_fraction": 0.25}, 250)])
def test_subset_is_stratified_seeded_and_in_order(fields: dict[str, Any], count: int) -> None:
    columns = many(1000)
    splits = load(columns, evaluation_rows=7, **fields)
    rows = splits.train["row"][:]
    assert len(rows) == count
    assert rows == sorted(set(rows))
    assert splits.train["text"][:] == [columns["text"][row] for row in rows]
    counts = Counter(splits.train["label"][:])
    assert counts == {0: 0.9 * count, 1: counts[1], 2: counts[2]}
    assert abs(counts[1] - counts[2]) <= 1
    assert load(columns, **fields).train["row"][:] == rows
    assert load(columns, subset_seed=1, **fields).train["row"][:] != rows
    assert splits.evaluation["validation"]["row"][:] == list(range(7))


def test_every_class_keeps_a_row_and_extra_rows_are_not_cut(tmp_path: Path) -> None:
    columns = {"text": [str(row) for row in range(100)], "label": [0] * 98 + [1, 2]}
    extra = write(tmp_path / "extra.csv", {"text": ["e", "f"], "label": [1, 1]})
    splits = load(columns, train_rows=3, extra_train_files=[extra])
    assert splits.train["label"][:] == [0, 1, 2, 1, 1]
    assert splits.train["row"][1:] == [98, 99, 100, 101]
    assert splits.num_extra_rows == 2


def test_subset_of_a_regression_covers_the_range() -> None:
    scores = np.random.default_rng(0).permutation(1000) / 200
    splits = load({"text": ["t"] * 1000, "label": scores.tolist()}, kind="regression", train_rows=50)
    counts = np.histogram(splits.train["label"][:], bins=10, range=(0, 5))[0]
    assert counts.tolist() == [5] * 10


def test_impossible_subsets_are_refused() -> None:
    refused(["task.train_rows is 4", "only 3 training rows", "1..3"], three([0, 1, 2]), train_rows=4)
    refused(["task.train_rows is 2", "3 classes", "3..3"], three([0, 1, 2]), train_rows=2)
    refused(["task.train_fraction is 0.1", "makes 1 rows", "3 classes"], three([0, 1, 2]), train_fraction=0.1)


@pytest.mark.parametrize("num_wanted", [4, 17, 60, 100])
def test_stratified_rows_keep_shares(num_wanted: int) -> None:
    strata = np.random.default_rng(1).choice(4, size=100, p=[0.7, 0.2, 0.07, 0.03]).astype(np.int64)
    strata[:4] = np.arange(4)
    rows = stratified_rows(strata, num_wanted, seed=3)
    assert len(set(rows.tolist())) == num_wanted
    counts, ideal = np.bincount(strata[rows], minlength=4), np.bincount(strata) * num_wanted / 100
    assert counts.min() >= 1
    assert (counts[ideal >= 1] <= np.ceil(ideal[ideal >= 1])).all()


def test_a_larger_draw_holds_the_smaller_one() -> None:
    strata = np.repeat([0, 1], [600, 400]).astype(np.int64)
    small, large = stratified_rows(strata, 10, seed=5), stratified_rows(strata, 100, seed=5)
    assert set(small.tolist()) < set(large.tolist())


def test_demo_task_loads_by_name() -> None:
    splits = load_splits(Task(name="demo", train_rows=30, evaluation_rows=9))
    assert (len(splits.train), len(splits.evaluation["validation"])) == (30, 9)
    assert splits.train.column_names == COLUMNS
    assert Counter(splits.train["label"][:]).keys() == {0, 1, 2}


def test_evaluation_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", three(["no", "yes", "no"]))
    spec, splits = load_evaluation(Task(evaluation_files={"dev": [path]}, label_names=["yes", "no"]))
    assert (spec.num_labels, splits["dev"]["label"][:]) == (2, [1, 0, 1])
    with pytest.raises(ConfigurationError, match=r"task\.label_names is null"):
        load_evaluation(Task(evaluation_files={"dev": [path]}))


@pytest.mark.parametrize(
    ("name", "num_rows", "labels"),
    [
        ("rte", 2490, {0: 1249, 1: 1241}),
        ("mrpc", 3668, {0: 1194, 1: 2474}),
        ("mnli", 26413, {0: 8910, 1: 8825, 2: 8678}),
    ],
)
def test_real_glue_files(name: str, num_rows: int, labels: dict[int, int]) -> None:
    folder = os.environ.get("MIXKD_TEST_DATA")
    if folder is None or not Path(folder, name).is_dir():
        pytest.skip(f"MIXKD_TEST_DATA names no folder with {name}/train.parquet")
    names = ["validation_matched", "validation_mismatched"] if name == "mnli" else ["validation"]
    files = {split: [f"{folder}/{name}/{split}.parquet"] for split in names}
    splits = load_splits(Task(name=name, train_files=[f"{folder}/{name}/train.parquet"], evaluation_files=files))
    assert len(splits.train) == num_rows
    assert Counter(splits.train["label"][:]) == labels
    assert list(splits.evaluation) == names


def test_real_regression_file() -> None:
    folder = os.environ.get("MIXKD_TEST_DATA")
    if folder is None or not Path(folder, "stsb").is_dir():
        pytest.skip("MIXKD_TEST_DATA names no folder with stsb/train.parquet")
    files = {"validation": [f"{folder}/stsb/validation.parquet"]}
    task = Task(name="stsb", train_files=[f"{folder}/stsb/train.parquet"], evaluation_files=files, train_fraction=0.1)
    splits = load_splits(task)
    assert len(splits.train) == 575
    assert np.mean(splits.train["label"][:]) == pytest.approx(2.701, abs=0.05)
