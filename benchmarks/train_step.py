"""Whole training steps against plain PyTorch: python -m benchmarks train_step [--device cpu|cuda] [--json FILE]

Arms run in processes of their own, in turn, round after round, so that each meets the same machine; see
`train_arms.py` for what they are. mixkd_fast is timed over all epochs with the building of its teacher store. The
textbook arm, whose steps are all alike, is timed over fewer steps. A separate check compares losses and gradients of
the arms on identical batches (`train_agreement.py`).
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification

from benchmarks.plan_check import save_tokenizer, write_rows
from benchmarks.train_report import markdown, plot
from benchmarks.train_summary import Runs, summarise, times_faster
from mixkd_fast.planning.hardware import GPUS

ROOT = Path(__file__).resolve().parent.parent
SIZES = {
    # width, layers, heads, feed-forward, student layers
    "minilm": (384, 6, 12, 1536, 3),
    "bert-base": (768, 12, 12, 3072, 6),
    "bert-large": (1024, 24, 16, 4096, 6),
}
ARMS = ("textbook", "tuned", "tuned_reusing", "tuned_compiled", "mixkd_fast")
REUSE = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34)}
"""What makes glibc keep freed memory for the next step, as mixkd_fast does on the CPU by itself."""


def main(arguments: list[str], facts: dict[str, Any]) -> None:
    """Run the benchmark. Args: facts = commit, versions, device, for the report."""
    options = _options(arguments)
    models = options.models.split(",") if options.models else (["minilm"] if options.device == "cpu" else list(SIZES))
    unknown = [name for name in models if name not in SIZES]
    if unknown:
        sys.exit(f"--models {','.join(unknown)}: allowed: {', '.join(SIZES)}")
    results: list[dict[str, Any]] = []
    report = {"command": facts.pop("command"), **facts, "results": results}
    for name in models:
        results.append(measure(name, options))
        if options.json is not None:  # what is measured stays if a later model is cut off
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            options.json.with_suffix(".md").write_text(markdown(report), encoding="utf-8")
            plot(report, options.json.with_suffix(".svg"))
    print(markdown(report))
    if any(not result["agreement"]["agrees"] for result in results):
        sys.exit("losses or gradients of the arms differ by more than the tolerance: the times mean nothing")


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """All arms on models of one size."""
    with tempfile.TemporaryDirectory() as folder:
        job = make_job(name, Path(folder), options)
        agreement = run_arm("agreement", job)
        runs: dict[str, Runs] = {arm: {} for arm in ARMS if arm != "tuned_reusing" or options.device == "cpu"}
        order, shuffle = list(runs), random.Random(0)
        for number in range(options.rounds):
            shuffle.shuffle(order)
            for arm in order:
                if arm != "tuned_compiled" or options.compiled_rounds is None or number < options.compiled_rounds:
                    runs[arm][number] = run_arm(arm, job)
        runs = {arm: of_arm for arm, of_arm in runs.items() if of_arm}
        peak = peak_flops(options.device, job["threads"])
        arms = {arm: summarise(arm, of_arm, job, peak) for arm, of_arm in runs.items()}
        for arm, of_arm in runs.items():
            if arm != "mixkd_fast":
                arms[arm]["mixkd_fast_is"] = times_faster(runs["mixkd_fast"], of_arm)
        parts = profile(job, arms)
    keys = ("rows", "batch_size", "epochs", "max_length", "textbook_steps", "warmup_steps", "threads", "workers")
    return {
        "model": name,
        "teacher_layers": SIZES[name][1],
        "student_layers": SIZES[name][4],
        "job": {key: job[key] for key in (*keys, "attention_dropout", "training")},
        "peak_flops": peak,
        "agreement": agreement,
        "arms": arms,
        "parts_ms": parts,
    }


def profile(job: dict[str, Any], arms: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Milliseconds of a step of mixkd_fast by part; on a GPU each arm gets its "idle_share", from a run of its own."""
    job = job | {"profile": job["profile_steps"]}
    if job["device"] == "cpu":
        return dict(run_arm("mixkd_fast", job)["parts_ms"])
    for arm, figures in arms.items():
        figures["idle_share"] = run_arm(arm, job)["idle_share"]
    # Parts are spans of the host: each kernel is waited for, so that a span holds what it has started.
    return dict(run_arm("mixkd_fast", job, {"CUDA_LAUNCH_BLOCKING": "1"})["parts_ms"])


def make_job(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Models of random weights and rows of random words with MNLI's lengths, on disk."""
    width, layers, heads, inner, student_layers = SIZES[name]
    on_gpu = options.device == "cuda"
    # Attention of variable length, which mixkd_fast uses there, has no dropout: on a GPU no arm has it.
    attention_dropout = 0.0 if on_gpu else 0.1
    config = BertConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=inner, num_labels=2,
        attention_probs_dropout_prob=attention_dropout,
    )  # fmt: skip
    torch.manual_seed(0)
    teacher = BertForSequenceClassification(config)
    with torch.no_grad():
        teacher.classifier.weight.mul_(20)  # so that its answers differ
    student_config = BertConfig(**{**config.to_dict(), "num_hidden_layers": student_layers})
    student = BertForSequenceClassification(student_config)
    student.load_state_dict(teacher.state_dict(), strict=False)
    for which, model in (("teacher", teacher), ("student", student)):
        model.save_pretrained(folder / which)
        save_tokenizer(folder / which)
    rows = options.rows or (16384 if on_gpu else 2048)
    write_rows(folder / "train.jsonl", rows, seed=1)
    write_rows(folder / "validation.jsonl", 32, seed=2)
    return {
        "device": options.device,
        "teacher": str(folder / "teacher"),
        "student": str(folder / "student"),
        "train": str(folder / "train.jsonl"),
        "validation": str(folder / "validation.jsonl"),
        "work": str(folder),
        "rows": rows,
        "batch_size": options.batch_size or (128 if on_gpu else 32),
        "epochs": options.epochs,
        "max_length": 128,
        "textbook_steps": options.textbook_steps,
        # As many as mixkd_fast's, in which models are compiled on a GPU.
        "warmup_steps": 16 if on_gpu else 3,
        "profile_steps": 48,
        "threads": options.threads or torch.get_num_threads(),
        "workers": min(4, os.cpu_count() or 1) if on_gpu else 0,
        "attention_dropout": attention_dropout,
        "training": {"compile": "dynamic", "unpadded": True} if on_gpu else {},
        "shape": [width, layers, heads, inner, student_layers],
    }


def run_arm(arm: str, job: dict[str, Any], more_environment: dict[str, str] | None = None) -> dict[str, Any]:
    """One arm in a new process."""
    job_file, output = Path(job["work"]) / "job.json", Path(job["work"]) / "result.json"
    job_file.write_text(json.dumps(job))
    print(f"{time.strftime('%H:%M:%S')} {arm}{' profile' if job.get('profile') else ''}", file=sys.stderr, flush=True)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "KINETO_LOG_LEVEL": "99"}
    environment |= (REUSE if arm == "tuned_reusing" else {}) | (more_environment or {})
    done = start(["-m", "benchmarks.train_arms", arm, str(job_file), str(output)], environment)
    if done.returncode != 0:
        sys.exit(f"{arm} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(output.read_text())
    return result


def start(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run Python in a new process."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def peak_flops(device: str, threads: int) -> float:
    """bf16 FLOP/s: published for a GPU in the table of `mixkd-fast plan`; measured by a large product on the CPU."""
    if device == "cuda":
        name = torch.cuda.get_device_properties(0).name
        found = next((entry for key, entry in GPUS.items() if key in name), None)
        if found is None:
            sys.exit(f"no published peak for {name}")
        return found.flops_per_s["bf16"]
    torch.set_num_threads(threads)
    matrix = torch.randn(2048, 2048).to(torch.bfloat16)
    best = float("inf")
    for _ in range(10):
        started = time.perf_counter()
        matrix @ matrix
        best = min(best, time.perf_counter() - started)
    return 2 * 2048**3 / best


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks train_step", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path, help="file of the results; .md and .svg are written beside it")
    parser.add_argument("--models", help=f"comma separated, of {', '.join(SIZES)} (default: minilm; all on a GPU)")
    parser.add_argument("--rows", type=int, help="training rows (default: 2,048 on the CPU, 16,384 on a GPU)")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, help="rows of a batch (default: 32 on the CPU, 128 on a GPU)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compiled-rounds", type=int, help="how many of them run tuned_compiled too (default: all)")
    parser.add_argument("--textbook-steps", type=int, default=8, help="steps of the textbook arm that are timed")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    return parser.parse_args(arguments)
