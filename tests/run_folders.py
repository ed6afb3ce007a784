"""Run folders as a run leaves them, for the tests of what reads them."""

import json
from pathlib import Path
from typing import Any

TEACHER_METRICS = {"accuracy": 0.84, "nll": 0.42, "ece": 0.02}
STUDENT_METRICS = {"accuracy": 0.78, "nll": 0.55, "ece": 0.04, "teacher_agreement": 0.9, "kl_to_teacher": 0.1}


def train_line(step: int, **fields: Any) -> str:
    """A "train" line of metrics.jsonl."""
    terms = {"mle": 0.6 / step, "tmkd": 0.4 / step}
    line = {"kind": "train", "step": step, "epoch": step / 10, "loss": 1.0 / step, "terms": terms}
    line |= {"learning_rate": 4e-5, "grad_norm": 1.2, "samples_per_s": 120.5, "tokens_per_s": 3011.0}
    return json.dumps(line | {"step_ms": 266.0, "memory_mib": 812.0, "skipped_steps": 0} | fields)


def evaluation_line(step: int, split: str = "validation", **metrics: Any) -> str:
    """An "evaluation" line of metrics.jsonl."""
    line = {"kind": "evaluation", "step": step, "epoch": step / 10, "split": split, "seconds": 3.1}
    return json.dumps(line | {"metrics": STUDENT_METRICS | metrics})


def config_of(method: str = "mixkd", task: str = "mnli") -> dict[str, Any]:
    """A resolved configuration."""
    options = {"name": method} | ({} if method == "finetune" else {"temperature": 2.0, "kd_weight": 1.0})
    return {
        "task": {"name": task, "hub": None, "train_files": None, "text_pair_column": None},
        "teacher": {"model": "acme/teacher-base", "zero_stage": 0},
        "student": {"model": None, "num_layers": 3},
        "method": options,
        "training": {"batch_size": 32, "learning_rate": 5e-5, "seed": 0},
    }


def summary_of(method: str = "mixkd", task: str = "mnli", split: str = "validation") -> dict[str, Any]:
    """A summary.json."""
    model = {"model_type": "bert", "hidden_size": 768}
    return {
        "version": "0.1.0",
        "task": task,
        "method": method,
        "teacher": model
        | {
            "model": "acme/teacher-base",
            "parameters": 109_482_240,
            "layers": 12,
            "metrics": {split: dict(TEACHER_METRICS)},
        },
        "student": model | {"parameters": 45_693_699, "layers": 3},
        "data": {
            "train_rows": 39_270,
            "extra_rows": 0,
            "evaluation_rows": {split: 9815},
            "max_length": 128,
            "truncated_rows": 12,
            "content_hash": "3f9a" * 16,
        },
        "training": {
            "steps": 20,
            "seconds": 61.5,
            "samples_per_s": 117.7,
            "tokens_per_s": 3449.1,
            "batch_size": 32,
            "ranks": 1,
            "device": "cpu (2 threads)",
            "precision": "bf16",
            "zero_stage": 2,
        },
        "inference": {"samples_per_s": 341.2, "teacher_samples_per_s": 88.4},
        "best": {"step": 20, "split": split, "metric": "accuracy", "value": 0.78},
        "metrics": {split: dict(STUDENT_METRICS)},
        "backends": {"kd_loss": {"name": "reference", "reason": "cpu: not part of this version"}},
        "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
    }


def write_run(
    directory: Path, lines: list[str], summary: dict[str, Any] | None = None, config: dict[str, Any] | None = None
) -> Path:
    """Write a run's folder; without a summary it is an unfinished run's."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config or config_of()))
    (directory / "metrics.jsonl").write_text("\n".join(lines))
    if summary is not None:
        (directory / "summary.json").write_text(json.dumps(summary))
    return directory
