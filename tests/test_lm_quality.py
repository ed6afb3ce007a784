"""The quality benchmark of language models: its table, its intervals, and what it refuses."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from toy import ROOT, environment
from toy_lm import byte_tokenizer, language_task, save_lm, tiny_lm

from benchmarks.lm_own_text import _divergence, divergence_on_own_text
from benchmarks.lm_quality import ARMS, SETTINGS, Options, describe, finished
from benchmarks.lm_quality_report import collect, interval, markdown
from mixkd_fast.causal_lm import CausalLM
from mixkd_fast.configuration import Task, validate


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
    report = collect(runs, {"shakespeare": "Text"}, {name: ARMS[name] for name in ("ce", "kd")}, "abc")
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
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "has no lm/tiny_shakespeare_train.parquet" in done.stderr


def test_arms_after_ce_begin_with_its_student_and_are_compared_with_more_of_it() -> None:
    options = Options(Path("data"), Path("work"), "fp32", 1, 1.0)
    wanted = describe("shakespeare", "ce_gkd", 1, options)
    assert wanted["start"]["run"] == describe("shakespeare", "ce", 1, options)
    assert wanted["method"] == describe("shakespeare", "gkd", 1, options)["method"]
    values = {("ce", 0): 20.0, ("ce_ce", 0): 16.0, ("ce_gkd", 0): 12.0}
    runs: dict[Any, Any] = {("shakespeare", arm, seed): _figures(arm, seed, v) for (arm, seed), v in values.items()}
    report = collect(runs, {"shakespeare": "Text"}, {name: ARMS[name] for name in ("ce", "ce_ce", "ce_gkd")}, "abc")
    assert [row["change"] for row in report["tables"]["shakespeare"][:2]] == [None, None]
    assert report["tables"]["shakespeare"][2]["change"]["percent"] == pytest.approx(-25)
    page = markdown(report)
    assert page.index("From random weights") < page.index("| CE (labels") < page.index("as many steps again, at a peak")


@pytest.mark.parametrize("instruct", [False, True])
def test_divergence_on_own_text(tmp_path: Path, instruct: bool) -> None:
    tokenizer = byte_tokenizer()
    student = save_lm(tmp_path / "student", tokenizer=tokenizer, seed=1)
    teacher = save_lm(tmp_path / "teacher", tokenizer=tokenizer, seed=2)
    task = validate(Task, language_task(tmp_path, instruct=instruct, cache_dir=str(tmp_path / "cache")))
    assert divergence_on_own_text(student, student, task, 6)["kl"] == pytest.approx(0, abs=1e-12)
    found = divergence_on_own_text(student, teacher, task, 6)
    # The draws are those of the seed.
    assert found == divergence_on_own_text(student, teacher, task, 6)
    assert found["kl"] > 0.01 and found["tokens"] > 20
    assert divergence_on_own_text(teacher, student, task, 6)["kl"] != pytest.approx(found["kl"], rel=1e-3)


@torch.no_grad()
def test_the_divergence_of_padded_rows_is_that_of_each_row_alone() -> None:
    student, teacher = CausalLM(tiny_lm(seed=1)), CausalLM(tiny_lm(seed=2))
    ids = torch.tensor([[257, 257, 5, 6, 7, 8, 9], [1, 2, 3, 4, 10, 11, 257]])
    mask = (ids != 257).long()
    found = _divergence(student, teacher, ids, mask)
    for number, (row, kept) in enumerate(zip(ids, mask.bool(), strict=True)):
        alone = row[kept][None]
        log_q, log_p = (F.log_softmax(lm.model(input_ids=alone).logits.double(), -1) for lm in (student, teacher))
        expected = (log_q.exp() * (log_q - log_p)).sum(-1)[0, :-1]
        place = int(kept.nonzero()[0])
        torch.testing.assert_close(found[number, place + 1 : place + 1 + len(expected)], expected)
