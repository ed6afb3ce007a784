"""The quality benchmark: two arms through the real program, kept, resumed and adopted; its settings and options."""

import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset
from toy import ROOT, save_toy_teacher, toy_rows

from benchmarks import quality, quality_report, quality_results, quality_runs
from benchmarks.quality_plan import estimate, plan_text
from benchmarks.quality_results import TEACHER, Options, Run
from benchmarks.quality_settings import (
    ARMS,
    SETTINGS,
    TEACHER_BATCH_SIZE,
    Setting,
    chosen,
    method_of,
    pairs,
    seed_numbers,
)
from benchmarks.statistics import unpack, unpack_losses
from mixkd_fast.errors import ConfigurationError
from mixkd_fast.interrupt import StopRequest
from mixkd_fast.run import Run as TrainingRun

FT, KD = (Run("toy_half", arm, 2, 0) for arm in ("ft", "kd"))


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Options:
    """The toy task in the place of the real ones: a setting of all rows, and one of half of them."""
    for split, count, seed in (("train", 64, 1), ("validation", 40, 2)):
        rows = Dataset.from_dict(toy_rows(count, seed)).cast_column("label", ClassLabel(names=["bad", "good"]))
        (tmp_path / "data" / "toy").mkdir(parents=True, exist_ok=True)
        rows.to_parquet(tmp_path / "data" / "toy" / f"{split}.parquet")
    # A task without a table row: the text's column is recognised, the labels' names are in the file.
    whole = Setting("Toy", "toy", 32, 8.0, 64, 2, 4, 2, learning_rate=2e-3, teacher_learning_rate=2e-3)
    half = Setting("Half", "toy", 32, 8.0, 32, 2, 1, 2, fraction=0.5, learning_rate=2e-3, teacher_learning_rate=2e-3)
    monkeypatch.setitem(SETTINGS, "toy", whole)
    monkeypatch.setitem(SETTINGS, "toy_half", half)
    encoder = str(save_toy_teacher(tmp_path / "encoder"))
    return Options(tmp_path / "data", encoder, "toy-encoder", tmp_path / "work", "fp32", "all", threads=1)


def test_two_arms_from_data_to_report(options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [
        "quality",
        *("--data", str(options.data), "--work", str(options.work), "--output", str(tmp_path / "out")),
        *("--encoder", options.encoder, "--precision", "fp32", "--threads", "1"),
        *("--settings", "toy_half", "--arms", "ft,kd", "--seeds", "0-1", "--student-layers", "2"),
    ]
    monkeypatch.setattr(sys, "argv", command)
    assert quality.main() == 0
    report = json.loads((tmp_path / "out" / "quality.json").read_text())
    assert not report["missing"]
    assert str(tmp_path) not in json.dumps(report), "paths of this machine in the result file"
    by_run = {(r["setting"], r["arm"], r["layers"], r["seed"]): r for r in report["results"]}
    students = [("toy_half", arm, 2, seed) for arm in ("ft", "kd") for seed in (0, 1)]
    assert set(by_run) == {("toy", TEACHER, 0, 0), *students}
    assert by_run["toy", TEACHER, 0, 0]["training_rows"] == 64 and by_run["toy_half", "kd", 2, 0]["training_rows"] == 32
    hashes = {key: result["content_hash"] for key, result in by_run.items()}
    assert hashes["toy_half", "ft", 2, 0] == hashes["toy_half", "kd", 2, 0] != hashes["toy_half", "kd", 2, 1]
    assert by_run["toy_half", "ft", 2, 0]["steps"] == by_run["toy_half", "kd", 2, 0]["steps"] == 2
    for result in by_run.values():
        split = result["splits"]["validation"]
        assert unpack(split["correct"], 40).mean() == split["metrics"]["accuracy"]
        assert unpack_losses(split["nll"]).mean() == pytest.approx(split["metrics"]["nll"], rel=1e-3)
        assert ("kl_to_teacher" in split["metrics"]) == (result["arm"] != TEACHER)
    (difference,) = report["comparisons"]
    assert (difference["first"], difference["second"], difference["seeds"]) == ("kd", "ft", [0, 1])
    accuracies = [by_run["toy_half", arm, 2, s]["splits"]["validation"] for arm in ("kd", "ft") for s in (0, 1)]
    means = np.array([entry["metrics"]["accuracy"] for entry in accuracies]).reshape(2, 2).mean(1)
    assert difference["accuracy"]["difference"] == pytest.approx(means[0] - means[1])
    nll = [entry["metrics"]["nll"] for entry in accuracies]
    assert difference["nll"]["difference"] == pytest.approx((nll[0] + nll[1] - nll[2] - nll[3]) / 2, abs=1e-3)
    assert "| Half | 2 |" in (tmp_path / "out" / "quality.md").read_text()
    assert (tmp_path / "out" / "quality.svg").read_text().count("3 layers") == 0
    assert not list(options.work.glob("toy_half/*/student")), "weights of students are kept"
    # Nothing is made twice, nor what another work folder has made.
    with monkeypatch.context() as patch:
        patch.setattr(quality_runs, "_make", None)
        assert quality.main() == 0
        elsewhere = {str(options.work): str(tmp_path / "other"), str(tmp_path / "out"): str(tmp_path / "again")}
        adopting = [elsewhere.get(word, word) for word in command] + ["--adopt", str(tmp_path / "out" / "quality.json")]
        patch.setattr(sys, "argv", adopting)
        assert quality.main() == 0
    again = json.loads((tmp_path / "again" / "quality.json").read_text())
    assert again["results"] == report["results"] and again["comparisons"] == report["comparisons"]
    assert str(tmp_path) not in json.dumps(again), "paths of this machine in the result file"
    # What is missing is made there, with a teacher made anew.
    monkeypatch.setattr(sys, "argv", [*adopting, "--arms", "kd", "--seeds", "2"])
    assert quality.main() == 0
    report = json.loads((tmp_path / "again" / "quality.json").read_text())
    assert len(report["results"]) == 6 and (tmp_path / "other" / "toy" / "teacher-0" / "logits.npz").is_file()


def test_runs_of_another_budget_are_not_adopted(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    described = quality_results.describe(FT, options)
    result = {"setting": "toy_half", "arm": "ft", "layers": 2, "seed": 0, "description": described, "splits": {}}
    data = quality_results.digest_of(options.data / "toy" / "train.parquet")
    result |= {"content_hash": "", "models": {}, "processor": "", "training_data": data}
    assert quality_results.adopt([result], options) == [FT] and quality_results.finished(FT, options) == result
    assert quality_results.adopt([result], options) == [], "what is here stays"
    assert quality_results.adopt([{**result, "seed": 1, "training_data": "other"}], options) == []
    half = SETTINGS["toy_half"]
    monkeypatch.setitem(SETTINGS, "toy_half", replace(half, batch_size=half.batch_size // 2))
    assert quality_results.adopt([result, {**result, "setting": "gone"}, {**result, "arm": "gone"}], options) == []
    assert quality_results.finished(FT, options) is None


@pytest.mark.parametrize("content", [None, "no JSON", "[]", "{}", '{"results": [{"arm": "kd"}]}', '{"results": [1]}'])
def test_a_file_that_is_no_report_is_refused(
    content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "quality.json"
    if content is not None:
        file.write_text(content)
    folders = ["--data", str(tmp_path), "--work", str(tmp_path), "--output", str(tmp_path), "--encoder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["quality", *folders, "--report-only", "--adopt", str(file)])
    assert quality.main() == 2
    assert f"--adopt {file}" in capsys.readouterr().err


def test_a_failed_run_costs_no_other(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    real = quality_runs.distill

    def sometimes(**sections: Any) -> Any:
        if sections["method"]["name"] == "kd":
            raise RuntimeError("out of luck")
        return real(**sections)

    monkeypatch.setattr(quality_runs, "distill", sometimes)
    assert quality._make_all([KD, FT], options) == 1
    assert quality_results.finished(FT, options) is not None and quality_results.finished(KD, options) is None
    report = quality_report.collect(options, [KD, FT], "quality")
    missing = {"setting": "toy_half", "arm": "kd", "layers": 2, "seed": 0, "why": "failed: RuntimeError: out of luck"}
    assert report["missing"] == [missing]
    assert "failed: RuntimeError: out of luck: kd 0" in quality_report.markdown(report)


def test_a_teacher_that_fails_is_tried_once(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def never(**sections: Any) -> Any:
        asked.append(sections["output"]["directory"])
        raise RuntimeError("no teacher")

    monkeypatch.setattr(quality_runs, "distill", never)
    assert quality._make_all([KD, FT], options) == 1
    assert asked == [str(options.work / "toy" / "teacher-0")]


def test_a_stopped_run_goes_on_and_ends_as_if_it_had_not_been(options: Options) -> None:
    whole = quality_runs.make(FT, options)
    assert whole is not None
    folder = quality_results.folder_of(FT, options)
    (folder / "result.json").unlink()
    enter = StopRequest.__enter__

    def stopped_at_once(request: StopRequest) -> StopRequest:
        entered = enter(request)
        os.kill(os.getpid(), signal.SIGTERM)
        return entered

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StopRequest, "__enter__", stopped_at_once)
        assert quality._make_all([FT], options) == 128 + signal.SIGTERM
    assert quality_results.finished(FT, options) is None and (folder / "checkpoints").is_dir()
    assert not (folder / "failure.json").exists()
    again = quality_runs.make(FT, options)
    assert again is not None and again["steps"] == whole["steps"]
    resumed = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert resumed["step"] == whole["steps"]
    assert again["splits"] == whole["splits"]


def test_a_signal_before_the_first_step_ends_the_run_there(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def prepares(**sections: Any) -> None:
        asked.append(sections["method"]["name"])
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
        raise AssertionError("it went on")

    monkeypatch.setattr(quality_runs, "distill", prepares)
    started = time.monotonic()
    assert quality._make_all([KD, FT], options) == 128 + signal.SIGTERM
    assert asked == ["finetune"] and time.monotonic() - started < 30
    assert not list(options.work.glob("*/*/failure.json")) and not list(options.work.glob("*/*/result.json"))


def test_a_signal_at_the_last_step_is_not_lost(options: Options) -> None:
    """The training takes it for itself and ends as it would have; the next one must not begin."""
    evaluate = TrainingRun._evaluate
    quality_runs.make(quality_results.teacher_of(FT, options), options)

    def stopped_at_the_end(run: TrainingRun, *arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        evaluate(run, *arguments)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingRun, "_evaluate", stopped_at_the_end)
        assert quality._make_all([FT, KD], options) == 128 + signal.SIGTERM
    assert quality_results.finished(FT, options) is not None and quality_results.finished(KD, options) is None
    assert signal.getsignal(signal.SIGTERM) == before and signal.set_wakeup_fd(-1) == -1


def test_results_of_another_budget_are_not_shown(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    quality_runs.make(FT, options)
    assert quality_results.finished(FT, options) is not None
    longer = Setting("Half", "toy", 32, 8.0, 32, 3, 1, 2, fraction=0.5, learning_rate=2e-3, teacher_learning_rate=2e-3)
    monkeypatch.setitem(SETTINGS, "toy_half", longer)
    assert quality_results.finished(FT, options) is None
    assert quality_results.why_not(FT, options) == "made with other options or data"
    assert quality_report.collect(options, [FT], "quality")["results"] == []


def test_results_of_another_data_file_are_not_shown(options: Options) -> None:
    quality_runs.make(FT, options)
    file = options.data / "toy" / "train.parquet"
    rows = Dataset.from_dict(toy_rows(64, 5)).cast_column("label", ClassLabel(names=["bad", "good"]))
    assert quality_results.finished(FT, options) is not None
    rows.to_parquet(file)
    assert quality_results.finished(FT, options) is None


def test_an_encoder_is_named_by_its_weights_too(options: Options, tmp_path: Path) -> None:
    other = save_toy_teacher(tmp_path / "elsewhere" / "encoder", seed=9)
    names = {quality._shown(str(place)) for place in (options.encoder, other)}
    assert len(names) == 2 and all(name.startswith("encoder-") for name in names)


def test_an_option_that_came_later_makes_no_result_old(options: Options) -> None:
    now = quality_results.describe(KD, options)
    before = {**now, "method": {name: value for name, value in now["method"].items() if name != "temperature"}}
    assert quality_results.same(before, now) and not quality_results.same(now, before)
    assert not quality_results.same({**now, "method": {**now["method"], "temperature": 3.0}}, now)
    assert not quality_results.same({**now, "teacher": None}, now) and not quality_results.same(
        now, {**now, "teacher": None}
    )
    other_teacher = {**now, "teacher": {**now["teacher"], "max_length": 31}}
    assert not quality_results.same(other_teacher, now)


def test_a_run_of_another_process_is_left_to_it(options: Options) -> None:
    quality_runs.make(quality_results.teacher_of(FT, options), options)
    with quality_results.locked(quality_results.folder_of(FT, options), wait=False) as mine:
        assert mine
        assert quality_runs.make(FT, options) is None


def test_teacher_rows_and_start(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    assert quality_results.teacher_of(FT, options) == Run("toy", TEACHER, 0, 0)
    own = Options(*(getattr(options, name) for name in ("data", "encoder", "encoder_name", "work")), "fp32", "same")
    assert quality_results.teacher_of(Run("toy_half", "kd", 2, 3), own) == Run("toy_half", TEACHER, 0, 3)
    described = quality_results.describe(Run("toy_half", "kd", 2, 3), own)
    assert described["teacher"]["fraction"] == 0.5 and described["teacher"]["training"]["epochs"] == 2
    monkeypatch.setitem(SETTINGS, "after", Setting("After", "toy", 32, 8.0, 64, 2, 4, 2, start="toy"))
    run = Run("after", "kd", 2, 0)
    # The setting "after" is of the task toy, whose teacher is the setting's that carries the task's name.
    whole = Run("toy", TEACHER, 0, 0)
    assert quality_results.in_order(run, options) == [whole, Run("toy", "kd", 2, 0), run]
    assert quality_results.describe(run, options)["start"]["method"]["name"] == "kd"


def test_a_start_is_trained_and_kept(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SETTINGS, "after", Setting("After", "toy", 32, 8.0, 64, 1, 1, 1, start="toy"))
    assert quality._make_all([Run("after", "ft", 2, 0)], options) == 0
    start = quality_results.folder_of(Run("toy", "kd", 2, 0), options)
    used = json.loads((options.work / "after" / "ft-2layers-0" / "config.json").read_text())["student"]["model"]
    assert used == str(start / "student") and (start / "student" / "config.json").is_file()


def test_arms_are_checked_as_a_json_is() -> None:
    for name in ("ft", "kd", "kd_2x", "kd_sm", "tmkd", "sm_tmkd"):
        method_of(name)
    tmkd: Any = method_of("tmkd")
    assert (tmkd.mle_weight, tmkd.kd_weight, tmkd.sm_weight, tmkd.tmkd_weight) == (1.0, 0.0, 0.0, 1.0)
    with (
        pytest.raises(ConfigurationError, match=r"--arms nothing: .*no_such_method"),
        pytest.MonkeyPatch.context() as p,
    ):
        p.setitem(ARMS, "nothing", quality.ARMS["kd"].__class__("Nothing", {"name": "no_such_method"}))
        method_of("nothing")


def test_pairs_that_matter() -> None:
    assert pairs(["tmkd", "ft", "kd", "kd_2x"]) == [
        ("kd_2x", "kd"),
        ("tmkd", "kd"),
        ("kd", "ft"),
        ("kd_2x", "ft"),
        ("tmkd", "ft"),
        ("tmkd", "kd_2x"),
    ]
    assert pairs(["ft"]) == []


def test_options_of_the_command_line() -> None:
    assert seed_numbers("0-2,5,5") == [0, 1, 2, 5]
    for wrong in ("", "a", "3-1", "-1"):
        with pytest.raises(ConfigurationError, match="--seeds"):
            seed_numbers(wrong)
    assert chosen("rte, mrpc,rte", SETTINGS, "--settings") == ["rte", "mrpc"]
    with pytest.raises(ConfigurationError, match="--settings rtee: is not one of"):
        chosen("rtee", SETTINGS, "--settings")


def test_estimates_scale_with_the_work(options: Options) -> None:
    assert estimate(KD, {}) is None
    assert estimate(KD, {Run("toy_half", "kd", 2, 5): 30.0, FT: 1.0}) == 30.0
    assert estimate(Run("toy_half", "kd_2x", 2, 0), {KD: 30.0}) == pytest.approx(60.0)
    # 2 layers, backward counted twice: 6 of a clean row, 12 with a mixed one, and 6 of the teacher for the mixed one.
    assert estimate(Run("toy_half", "tmkd", 2, 0), {KD: 30.0}) == pytest.approx(90.0)
    text = plan_text([FT, KD], options)
    assert "toy_half     2            2     0     0.00    unknown" in text and f"{FT}: not made yet" in text


def test_docs_state_the_budgets() -> None:
    text = (ROOT / "docs" / "quality.md").read_text()
    for name, s in SETTINGS.items():
        steps = int(s.rows // s.batch_size * s.epochs)  # batches by length leave out an epoch's remainder
        cells = [
            f"{s.rows:,}",
            f"{s.epochs:g}",
            s.batch_size,
            f"{steps:,}",
            f"{s.learning_rate:g}",
            s.max_length,
            s.seeds,
        ]
        assert " | ".join([f"| `{name}`", *map(str, cells)]) + " |" in text, name
        assert s.teacher_learning_rate == 1e-4 and TEACHER_BATCH_SIZE == 32
    assert all(f"`{name}`" in text for name in ARMS)
