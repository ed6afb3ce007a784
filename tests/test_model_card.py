"""The model card: front matter that a YAML reader understands, and what a reader wants to know."""

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from run_folders import STUDENT_METRICS, config_of, summary_of

from mixkd_fast.model_card import write_model_card

yaml = pytest.importorskip("yaml", reason="reading the front matter back needs pyyaml")
ODD = [
    "plain",
    'a: "b" # c',
    "- x\n---\n",
    "yes",
    "null",
    "0x10",
    "2020-01-01",
    "{a: [b",
    "'",
    "back\\slash\ttab",
    "grün 😀 \u2028 \x7f \x85 \ufeff",
]


def card_of(folder: Path, summary: dict[str, Any], config: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Front matter and body."""
    text = write_model_card(folder, summary, config).read_text(encoding="utf-8")
    match = re.match(r"---\n(.*?\n)---\n(.*)", text, re.DOTALL)
    assert match is not None
    return yaml.safe_load(match[1]), match[2]


def test_front_matter(tmp_path: Path) -> None:
    front, _ = card_of(tmp_path, summary_of(), config_of())
    assert front["library_name"] == "transformers"
    assert front["pipeline_tag"] == "text-classification"
    assert front["tags"] == ["knowledge-distillation", "mixkd"]
    assert front["datasets"] == ["nyu-mll/glue"]
    assert front["metrics"] == list(STUDENT_METRICS)
    assert "license" not in front
    (result,) = front["model-index"][0]["results"]
    assert result["dataset"] == {"name": "mnli", "type": "nyu-mll/glue", "split": "validation"}
    assert {metric["type"]: metric["value"] for metric in result["metrics"]} == STUDENT_METRICS


@pytest.mark.parametrize("text", ODD)
def test_odd_names_come_back_as_they_were(tmp_path: Path, text: str) -> None:
    config = config_of(task=text)
    config["task"]["hub"] = text
    front, _ = card_of(tmp_path, summary_of(task=text, split=text), config)
    (result,) = front["model-index"][0]["results"]
    assert result["dataset"] == {"name": text, "type": text, "split": text}
    assert front["datasets"] == [text]


def test_figures_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    summary = summary_of()
    summary["metrics"] = {"a": {"accuracy": 0.5, "nll": math.nan, "ece": None}, "b": {"accuracy": math.inf}}
    front, _ = card_of(tmp_path, summary, config_of())
    assert [result["metrics"] for result in front["model-index"][0]["results"]] == [
        [{"type": "accuracy", "value": 0.5}]
    ]
    assert front["metrics"] == ["accuracy"]


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ({"name": "demo"}, None),
        ({"name": "custom", "train_files": ["a.csv"]}, None),
        ({"name": "mnli", "train_files": ["a.csv"]}, None),
        ({"name": "custom", "hub": "acme/rows"}, ["acme/rows"]),
        ({"name": "rte"}, ["nyu-mll/glue"]),
    ],
)
def test_only_a_hub_data_set_is_named_as_one(tmp_path: Path, task: dict[str, Any], expected: list[str] | None) -> None:
    front, _ = card_of(tmp_path, summary_of(task=task["name"]), config_of() | {"task": task})
    assert front.get("datasets") == expected


def test_a_fine_tuned_model_claims_no_distillation(tmp_path: Path) -> None:
    front, body = card_of(tmp_path, summary_of("finetune") | {"teacher": None}, config_of("finetune"))
    assert front["tags"] == ["finetune"]
    assert "distilled from" not in body
    assert "L = CE(S(x), y)" in body


def test_the_body_states_teacher_data_method_results_and_versions(tmp_path: Path) -> None:
    _, body = card_of(tmp_path, summary_of(), config_of())
    for expected in (
        "acme/teacher-base",
        "39,270 training rows",
        "temperature = 2.0",
        "λ ~ Beta(alpha, alpha)",
        "| validation | accuracy | 0.7800 | 0.8400 |",
        "torch 2.13.0",
        "text_pair",
    ):
        assert expected in body


def test_the_configuration_can_be_copied_out(tmp_path: Path) -> None:
    config = copy.deepcopy(config_of())
    config["task"]["text_column"] = "a ``` b ```` c"
    _, body = card_of(tmp_path, summary_of(), config)
    match = re.search(r"^(`{3,})json\n(.*?)\n\1$", body, re.DOTALL | re.MULTILINE)
    assert match is not None
    assert json.loads(match[2]) == config


@pytest.mark.parametrize(
    ("task", "metric", "expected"), [("sst2", "accuracy", 'classify("A text.")'), ("stsb", "mse", "'none'")]
)
def test_the_call_fits_the_task(tmp_path: Path, task: str, metric: str, expected: str) -> None:
    summary = summary_of(task=task)
    summary["metrics"] = {"validation": {metric: 0.5}}
    _, body = card_of(tmp_path, summary, config_of(task=task))
    (call,) = [line for line in body.splitlines() if line.startswith("print(classify(")]
    assert expected in call
    assert ("text_pair" in call) == (task == "stsb")
