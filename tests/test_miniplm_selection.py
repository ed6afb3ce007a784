"""The benchmark of MiniPLM's selection runs whole on a little text, and its table counts what was kept."""

import json
import random
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import miniplm_selection
from benchmarks.miniplm_selection import KINDS, WORDS, passages_of


def write_files(folder: Path) -> None:
    """Three corpora of made sentences."""
    rng, vocabulary = random.Random(0), [f"w{number}" for number in range(30)]
    (folder / "lm").mkdir(parents=True)
    for name in ("c4_sample", "wikipedia_sample", "tiny_shakespeare"):
        texts = [" ".join(rng.choices(vocabulary, k=10 * WORDS + 3)) for _ in range(16)]
        pq.write_table(pa.table({"text": texts}), folder / f"lm/{name}_train.parquet")


def test_passages_are_whole() -> None:
    assert [len(text.split()) for text in passages_of("word " * (2 * WORDS + 7))] == [WORDS, WORDS]


def test_a_small_selection_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path)
    monkeypatch.setattr(miniplm_selection, "VALIDATION", 4)
    options = ["--data", str(tmp_path), "--steps", "4", "--rows", "6", "--precision", "fp32"]
    folders = ["--work", str(tmp_path / "work"), "--output", str(tmp_path / "output")]
    monkeypatch.setattr(sys, "argv", ["miniplm_selection", *options, *folders])
    assert miniplm_selection.main() == 0
    report = json.loads((tmp_path / "output" / "miniplm_selection.json").read_text())
    assert [row["rows"] for row in report["kinds"]] == [6] * len(KINDS)
    assert sum(row["kept_percent"] * 6 / 100 for row in report["kinds"]) == pytest.approx(12)
    selected, dropped = report["kept"]["selected"], report["kept"]["dropped"]
    assert (selected["rows"], dropped["rows"]) == (12, 12) and selected["score"] > dropped["score"]
    for row in (selected, dropped, *report["kinds"]):
        assert row["score"] == pytest.approx(row["reference_nll"] - row["teacher_nll"], abs=1e-6)
    page = (tmp_path / "output" / "miniplm_selection.md").read_text()
    assert all(title in page for title in KINDS.values()) and "| kept |" in page and "| dropped |" in page


def test_missing_data_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["miniplm_selection", "--data", str(tmp_path)])
    assert miniplm_selection.main() == 2
    assert "lm/c4_sample_train.parquet" in capsys.readouterr().err
