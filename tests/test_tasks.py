"""Known tasks and the merging of a task's fields with its table row."""

from typing import Any

import pytest

from mixkd_fast.configuration import Task
from mixkd_fast.data.tasks import KNOWN_TASKS, METRICS, TaskSpec, detect_columns, resolve
from mixkd_fast.errors import ConfigurationError, DataError

GLUE_COLUMNS = {
    "mnli": ("premise", "hypothesis"),
    "qqp": ("question1", "question2"),
    "qnli": ("question", "sentence"),
    "sst2": ("sentence", None),
    "mrpc": ("sentence1", "sentence2"),
    "rte": ("sentence1", "sentence2"),
    "cola": ("sentence", None),
    "stsb": ("sentence1", "sentence2"),
}


@pytest.mark.parametrize("name", GLUE_COLUMNS)
def test_glue_tasks_come_from_the_hub_by_name(name: str) -> None:
    spec = resolve(Task(name=name))
    assert (spec.hub, spec.hub_config) == ("nyu-mll/glue", name)
    assert (spec.text_column, spec.text_pair_column, spec.label_column) == (*GLUE_COLUMNS[name], "label")
    assert set(spec.metrics) <= set(METRICS[spec.kind])
    assert spec.num_labels == {"mnli": 3, "stsb": 1}.get(name, 2)


def test_primary_metrics_and_evaluation_splits() -> None:
    assert {name: known.metrics[0] for name, known in KNOWN_TASKS.items() if known.metrics[0] != "accuracy"} == {
        "cola": "matthews",
        "stsb": "pearson",
    }
    assert resolve(Task(name="mnli")).evaluation_splits == ("validation_matched", "validation_mismatched")
    assert resolve(Task(name="rte")).evaluation_splits == ("validation",)


def test_config_fields_win_over_the_table() -> None:
    task = Task(
        name="rte",
        train_files=["a.tsv"],
        evaluation_files={"dev": ["b.tsv"]},
        text_column="first",
        text_pair_column="second",
        label_column="gold",
        label_names=["yes", "no", "maybe"],
        metrics=["f1"],
    )
    spec = resolve(task)
    assert (spec.hub, spec.hub_config, spec.evaluation_splits) == (None, None, ("validation",))
    assert (spec.text_column, spec.text_pair_column, spec.label_column) == ("first", "second", "gold")
    assert (spec.label_names, spec.num_labels, spec.metrics) == (("yes", "no", "maybe"), 3, ("f1",))
    assert (spec.train_files, spec.evaluation_files) == (("a.tsv",), {"dev": ("b.tsv",)})


def test_own_hub_data_set_does_not_inherit_the_glue_configuration() -> None:
    spec = resolve(Task(name="mnli", hub="someone/nli", revision="abc"))
    assert (spec.hub, spec.hub_config, spec.revision, spec.evaluation_splits) == ("someone/nli", None, "abc", None)


def test_custom_regression_takes_regression_metrics() -> None:
    spec = resolve(Task(name="scores", kind="regression"), in_memory=True)
    assert (spec.metrics, spec.num_labels, spec.label_names) == (("pearson", "spearman"), 1, None)


FILES: dict[str, Any] = {"train_files": ["a.csv"], "evaluation_files": {"dev": ["b.csv"]}}

CONTRADICTIONS: list[tuple[dict[str, Any], list[str]]] = [
    ({"name": "mnlli"}, ["task.name", '"mnlli"', 'nearest: "mnli"', '"stsb"', "task.train_files"]),
    ({"name": "zzzz"}, ["task.name", '"zzzz"', "not a known task", "task.hub"]),
    ({"hub": "a/b", **FILES}, ['task.hub is "a/b"', "task.train_files", "only one"]),
    ({"name": "rte", "kind": "regression"}, ['task.kind is "regression"', '"rte"', "classification"]),
    ({"hub_config": "x", **FILES}, ['task.hub_config is "x"', "no hub data set"]),
    ({"name": "demo", "revision": "x"}, ['task.revision is "x"', "no hub data set"]),
    ({"train_files": []}, ["task.train_files is []", "at least one file"]),
    ({"name": "rte", "evaluation_files": {}}, ["task.evaluation_files is {}", "validation"]),
    ({"name": "rte", "evaluation_files": {"dev": []}}, ['task.evaluation_files["dev"] is []', "at least one"]),
    ({"kind": "regression", "label_names": ["a", "b"], **FILES}, ["task.label_names", "regression"]),
    ({"kind": "regression", "soft_label_columns": ["a", "b"], **FILES}, ["task.soft_label_columns", "regression"]),
    ({"label_names": ["a", "a"], **FILES}, ["task.label_names is ['a', 'a']", "different names"]),
    ({"label_names": ["a"], **FILES}, ["task.label_names is ['a']", "two or more"]),
    ({"name": "rte", "metrics": ["acuracy"]}, ['"acuracy"', 'nearest: "accuracy"', '"matthews"']),
    ({"name": "rte", "metrics": ["pearson"]}, ["task.metrics", '"pearson"', "classification", '"f1"']),
    ({"name": "stsb", "metrics": ["f1"]}, ['"f1"', "regression", '"spearman"']),
    ({"name": "rte", "metrics": []}, ["task.metrics is []", '"accuracy"']),
    ({"text_pair_column": "b", **FILES}, ['task.text_pair_column is "b"', "task.text_column is null"]),
    ({"text_column": "b", "text_pair_column": "b", **FILES}, ['task.text_column is "b"', "two different columns"]),
]


@pytest.mark.parametrize(("fields", "words"), CONTRADICTIONS)
def test_contradictions_name_field_value_and_what_is_allowed(fields: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigurationError) as error:
        resolve(Task(**fields))
    for word in words:
        assert word in str(error.value)


def test_rows_passed_as_an_object_exclude_files() -> None:
    with pytest.raises(ConfigurationError, match=r"passed as an object and task\.train_files is set"):
        resolve(Task(**FILES), in_memory=True)
    with pytest.raises(ConfigurationError, match=r"passed as an object and task\.hub is set"):
        resolve(Task(hub="a/b"), in_memory=True)


def _custom() -> TaskSpec:
    return resolve(Task(), in_memory=True)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["text", "label"], ("text", None)),
        (["idx", "sentence", "label"], ("sentence", None)),
        (["premise", "hypothesis", "label"], ("premise", "hypothesis")),
        (["sentence2", "sentence1"], ("sentence1", "sentence2")),
        (["question", "sentence"], ("question", "sentence")),
        (["question1", "question2"], ("question1", "question2")),
    ],
)
def test_usual_columns_are_recognised(columns: list[str], expected: tuple[str, str | None]) -> None:
    spec = detect_columns(_custom(), columns, "here")
    assert (spec.text_column, spec.text_pair_column) == expected


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        (["review", "label"], "no usual text column"),
        (["text", "sentence", "label"], "more than one"),
        (["premise", "hypothesis", "sentence1", "sentence2"], "more than one"),
    ],
)
def test_unusual_columns_are_refused_with_the_list(columns: list[str], problem: str) -> None:
    with pytest.raises(DataError) as error:
        detect_columns(_custom(), columns, 'file "a.csv"')
    for word in ['file "a.csv"', problem, *columns, "task.text_column"]:
        assert word in str(error.value)


def test_named_columns_are_not_detected_anew() -> None:
    spec = resolve(Task(text_column="review"), in_memory=True)
    assert detect_columns(spec, ["text", "review"], "here") == spec
