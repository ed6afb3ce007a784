"""Corpora of language models that are streamed: rows one for one, the same loss as rows in memory, resumable."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from toy_lm import byte_tokenizer, instructions, language_config, sentences

from mixkd_fast.configuration import Config, Task, validate
from mixkd_fast.data.language_tokens import tokenize_language_rows
from mixkd_fast.data.prompts import PromptStyle
from mixkd_fast.distillation import run_config
from mixkd_fast.errors import DataError


def _tokens(columns: dict[str, Any], max_length: int) -> Any:
    rows = Dataset.from_dict(columns | {"row": list(range(len(next(iter(columns.values())))))})
    style = PromptStyle.of(Task(kind="causal_lm", prompt_template="Q: {prompt}\n"))
    return tokenize_language_rows(rows, byte_tokenizer(), max_length, None, style, one_for_one=True)


def test_documents_are_rows_of_their_own() -> None:
    rows = _tokens({"text": ["abcdef", "", "ab"]}, 5)
    assert [len(rows.row(index)) for index in range(3)] == [5, 1, 3]
    assert rows.row(2).tolist() == [*byte_tokenizer()("ab")["input_ids"], 256]
    assert rows.num_truncated == 1
    assert rows.num_targets.tolist() == [4, 0, 2]


def test_a_prompt_without_room_keeps_its_place_and_has_no_target() -> None:
    rows = _tokens({"prompt": ["why?", "x" * 40], "input": ["", ""], "response": ["so", "so"]}, 16)
    assert len(rows) == 2
    assert rows.num_dropped == 1
    assert rows.num_targets.tolist() == [3, 0]
    assert len(rows.row(1)) == 16


@pytest.fixture
def streamed(tmp_path: Path) -> dict[str, Any]:
    """A configuration over three files."""
    (tmp_path / "corpus").mkdir()
    for number in range(3):
        rows = [{"text": text} for text in sentences(16, number)]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "corpus" / f"{number}.parquet", row_group_size=8)
    config = language_config(tmp_path, "streamed", method={"name": "lm_kd", "kd_weight": 0.5})
    config["task"] |= {"train_files": [str(tmp_path / "corpus" / "*.parquet")], "streaming": True}
    return config


def _losses(config: dict[str, Any], resume: bool = False) -> list[float]:
    run_config(validate(Config, config), resume=resume, progress=False)
    lines = (Path(config["output"]["directory"]) / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if line["kind"] == "train"]


def test_a_streamed_run_learns_and_resumes_at_the_row(streamed: dict[str, Any], tmp_path: Path) -> None:
    streamed["training"] |= {"steps": 20, "evaluate_every": 10}
    whole = _losses(streamed)
    assert np.mean(whole[-5:]) < np.mean(whole[:5])
    again = streamed | {"output": {"directory": str(tmp_path / "again"), "report": False}}
    _losses(again | {"training": streamed["training"]})
    folder = tmp_path / "again"
    # As a kill after step 10 would leave it.
    for name in ("step-00000020",):
        for path in sorted((folder / "checkpoints" / name).rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        (folder / "checkpoints" / name).rmdir()
    extra = tmp_path / "corpus" / "3.parquet"
    pq.write_table(pa.Table.from_pylist([{"text": text} for text in sentences(16, 3)]), extra)
    with pytest.raises(DataError, match=r"those of the task are others .* a file was changed, added or taken away"):
        _losses(again, resume=True)
    extra.unlink()
    assert _losses(again, resume=True) == whole


def test_the_loss_is_a_mean_over_the_tokens_of_all_micro_batches(streamed: dict[str, Any], tmp_path: Path) -> None:
    """Documents of unequal length: the first loss of a step of one micro-batch, by an independent forward."""
    import torch
    from toy_lm import tiny_lm

    from mixkd_fast.data.streaming import StreamedRows

    streamed["training"] |= {"steps": 1, "batch_size": 8, "micro_batch_size": 2, "learning_rate": 1e-9}
    streamed["method"] = {"name": "finetune"}
    streamed["student"] = {"model": streamed["teacher"]["model"], "dropout": 0.0}
    (loss,) = _losses(streamed)
    config = validate(Config, streamed)
    from mixkd_fast.data.loading import load_evaluation
    from mixkd_fast.data.stream_loading import open_stream

    spec, _ = load_evaluation(config.task)
    rows = open_stream(config, spec, byte_tokenizer(), 2, tmp_path / "cache")
    assert isinstance(rows, StreamedRows)
    model, total, count = tiny_lm(seed=3), 0.0, 0
    for lane in range(4):
        part = rows.rows(0, lane)
        for index in range(len(part)):
            ids = torch.from_numpy(part.row(index).astype(np.int64))[None]
            with torch.no_grad():
                log_q = model(ids).logits[0, :-1].log_softmax(-1)
            total -= float(log_q.gather(1, ids[0, 1:, None]).sum())
            count += ids.shape[1] - 1
    assert loss == pytest.approx(total / count, rel=1e-5)


def test_instructions_stream(tmp_path: Path) -> None:
    """Also where some files, and blocks of files, have no input."""
    config = language_config(tmp_path, instruct=True)
    rows: list[dict[str, str]] = instructions(40)
    for number, row in enumerate(rows):
        if number >= 20:
            del row["input"]
    (tmp_path / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:30]))
    pq.write_table(pa.Table.from_pylist(rows[30:]), tmp_path / "many.parquet")
    config["task"] |= {"train_files": [str(tmp_path / "many.*")], "streaming": True}
    config["training"] |= {"steps": 5, "evaluate_every": 5}
    assert all(np.isfinite(_losses(config)))
    asked = [row | {"about": ""} for row in instructions(4)]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    columns = {"prompt_column": "instruction", "input_column": "about", "response_column": "output"}
    config["task"] |= {"evaluation_files": {"validation": [str(tmp_path / "asked.jsonl")]}, **columns}
    with pytest.raises(DataError, match=r'no file of task.train_files has a column "about" \(task.input_column\)'):
        _losses(config | {"output": {"directory": str(tmp_path / "other"), "report": False}})
