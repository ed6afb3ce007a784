"""Runs the trials: in this process, or each by DeepSpeed's launcher. What is finished is not run again."""

import gc
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

import mixkd_fast
from mixkd_fast import distributed
from mixkd_fast.checkpoint import remove_tree
from mixkd_fast.distillation import run_config
from mixkd_fast.errors import ConfigurationError, Interrupted, MixKDError
from mixkd_fast.folder_lock import alone_in
from mixkd_fast.interrupt import StopRequest
from mixkd_fast.run_folder import write_json
from mixkd_fast.sweep.trials import RunPlan, Trial
from mixkd_fast.sweep_file import Sweep

_LINES_OF_LOG = 20
"""Of a launched run that failed: how many last lines are recorded as its error."""


def run_trials(sweep: Sweep, trials: Sequence[Trial]) -> None:
    """Run whatever is not finished, one after another; a run that was cut off goes on from its newest checkpoint.

    A run that fails is recorded in FOLDER.failed.json, and tried again by the next call.
    Raises: Interrupted once a stopped run is saved; ConfigurationError if another sweep is at work in the folder.
    """
    StopRequest.last_received = None
    with alone_in(Path(sweep.output), "output", "sweep"):
        for place, trial in enumerate(trials, start=1):
            trial.folder.mkdir(parents=True, exist_ok=True)
            write_json(trial.folder / "trial.json", {"values": dict(trial.values)})
            broken: set[int] = set()
            for plan in trial.runs:
                if is_finished(plan) or plan.seed in broken:
                    continue
                shard = "" if plan.part is None else f", shard {plan.part}"
                distributed.say(
                    f"\ntrial {place} of {len(trials)}: {trial.describe()}; seed {plan.seed}{shard}; {plan.folder}"
                )
                if not _run(sweep, plan) and trial.chained:
                    broken.add(plan.seed)
                number = StopRequest.last_received
                if number is not None:
                    raise Interrupted(f"Stopped by signal {number}; the run in {plan.folder} had ended.", number)


def is_finished(plan: RunPlan) -> bool:
    """Whether the run has written its summary, which it does last."""
    return (plan.folder / "summary.json").is_file()


def failure_file(plan: RunPlan) -> Path:
    """Where a failed run's error is recorded."""
    return plan.folder.with_name(f"{plan.folder.name}.failed.json")


def _run(sweep: Sweep, plan: RunPlan) -> bool:
    """One run. Returns whether it has finished."""
    plan.folder.parent.mkdir(parents=True, exist_ok=True)
    failure_file(plan).unlink(missing_ok=True)
    resume = (plan.folder / "config.json").exists()
    error = _launch(plan, sweep.ranks, resume) if sweep.ranks is not None else _run_here(plan, resume)
    if error is not None:
        write_json(failure_file(plan), {"error": error, "folder": str(plan.folder)})
        distributed.say(f"failed: {error.splitlines()[0]}")
        return False
    if not sweep.keep_checkpoints:
        for name in ("checkpoints", "best"):
            remove_tree(plan.folder / name)
    return True


def _run_here(plan: RunPlan, resume: bool) -> str | None:
    """The run in this process. Returns its error; stop signals pass through."""
    try:
        run_config(plan.config, resume=resume)
    except Interrupted:
        raise
    except MixKDError as error:
        return f"{type(error).__name__}: {error}"
    except Exception as error:  # whatever one trial dies of, memory for example, the others may live
        return f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
    finally:
        # DeepSpeed's engine is full of cycles, which would keep its memory until some later collection.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return None


def _launch(plan: RunPlan, ranks: int, resume: bool) -> str | None:
    """The run by DeepSpeed's launcher, its output in FOLDER.log. Returns its error.

    Raises: Interrupted after a stop signal, which the ranks obey once they have saved everything.
    """
    name = plan.folder.name
    config_file, log_file = plan.folder.with_name(f"{name}.config.json"), plan.folder.with_name(f"{name}.log")
    write_json(config_file, plan.config.model_dump(mode="json", by_alias=True, serialize_as_any=True))
    command = [_deepspeed(), "--num_gpus", str(ranks), "--master_port", str(_free_port())]
    command += [str(Path(mixkd_fast.__file__).parent / "train.py"), "--config", str(config_file)]
    with log_file.open("ab") as log, StopRequest() as stop:
        process = subprocess.Popen([*command, *(["--resume"] if resume else [])], stdout=log, stderr=log)
        told = False
        while process.poll() is None:
            if stop.requested() and not told:
                process.send_signal(signal.SIGTERM)
                told = True
            time.sleep(0.1)
        number = stop.requested()
    if number and not is_finished(plan):
        raise Interrupted(f"Stopped by signal {number}; the run in {plan.folder} saves what it has.", number)
    if process.returncode == 0:
        return None
    lines = log_file.read_text(encoding="utf-8", errors="replace").splitlines()
    cause = [line for line in lines if line.startswith("error: ")][-1:] or [f"exit code {process.returncode}"]
    return "\n".join([*cause, *lines[-_LINES_OF_LOG:], f"whole output: {log_file}"])


def _deepspeed() -> str:
    """DeepSpeed's launcher: the one beside this Python, else one on the path."""
    beside = Path(sys.executable).with_name("deepspeed")
    found = str(beside) if beside.exists() else shutil.which("deepspeed")
    if found is None:
        raise ConfigurationError("ranks: the deepspeed command is not there; leave ranks out to run in this process")
    return found


def _free_port() -> int:
    """A TCP port that is free now: the launcher's own default may belong to another run of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def recorded_error(plan: RunPlan) -> str | None:
    """The error of a run that failed and has not finished since."""
    path = failure_file(plan)
    if is_finished(plan) or not path.is_file():
        return None
    return str(json.loads(path.read_text(encoding="utf-8"))["error"])
