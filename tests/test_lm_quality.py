"""The quality benchmark of language models: its table, its intervals, and what it refuses."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from toy import ROOT, environment

from benchmarks.lm_quality import ARMS, SETTINGS, Options, describe, finished
from benchmarks.lm_quality_report import collect, interval, markdown


def _figures(arm: str, seed: int, perplexity: float) -> dict[str, Any]:
    options = Options(Path("data"), Path("work"), "fp32", 1, 1.0)
    return {
        **describe("shakespeare", arm, seed, options),
        "metrics": {"validation": {"perplexity": 1.0}, "test": {"perplexity": perplexity}},
        "teacher_metrics": None if arm == "ce" else {"test": {"perplexity": 7.0}},
        "parameters": 10,
        "seconds": 2.0,
    }


def test_the_table_pairs_seeds_and_takes_the_last_split() -> None:
    values = {("ce", 0): 20.0, ("ce", 1): 22.0, ("kd", 0): 18.0, ("kd", 1): 19.8}
    runs: dict[Any, Any] = {("shakespeare", arm, seed): _figures(arm, seed, v) for (arm, seed), v in values.items()}
    runs["shakespeare", "kd", 2] = None
    titles = {name: ARMS[name].title for name in ("ce", "kd")}
    report = collect(runs, {"shakespeare": "Text"}, titles, "abc")
    labels, kd = report["tables"]["shakespeare"]
    assert labels["perplexity"] == pytest.approx(21.0) and labels["change"] is None
    # Both seeds are a tenth below: no spread, whatever the seeds' own levels are.
    assert kd["change"]["percent"] == pytest.approx(-10) and kd["change"]["upper"] == pytest.approx(-10)
    assert report["missing"] == [["shakespeare", "kd", 2]]
    assert "| teacher | 1 | 7.00 |" in markdown(report)


def test_intervals_are_students_t() -> None:
    logs = [math.log(0.9), math.log(0.8), math.log(0.85)]
    mean = sum(logs) / 3
    deviation = math.sqrt(sum((value - mean) ** 2 for value in logs) / 2)
    # Three seeds: the quantile is 4.30265.
    upper = 100 * (math.exp(mean + 4.30265 * deviation / math.sqrt(3)) - 1)
    assert interval(logs)["upper"] == pytest.approx(upper, rel=1e-4)
    assert interval([0.1])["lower"] is None


def test_a_run_of_other_steps_counts_as_not_made(tmp_path: Path) -> None:
    options = Options(Path("data"), tmp_path, "fp32", 1, 1.0)
    wanted = describe("shakespeare", "kd", 0, options)
    assert finished(tmp_path, wanted) is None
    (tmp_path / "result.json").write_text(json.dumps(wanted | {"metrics": {}}))
    assert finished(tmp_path, wanted) is not None
    assert finished(tmp_path, wanted | {"steps": wanted["steps"] + 1}) is None
    assert wanted["steps"] == SETTINGS["shakespeare"].student_steps


def test_missing_files_are_named(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.lm_quality", "--data", str(tmp_path), "--settings", "shakespeare"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "has no lm/tiny_shakespeare_train.parquet" in done.stderr
