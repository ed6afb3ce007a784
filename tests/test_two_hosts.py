"""Two hosts, each with its own network: started without ssh, cut off from each other, and resumed."""

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hosts import Hosts, missing
from lost_runs import kill_tree, ranks_of, wait_for_steps
from toy import losses, must_run, program, toy_config

REASON = missing()
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON)
TIMEOUT_S = 6


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with Hosts(tmp_path_factory.mktemp("hosts")) as made:
        yield made


def _config(folder: Path, **training: Any) -> str:
    fields = {"steps": 150, "micro_batch_size": 2, "checkpoint_every": 5, "evaluate_every": 75, **training}
    config = toy_config(folder, training={"rank_timeout_s": TIMEOUT_S, **fields})
    config["deepspeed"] = {"zero_optimization": {"stage": 2}}
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return str(path)


def _end(processes: list[subprocess.Popen[str]], timeout: float = 240) -> list[str]:
    errors = [process.communicate(timeout=timeout) for process in processes]
    for process, (output, error) in zip(processes, errors, strict=True):
        assert process.returncode == 0, f"{output[-2000:]}\n{error[-4000:]}"
    return [output + error for output, error in errors]


def test_two_hosts_give_the_losses_of_one_process(hosts: Hosts, tmp_path: Path) -> None:
    """Each host keeps its tokenised rows, and the teacher's logits, in a folder of its own."""
    config = _config(tmp_path, steps=20)
    processes = [
        hosts.start(host, "--config", config, "--set", f"task.cache_dir={tmp_path / f'cache-of-{host}'}")
        for host in range(2)
    ]
    _end(processes)
    must_run(program("--config", config, "--set", f"output.directory={tmp_path / 'alone'}"))
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "alone"), abs=1e-5)
    assert all((tmp_path / f"cache-of-{host}").is_dir() for host in range(2))


@pytest.mark.slow
def test_a_folder_that_is_not_shared_is_refused(hosts: Hosts, tmp_path: Path) -> None:
    config = _config(tmp_path, steps=20)
    folders = [tmp_path / f"disk-of-{host}" for host in range(2)]
    processes = []
    for host, folder in enumerate(folders):
        folder.mkdir()
        processes.append(hosts.start(host, "--config", config, "--set", "output.directory=run", cwd=folder))
    for process in processes:
        _, errors = process.communicate(timeout=200)
        assert process.returncode != 0
        assert "output.directory = 'run': rank 1 on " in errors and "cannot see what rank 0 writes there" in errors


@pytest.mark.slow
@pytest.mark.parametrize("accident", ["power", "cable"])
def test_the_other_host_stops_within_a_minute_and_resume_goes_on(hosts: Hosts, tmp_path: Path, accident: str) -> None:
    config = _config(tmp_path)
    processes = [hosts.start(host, "--config", config) for host in range(2)]
    wait_for_steps(tmp_path / "run", 12, *processes)
    start = time.monotonic()
    try:
        if accident == "power":
            assert len(ranks_of(processes[1])) == 1
            kill_tree(processes[1])
            waited = processes[:1]
        else:
            hosts.cable("down")
            waited = processes
        errors = [process.communicate(timeout=60)[1] for process in waited]
        assert time.monotonic() - start < 60
    finally:
        hosts.cable("up")
    for number, (process, error) in enumerate(zip(waited, errors, strict=True)):
        assert process.returncode == 75, error
        assert f"error: rank {1 - number} on " in error and f"Rank {number} on " in error
        assert "run the same command with --resume" in error
        assert ("ended without a word" if accident == "power" else f"not heard of for {TIMEOUT_S} s") in error
    resumed = [hosts.start(host, "--config", config, "--resume", "--set", "training.log_every=1") for host in range(2)]
    outputs = _end(resumed)
    assert "Resuming from" in outputs[0]
    assert len(losses(tmp_path / "run")) == 150
