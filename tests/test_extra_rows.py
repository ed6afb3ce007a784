"""Extra training rows: labelled by the teacher, filtered, counted, in one process and over ranks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from loading_cases import write
from toy import (
    ROOT,
    losses,
    must_run,
    must_run_ranks,
    program,
    run,
    save_toy_teacher,
    toy_config,
    toy_rows,
    toy_tokenizer,
)
from transformers import AutoModelForSequenceClassification

from mixkd_fast.cli_config import check_config
from mixkd_fast.configuration import Config, Task, validate
from mixkd_fast.data.extra_rows import ExtraRows, select_extra_rows
from mixkd_fast.data.loading import Splits, load_splits
from mixkd_fast.data.tasks import resolve
from mixkd_fast.data.tokenization import tokenize_rows
from mixkd_fast.errors import ConfigurationError, DataError, ModelError

# Probabilities of class 1, by which rows are recognised below.
P = [0.9, 0.2, 0.6, 0.45, 0.99]
LABELS = [1, 1, 0, 0, 1]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets_cache")


def _logits(p: list[float]) -> np.ndarray:
    return np.log(np.stack([1 - np.array(p), np.array(p)], axis=1)).astype(np.float32) + 3.0


def _splits(folder: Path, extra: dict[str, list[Any]], main: dict[str, list[Any]] | None = None, **fields: Any) -> Any:
    folder.mkdir(exist_ok=True)
    task = Task(extra_train_files=[write(folder / "extra.jsonl", extra)], **fields)
    rows = Dataset.from_dict(main or {"text": ["m0", "m1", "m2"], "label": [0, 1, 0]})
    return task, load_splits(task, rows, rows)


def _extra(labels: list[Any] | None = None) -> dict[str, list[Any]]:
    texts = [f"e{number}" for number in range(len(P))]
    return {"text": texts} | ({} if labels is None else {"label": labels})


def _select(folder: Path, extra: dict[str, list[Any]], p: list[float] = P, **fields: Any) -> tuple[Splits, ExtraRows]:
    task, splits = _splits(folder, extra, **fields)
    return select_extra_rows(task, splits, _logits(p) if task.asks_teacher_about_extra_rows else None)


def test_teacher_labels_files_without_a_label_column(tmp_path: Path) -> None:
    splits, counts = _select(tmp_path, _extra(), extra_labels="teacher")
    assert splits.train["text"][:] == ["m0", "m1", "m2", *_extra()["text"]]
    assert splits.train["label"][:] == [0, 1, 0, 1, 0, 1, 0, 1]
    soft = np.array(splits.train["soft_labels"][:])
    np.testing.assert_array_equal(soft[:3], [[1, 0], [0, 1], [1, 0]])
    np.testing.assert_allclose(soft[3:, 1], P, atol=1e-6)
    np.testing.assert_allclose(soft.sum(axis=1), 1, atol=1e-6)
    assert splits.train["row"][:] == list(range(8)) and (counts.read, counts.kept) == (5, 5)


def test_own_soft_labels_of_the_training_rows_stay(tmp_path: Path) -> None:
    main = {"text": ["m0", "m1"], "label": [0, 1], "a": [0.75, None], "b": [0.25, None]}
    splits, _ = _select(tmp_path, _extra(), main=main, soft_label_columns=["a", "b"], extra_labels="teacher")
    soft = np.array(splits.train["soft_labels"][:])
    np.testing.assert_allclose(soft[:2], [[0.75, 0.25], [0, 1]])
    np.testing.assert_allclose(soft[2:, 1], P, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "kept", "dropped"),
    [
        ({"extra_min_confidence": 0.6}, [0, 1, 2, 4], (1, 0, 0)),
        ({"extra_agreement": True}, [0, 3, 4], (0, 2, 0)),
        ({"extra_agreement": True, "extra_min_confidence": 0.7}, [0, 4], (2, 1, 0)),
        ({"extra_agreement": True, "extra_labels": "teacher"}, [0, 3, 4], (0, 2, 0)),
        ({"extra_min_confidence": 1.0}, [], (5, 0, 0)),
    ],
)
def test_filters_keep_what_they_say(
    tmp_path: Path, fields: dict[str, Any], kept: list[int], dropped: tuple[int, int, int]
) -> None:
    splits, counts = _select(tmp_path, _extra(LABELS), **fields)
    assert splits.train["text"][3:] == [f"e{number}" for number in kept]
    assert splits.num_extra_rows == counts.kept == len(kept)
    assert (counts.low_confidence, counts.disagreeing, counts.over_limit) == dropped
    expected = [int(P[n] > 0.5) if fields.get("extra_labels") == "teacher" else LABELS[n] for n in kept]
    assert splits.train["label"][3:] == expected


def test_limit_is_a_seeded_draw_that_needs_no_teacher(tmp_path: Path) -> None:
    draws = []
    for seed in range(8):
        splits, counts = _select(tmp_path, _extra(LABELS), extra_max_rows=2, subset_seed=seed)
        chosen = splits.train["text"][3:]
        assert len(chosen) == 2 and chosen == sorted(chosen) and counts.over_limit == 3
        draws.append(tuple(chosen))
        again, _ = _select(tmp_path, _extra(LABELS), extra_max_rows=2, subset_seed=seed)
        assert again.train["text"][3:] == chosen
    assert len(set(draws)) > 1
    splits, counts = _select(tmp_path, _extra(LABELS), extra_max_rows=9)
    assert counts.kept == 5 and counts.over_limit == 0


def test_regression_is_labelled_and_has_no_filters(tmp_path: Path) -> None:
    main = {"text": ["a", "b"], "label": [0.5, 2.5]}
    task, splits = _splits(tmp_path, _extra(), main, kind="regression", extra_labels="teacher")
    logits = np.arange(5, dtype=np.float32)[:, None] / 2
    splits, counts = select_extra_rows(task, splits, logits)
    assert splits.train["label"][:] == [0.5, 2.5, 0, 0.5, 1, 1.5, 2] and counts.kept == 5
    assert "soft_labels" not in splits.train.column_names
    for field in ({"extra_agreement": True}, {"extra_min_confidence": 0.5}):
        with pytest.raises(ConfigurationError, match=f"{next(iter(field))} is .*regression"):
            _splits(tmp_path, _extra([0.0] * 5), main, kind="regression", **field)


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="extra_min_confidence: needs extra_train_files"):
        validate(Task, {"extra_min_confidence": 0.5})
    with pytest.raises(ConfigurationError, match=r"teacher: is missing.*extra rows"):
        fields = {"train_files": ["a.csv"], "extra_train_files": ["b.csv"], "extra_agreement": True}
        validate(Config, {"task": fields, "student": {"model": "x"}, "method": {"name": "finetune"}})
    with pytest.raises(DataError, match='has no column "label"'):
        _splits(tmp_path, _extra(), extra_agreement=True)
    task, splits = _splits(tmp_path, _extra(), extra_labels="teacher")
    with pytest.raises(DataError, match="3 outputs for a row, and the task has 2"):
        select_extra_rows(task, splits, np.zeros((5, 3), dtype=np.float32))
    with pytest.raises(ModelError, match="not finite for extra row 2"):
        logits = _logits(P)
        logits[2, 0] = np.nan
        select_extra_rows(task, splits, logits)


def test_chosen_rows_have_a_content_hash_of_their_own(tmp_path: Path) -> None:
    """The teacher's kept logits are found by it."""
    hashes = set()
    options: list[dict[str, Any]] = [
        {},
        {"extra_labels": "teacher"},
        {"extra_agreement": True},
        {"extra_min_confidence": 0.6},
        {"extra_max_rows": 1},
    ]
    for fields in options:
        splits, _ = _select(tmp_path, _extra(LABELS), **fields)
        hashes.add(tokenize_rows(splits.train, toy_tokenizer(), 32, None).content_hash)
    other, _ = _select(tmp_path, _extra(LABELS), p=[0.8, *P[1:]], extra_labels="teacher")
    hashes.add(tokenize_rows(other.train, toy_tokenizer(), 32, None).content_hash)
    assert len(hashes) == len(options) + 1


@settings(deadline=None, max_examples=40)
@given(
    p=st.lists(st.floats(0.01, 0.99), min_size=1, max_size=12),
    confidence=st.none() | st.floats(0, 1),
    agreement=st.booleans(),
    limit=st.none() | st.integers(1, 12),
    data=st.data(),
)
def test_every_row_is_kept_or_counted_once(
    p: list[float], confidence: float | None, agreement: bool, limit: int | None, data: st.DataObject
) -> None:
    labels = data.draw(st.lists(st.integers(0, 1), min_size=len(p), max_size=len(p)))
    options = {"extra_min_confidence": confidence, "extra_agreement": agreement, "extra_max_rows": limit}
    task = Task(extra_train_files=["x.csv"], label_names=["no", "yes"], **options)
    columns = {"text": ["m", *map(str, range(len(p)))], "label": [0, *labels], "row": list(range(len(p) + 1))}
    splits = Splits(resolve(task, in_memory=True), Dataset.from_dict(columns), {}, len(p))
    chosen, counts = select_extra_rows(task, splits, _logits(p) if task.asks_teacher_about_extra_rows else None)
    rows = chosen.train["row"][1:]
    assert len(rows) == counts.kept == chosen.num_extra_rows and counts.read == len(p) and rows == sorted(set(rows))
    assert min(counts.low_confidence, counts.disagreeing, counts.over_limit) >= 0
    for row in rows:
        assert not agreement or (p[row - 1] > 0.5) == labels[row - 1] or abs(p[row - 1] - 0.5) < 1e-6
        assert confidence is None or max(p[row - 1], 1 - p[row - 1]) >= confidence - 1e-6
    if limit is not None:
        assert len(rows) <= limit
    assert task.asks_teacher_about_extra_rows or len(rows) == min(len(p), limit or len(p))


def _run_config(folder: Path, **task: Any) -> dict[str, Any]:
    rows = toy_rows(40, 5)
    write(folder / "generated.jsonl", {"sentence": rows["sentence"]})
    config = toy_config(folder, training={"steps": 6, "micro_batch_size": 2})
    fields = {"extra_train_files": [str(folder / "generated.jsonl")], "extra_labels": "teacher", **task}
    config["task"] |= fields
    return config


def _teacher_probabilities(folder: Path) -> np.ndarray:
    tokenizer, model = toy_tokenizer(), AutoModelForSequenceClassification.from_pretrained(folder / "teacher").eval()
    with torch.no_grad():
        batch = tokenizer(toy_rows(40, 5)["sentence"], return_tensors="pt", padding=True)
        return np.asarray(model(**batch).logits.double().softmax(-1))


@pytest.mark.slow
def test_whole_runs_on_one_rank_two_ranks_and_a_partitioned_teacher_agree(tmp_path: Path) -> None:
    """And the run of a method without a teacher may use one to label."""
    save_toy_teacher(tmp_path / "teacher")
    confidence = _teacher_probabilities(tmp_path).max(axis=1)
    threshold = float(np.sort(confidence)[19:21].mean())  # in the middle of the widest doubt
    config = _run_config(tmp_path, extra_min_confidence=threshold)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    arguments = ["--config", str(path), "--set"]
    output = must_run(program(*arguments, f"output.directory={tmp_path / 'one'}", "--set", "output.report=true"))
    assert "20 of 40 extra rows kept (dropped: 20 of low confidence); labels from the teacher" in output
    zero3 = ["--set", "teacher.zero_stage=3"]
    must_run_ranks(2, *arguments, f"output.directory={tmp_path / 'two'}", *zero3)
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two")]
    for summary in summaries:
        data = summary["data"]
        assert (data["train_rows"], data["extra_rows"], data["extra_rows_low_confidence"]) == (116, 20, 20)
        assert data["extra_labels"] == "teacher" and data["extra_rows_read"] == 40
    np.testing.assert_allclose(losses(tmp_path / "one"), losses(tmp_path / "two"), rtol=1e-4)
    assert "extra rows low confidence" in (tmp_path / "one" / "report.html").read_text()
    result = run(program(*arguments, f"output.directory={tmp_path / 'tuned'}", "--set", 'method={"name":"finetune"}'))
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "tuned" / "summary.json").read_text())["data"]["train_rows"] == 116


def test_the_shipped_example_is_whole() -> None:
    path = ROOT / "configs" / "local_files_generated.json"
    config = validate(Config, json.loads(path.read_text()))
    check_config(config)
    assert config.task.extra_labels == "teacher" and config.task.extra_min_confidence is not None
