"""Sweeps of real runs of the toy task: resumption, failures, ranking, reports, partition studies."""

import fcntl
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from toy import ROOT, environment, losses, toy_config

from mixkd_fast import cli_sweep
from mixkd_fast.configuration import Config, validate
from mixkd_fast.distillation import run_config
from mixkd_fast.interrupt import StopRequest
from mixkd_fast.sweep import execution

TRAINING = {"steps": 4, "evaluate_every": 2}


def _write(folder: Path, training: dict[str, Any] | None = None, **fields: Any) -> Path:
    """A sweep file over the toy task, into folder/out."""
    base = toy_config(folder, training={**TRAINING, **(training or {})}, method={"name": "kd"})
    path = folder / "sweep.json"
    path.write_text(json.dumps({"config": base, "output": str(folder / "out"), **fields}))
    return path


def _run(path: Path, *options: str) -> int:
    return cli_sweep.main(["--config", str(path), *options])


def _report(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "out" / "sweep.json").read_text())
    return content


def _summary(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return content


class _Page(HTMLParser):
    """Tags and text, and whether every opened tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A grid with a coupled pair over two seeds, of which one value of num_layers cannot run. And its exit code."""
    folder = tmp_path_factory.mktemp("grid")
    pairs = [{"method.kd_weight": w, "method.mle_weight": 1 - w} for w in (0.25, 1.0)]
    path = _write(folder, fields={"student.num_layers": [1, 9]}, coupled=[pairs], seeds=[0, 1])
    return folder, _run(path)


def test_a_failed_trial_is_recorded_and_stops_nothing(grid: tuple[Path, int]) -> None:
    folder, code = grid
    trials = _report(folder)["trials"]
    assert code == 1 and len(trials) == 4
    assert [trial["status"] for trial in trials] == ["finished", "finished", "failed", "failed"]
    for trial in trials[2:]:
        assert trial["values"]["student.num_layers"] == 9 and trial["rank"] is None and trial["mean"] is None
        assert len(trial["errors"]) == 2 and all("num_layers" in error for error in trial["errors"])


def test_ranking_is_by_the_mean_over_seeds(grid: tuple[Path, int]) -> None:
    folder, _ = grid
    report = _report(folder)
    assert report["metric"] == "validation/accuracy" and report["higher_is_better"]
    done = [trial for trial in report["trials"] if trial["status"] == "finished"]
    for trial in done:
        assert trial["values"]["method.kd_weight"] + trial["values"]["method.mle_weight"] == 1
        runs = [_summary(Path(trial["folder"]) / f"seed-{seed}") for seed in (0, 1)]
        values = [run["metrics"]["validation"]["accuracy"] for run in runs]
        assert trial["mean"] == pytest.approx(statistics.fmean(values))
        assert trial["std"] == pytest.approx(statistics.stdev(values))
        assert trial["by_seed"] == {"0": values[0], "1": values[1]}
        assert trial["seconds"] == pytest.approx(sum(run["training"]["seconds"] for run in runs))
        assert all((Path(student) / "model.safetensors").is_file() for student in trial["students"])
    assert done[0]["mean"] >= done[1]["mean"] and [trial["rank"] for trial in done] == [1, 2]


def test_a_sweep_without_a_finished_run_keeps_its_metric(tmp_path: Path) -> None:
    path = _write(tmp_path, fields={"student.num_layers": [9]}, metric="nll")
    assert _run(path) == 1
    report = _report(tmp_path)
    assert report["metric"] == "nll" and not report["higher_is_better"] and report["trials"][0]["metric"] is None


def test_trials_of_tasks_with_other_splits_go_by_their_own(tmp_path: Path) -> None:
    path = _write(tmp_path)
    content = json.loads(path.read_text())
    (files,) = content["config"]["task"]["evaluation_files"].values()
    content["fields"] = {"task.evaluation_files": [{"first": files}, {"second": files}]}
    path.write_text(json.dumps(content))
    assert _run(path) == 0
    report = _report(tmp_path)
    assert report["metric"] == "accuracy" and report["higher_is_better"]
    assert {trial["metric"] for trial in report["trials"]} == {"first/accuracy", "second/accuracy"}
    assert all(trial["mean"] is not None for trial in report["trials"])
    assert "By accuracy" in (tmp_path / "out" / "sweep.html").read_text()


def test_a_metric_of_which_less_is_better_turns_the_order(grid: tuple[Path, int]) -> None:
    folder, _ = grid
    content = json.loads((folder / "sweep.json").read_text())
    path = folder / "by_nll.json"
    path.write_text(json.dumps(content | {"metric": "nll"}))
    assert _run(path, "--report-only") == 1
    report = _report(folder)
    assert _run(folder / "sweep.json", "--report-only") == 1  # for the other tests
    means = [trial["mean"] for trial in report["trials"] if trial["mean"] is not None]
    assert report["metric"] == "validation/nll" and not report["higher_is_better"]
    assert len(means) == 2 and means == sorted(means) and means[0] != means[1]


def test_report_files_can_be_read(grid: tuple[Path, int]) -> None:
    folder, _ = grid
    page = _Page((folder / "out" / "sweep.html").read_text())
    text = " ".join(page.words)
    assert not page.open and "validation/accuracy over method.kd_weight" in text and "Failed" in text
    assert page.tags.count("svg") == page.tags.count("figure") == 2  # num_layers has one value that finished
    lines = (folder / "out" / "sweep.md").read_text().splitlines()
    table = [line.strip("|").split("|") for line in lines if line.startswith("|")]
    assert len(table) == 6 and len({len(row) for row in table}) == 1
    assert [cell.strip() for cell in table[0]][:3] == ["rank", "trial", "student.num_layers"]
    assert sum(line.startswith("- 0") for line in lines) == 4  # two seeds of two trials failed


def test_a_trial_is_the_run_that_it_says(grid: tuple[Path, int]) -> None:
    """Neither the trials before it in this process nor its place change it."""
    folder, _ = grid
    trial = _report(folder)["trials"][1]
    content = json.loads((Path(trial["folder"]) / "seed-1" / "config.json").read_text())
    content["output"]["directory"] = str(folder / "alone")
    run_config(validate(Config, content), progress=False)
    assert losses(folder / "alone") == losses(Path(trial["folder"]) / "seed-1")


def test_finished_trials_stay_and_failed_ones_are_tried_again(grid: tuple[Path, int]) -> None:
    folder, _ = grid
    finished = list(folder.glob("out/trials/*/seed-*/summary.json"))
    failed = list(folder.glob("out/trials/*/seed-*.failed.json"))
    assert len(finished) == len(failed) == 4
    before = {path: path.stat().st_mtime_ns for path in [*finished, *failed]}
    assert not list(folder.glob("out/trials/*/seed-*/checkpoints"))
    assert _run(folder / "sweep.json") == 1
    assert all(path.stat().st_mtime_ns == before[path] for path in finished)
    assert all(path.stat().st_mtime_ns > before[path] for path in failed)


def test_a_longer_sweep_file_runs_what_is_new(tmp_path: Path) -> None:
    path = _write(tmp_path, fields={"method.temperature": [1.0]}, training={"steps": 2})
    assert _run(path) == 0
    (first,) = tmp_path.glob("out/trials/*/seed-0/summary.json")
    before = first.stat().st_mtime_ns
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"fields": {"method.temperature": [4.0, 1.0]}}))
    assert _run(path) == 0
    assert first.stat().st_mtime_ns == before
    assert sorted(folder.name[:3] for folder in (tmp_path / "out" / "trials").iterdir()) == ["000", "001"]
    assert {trial["values"]["method.temperature"] for trial in _report(tmp_path)["trials"]} == {1.0, 4.0}


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_stopped_sweep_goes_on_where_it_was(
    tmp_path: Path, number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    training = {"steps": 150, "evaluate_every": 150, "checkpoint_every": 10}
    path = _write(tmp_path, training, search="random", trials=2, fields={"method.temperature": {"uniform": [1, 3]}})
    process = subprocess.Popen(
        [sys.executable, "-m", "mixkd_fast.cli", "sweep", "--config", str(path)],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline, trials = time.monotonic() + 240, tmp_path / "out" / "trials"
    while not any(len(log.read_bytes().splitlines()) > 25 for log in trials.glob("001-*/seed-0/metrics.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0][-3000:]
        time.sleep(0.005)
    os.kill(process.pid, number)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    (first,) = trials.glob("000-*/seed-0/summary.json")
    (second,) = trials.glob("001-*/seed-0")
    assert not (second / "summary.json").exists(), "stopped too late to show anything"
    if number == signal.SIGTERM:
        assert "The same sweep command goes on" in output
        assert [trial["status"] for trial in _report(tmp_path)["trials"]] == ["finished", "unfinished"]
    before = first.stat().st_mtime_ns
    capfd.readouterr()
    assert _run(path) == 0
    assert capfd.readouterr().err.count("Resuming from") == 1 and first.stat().st_mtime_ns == before
    assert len(losses(second)) == 150
    assert [trial["status"] for trial in _report(tmp_path)["trials"]] == ["finished", "finished"]


def test_a_signal_at_the_last_step_of_a_run_stops_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run itself has nothing left to stop."""

    def signalled(config: Config, resume: bool) -> Any:
        with StopRequest():
            os.kill(os.getpid(), signal.SIGTERM)
        return run_config(config, resume=resume)

    path = _write(tmp_path, fields={"method.temperature": [1.0, 2.0]})
    monkeypatch.setattr(execution, "run_config", signalled)
    assert _run(path) == 128 + signal.SIGTERM
    assert [trial["status"] for trial in _report(tmp_path)["trials"]] == ["finished", "unfinished"]
    monkeypatch.undo()
    assert _run(path) == 0


def test_partition_study_compares_strategies_and_transfers(tmp_path: Path) -> None:
    strategies = ["iid", "label_skew", "quantity_skew"]
    study = {"strategies": strategies, "parts": 2, "alpha": 0.5, "transfer": ["none", "initial", "teacher"]}
    path = _write(tmp_path, {"steps": 3, "evaluate_every": 3}, partition=study)
    assert _run(path) == 0
    report = _report(tmp_path)
    trials = {tuple(trial["values"].values()): trial for trial in report["trials"]}
    assert len(trials) == 9
    for (strategy, transfer), trial in trials.items():
        folders = [Path(trial["folder"]) / "seed-0" / f"part-{part}" for part in range(2)]
        first, second = map(_summary, folders)
        assert first["data"]["train_rows"] + second["data"]["train_rows"] == 96
        assert (first["data"]["train_rows"] == 48) == (strategy == "iid")
        assert second["data"]["evaluation_rows"] == {"validation": 40}
        accuracies = [run["metrics"]["validation"]["accuracy"] for run in (first, second)]
        assert trial["mean"] == accuracies[1] and trial["by_part"] == {"0": accuracies[0], "1": accuracies[1]}
        taught_by_student = second["teacher"]["model"] == str(folders[0] / "student")
        assert taught_by_student == (transfer == "teacher")
        assert second["student"]["layers"] == 2
        if transfer == "initial":  # it starts from weights that have been trained
            content = json.loads((folders[1] / "config.json").read_text())
            assert content["student"]["model"] == str(folders[0] / "student")
    # Shard 0 is trained the same whatever is handed on later; shard 1 is not.
    for strategy in strategies:
        runs = [Path(trials[strategy, transfer]["folder"]) / "seed-0" for transfer in study["transfer"]]
        assert len({tuple(losses(run / "part-0")) for run in runs}) == 1
        assert len({tuple(losses(run / "part-1")) for run in runs}) == 3
    text = (tmp_path / "out" / "sweep.html").read_text()  # labels of plots are glyphs, with their text in a comment
    assert "by strategy and transfer" in text and "label_skew, teacher" in text and "mean of shards" in text


@pytest.mark.slow
def test_several_ranks_are_started_by_the_launcher(tmp_path: Path) -> None:
    training = {"steps": 2, "evaluate_every": 2, "micro_batch_size": 2}
    path = _write(tmp_path, training, fields={"student.num_layers": [1, 9]}, ranks=2)
    assert _run(path) == 1
    good, bad = _report(tmp_path)["trials"]
    assert good["status"] == "finished" and bad["status"] == "failed"
    assert _summary(Path(good["folder"]) / "seed-0")["training"]["ranks"] == 2
    assert "num_layers" in bad["errors"][0].splitlines()[0] and "seed-0.log" in bad["errors"][0]


def test_two_sweeps_do_not_share_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _write(tmp_path, fields={"method.temperature": [1.0]})
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / ".sweep.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert _run(path) == 1
    assert "another sweep is at work there" in capsys.readouterr().err
    assert not (tmp_path / "out" / "trials").exists()
