"""Whole training steps against plain PyTorch: python -m benchmarks train_step [--device cpu|cuda] [--json FILE]

Arms run in processes of their own, in turn, round after round, so that each meets the same machine; see
`train_arms.py` for what they are. mixkd_fast is timed over all epochs with the building of its teacher store. The
textbook arm, whose steps are all alike, is timed over fewer steps. A separate check compares the losses of the arms on
identical batches.
"""

import argparse
import copy
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, BertConfig, BertForSequenceClassification

from benchmarks.machine import ROOT, planned_gpu, write_both
from benchmarks.plan_check import save_tokenizer, write_rows
from benchmarks.train_report import markdown, plot
from mixkd_fast.planning.flops import EncoderShape, forward_flops
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
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2, "tuned": 2e-2}
"""How far losses may be from the textbook arm's in fp32, relative: mixkd_fast in fp32 and bf16, and the tuned arm."""


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
    report = {"command": facts.pop("command"), **facts, "tested": options.tested, "tolerance": TOLERANCE}
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
        found.append("the losses of the arms differ by more than the tolerance: the times mean nothing")
    return found + [f"{part}: not run, no time was left" for part in result["not_run"]]


def measure(
    name: str,
    options: argparse.Namespace,
    stop: float = math.inf,
    save: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """All arms on models of one size.

    Args: stop = time.monotonic() after which nothing new is begun; save gets the result whenever there is more of it.
    An arm that fails is named in "failures", what is not begun in "not_run".
    """
    keys = ("rows", "batch_size", "epochs", "max_length", "textbook_steps", "warmup_steps", "threads")
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
        result |= {"job": {key: job[key] for key in keys}, "peak_flops": peak}
        runs: dict[str, list[dict[str, Any]]] = {}

        def run(what: str) -> None:
            if what == "agreement":
                result["agreement"] = compare_losses(job)
            elif what == "profile":
                result["parts_ms"] = profile(job)
            else:
                runs.setdefault(what, []).append(run_arm(what, job))
                summaries = {arm: summarise(arm, runs[arm], job, peak) for arm in ARMS if arm in runs}
                result["arms"] = summaries

        for what in work(options):
            if time.monotonic() > stop:
                result["not_run"].append(what)
                continue
            try:
                run(what)
            except (RuntimeError, AssertionError, OSError) as error:  # of CUDA too: the next has a process of its own
                result["failures"][what] = f"{type(error).__name__}: {error}"
                print(f"{what} failed: {error}", file=sys.stderr, flush=True)
            save(result)
    save(result)
    return result


def work(options: argparse.Namespace) -> list[str]:
    """What is done with models of one size, in order."""
    # Freed memory is kept by PyTorch on a GPU.
    arms = [arm for arm in ARMS if not (arm == "tuned_reusing" and options.device != "cpu")]
    if options.rounds == 1:
        # Nothing is compared between rounds, and time may be short: what bars speak of comes first.
        return ["mixkd_fast", *[arm for arm in arms if arm != "mixkd_fast"], "agreement", "profile"]
    order, shuffle, found = list(arms), random.Random(0), ["agreement"]
    for number in range(options.rounds):
        shuffle.shuffle(order)
        # Compiling takes minutes: once shows it.
        found += [arm for arm in order if arm != "tuned_compiled" or number == 0]
    return [*found, "profile"]


def profile(job: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of a step by part, and on a GPU the share of the time in which it is idle."""
    job = job | {"profile": 48}
    if job["device"] == "cpu":
        return dict(run_arm("mixkd_fast", job)["parts_ms"])
    # Parts are spans of the host: each kernel is waited for, so that a span holds what it has started.
    parts = run_arm("mixkd_fast", job, {"CUDA_LAUNCH_BLOCKING": "1"})["parts_ms"]
    parts["device idle share"] = run_arm("mixkd_fast", job)["parts_ms"]["device idle share"]
    return dict(parts)


def make_job(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Models of random weights and rows of random words with MNLI's lengths, on disk."""
    width, layers, heads, inner, student_layers = SIZES[name]
    config = BertConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=inner, num_labels=2
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
    rows = options.rows or (2048 if options.device == "cpu" else 16384)
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
        "batch_size": options.batch_size,
        "epochs": options.epochs,
        "max_length": 128,
        "textbook_steps": options.textbook_steps,
        "warmup_steps": 3,
        "threads": options.threads or torch.get_num_threads(),
        "training": {"compile": "dynamic"} if options.device == "cuda" else {},
        "shape": [width, layers, heads, inner, student_layers],
    }


def run_arm(arm: str, job: dict[str, Any], more_environment: dict[str, str] | None = None) -> dict[str, Any]:
    """One arm in a new process."""
    job_file, output = Path(job["work"]) / "job.json", Path(job["work"]) / "result.json"
    job_file.write_text(json.dumps(job))
    print(f"{time.strftime('%H:%M:%S')} {arm}{' profile' if job.get('profile') else ''}", file=sys.stderr, flush=True)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "KINETO_LOG_LEVEL": "99"}
    environment |= (REUSE if arm == "tuned_reusing" else {}) | (more_environment or {})
    command = [sys.executable, "-m", "benchmarks.train_arms", arm, str(job_file), str(output)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(done.stderr[-3000:].strip() or f"status {done.returncode}")
    result: dict[str, Any] = json.loads(output.read_text())
    return result


def compare_losses(job: dict[str, Any]) -> dict[str, Any]:
    """The loss of identical batches, no dropout: the textbook's in fp32 against the tuned arm's and this project's."""
    from benchmarks.train_arms import load_models, load_rows, mixkd_loss, pad
    from mixkd_fast.data.batching import Padding, micro_batches
    from mixkd_fast.data.planned_batches import PlannedBatches
    from mixkd_fast.distillation_module import DistillationModule
    from mixkd_fast.frozen_teacher import FrozenTeacher
    from mixkd_fast.methods import MixKD, Moment
    from mixkd_fast.models import Encoder

    rows, (teacher, student) = load_rows(job), load_models(job)
    student.eval()
    method = MixKD(kd_weight=1.0)
    stream = PlannedBatches(rows.lengths, job["batch_size"], 0, method)
    encoders = [Encoder(teacher), Encoder(student)]
    for encoder in encoders:
        assert encoder.fuse() == ""
    module = DistillationModule(encoders[1], FrozenTeacher(encoders[0], str), None, method)
    half_teacher = copy.deepcopy(teacher).bfloat16()
    differences: dict[str, list[float]] = {"fp32": [], "bf16": [], "tuned": []}
    for step in range(3):
        (batch,) = micro_batches(rows, stream.draw(step), 0, 1, job["batch_size"], Padding(0))
        batch = batch.to(job["device"])
        assert batch.partner is not None and batch.lam is not None
        with torch.no_grad():
            padded = pad(rows, batch.row_ids[: batch.num_rows].numpy(), job["max_length"], job["device"])
            truth = float(mixkd_loss(teacher, student, padded, batch.partner, batch.lam))
            with torch.autocast(job["device"], torch.bfloat16):
                tuned = float(mixkd_loss(half_teacher, student, padded, batch.partner, batch.lam))
            differences["tuned"].append(abs(tuned - truth) / abs(truth))
            for precision in ("fp32", "bf16"):
                module.autocast = precision == "bf16"
                terms, _ = module(batch, Moment(step, 3, 0.0))
                differences[precision].append(abs(float(terms.mean(1).sum()) - truth) / abs(truth))
    largest = {precision: max(values) for precision, values in differences.items()}
    agrees = all(value <= TOLERANCE[precision] for precision, value in largest.items())
    return {"largest_relative_difference": largest, "agrees": agrees}


def summarise(arm: str, runs: list[dict[str, Any]], job: dict[str, Any], peak: float) -> dict[str, Any]:
    """Medians over the rounds."""

    def rate(run: dict[str, Any], key: str) -> float:
        seconds = sum(epoch["seconds"] for epoch in run["epochs"]) + run["store_seconds"]
        return float(sum(epoch[key] for epoch in run["epochs"]) / seconds)

    samples = [rate(run, "rows") for run in runs]
    per_epoch = [[epoch["rows"] / epoch["seconds"] for epoch in run["epochs"]] for run in runs]
    return {
        "samples_per_s": statistics.median(samples),
        "all_samples_per_s": samples,
        "tokens_per_s": statistics.median(rate(run, "tokens") for run in runs),
        "epoch_samples_per_s": [statistics.median(values) for values in zip(*per_epoch, strict=True)],
        "store_seconds": statistics.median(run["store_seconds"] for run in runs),
        "peak_mib": max(run["peak_mib"] for run in runs),
        "mfu": statistics.median(samples) * flops_per_row(arm, job) / peak,
    }


def flops_per_row(arm: str, job: dict[str, Any]) -> float:
    """Matrix FLOPs of real tokens of one row and its mixed row, mean over an epoch; only what the arm computes.

    A mixed row is as long as the longer of its pair. The backward takes twice the forward's. mixkd_fast runs the
    teacher on a clean row once in all epochs, and every last layer for the first token only.
    """
    lines = Path(job["train"]).read_text().splitlines()
    lengths = np.array([json.loads(line)["sentence"].count(" ") + 3 for line in lines])
    partners = np.random.default_rng(0).permutation(lengths)
    # With batches of like length a partner is as long as the row.
    mixed = np.maximum(lengths, partners) if arm == "textbook" else lengths
    lean = arm == "mixkd_fast"

    def flops(which: str, rows: "np.ndarray[Any, Any]") -> float:
        config = AutoConfig.from_pretrained(job[which])
        return forward_flops(EncoderShape.of(config), rows, first_token_only=lean) / len(rows)

    clean_teacher = flops("teacher", lengths) / (job["epochs"] if lean else 1)
    return clean_teacher + flops("teacher", mixed) + 3 * (flops("student", lengths) + flops("student", mixed))


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
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--textbook-steps", type=int, default=8, help="steps of the textbook arm that are timed")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--tested", default="", help="what the tests said that ran before, for the report")
    parser.add_argument(
        "--stop-after", type=float, default=math.inf, metavar="SECONDS", help="begin nothing new after this time"
    )
    return parser.parse_args(arguments)
