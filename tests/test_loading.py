"""Loading: files of every kind, labels of every kind, subsets, and a message for everything that can be wrong."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from loading_cases import COLUMNS, load, refused, three, write

from mixkd_fast.configuration import Task
from mixkd_fast.data.loading import load_splits
from mixkd_fast.errors import ConfigurationError, DataError

ROWS = {
    "premise": ["a cat sat", 'a "dog', "NA", "two, three"],
    "hypothesis": ["x", "y y", "null", "w"],
    "label": [0, 1, 2, 1],
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets_cache")


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path / f"rows{ending}", ROWS)
    splits = load_splits(Task(train_files=[path], evaluation_files={"dev": [path, path]}))
    assert splits.train.column_names == COLUMNS
    assert splits.train["text"][:] == ROWS["premise"]
    assert splits.train["text_pair"][:] == ROWS["hypothesis"]
    assert splits.train["label"][:] == [0, 1, 2, 1]
    assert splits.spec.label_names == ("0", "1", "2")
    assert splits.train.features["label"].dtype == "int64"
    assert splits.evaluation["dev"]["row"][:] == list(range(8))
    assert splits.evaluation["dev"]["text"][:] == ROWS["premise"] * 2


def test_known_task_reads_class_label_files(tmp_path: Path) -> None:
    features = Features(
        {
            "sentence1": Value("string"),
            "sentence2": Value("string"),
            "label": ClassLabel(names=["entailment", "not_entailment"]),
        }
    )
    rows = Dataset.from_dict({"sentence1": ["a", "b"], "sentence2": ["c", "d"], "label": [1, 0]}, features=features)
    rows.to_parquet(tmp_path / "rte.parquet")
    path = str(tmp_path / "rte.parquet")
    splits = load_splits(Task(name="rte", train_files=[path], evaluation_files={"validation": [path]}))
    assert splits.train["label"][:] == [1, 0]
    assert splits.spec.label_names == ("entailment", "not_entailment")


@pytest.mark.parametrize(
    ("labels", "names", "numbers", "expected_names"),
    [
        ([2, 0, 1], None, [2, 0, 1], ("0", "1", "2")),
        (["2", "0", "1"], None, [2, 0, 1], ("0", "1", "2")),
        (["no", "yes", "maybe"], None, [1, 2, 0], ("maybe", "no", "yes")),
        (["no", "yes", "maybe"], ["yes", "no", "maybe"], [1, 0, 2], ("yes", "no", "maybe")),
        (["1", "yes", "2"], ["yes", "no", "maybe"], [1, 0, 2], ("yes", "no", "maybe")),
        ([True, False, True], None, [1, 0, 1], ("false", "true")),
        ([True, False, True], ["bad", "good"], [1, 0, 1], ("bad", "good")),
        ([-1, 1, 0], ["-1", "0", "1"], [0, 2, 1], ("-1", "0", "1")),
        ([5, 1, 5], ["1", "5"], [1, 0, 1], ("1", "5")),
    ],
)
def test_labels_become_class_numbers(
    labels: list[Any], names: list[str] | None, numbers: list[int], expected_names: tuple[str, ...]
) -> None:
    splits = load({"text": ["a", "b", "c"], "label": labels}, label_names=names)
    assert splits.train["label"][:] == numbers
    assert splits.spec.label_names == expected_names
    assert splits.spec.num_labels == len(expected_names)


def test_class_labels_in_another_order_are_matched_by_name() -> None:
    def rows(names: list[str]) -> Dataset:
        features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
        return Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features)

    splits = load_splits(Task(), rows(["no", "yes"]), rows(["yes", "no"]))
    assert splits.train["label"][:] == [0, 1]
    assert splits.evaluation["validation"]["label"][:] == [1, 0]
    with pytest.raises(DataError) as error:
        load_splits(Task(), rows(["no", "yes"]), {"dev": rows(["no", "maybe"])})
    for word in ['evaluation["dev"]', '"label"', '"no", "maybe"', '"no", "yes"', "task.label_names"]:
        assert word in str(error.value)


@pytest.mark.parametrize("labels", [[0, 3, 5], [0.0, 3.0, 5.0], ["0", " 3.0", "5e0"]])
def test_regression_takes_numbers(labels: list[Any]) -> None:
    splits = load({"text": ["a", "b", "c"], "label": labels}, kind="regression")
    assert splits.train.features["label"].dtype == "float32"
    assert splits.train["label"][:] == [0.0, 3.0, 5.0]
    assert splits.spec.num_labels == 1


NAMES = ["no", "yes"]
BAD_LABELS: list[tuple[list[Any], dict[str, Any], list[str]]] = [
    ([0, 1, 2], {"label_names": NAMES}, ["row 2", "label 2", "outside the range", "0..1", '"no", "yes"']),
    ([0, -2, 1], {"label_names": NAMES}, ["row 1", "label -2", "outside the range", "0..1"]),
    (["0", "2", "1"], {"label_names": NAMES}, ["row 1", "'2'", "outside the range"]),
    (["no", "yes", "nope"], {"label_names": NAMES}, ["row 2", "'nope'", "not a label name", '"no", "yes"']),
    ([1, 7, 1], {"label_names": ["1", "5"]}, ["row 1", "label 7", "outside the range", 'allowed: "1", "5"']),
    (["0", "x", "1"], {"label_names": ["0", "1"]}, ["row 1", "'x'", "text, where a number is expected"]),
    ([0.0, 1.0, 0.5], {"label_names": NAMES}, ["row 0", "label 0.0", "fractional type", "regression"]),
    ([float("nan"), 1.0, 0.0], {}, ["row 0", "nan", "not a number"]),
    (["0", "0.5", "1"], {}, ["row 1", "'0.5'", "fraction", "regression"]),
    (["0", "0.5", "1"], {"label_names": NAMES}, ["row 1", "'0.5'", "fraction"]),
    (["0", "x", "1"], {}, ["row 1", "'x'", "row 0", "'0'", "is text", "is a number"]),
    ([0, -1, 1], {}, ["row 1", "-1", "unlabelled", "1 in all", "0..1"]),
    ([0, None, 1], {}, ["row 1", "None", "unlabelled"]),
    (["no", "", "yes"], {}, ["row 1", "''", "unlabelled"]),
    ([1, 2, 3], {}, ["row 2", "label 3", "outside the range", "0..2", "task.label_names"]),
    ([-3, 0, 1], {}, ["row 0", "label -3", "outside the range"]),
    ([1, 1, 1], {}, ["label 1", "at least two classes"]),
    ([None, None, None], {}, ["no row has a label"]),
    ([[0], [1], [0]], {"label_names": NAMES}, ["row 0", "[0]", "wrong kind", "list"]),
    ([True, False, True], {"label_names": ["a", "b", "c"]}, ["row 0", "True", "3 classes"]),
    ([0.0, None, 1.0], {"kind": "regression"}, ["row 1", "None", "missing", "finite numbers"]),
    ([0.0, float("nan"), 1.0], {"kind": "regression"}, ["row 1", "nan", "not finite"]),
    ([0.0, 1.0, float("inf")], {"kind": "regression"}, ["row 2", "inf", "not finite"]),
    (["1.5", "high", "2"], {"kind": "regression"}, ["row 1", "'high'", "text, where a number is expected"]),
    ([True, False, True], {"kind": "regression"}, ["row 0", "True", "wrong kind", "numbers"]),
]


@pytest.mark.parametrize(("labels", "fields", "words"), BAD_LABELS)
def test_bad_labels_name_row_value_and_what_is_allowed(
    labels: list[Any], fields: dict[str, Any], words: list[str]
) -> None:
    refused(["label", *words], three(labels), **fields)


def test_bad_evaluation_label_names_the_split() -> None:
    refused(["evaluation, row 1", '"label"', "label 2"], three([0, 1, 1]), three([0, 2, 1]))


def test_classes_in_a_regression_are_refused() -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=NAMES)})
    rows = Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features)
    with pytest.raises(DataError, match=r'holds classes \("no", "yes"\), but the task is a regression'):
        load_splits(Task(kind="regression"), rows, rows)


def test_mixed_kinds_in_a_json_file_name_the_row(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"text": ["a", "b", "c"], "label": [0, 1, "no"]})
    with pytest.raises(DataError) as error:
        load_splits(Task(train_files=[path], evaluation_files={"dev": [path]}))
    for word in [path, "row 2", "'no'", "wrong kind", "row 0 holds int"]:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["a", None, "c"], ["row 1", '"text"', "None is empty", "task.text_column"]),
        ([1, 2, 3], ["row 0", "1 is of type int", "allowed: text"]),
        (["a", "b", "  "], ["row 2", "the text is empty", "at least one character"]),
    ],
)
def test_bad_texts_name_the_row(texts: list[Any], words: list[str]) -> None:
    refused(["train", *words], {"text": texts, "label": [0, 1, 0]})


def test_one_empty_text_of_a_pair_is_allowed() -> None:
    splits = load({"question1": ["a", ""], "question2": ["", "b"], "label": [0, 1]})
    assert splits.train["text_pair"][:] == ["", "b"]


def test_missing_columns_list_what_is_there() -> None:
    columns = {"premiss": ["a", "b"], "hypothesis": ["c", "d"], "label": [0, 1]}
    refused(
        ["train", '"premise"', "task.text_column", 'nearest: "premiss"', '"hypothesis", "label"'],
        columns,
        name="mnli",
    )
    refused(['"labels"', "task.label_column", 'nearest: "label"'], three([0, 1, 0]), label_column="labels")
    refused(['evaluation has no column "label"', '"text"'], three([0, 1, 0]), {"text": ["a"]})


@pytest.mark.parametrize("kind", ["train_files", "extra_train_files", "evaluation_files"])
def test_missing_file_names_field_and_nearest(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "train.csv", three([0, 1, 0]))
    absent = str(tmp_path / "trian.csv")
    fields: dict[str, Any] = {"train_files": [path], "evaluation_files": {"dev": [path]}}
    fields[kind] = {"dev": [absent]} if kind == "evaluation_files" else [absent]
    with pytest.raises(DataError) as error:
        load_splits(Task(**fields))
    for word in [absent, f"task.{kind}", "does not exist", 'nearest: "train.csv"']:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.xlsx", "x", ['ending ".xlsx"', '".parquet"']),
        ("rows.csv", "", ["is empty", "at least one row"]),
        ("rows.tsv", "text\tlabel\n", ["header and no rows", "at least one row"]),
        ("rows.json", "[]", ["is empty", "at least one row"]),
        ("rows.parquet", "not parquet", ["cannot be read"]),
        ("rows.jsonl", "{not json}\n", ["cannot be read"]),
        ("rows.csv", "text,label\na,0,9\nb,1\n", ["cannot be read", "Expected 2 fields"]),
        ("rows.csv", "text,label\na,0\nb,1,9\n", ["cannot be read", "Expected 2 fields in line 3"]),
        ("rows.csv", "text,text\na,0\n", ["two columns of the same name"]),
    ],
)
def test_unreadable_files_are_named(tmp_path: Path, name: str, content: str, words: list[str]) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError) as error:
        load_splits(Task(train_files=[str(path)], evaluation_files={"dev": [str(path)]}))
    for word in [str(path), "task.train_files", *words]:
        assert word in str(error.value)


def test_empty_and_wrong_objects_are_refused() -> None:
    rows = Dataset.from_dict(three([0, 1, 0]))
    numbers: Any = [1, 2]
    splits: Any = {"train": rows, "test": rows}
    with pytest.raises(DataError, match="evaluation is empty; at least one row"):
        load_splits(Task(), rows, rows.select([]))
    with pytest.raises(DataError, match=r"train is a list; allowed: datasets\.Dataset"):
        load_splits(Task(), numbers, rows)
    with pytest.raises(DataError, match='train is a dict with the splits "train", "test": pick one'):
        load_splits(Task(), splits, rows)
    with pytest.raises(DataError, match=r"evaluation is \{\}; at least one"):
        load_splits(Task(), rows, {})
    with pytest.raises(ConfigurationError, match="evaluation_files is null"):
        load_splits(Task(), rows)


def test_training_files_without_evaluation_files_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", three([0, 1, 0]))
    with pytest.raises(ConfigurationError, match=r"task\.train_files is set, but task\.evaluation_files is null"):
        load_splits(Task(name="rte", train_files=[path]))


def test_no_network_says_what_to_put_locally(tmp_path: Path) -> None:
    script = (
        "from mixkd_fast.configuration import Task\n"
        "from mixkd_fast.data.loading import load_splits\n"
        "from mixkd_fast.errors import DataError\n"
        "try:\n    load_splits(Task(name='mnli'))\n"
        "except DataError as error:\n    print(error)\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    for word in [
        'cannot load the hub data set "nyu-mll/glue" (configuration "mnli")',
        "OfflineModeIsEnabled",
        'task.train_files = ["train.parquet"]',
        '"validation_matched": ["validation_matched.parquet"], "validation_mismatched": ["validation_mism',
        '"premise", "hypothesis", "label"',
    ]:
        assert word in done.stdout


def test_soft_labels_of_files_that_have_them(tmp_path: Path) -> None:
    plain = write(tmp_path / "plain.jsonl", {"text": ["a", "b"], "label": ["no", "yes"]})
    extra = {"text": ["c", "d", "e"], "label": ["no", "yes", None], "p": [0.2, None, 0.3], "q": [0.8005, None, 0.7]}
    task = Task(
        train_files=[plain],
        extra_train_files=[write(tmp_path / "extra.csv", extra)],
        evaluation_files={"dev": [plain]},
        soft_label_columns=["p", "q"],
    )
    splits = load_splits(task)
    assert splits.num_extra_rows == 3
    assert splits.train.column_names == ["text", "label", "soft_labels", "row"]
    # The file's hard label stays; a row with probabilities only counts under the most probable class.
    assert splits.train["label"][:] == [0, 1, 0, 1, 1]
    assert splits.train["row"][:] == [0, 1, 2, 3, 4]
    soft = np.array(splits.train["soft_labels"][:])
    np.testing.assert_allclose(soft, [[1, 0], [0, 1], [0.2 / 1.0005, 0.8005 / 1.0005], [0, 1], [0.3, 0.7]], atol=1e-6)
    assert splits.evaluation["dev"].column_names == ["text", "label", "row"]


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (-0.1, 1.1, ["row 1", "negative", '"p"']),
        (0.5, 0.6, ["row 1", "[0.5, 0.6]", "sum to 1.1", "0.001"]),
        (0.5, None, ["row 1", 'lack "q"']),
        (float("inf"), 0.0, ["row 1", "sum to inf"]),
    ],
)
def test_bad_soft_labels_name_row_and_values(first: float, second: float | None, words: list[str]) -> None:
    columns = {"text": ["a", "b", "c"], "label": [0, 1, 0], "p": [0.5, first, 1.0], "q": [0.5, second, 0.0]}
    refused(["train", '"p", "q"', "allowed", *words], columns, soft_label_columns=["p", "q"])


def test_soft_label_columns_must_be_there_and_fit() -> None:
    soft = {"p": [0.5, 0.5, 0.5], "q": [0.5, 0.5, 0.5]}
    refused(['no column "p"', "soft_label_columns"], three([0, 1, 0]), soft_label_columns=["p", "q"])
    refused(['no column "r"', '"q"'], three([0, 1, 0]) | soft, soft_label_columns=["p", "r"])
    refused(
        ["2 columns", "3 classes"], three([0, 1, 2]) | soft, soft_label_columns=["p", "q"], error=ConfigurationError
    )
    refused(
        ['column "p"', "probability 'x'", "text, where a number"],
        three([0, 1, 0]) | soft | {"p": ["1", "x", "0"]},
        soft_label_columns=["p", "q"],
    )
