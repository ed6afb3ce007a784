"""Whole training steps against plain PyTorch: python -m benchmarks train_step [--device cpu|cuda] [--json FILE]

Arms run in processes of their own, in turn, round after round, so that each meets the same machine; see
`train_arms.py` for what they are. mixkd_fast is timed over all epochs with the building of its teacher store. The
textbook arm, whose steps are all alike, is timed over fewer steps. A separate check compares losses and gradients of
the arms on identical batches (`train_agreement.py`).
"""

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import BertConfig, BertForSequenceClassification

from benchmarks.machine import ROOT, planned_gpu, write_both
from benchmarks.plan_check import save_tokenizer, write_rows
from benchmarks.train_report import markdown, plot
from benchmarks.train_summary import Runs, summarise_all
from mixkd_fast.planning.hardware import GPUS

SIZES = {
    # width, layers, heads, feed-forward, student layers
    # The one with a bar for its MFU first.
    "bert-large": (1024, 24, 16, 4096, 6),
    "bert-base": (768, 12, 12, 3072, 6),
    "minilm": (384, 6, 12, 1536, 3),
}
ARMS = ("textbook", "tuned", "tuned_reusing", "tuned_compiled", "mixkd_fast")
REUSE = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34)}
"""What makes glibc keep freed memory for the next step, as mixkd_fast does on the CPU by itself."""
IDLE = "GPU idle in "
"""Before an arm: the task of measuring how long the GPU stands still in its steps."""


def main(arguments: list[str], facts: dict[str, Any]) -> None:
    """Run the benchmark. Args: facts = commit, versions, device, for the report."""
    options = _options(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: PyTorch finds no CUDA device here")
    stop = time.monotonic() + options.stop_after
    models = options.models.split(",") if options.models else (["minilm"] if options.device == "cpu" else list(SIZES))
    unknown = [name for name in models if name not in SIZES]
    if unknown:
        sys.exit(f"--models {','.join(unknown)}: allowed: {', '.join(SIZES)}")
    results: dict[str, dict[str, Any]] = {}
    report = {"command": facts.pop("command"), **facts, "tested": options.tested}
    report |= {"results": [], "not_run": []}

    def write() -> None:
        if options.json is not None:
            write_both(report, markdown(report), options.json)

    def save(result: dict[str, Any]) -> None:
        results[result["model"]] = result
        report["results"] = list(results.values())
        write()

    for name in models:
        if time.monotonic() > stop:
            report["not_run"].append(name)
            write()
            continue
        measure(name, options, stop, save)
        if options.json is not None:
            plot(report, options.json.with_suffix(".svg"))
    print(markdown(report))
    lacking = [f"{result['model']} {what}" for result in results.values() for what in lacking_parts(result)]
    lacking += [f"{name}: not begun, no time was left" for name in report["not_run"]]
    if lacking:
        sys.exit("\n".join(lacking))


def lacking_parts(result: dict[str, Any]) -> list[str]:
    """What failed and what was not run, for the last lines of the program."""
    found = [f"{part}: {why}" for part, why in result["failures"].items()]
    if result["agreement"] is not None and not result["agreement"]["agrees"]:
        found.append("losses or gradients of the arms differ by more than the tolerance: the times mean nothing")
    return found + [f"{part}: not run, no time was left" for part in result["not_run"]]


def measure(
    name: str,
    options: argparse.Namespace,
    stop: float = math.inf,
    save: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """All arms on models of one size.

    Args: stop = time.monotonic() after which nothing new is begun; save gets the result whenever there is more of it.
    What fails is named in "failures", what is not begun in "not_run".
    """
    keys = ("rows", "batch_size", "epochs", "max_length", "textbook_steps", "warmup_steps", "threads", "workers")
    result: dict[str, Any] = {
        "model": name,
        "teacher_layers": SIZES[name][1],
        "student_layers": SIZES[name][4],
        "agreement": None,
        "arms": {},
        "parts_ms": {},
        "failures": {},
        "not_run": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        job = make_job(name, Path(folder), options)
        peak = peak_flops(options.device, job["threads"])
        result |= {"job": {key: job[key] for key in (*keys, "attention_dropout", "training")}, "peak_flops": peak}
        runs: dict[str, Runs] = {}

        def run(task: Task) -> None:
            if task.what == "agreement":
                result["agreement"] = run_arm("agreement", job)
            elif task.what == "profile":
                result["parts_ms"] = profile(job)
            elif task.what.startswith(IDLE):
                arm = task.what.removeprefix(IDLE)
                if arm in result["arms"]:  # otherwise it has failed before
                    result["arms"][arm]["idle_share"] = idle_share(arm, job)
            else:
                runs.setdefault(task.what, {})[task.round] = run_arm(task.what, job)
                result["arms"] = summarise_all({arm: runs[arm] for arm in ARMS if arm in runs}, job, peak)

        for task in work(options):
            several = options.rounds > 1 and task.what in ARMS
            label = f"{task.what} (round {task.round + 1})" if several else task.what
            if time.monotonic() > stop:
                result["not_run"].append(label)
                continue
            try:
                run(task)
            except (RuntimeError, AssertionError, OSError) as error:  # of CUDA too: the next has a process of its own
                result["failures"][label] = f"{type(error).__name__}: {error}"
                print(f"{label} failed: {error}", file=sys.stderr, flush=True)
            save(result)
    save(result)
    return result


class Task(NamedTuple):
    """An arm of one round, or what is done once."""

    what: str
    """An arm, "agreement", "profile", or `IDLE` before an arm."""
    round: int = 0
    """Of an arm that is timed."""


def work(options: argparse.Namespace) -> list[Task]:
    """What is done with models of one size, in order."""
    # Freed memory is kept by PyTorch on a GPU.
    arms = [arm for arm in ARMS if not (arm == "tuned_reusing" and options.device != "cpu")]
    compiled = options.rounds if options.compiled_rounds is None else options.compiled_rounds
    profiles = [Task("profile")]
    if options.device == "cuda":
        profiles += [Task(IDLE + arm) for arm in arms[::-1] if arm != "tuned_compiled" or compiled]
    order, shuffle, timed = list(arms), random.Random(0), []
    for number in range(options.rounds):
        shuffle.shuffle(order)
        timed += [Task(arm, number) for arm in order if arm != "tuned_compiled" or number < compiled]
    if options.rounds == 1:
        # Nothing is compared between rounds, and time may be short: what bars speak of comes first.
        timed.sort(key=lambda task: (task.what != "mixkd_fast", arms.index(task.what)))
        return [*timed, Task("agreement"), *profiles]
    return [Task("agreement"), *timed, *profiles]


def profile(job: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of a step of mixkd_fast by part."""
    # Parts are spans of the host: on a GPU each kernel is waited for, so that a span holds what it has started.
    waiting = {"CUDA_LAUNCH_BLOCKING": "1"} if job["device"] == "cuda" else None
    return dict(run_arm("mixkd_fast", job | {"profile": job["profile_steps"]}, waiting)["parts_ms"])


def idle_share(arm: str, job: dict[str, Any]) -> float:
    """Share of an arm's steps in which the GPU stands still, from a run of its own."""
    return float(run_arm(arm, job | {"profile": job["profile_steps"]})["idle_share"])


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
        raise RuntimeError(done.stderr[-3000:].strip() or f"status {done.returncode}")
    result: dict[str, Any] = json.loads(output.read_text())
    return result


def start(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run Python in a new process."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def peak_flops(device: str, threads: int) -> float:
    """bf16 FLOP/s: published for a GPU in the table of `mixkd-fast plan`; measured by a large product on the CPU."""
    if device == "cuda":
        try:
            return GPUS[planned_gpu(torch.cuda.get_device_properties(0).name)].flops_per_s["bf16"]
        except LookupError as error:
            sys.exit(f"no MFU without a published peak: {error}")
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
    parser.add_argument("--tested", default="", help="what the tests said that ran before, for the report")
    parser.add_argument(
        "--stop-after", type=float, default=math.inf, metavar="SECONDS", help="begin nothing new after this time"
    )
    return parser.parse_args(arguments)
