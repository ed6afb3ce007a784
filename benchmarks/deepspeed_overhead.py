"""What DeepSpeed costs on one device without ZeRO: python -m benchmarks.deepspeed_overhead [--steps N] [--json FILE]

The same step (MixKD, 6 -> 3 layers of MiniLM's width, bf16 autocast) once through `Engine` and once as a bare loop:
forward, backward, clipping by AdamW's grad_scale, AdamW. Blocks of steps take turns on the same batches; prints both
medians (--json FILE: all blocks too), and ends with status 1 if the overhead is not below the bar.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import facts, headline, write_both
from benchmarks.plan_check import save_teacher, write_rows
from benchmarks.train_arms import load_rows
from mixkd_fast.configuration import BatchArithmetic, Config, validate
from mixkd_fast.data.batching import Batch, Padding, micro_batches
from mixkd_fast.data.planned_batches import PlannedBatches
from mixkd_fast.deepspeed_config import student_deepspeed_config
from mixkd_fast.distillation_module import DistillationModule
from mixkd_fast.engine import Engine, start_distributed
from mixkd_fast.frozen_teacher import FrozenTeacher
from mixkd_fast.host_memory import keep_freed_memory
from mixkd_fast.methods import MixKD, Moment
from mixkd_fast.models import load_student_encoder, load_teacher_encoder, load_tokenizer

BLOCK = 5
"""Steps that are timed together."""
BAR = 5.0
"""Percent."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path, help="file of the results; .md is written beside it")
    options = parser.parse_args()
    device = torch.device(options.device)
    start_distributed(device)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        save_teacher(Path(folder) / "teacher", 0.1)
        write_rows(Path(folder) / "train.jsonl", 2048, seed=1)
        job = {"train": f"{folder}/train.jsonl", "teacher": f"{folder}/teacher", "max_length": 128}
        method, rows = MixKD(kd_weight=1.0), load_rows(job)
        stream = PlannedBatches(rows.lengths, 32, 0, method)
        modules = [_module(job["teacher"], method, device) for _ in range(2)]
        config = validate(Config, {"task": {}, "teacher": {"model": job["teacher"]}, "training": {"precision": "bf16"}})
        deepspeed_config = student_deepspeed_config(config, BatchArithmetic(32, 32, 1, 1))
        engine = Engine(modules[0], config.training, deepspeed_config, device, np.arange(len(rows)))
        modules[1].autocast = True
        bare = BareLoop(modules[1])
        times: dict[str, list[float]] = {"engine": [], "bare loop": []}
        for block in range(options.steps // BLOCK + 1):
            numbers = range(block * BLOCK, (block + 1) * BLOCK)
            batches = [micro_batches(rows, stream.draw(n), 0, 1, 32, Padding(0))[0].to(device) for n in numbers]
            order = list(times) if block % 2 else list(times)[::-1]
            for name in order:
                # The device is waited for around a block only, so that whatever waits inside it shows.
                started = _now(device)
                for number, batch in zip(numbers, batches, strict=True):
                    moment = Moment(number, options.steps, 0.0)
                    if name == "engine":
                        engine.step([batch], moment, 1e-5, 32)
                    else:
                        bare.step(batch, moment)
                if block:
                    times[name].append((_now(device) - started) / BLOCK)
            engine.report()
    medians = {name: statistics.median(values) * 1e3 for name, values in times.items()}
    pairs = [ours / plain for ours, plain in zip(times["engine"], times["bare loop"], strict=True)]
    overhead = 100 * (statistics.median(pairs) - 1)
    found = {"median_ms": medians, "overhead_percent": overhead}
    print(json.dumps(found))
    if options.json is not None:
        found |= {"overhead_percent_of_blocks": [100 * (pair - 1) for pair in pairs], "seconds_of_blocks": times}
        report = {**facts(device), "steps": options.steps, "bar_percent": BAR, **found}
        write_both(report, page(report), options.json)
    if overhead >= BAR:
        sys.exit(f"the overhead is not below {BAR} %")


def page(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = ["# What DeepSpeed costs without ZeRO", "", headline(report), "", "| loop | median ms of a step |"]
    lines += ["| --- | ---: |", *(f"| {name} | {value:.2f} |" for name, value in report["median_ms"].items()), ""]
    verdict = "met" if report["overhead_percent"] < BAR else "MISSED"
    blocks = report["overhead_percent_of_blocks"]
    lines.append(
        f"Overhead {report['overhead_percent']:.1f} %, the median of {len(blocks)} pairs of blocks "
        f"({min(blocks):.1f} to {max(blocks):.1f} %); below {BAR:g} % is asked: {verdict}."
    )
    return "\n".join(lines)


class BareLoop:
    """The step without DeepSpeed."""

    def __init__(self, module: DistillationModule) -> None:
        self.module = module.train()
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5, weight_decay=0.01, fused=True)

    def step(self, batch: Batch, moment: Moment) -> None:
        """One optimizer step."""
        terms, _ = self.module(batch, moment)
        (terms.sum() / 32).backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None])
        # What the fused kernel reads of a gradient scaler: it divides by the one and leaves out the step by the other.
        vars(self.optimizer).update(grad_scale=(norm + 1e-6).clamp(min=1.0), found_inf=(~torch.isfinite(norm)).float())
        self.optimizer.step()
        self.optimizer.zero_grad()


def _module(folder: str, method: MixKD, device: torch.device) -> DistillationModule:
    config = validate(Config, {"task": {}, "teacher": {"model": folder}, "student": {"num_layers": 3}})
    assert config.teacher is not None
    teacher = load_teacher_encoder(config.teacher, 2, "classification", None, "bf16")
    tokenizer = load_tokenizer(folder, None, False, "teacher.model")
    student, _ = load_student_encoder(config.student, config.teacher, tokenizer, 2, "classification")
    for encoder in (teacher, student):
        encoder.fuse()
    return DistillationModule(student.to(device), FrozenTeacher(teacher.to(device), str), None, method)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    main()
