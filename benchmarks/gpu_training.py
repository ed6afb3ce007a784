"""Does training on the GPU follow the CPU's? python -m benchmarks.gpu_training [--steps N] [--json FILE]

The demo's student by MixKD without dropout: fp32 on the CPU, then bf16 on the GPU at ZeRO 0, 2 and 3, padded, unpadded
and compiled. Losses of the same steps must stay near each other. Several run at once; what became of each stands in
FILE and FILE.md as soon as it has ended. Exit status 1 if one failed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import ROOT, facts, headline, write_both
from mixkd_fast.quantized_teacher import why_not

TOLERANCE = 0.05
"""Largest mean relative difference of the losses over all steps: bf16 against fp32."""
LIMIT_S = 150
"""For one run."""
Changes = dict[str, Any]
VARIANTS: dict[str, Changes] = {
    "ZeRO 0": {},
    "ZeRO 2": {"deepspeed.zero_optimization.stage": 2},
    "ZeRO 3": {"deepspeed.zero_optimization.stage": 3},
    "ZeRO 3 teacher": {"teacher.zero_stage": 3},
    "ZeRO 0, unpadded": {"training.unpadded": True},
    "ZeRO 0, compiled": {"training.compile": "dynamic"},
    "ZeRO 0, CUDA graphs": {"training.compile": "shapes"},
    "ZeRO 0, teacher on its own stream": {"teacher.stream": True},
    "ZeRO 0, accumulated": {"training.micro_batch_size": 8},
    "ZeRO 0, fp8 teacher": {"teacher.quantization": "fp8"},
}


class RunFailed(RuntimeError):
    """A training ended with an error or did not end."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--jobs", type=int, default=max(1, min(4, (os.cpu_count() or 1) // 2)), help="runs at once")
    parser.add_argument("--json", type=Path, help="file of the outcomes; .md is written beside it")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("PyTorch finds no CUDA device here")
    device = torch.device("cuda")
    report = {**facts(device), "steps": options.steps, "tolerance": TOLERANCE}

    def save(outcomes: Mapping[str, Any]) -> None:
        report["variants"] = outcomes
        if options.json is not None:
            write_both(report, page(report), options.json)

    with tempfile.TemporaryDirectory() as folder:

        def train(name: str, changes: Changes, gpu: bool) -> list[float]:
            return losses(Path(folder) / name.replace(" ", "-"), options.steps, changes, gpu)

        outcomes = compare(VARIANTS, train, lambda changes: reason_to_leave_out(changes, device), options.jobs, save)
    print(page(report))
    wrong = [name for name, outcome in outcomes.items() if outcome["outcome"] == "failed"]
    if wrong:
        sys.exit(f"failed: {', '.join(wrong)}")


def reason_to_leave_out(changes: Changes, device: torch.device) -> str:
    """What a variant needs and this GPU lacks, or ""."""
    quantization = changes.get("teacher.quantization")
    return why_not(quantization, device) if quantization else ""


def compare(
    variants: Mapping[str, Changes],
    train: Callable[[str, Changes, bool], list[float]],
    reason: Callable[[Changes], str],
    jobs: int,
    save: Callable[[Mapping[str, Any]], None],
) -> dict[str, dict[str, Any]]:
    """Every variant against the CPU's run.

    Args: train takes (name, changes, on the GPU?), returns the losses and raises RunFailed; reason says why a variant
    cannot run here ("": it can); save gets all outcomes whenever there is a new one.
    Returns: by name, outcome "passed", "failed" or "left out", and difference or why.
    """
    outcomes: dict[str, dict[str, Any]] = {}
    with ThreadPoolExecutor(jobs) as pool:
        truth = pool.submit(train, "CPU", {"training.precision": "fp32"}, False)
        running: dict[Future[list[float]], str] = {}
        for name, changes in variants.items():
            why = reason(changes)
            if why:
                outcomes[name] = {"outcome": "left out", "why": why}
            else:
                running[pool.submit(train, name, {"training.precision": "bf16", **changes}, True)] = name
        for job in as_completed(running):
            name = running[job]
            try:
                outcomes[name] = judge(job.result(), truth.result())
            except RunFailed as error:
                outcomes[name] = {"outcome": "failed", "why": str(error)}
            print(name, outcomes[name], file=sys.stderr, flush=True)
            save({name: outcomes[name] for name in variants if name in outcomes})
    return {name: outcomes[name] for name in variants}


def judge(found: list[float], truth: list[float]) -> dict[str, Any]:
    """Mean relative difference of the losses, and whether it is small enough."""
    if len(found) != len(truth) or not truth:
        return {"outcome": "failed", "why": f"{len(found)} losses, and {len(truth)} on the CPU"}
    difference = sum(abs(ours - exact) / abs(exact) for ours, exact in zip(found, truth, strict=True)) / len(truth)
    if difference <= TOLERANCE:  # NaN is not
        return {"outcome": "passed", "difference": difference}
    return {"outcome": "failed", "difference": difference, "why": f"the difference is above {TOLERANCE}"}


def page(report: Mapping[str, Any]) -> str:
    """The outcomes as Markdown."""
    lines = ["# Training on the GPU against the CPU", "", headline(dict(report)), ""]
    lines += [
        f"MixKD of the demo, {report['steps']} steps, bf16 against fp32 on the CPU. The mean relative difference of "
        f"the losses may be {report['tolerance']}.",
        "",
        "| variant | outcome | difference |",
        "| --- | --- | ---: |",
    ]
    for name, outcome in report["variants"].items():
        said = ": ".join([outcome["outcome"], *outcome.get("why", "").splitlines()[-1:]]).replace("|", "\\|")
        difference = f"{outcome['difference']:.4f}" if "difference" in outcome else ""
        lines.append(f"| {name} | {said} | {difference} |")
    return "\n".join(lines)


def losses(folder: Path, steps: int, changes: Changes, gpu: bool) -> list[float]:
    """The losses of a run of the real program in `folder`, in a process of its own. Raises: RunFailed."""
    fields = {
        "output.directory": str(folder / "run"),
        "output.report": False,
        "task.cache_dir": str(folder / "cache"),
        "training.steps": steps,
        "training.log_every": 1,
        "training.evaluate_every": steps,
        "training.checkpoint_every": steps,
        "training.batching": "length",
        **changes,
    }
    command = [sys.executable, "-m", "mixkd_fast.train", "--config", "configs/demo_mixkd.json"]
    for name, value in fields.items():
        command += ["--set", f"{name}={json.dumps(value)}"]
    environment = {**os.environ, **({} if gpu else {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"})}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=LIMIT_S
        )
    except subprocess.TimeoutExpired as error:
        raise RunFailed(f"still running after {LIMIT_S} s") from error
    if done.returncode != 0:
        raise RunFailed(f"{' '.join(command)} failed:\n{done.stderr[-3000:].strip()}")
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if record["kind"] == "train"]


if __name__ == "__main__":
    main()
