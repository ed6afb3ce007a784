"""Rows streamed from many files: each once an epoch, the same for any number of ranks, no more read than needed."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from toy import losses, must_run, must_run_ranks, program, records, run, toy_config, toy_rows, toy_tokenizer

from mixkd_fast import distributed
from mixkd_fast.data.batching import Padding
from mixkd_fast.data.shard_index import open_shards
from mixkd_fast.data.streaming import StreamedRows
from mixkd_fast.data.tokenization import TokenRows, tokenize_rows
from mixkd_fast.errors import ConfigurationError, DataError
from mixkd_fast.mixing import Mixing
from mixkd_fast.preparation import _require_same_rows
from mixkd_fast.schedule import check_same_rows

# Rows of each file, in row groups of 20 (the JSONL files are one block each).
SIZES = (90, 40, 1, 33, 76, 60)
TOTAL = sum(SIZES)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Files whose labels are 0, 1, 2, ...: the row's number through all files."""
    folder, start = tmp_path / "corpus", 0
    folder.mkdir()
    for number, size in enumerate(SIZES):
        columns = {
            "sentence": toy_rows(size, number)["sentence"],
            "label": [float(row) for row in range(start, start + size)],
        }
        start += size
        path = folder / f"part-{number}"
        if number % 3 == 2:
            lines = [json.dumps({"sentence": s, "label": y}) for s, y in zip(*columns.values(), strict=True)]
            (path.with_suffix(".jsonl")).write_text("\n".join(lines) + "\n\n")
        else:
            pq.write_table(pa.table(columns), path.with_suffix(".parquet"), row_group_size=20)
    return folder


def _files(corpus: Path) -> list[str]:
    return [str(corpus / "*.parquet"), str(corpus / "*.jsonl")]


def _stream(
    corpus: Path, batch: int = 12, micro: int = 3, window: int = 16, seed: int = 0, **more: Any
) -> StreamedRows:
    tokenizer = toy_tokenizer()

    def tokenise(table: pa.Table, where: str) -> TokenRows:
        columns = {"text": table["sentence"].to_pylist(), "label": table["label"].to_pylist(), "row": [0] * len(table)}
        return tokenize_rows(Dataset.from_dict(columns), tokenizer, 32, None)

    index = open_shards(_files(corpus), corpus / "cache")
    return StreamedRows(
        index,
        tokenise,
        **{"batch_size": batch, "micro_batch_size": micro, "seed": seed, "window": window, "max_length": 32, **more},
    )


def _ids(rows: StreamedRows, steps: range) -> list[list[int]]:
    """The row numbers of steps, micro-batch by micro-batch."""
    return [
        [int(number) for lane in range(rows.num_lanes) for number in rows.rows(step, lane).source_rows]
        for step in steps
    ]


def test_every_row_comes_once_an_epoch_but_for_the_few_that_do_not_fit(corpus: Path) -> None:
    rows = _stream(corpus)
    per_lane = TOTAL // 4
    assert per_lane % 3 == 0, "an epoch ends with a step here"
    for epoch in range(2):
        steps = range(epoch * per_lane // 3, (epoch + 1) * per_lane // 3)
        seen = Counter(number for ids in _ids(rows, steps) for number in ids)
        assert len(seen) == 4 * per_lane and set(seen.values()) == {1} and set(seen) <= set(range(TOTAL))
    assert rows.steps_in(2.0) == 2 * per_lane // 3 and rows.epoch(per_lane // 3) == 1.0


def test_a_row_has_the_number_that_its_file_gives_it(corpus: Path) -> None:
    rows = _stream(corpus)
    order = [path for path in rows.index.paths]
    truth = []
    for path in order:
        table = pa.json.read_json(path) if path.endswith("jsonl") else pq.read_table(path)
        truth += list(zip(table["sentence"].to_pylist(), table["label"].to_pylist(), strict=True))
    tokenizer = toy_tokenizer()
    for step in range(5):
        found = rows.rows(step, 2)
        for index, number in enumerate(found.source_rows):
            text, label = truth[number]
            assert found.row(index).tolist() == tokenizer(text)["input_ids"]
            assert found.labels[index] == label


def test_order_is_shuffled_and_depends_on_seed_and_epoch(corpus: Path) -> None:
    first = _ids(_stream(corpus), range(25))
    assert first == _ids(_stream(corpus), range(25))
    assert first != _ids(_stream(corpus, seed=1), range(25))
    epochs = _ids(_stream(corpus), range(50))
    assert epochs[:25] != epochs[25:]
    flat = np.array(first).ravel()
    assert np.abs(np.diff(flat)).mean() > 5, "neighbours in the files are not neighbours in training"


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_together_see_the_same_micro_batches(corpus: Path, world: int) -> None:
    mixing = Mixing()
    alone = [_stream(corpus, mixing=mixing).batches(step, 0, 1, Padding(0)) for step in range(4)]
    for rank in range(world):
        rows = _stream(corpus, mixing=mixing)
        for step in range(4):
            for mine, lane in zip(rows.batches(step, rank, world, Padding(0)), range(rank, 4, world), strict=True):
                for name, value in vars(alone[step][lane]).items():
                    found = getattr(mine, name)
                    assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value, name


def test_partners_are_a_permutation_of_the_micro_batch(corpus: Path) -> None:
    rows = _stream(corpus, batch=24, micro=6, mixing=Mixing(mixed_rows=2))
    partners = []
    for batch in rows.batches(0, 0, 1, Padding(0)):
        assert batch.partner is not None and batch.lam is not None and len(batch.lam) == 12
        assert sorted(batch.partner[:6].tolist()) == sorted(batch.partner[6:].tolist()) == list(range(6))
        partners.append(tuple(batch.partner.tolist()))
        assert torch.equal(batch.labels[: batch.num_rows], batch.labels)
    assert len(set(partners)) > 1


def test_a_resumed_run_reads_its_window_and_not_what_came_before(corpus: Path) -> None:
    whole = _stream(corpus)
    expected = _ids(whole, range(40))
    resumed = _stream(corpus)
    assert _ids(resumed, range(33, 34)) == expected[33:34]
    # One window of 16 rows for each of 4 lanes, and the blocks of 20 rows (or a file of 40) that they lie in.
    assert resumed.reading.rows <= 4 * 2 * 16
    assert resumed.reading.blocks <= 4 * 3 < len(resumed.index.rows)
    assert _ids(resumed, range(34, 40)) == expected[34:]


def test_a_rank_reads_its_own_part_and_holds_little(corpus: Path) -> None:
    steps = range(25)  # one epoch
    read = []
    for rank in range(4):
        rows = _stream(corpus)
        for step in steps:
            rows.batches(step, rank, 4, Padding(0))
        read.append(rows.reading)
    for reading in read:
        assert TOTAL // 4 <= reading.rows <= TOTAL // 4 + 16
        assert reading.most_rows_held <= 16 + max(60, 20), "a window and the largest block"
    assert sum(reading.blocks for reading in read) <= len(_stream(corpus).index.rows) + 4 + 8


def test_the_index_is_kept_and_follows_the_files(corpus: Path) -> None:
    first = open_shards(_files(corpus), corpus / "cache")
    (kept,) = (corpus / "cache" / "stream_index").iterdir()
    content = json.loads(kept.read_text())
    content[0][0][0][2] += 1  # shows that it is read
    kept.write_text(json.dumps(content))
    assert open_shards(_files(corpus), corpus / "cache").num_rows == first.num_rows + 1
    pq.write_table(pa.table({"sentence": ["a film"], "label": [7.0]}), corpus / "part-0.parquet")
    assert open_shards(_files(corpus), corpus / "cache").num_rows == TOTAL - SIZES[0] + 1
    assert open_shards(_files(corpus), None).digest != first.digest


def test_long_jsonl_files_are_cut_into_blocks(tmp_path: Path) -> None:
    lines = [json.dumps({"sentence": f"a ü {number}", "label": number}) for number in range(10_000)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    index = open_shards([str(tmp_path / "a.jsonl")], None)
    assert index.rows.tolist() == [4096, 4096, 10_000 - 2 * 4096]
    assert index.read(1)["label"].to_pylist() == list(range(4096, 8192))
    assert index.place(2) == (str(tmp_path / "a.jsonl"), 8192)


def test_blocks_of_lines_have_the_columns_of_all(tmp_path: Path) -> None:
    first = [{"a": 1, "b": None, "c": "x", "mixed": 1} for _ in range(4096)]
    second = [{"b": "text", "c": "y", "mixed": "one"}] * 3
    (tmp_path / "1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in first + second))
    (tmp_path / "2.jsonl").write_text(json.dumps({"d": 2.5}) + "\n")
    for _ in range(2):  # made, and as it was kept
        index = open_shards([str(tmp_path / "*.jsonl")], tmp_path / "cache")
        assert index.columns == ("a", "b", "c", "mixed", "d") and len(index.rows) == 3
        assert index.read(0)["b"].type == index.read(2)["b"].type == pa.string()
        assert index.read(1)["a"].to_pylist() == [None] * 3 and index.read(1)["b"].to_pylist() == ["text"] * 3
        assert index.read(2)["d"].to_pylist() == [2.5] and index.read(0)["d"].null_count == 4096
        # No type is both: each block keeps its own.
        assert index.read(0)["mixed"].to_pylist()[:2] == [1, 1] and index.read(1)["mixed"].to_pylist() == ["one"] * 3


def test_files_that_cannot_be_streamed_are_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r'"nowhere/\*.parquet" \(task.train_files\) names no file'):
        open_shards(["nowhere/*.parquet"], None)
    (tmp_path / "a.csv").write_text("sentence,label\n")
    with pytest.raises(DataError, match=r"a.csv.*streamed from .parquet and .jsonl files"):
        open_shards([str(tmp_path / "a.csv")], None)
    (tmp_path / "b.parquet").write_bytes(b"PAR1 is how it begins")
    with pytest.raises(DataError, match=r"b.parquet.* cannot be read"):
        open_shards([str(tmp_path / "b.parquet")], None)
    index = open_shards(_files(corpus), None)
    (corpus / "part-2.jsonl").write_text('{"sentence": "a"}\n{"sentence": "b"}\n')
    place = list(index.files).index(index.paths.index(str(corpus / "part-2.jsonl")))
    with pytest.raises(DataError, match=r"part-2.jsonl.*the file was changed"):
        index.read(place)


def test_what_needs_all_rows_is_refused(corpus: Path) -> None:
    rows = _stream(corpus)
    with pytest.raises(ConfigurationError, match=r"task.streaming = true: .* needs all training rows at once"):
        _ = rows.labels
    with pytest.raises(ConfigurationError, match=r'method.pairing = "dataset"'):
        _stream(corpus, mixing=Mixing(pairing="dataset"))
    with pytest.raises(ConfigurationError, match=r"training.batch_size = 1000: task.train_files have 300 rows"):
        _stream(corpus, batch=1000, micro=1000)


def _run_config(folder: Path, **sections: Any) -> str:
    """The toy task with its training rows in five files."""
    config = toy_config(folder, **sections)
    lines = (folder / "train.jsonl").read_text().splitlines()
    for number in range(5):
        (folder / f"shard-{number}.jsonl").write_text("\n".join(lines[number::5]) + "\n")
    streaming = {"streaming": True, "streaming_window": 8, "label_names": ["bad", "good"]}
    config["task"] |= {"train_files": [str(folder / "shard-*.jsonl")], **streaming}
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return str(path)


def test_a_run_streams_on_one_and_two_ranks_and_resumes_on_the_other(tmp_path: Path) -> None:
    training = {"steps": 16, "micro_batch_size": 2, "checkpoint_every": 8, "evaluate_every": 16}
    config = _run_config(tmp_path, training=training)
    must_run(program("--config", config, "--set", f"output.directory={tmp_path / 'one'}"))
    expected = losses(tmp_path / "one")
    assert len(set(expected)) == 16
    must_run_ranks(2, "--config", config)
    assert losses(tmp_path / "run") == pytest.approx(expected, abs=1e-5)
    must_run(["rm", "-r", str(tmp_path / "run" / "checkpoints" / "step-00000016")])
    output = must_run(program("--config", config, "--resume"))
    assert "after step 8 of 16, written by 2 ranks" in output
    assert losses(tmp_path / "run") == pytest.approx(expected, abs=1e-5)
    first, second = (records(tmp_path / name, "evaluation")[-1]["metrics"] for name in ("one", "run"))
    assert second == pytest.approx(first, abs=1e-5)
    other = run(program("--config", config, "--resume", "--set", "training.micro_batch_size=4"))
    assert other.returncode == 1
    assert "task.streaming: the checkpoint's steps had 4 micro-batches, and now they have 2" in other.stderr


def test_rows_must_be_those_of_the_checkpoint_and_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    check_same_rows("", "abc")  # a checkpoint that says nothing about them
    check_same_rows("abc", "abc")
    with pytest.raises(DataError, match=r"\(abc then, abd now\)"):
        check_same_rows("abc", "abd")
    monkeypatch.setattr(distributed, "gather_objects", lambda mine: [mine, mine, ("other", "host-c")])
    with pytest.raises(DataError, match=r"training rows on host-c \(rank 2\) are not those on .* \(rank 0\)"):
        _require_same_rows("one")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.batching=length", "task.streaming = true and training.batching exclude each other"),
        ("task.train_rows=10", "task.streaming = true and task.train_rows exclude each other"),
        ('method={"name":"reffakd"}', "needs all training rows at once"),
    ],
)
def test_contradictory_configurations_are_refused(tmp_path: Path, override: str, message: str) -> None:
    result = run(program("--config", _run_config(tmp_path), "--set", override))
    assert result.returncode == 1, result.stderr
    assert message in result.stderr and "Traceback" not in result.stderr
