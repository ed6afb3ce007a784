"""Is `mixkd-fast plan` right? Predicts the speed of training steps on this CPU or GPU, then runs them and compares.

    python -m benchmarks.plan_check [--device cuda] [--precision bf16] [--batching length] [--steps 30] [--repeats N]
                                    [--json FILE]

A BERT of MiniLM's size (6 layers x 384) and random weights teaches its first 3 layers on rows of random words whose
lengths follow MNLI's. The prediction is made before and after the run, because the machine may change in between.
Exit status 1 if the median over the repeats of predicted / measured is not within 15 % of 1.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from benchmarks.machine import facts, headline, planned_gpu, write_both
from mixkd_fast import distill
from mixkd_fast.configuration import Config, validate
from mixkd_fast.distillation import Result
from mixkd_fast.planning.lengths import mnli_lengths
from mixkd_fast.planning.plan import make_plan

VOCABULARY = 30522
MAX_LENGTH = 128
BAR = 0.15
"""How far predicted / measured may be from 1."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--batching", choices=["random", "length"], default="random")
    parser.add_argument("--method", choices=["finetune", "kd", "mixkd"], default="mixkd")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--threads", type=int, default=None)
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=here)
    parser.add_argument("--repeats", type=int, default=1, help="how often to predict, run and compare (default: 1)")
    parser.add_argument("--json", type=Path, help="file of the results; .md is written beside it")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats is {options.repeats}; allowed: at least 1")
    if options.device != here:  # runs take the GPU where there is one
        sys.exit(f"--device {options.device}: runs here take {here} (CUDA_VISIBLE_DEVICES= hides a GPU)")
    runs: list[dict[str, Any]] = []
    found: dict[str, Any] = {}
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as folder:
            runs.append(check(Path(folder), options))
        print(json.dumps(runs[-1], indent=2), flush=True)
        found = judge(runs, options)
        if options.json is not None:  # what is measured stays if a later repeat is cut off
            report = {**facts(torch.device(options.device)), **found}
            write_both(report, page(report), options.json)
    print(verdict(found))
    if not found["within"]:
        sys.exit(verdict(found))


def judge(runs: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """The report: options, runs, the median of predicted / measured, whether that is within the bar.

    With one thread it is the processor's time that is predicted, which other work on the machine does not touch.
    """
    key = "predicted_over_measured_cpu" if options.threads == 1 else "predicted_over_measured"
    median = statistics.median(run[key] for run in runs)
    known = {name: value for name, value in vars(options).items() if name != "json"}
    within = abs(median - 1) <= BAR
    return {"options": known, "judged": key, "median": median, "bar": BAR, "within": within, "runs": list(runs)}


def verdict(report: dict[str, Any]) -> str:
    """The median of all runs against the bar, as a line."""
    said = "is" if report["within"] else "is not"
    ratio = f"median of predicted / measured over {len(report['runs'])} runs: {report['median']:.2f}"
    return f"{ratio} {said} within {100 * report['bar']:g} % of 1"


def page(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    seconds = "s of processor time" if report["judged"].endswith("_cpu") else "s"
    lines = ["# The plan against a run", "", headline(report), ""]
    lines += [f"| measured, rows/{seconds} | predicted before and after | predicted / measured |"]
    lines += ["| ---: | ---: | ---: |"]
    for run in report["runs"]:
        predictions = ", ".join(f"{rate:.1f}" for rate in run["predicted_rows_per_s"])
        measured = run["measured_rows_per_cpu_s" if report["judged"].endswith("_cpu") else "measured_rows_per_s"]
        lines.append(f"| {measured:.1f} | {predictions} | {run[report['judged']]:.2f} |")
    return "\n".join([*lines, "", f"The {verdict(report)}."])


def check(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Predicted and measured rows per second of one configuration."""
    save_teacher(folder / "teacher", options.dropout)
    write_rows(folder / "train.jsonl", max(2048, options.steps * options.batch_size), seed=1)
    write_rows(folder / "validation.jsonl", 32, seed=2)
    fields: dict[str, Any] = {
        "task": {
            "train_files": [str(folder / "train.jsonl")],
            "evaluation_files": {"validation": [str(folder / "validation.jsonl")]},
            "max_length": MAX_LENGTH,
            "cache_dir": str(folder / "cache"),
        },
        "teacher": {"model": str(folder / "teacher")},
        "student": {"num_layers": 3},
        "method": {"name": options.method},
        "training": {
            "steps": options.steps,
            "batch_size": options.batch_size,
            "precision": options.precision,
            "batching": options.batching,
            "keep_best": False,
            "threads": options.threads,
        },
        "output": {"directory": str(folder / "run"), "report": False},
    }
    config = validate(Config, fields)
    planned = "cpu" if options.device == "cpu" else planned_gpu(torch.cuda.get_device_name())
    before = predicted(config, planned)
    result, cpu_s = timed(fields)
    after = predicted(config, planned)
    measured = float(result.summary["training"]["samples_per_s"])
    mean = (before["rows_per_s"] + after["rows_per_s"]) / 2
    report: dict[str, Any] = {
        "measured_rows_per_s": measured,
        "predicted_rows_per_s": [before["rows_per_s"], after["rows_per_s"]],
        "predicted_over_measured": mean / measured,
        "parts_ms": after["parts_ms"],
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
    }
    if options.threads == 1:
        # Where others use the machine, the time that this process had the processor is what a plan can know of.
        fields["training"]["steps"] = few = max(1, options.steps // 5)
        fields["output"]["directory"] = str(folder / "few")
        _, few_cpu_s = timed(fields)
        report["measured_rows_per_cpu_s"] = options.batch_size * (options.steps - few) / (cpu_s - few_cpu_s)
        report["predicted_over_measured_cpu"] = mean / report["measured_rows_per_cpu_s"]
    return report


def timed(fields: dict[str, Any]) -> tuple[Result, float]:
    """A run, and the seconds of processor time that it took."""
    started = time.process_time()
    result = distill(**fields, progress=False)
    return result, time.process_time() - started


def predicted(config: Config, planned: str) -> dict[str, Any]:
    """The plan's rows per second and its parts on one device: "cpu", or a GPU of its table."""
    speed = make_plan(config, [planned], [1]).devices[0].counts[0].throughput
    assert speed is not None
    return {"rows_per_s": speed.rows_per_s, "parts_ms": {part.name: 1e3 * part.seconds for part in speed.parts}}


def save_teacher(folder: Path, dropout: float) -> None:
    """A random BERT of MiniLM's size with its tokenizer."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        num_labels=2,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    save_tokenizer(folder)


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of one token per word of `write_rows`."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = special + [f"w{number}" for number in range(VOCABULARY - len(special))]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)


def write_rows(path: Path, count: int, seed: int) -> None:
    """Rows of random words as long as MNLI's pairs, with random labels."""
    rng = np.random.default_rng(seed)
    lengths = mnli_lengths(MAX_LENGTH).draw(count, rng)
    with path.open("w", encoding="utf-8") as file:
        for length in lengths:
            words = rng.integers(0, VOCABULARY - 5, size=length - 2)
            row = {"sentence": " ".join(f"w{word}" for word in words), "label": int(rng.integers(2))}
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
