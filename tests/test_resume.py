"""A run that is killed and resumed ends bit for bit where the uninterrupted one ends."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file
from toy import ROOT, environment, launched, losses, must_run, must_run_ranks, program, records, run, toy_config

STAGES = [pytest.param(stage, marks=[pytest.mark.slow] if stage < 3 else []) for stage in (0, 1, 2, 3)]
WORKER = "tests/workers/resume_stages.py"
KILL_AFTER = 19  # steps: behind the checkpoint of step 14, in the middle of the second epoch


def _write_config(folder: Path, **sections: Any) -> Path:
    training = {"steps": 40, "evaluate_every": 10, "checkpoint_every": 7, **sections.pop("training", {})}
    config = toy_config(folder, student={"num_layers": 2, "dropout": 0.1}, training=training, **sections)
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path


def _wait_for_steps(folder: Path, count: int, process: subprocess.Popen[str], timeout: float = 300) -> None:
    """Return as soon as the run has logged `count` steps."""
    log, deadline = folder / "metrics.jsonl", time.monotonic() + timeout
    while time.monotonic() < deadline:
        if log.exists() and log.read_bytes().count(b'"kind": "train"') >= count:
            return
        if process.poll() is not None:
            pytest.fail(f"the run ended before step {count}:\n{process.communicate()[1][-3000:]}")
        time.sleep(0.002)
    process.kill()
    pytest.fail(f"no step {count} within {timeout} s")


def _start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _kill_tree(process: subprocess.Popen[str]) -> None:
    """SIGKILL for the process and all it started, as a power cut would do."""
    parent = psutil.Process(process.pid)
    for child in [*parent.children(recursive=True), parent]:
        child.kill()
    process.communicate()


def _same_weights(first: Path, second: Path) -> None:
    one, two = (load_file(folder / "student" / "model.safetensors") for folder in (first, second))
    assert one.keys() == two.keys()
    different = [name for name in one if not one[name].equal(two[name])]
    assert not different, f"tensors differ: {different}"


@pytest.fixture(scope="module")
def stages(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """At every stage that is asked for: one run without interruption; one killed by SIGKILL on the way and resumed."""
    folder = tmp_path_factory.mktemp("resume")
    path = _write_config(folder)
    items = [item for item in request.session.items if item.path == request.path and isinstance(item, pytest.Function)]
    stages = sorted({item.callspec.params["stage"] for item in items if "stages" in item.fixturenames})
    must_run([sys.executable, WORKER, str(folder), "whole", "start", *map(str, stages)])
    for stage in stages:
        output = folder / f"killed{stage}"
        zero = json.dumps({"zero_optimization": {"stage": stage}})
        process = _start(
            program("--config", str(path), "--set", f"output.directory={output}", "--set", f"deepspeed={zero}")
        )
        _wait_for_steps(output, KILL_AFTER, process)
        _kill_tree(process)
        assert not (output / "summary.json").exists(), "killed too late to show anything"
    must_run([sys.executable, WORKER, str(folder), "killed", "resume", *map(str, stages)])
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_resumed_losses_are_bit_identical(stages: Path, stage: int) -> None:
    whole, resumed = losses(stages / f"whole{stage}"), losses(stages / f"killed{stage}")
    assert len(whole) == 40 and len(set(whole)) == 40
    assert resumed == whole


@pytest.mark.parametrize("stage", STAGES)
def test_resumed_weights_and_evaluations_are_bit_identical(stages: Path, stage: int) -> None:
    _same_weights(stages / f"whole{stage}", stages / f"killed{stage}")
    whole, resumed = (records(stages / f"{kind}{stage}", "evaluation") for kind in ("whole", "killed"))
    assert [line["metrics"] for line in resumed] == [line["metrics"] for line in whole]


def test_two_ranks_killed_and_resumed_are_bit_identical(tmp_path: Path) -> None:
    path = _write_config(tmp_path, deepspeed={"zero_optimization": {"stage": 2}}, training={"micro_batch_size": 2})
    must_run_ranks(2, "--config", str(path), "--set", f"output.directory={tmp_path / 'whole'}")
    arguments = ["--config", str(path), "--set", f"output.directory={tmp_path / 'killed'}"]
    process = _start(launched(2, *arguments))
    _wait_for_steps(tmp_path / "killed", KILL_AFTER, process)
    _kill_tree(process)
    output = must_run_ranks(2, *arguments, "--resume")
    assert "Resuming from" in output
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    _same_weights(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("log_every", [pytest.param(1, marks=pytest.mark.slow), 9])
def test_sigterm_finishes_the_step_saves_and_says_how_to_resume(tmp_path: Path, log_every: int) -> None:
    training = {"steps": 400, "evaluate_every": 400, "checkpoint_every": 400, "log_every": log_every}
    path = _write_config(tmp_path, training=training)
    process = _start(program("--config", str(path)))
    _wait_for_steps(tmp_path / "run", -(-KILL_AFTER // log_every), process)
    os.kill(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "--resume" in errors and "after step" in errors
    stopped = int(errors.rpartition("after step ")[2].split()[0])
    assert len(losses(tmp_path / "run")) == stopped // log_every
    assert KILL_AFTER <= stopped < 400
    resumed = must_run(program("--config", str(path), "--resume", "--set", "training.checkpoint_every=1000"))
    assert f"after step {stopped} of 400" in resumed
    assert len(losses(tmp_path / "run")) == -(-400 // log_every)


def test_sigterm_to_the_launcher_command_saves_on_all_ranks(tmp_path: Path) -> None:
    path = _write_config(
        tmp_path, training={"steps": 4000, "evaluate_every": 4000, "checkpoint_every": 4000, "micro_batch_size": 2}
    )
    process = _start(launched(2, "--config", str(path)))
    _wait_for_steps(tmp_path / "run", KILL_AFTER, process)
    workers = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=90)
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive, "ranks go on although their launcher was stopped"
    stopped = len(losses(tmp_path / "run"))
    checkpoints = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert [path.name for path in checkpoints] == [f"step-{stopped:08d}"]


def test_resume_without_a_checkpoint_starts_from_the_beginning(tmp_path: Path) -> None:
    path = _write_config(tmp_path, training={"steps": 6, "evaluate_every": 6})
    output = must_run(program("--config", str(path), "--resume"))
    assert "No checkpoint" in output and len(losses(tmp_path / "run")) == 6


def test_altered_checkpoint_is_skipped_for_the_one_before(tmp_path: Path) -> None:
    path = _write_config(tmp_path, training={"steps": 20, "checkpoint_every": 6, "keep_checkpoints": 3})
    must_run(program("--config", str(path)))
    expected = losses(tmp_path / "run")
    newest = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[-1]
    victim = next(newest.rglob("*.pt"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    output = must_run(program("--config", str(path), "--resume"))
    assert f"Skipping {newest.name}: altered: {victim.relative_to(newest)}" in output
    assert "after step 18 of 20" in output
    assert losses(tmp_path / "run") == expected


def test_resume_with_another_configuration_names_the_field(tmp_path: Path) -> None:
    path = _write_config(tmp_path, training={"steps": 6, "evaluate_every": 6})
    must_run(program("--config", str(path)))
    result = run(program("--config", str(path), "--resume", "--set", "training.learning_rate=0.5"))
    assert result.returncode == 1
    assert "training.learning_rate: 0.001 then, 0.5 now" in result.stderr


def test_used_folder_is_not_overwritten_unasked(tmp_path: Path) -> None:
    path = _write_config(tmp_path, training={"steps": 6, "evaluate_every": 6})
    must_run(program("--config", str(path)))
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    result = run(program("--config", str(path)))
    assert result.returncode == 1 and "--resume" in result.stderr and "output.overwrite" in result.stderr
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
