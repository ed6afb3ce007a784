"""When a rank is lost the others stop soon, say which, and --resume goes on; slow ones are left alone."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lost_runs import kill_tree, ranks_of, wait_for_steps
from toy import ROOT, environment, launched, losses, must_run, toy_config

TIMEOUT_S = 4


def _config(folder: Path, steps: int = 40, **training: object) -> str:
    fields = {"steps": steps, "micro_batch_size": 2, "checkpoint_every": 5, "evaluate_every": 20, **training}
    path = folder / "config.json"
    path.write_text(json.dumps(toy_config(folder, training={"rank_timeout_s": TIMEOUT_S, **fields})))
    return str(path)


def _start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _start_ranks(config: str, port: str) -> list[subprocess.Popen[str]]:
    """Two ranks without a launcher, which would end the second one itself."""
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "mixkd_fast.train", "--config", config]
    return [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **place),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_the_other_rank_stops_says_who_is_gone_and_resume_goes_on(tmp_path: Path, victim: int) -> None:
    from toy import free_port

    config = _config(tmp_path, steps=150)
    processes = _start_ranks(config, str(free_port()))
    wait_for_steps(tmp_path / "run", 12, *processes)
    processes[victim].kill()
    killed = time.monotonic()
    _, errors = processes[1 - victim].communicate(timeout=60)
    assert time.monotonic() - killed < 60
    assert processes[1 - victim].returncode == 75, errors
    pid = processes[victim].pid
    assert (
        f"error: rank {victim} on " in errors and f"(process {pid}) ended without a word. Rank {1 - victim}" in errors
    )
    assert "run the same command with --resume" in errors and "run/checkpoints" in errors
    processes[victim].communicate()
    output = must_run(launched(2, "--config", config, "--resume"))
    assert "Resuming from" in output
    assert len(losses(tmp_path / "run")) == 150


@pytest.mark.slow
def test_a_rank_that_hangs_in_a_collective_is_ended_too(tmp_path: Path) -> None:
    """The lost one's process is stopped, not dead: its connections stay open, and the other waits in an all-reduce."""
    from toy import free_port

    processes = _start_ranks(_config(tmp_path, steps=150), str(free_port()))
    wait_for_steps(tmp_path / "run", 12, *processes)
    import psutil

    lost = [psutil.Process(processes[1].pid), *psutil.Process(processes[1].pid).children(recursive=True)]
    for process in lost:
        process.suspend()
    start = time.monotonic()
    _, errors = processes[0].communicate(timeout=60)
    assert time.monotonic() - start < 60 and processes[0].returncode == 75, errors
    assert f"was not heard of for {TIMEOUT_S} s: its machine or the network is down. Rank 0 on" in errors
    for process in lost:
        process.kill()
    processes[1].communicate()


@pytest.mark.slow
def test_a_rank_stopped_by_a_debugger_is_waited_for(tmp_path: Path) -> None:
    from toy import free_port

    processes = _start_ranks(_config(tmp_path, steps=60), str(free_port()))
    wait_for_steps(tmp_path / "run", 12, *processes)
    os.kill(processes[1].pid, signal.SIGSTOP)
    time.sleep(2 * TIMEOUT_S)
    assert processes[0].poll() is None
    os.kill(processes[1].pid, signal.SIGCONT)
    for process in processes:
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
    assert len(losses(tmp_path / "run")) == 60


@pytest.mark.slow
def test_the_launcher_passes_the_end_on(tmp_path: Path) -> None:
    config = _config(tmp_path, steps=150)
    process = _start(launched(2, "--config", config))
    wait_for_steps(tmp_path / "run", 12, process)
    ranks_of(process)[1].kill()
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0, errors
    kill_tree(process)


@pytest.mark.slow
def test_an_error_that_all_ranks_have_is_told_as_before(tmp_path: Path) -> None:
    config = _config(tmp_path, steps=6)
    result = subprocess.run(
        launched(2, "--config", config, "--set", "training.batch_size=7"),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode != 0
    assert "error: training.batch_size = 7" in result.stderr and "stops too" not in result.stderr
