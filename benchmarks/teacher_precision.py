"""What bf16, int8 and fp8 do to a teacher: python -m benchmarks.teacher_precision [--device D] [--json FILE]

Rows per second of its clean forward over the demo's validation rows, and how far its answers are from fp32's: share of
rows with the same answer, mean KL, accuracy. The demo's own teacher by default.
"""

import argparse
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from scipy.special import log_softmax
from torch import Tensor

from benchmarks.machine import facts, headline, write_both
from mixkd_fast.configuration import Task, Teacher
from mixkd_fast.data.batching import Batch, Padding
from mixkd_fast.data.loading import load_splits
from mixkd_fast.data.tokenization import tokenize_rows
from mixkd_fast.evaluation import EvaluationPlan, Logits, predict
from mixkd_fast.frozen_teacher import FrozenTeacher
from mixkd_fast.models import Encoder, load_teacher_encoder, load_tokenizer
from mixkd_fast.quantized_teacher import Quantization, quantize, why_not


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="mixkd_fast/data/demo/teacher")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--task", default="demo")
    parser.add_argument("--file", help="Parquet or JSONL rows of a task other than the demo")
    parser.add_argument("--json", type=Path, help="file of the results; .md is written beside it")
    options = parser.parse_args()
    files = {} if options.file is None else {"train_files": [options.file], "evaluation_files": {"it": [options.file]}}
    splits = load_splits(Task(name=options.task, max_length=128, **files), None, None)
    tokenizer = load_tokenizer(options.teacher, None, False, "teacher.model")
    rows = tokenize_rows(next(iter(splits.evaluation.values())), tokenizer, 128, None)
    device = torch.device(options.device)
    plan = EvaluationPlan(64, Padding.of(tokenizer), device, list(splits.spec.metrics))
    names = ["fp32", "bf16"] + [name for name in get_args(Quantization) if not why_not(name, device)]
    teachers = {
        name: FrozenTeacher(_encoder(name, options.teacher, splits.spec.num_labels, device), str) for name in names
    }
    seconds: dict[str, list[float]] = {name: [] for name in teachers}
    logits: dict[str, Logits] = {}
    for number in range(options.rounds + 1):
        for name, teacher in teachers.items():
            started = time.perf_counter()
            logits[name], _ = predict(rows, plan, partial(_clean_logits, teacher))
            if number:
                seconds[name].append(time.perf_counter() - started)
    truth, labels = log_softmax(logits["fp32"], 1), np.asarray(rows.labels)
    found: dict[str, dict[str, Any]] = {}
    for name, values in logits.items():
        own = log_softmax(values, 1)
        found[name] = {
            "rows_per_s": len(rows) / statistics.median(seconds[name]),
            "seconds": seconds[name],
            "agreement_percent": 100 * float((values.argmax(1) == logits["fp32"].argmax(1)).mean()),
            "kl_to_fp32": float((np.exp(truth) * (truth - own)).sum(1).mean()),
            "accuracy_percent": 100 * float((values.argmax(1) == labels).mean()),
        }
    print("\n".join(table(found)))
    if options.json is not None:
        report = {**facts(device), "teacher": Path(options.teacher).name, "rows": len(rows), "precisions": found}
        page = ["# What a teacher's precision does", "", headline(report), "", *table(found)]
        write_both(report, "\n".join(page), options.json)


def table(found: dict[str, dict[str, Any]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = ["| precision | rows/s | same answer as fp32, % | KL to fp32 | accuracy, % |"]
    lines.append("| --- | ---: | ---: | ---: | ---: |")
    for name, entry in found.items():
        cells = [f"{entry['rows_per_s']:,.0f}", f"{entry['agreement_percent']:.2f}", f"{entry['kl_to_fp32']:.1e}"]
        lines.append(f"| {name} | {' | '.join(cells)} | {entry['accuracy_percent']:.2f} |")
    return lines


def _clean_logits(teacher: FrozenTeacher, batch: Batch) -> Tensor:
    logits: Tensor = teacher.clean(batch).logits
    return logits


def _encoder(name: str, folder: str, num_labels: int, device: torch.device) -> Encoder:
    encoder = load_teacher_encoder(
        Teacher(model=str(Path(folder))), num_labels, "classification", None, "bf16" if name == "bf16" else "fp32"
    )
    if name in get_args(Quantization):
        return Encoder(quantize(encoder.model, name)).to(device)
    encoder.fuse()
    return encoder.to(device)


if __name__ == "__main__":
    main()
