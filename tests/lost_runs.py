"""Waiting for runs, and ending them as accidents do."""

import subprocess
import time
from pathlib import Path

import psutil
import pytest


def wait_for_steps(folder: Path, count: int, *processes: subprocess.Popen[str], timeout: float = 180) -> None:
    """Return as soon as the run has logged `count` steps."""
    log, deadline = folder / "metrics.jsonl", time.monotonic() + timeout
    while time.monotonic() < deadline:
        if log.exists() and log.read_bytes().count(b'"kind": "train"') >= count:
            return
        for process in processes:
            if process.poll() is not None:
                pytest.fail(f"the run ended before step {count}:\n{process.communicate()[1][-3000:]}")
        time.sleep(0.02)
    pytest.fail(f"no step {count} within {timeout} s")


def ranks_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The training processes that a `deepspeed` command has started."""
    return [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if any(argument.startswith("--local_rank") for argument in child.cmdline())
    ]


def kill_tree(process: subprocess.Popen[str]) -> None:
    """SIGKILL for the process and all it started, as a power cut would do."""
    if process.poll() is None:
        parent = psutil.Process(process.pid)
        for child in [*parent.children(recursive=True), parent]:
            child.kill()
    process.communicate()
