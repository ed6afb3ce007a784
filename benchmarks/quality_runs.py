"""How a run of the quality benchmark is made and measured; what it leaves is in quality_results.py."""

import gc
import json
import os
import platform
import subprocess
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray
from scipy.special import log_softmax

from benchmarks.quality_results import (
    TEACHER,
    Options,
    Run,
    describe,
    digest_of,
    folder_of,
    is_kept,
    locked,
    logits_of,
    needed_by,
    read,
    start_of,
    teacher_of,
    weights_of,
    whole,
    write,
)
from benchmarks.quality_settings import SETTINGS, method_of
from benchmarks.statistics import pack, pack_losses
from mixkd_fast import distill, distributed
from mixkd_fast.checkpoint import remove_tree
from mixkd_fast.cli_evaluate import evaluate_saved
from mixkd_fast.configuration import Task
from mixkd_fast.errors import CheckpointError, ConfigurationError, Interrupted
from mixkd_fast.facts import device_name
from mixkd_fast.methods import FineTune
from mixkd_fast.metrics import evaluate_predictions

METRICS = ["accuracy", "f1"]
_NEVER = 10**9


def make(run: Run, options: Options) -> dict[str, Any] | None:
    """The result of a run, with its model where others need that; None while another process is making it.

    It is made unless it is finished. A run that was interrupted goes on from its checkpoint. Models that other runs
    need are waited for.
    Raises: whatever ends the training.
    """
    result = whole(run, options)
    if result is not None:
        return result
    for needed in needed_by(run, options):
        if make(needed, options) is None:
            return None
    teacher = None if run.arm == TEACHER else folder_of(teacher_of(run, options), options)
    folder = folder_of(run, options)
    with locked(folder, wait=is_kept(run)) as mine:
        if not mine:
            return None
        result = whole(run, options)
        if result is None:
            (folder / "failure.json").unlink(missing_ok=True)
            try:
                result = _make(run, options, folder, teacher)
            except Interrupted:
                raise
            except Exception as error:
                text = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                write(folder / "failure.json", {"error": text})
                raise
    return result


def _make(run: Run, options: Options, folder: Path, teacher: Path | None) -> dict[str, Any]:
    print(f"== {run}", flush=True)
    started = time.perf_counter()
    made_at, described = commit(), describe(run, options)
    goes_on = read(folder / "described.json") == described and (folder / "checkpoints").is_dir()
    write(folder / "described.json", described)
    try:
        _train(run, options, folder, teacher, resume=goes_on)
    except (ConfigurationError, CheckpointError):
        if not goes_on:
            raise
        # The checkpoint is another version's, or broken: from the beginning, then.
        _train(run, options, folder, teacher, resume=False)
    trained = time.perf_counter()
    start = start_of(run)
    used = {"teacher": teacher, "start": None if start is None else folder_of(start, options)}
    splits = _measure(run, options, folder, teacher)
    for name in ("checkpoints", "best", *(() if is_kept(run) else ("student",))):
        remove_tree(folder / name)
    gc.collect()
    summary = json.loads((folder / "summary.json").read_text())
    result = {
        "setting": run.setting,
        "arm": run.arm,
        "layers": run.layers,
        "seed": run.seed,
        "description": described,
        "training_rows": summary["data"]["train_rows"],
        "training_data": digest_of(options.data / SETTINGS[run.setting].task / "train.parquet"),
        "content_hash": summary["data"]["content_hash"],
        "models": {name: None if place is None else digest_of(weights_of(place)) for name, place in used.items()},
        "steps": summary["training"]["steps"],
        "parameters": summary["student"]["parameters"],
        "training_seconds": summary["training"]["seconds"],
        "evaluation_seconds": time.perf_counter() - trained,
        "seconds": time.perf_counter() - started,
        "memory_mib": psutil.Process().memory_info().rss / 2**20,
        "device": device_name(distributed.choose_device()),
        "processor": _processor(),
        "commit": made_at,
        "splits": splits,
    }
    write(folder / "result.json", result)
    first = next(iter(splits.values()))["metrics"]
    shown = "  ".join(f"{name} {value:.4f}" for name, value in first.items())
    print(f"{run}: {shown}  ({result['seconds']:.0f} s, {result['memory_mib']:.0f} MiB)", flush=True)
    return result


def _train(run: Run, options: Options, folder: Path, teacher: Path | None, resume: bool) -> None:
    described, start = describe(run, options), start_of(run)
    encoder = options.encoder if start is None else str(folder_of(start, options) / "student")
    method = FineTune() if run.arm == TEACHER else method_of(run.arm)
    teacher_section = None
    if teacher is not None and method.uses_teacher:
        teacher_section = {"model": str(teacher / "student"), "store_dir": str(options.work / "teacher_logits")}
    distill(
        # All rows are evaluated afterwards, once and with their logits kept.
        task=_task(run, options) | {"evaluation_rows": 64},
        teacher=teacher_section,
        student={"model": encoder} | ({"num_layers": run.layers} if run.layers else {}),
        method=described["method"],
        training=described["training"]
        | {
            "evaluate_every": _NEVER,
            "log_every": 20,
            "keep_best": False,
            "keep_checkpoints": 1,
            "threads": options.threads,
        },
        output={"directory": str(folder), "overwrite": not resume, "report": False},
        resume=resume,
        progress=False,
    )


def _task(run: Run, options: Options) -> dict[str, Any]:
    setting = SETTINGS[run.setting]
    files = options.data / setting.task
    return {
        "name": setting.task,
        "train_files": [str(files / "train.parquet")],
        "evaluation_files": {split: [str(files / f"{split}.parquet")] for split in setting.splits},
        "train_fraction": setting.fraction,
        "subset_seed": run.seed,
        "max_length": setting.max_length,
        "metrics": METRICS,
        "cache_dir": str(options.work / "cache"),
    }


def _measure(run: Run, options: Options, folder: Path, teacher: Path | None) -> dict[str, Any]:
    """Split -> rows, metrics and which rows are right, of the saved model on all evaluation rows."""
    task = Task(**{name: value for name, value in _task(run, options).items() if name != "train_fraction"})
    teacher_logits = {} if teacher is None else logits_of(teacher_of(run, options), options)
    splits: dict[str, Any] = {}
    arrays: dict[str, NDArray[Any]] = {}
    for split, (evaluation, labels) in evaluate_saved(folder / "student", task).items():
        logits = evaluation.logits
        arrays[f"{split}.logits"] = logits
        losses = -log_softmax(logits.astype(np.float64), axis=1)[np.arange(len(labels)), labels]
        splits[split] = {
            "rows": len(labels),
            "metrics": evaluate_predictions(logits, labels, METRICS, teacher_logits.get(f"{split}.logits")),
            "correct": pack(logits.argmax(1) == labels),
            "nll": pack_losses(losses),
            "data": digest_of(options.data / SETTINGS[run.setting].task / f"{split}.parquet"),
        }
    if is_kept(run):
        aside = folder / ".writing-logits.npz"
        with aside.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
        os.replace(aside, folder / "logits.npz")
    return splits


@cache
def commit() -> str:
    """The checkout's commit when the first run began, "unknown" outside of one."""
    place = Path(__file__).parent
    command = ["git", "-C", str(place), "describe", "--always", "--dirty", "--exclude", "*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.processor())
