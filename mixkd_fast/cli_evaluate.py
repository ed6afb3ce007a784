"""`mixkd-fast evaluate`: score a saved model on a task's evaluation rows, or on the user's own."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mixkd_fast import distributed
from mixkd_fast.causal_lm import CausalLM, check_head
from mixkd_fast.configuration import Task, load_config
from mixkd_fast.data.batching import Batch, Padding
from mixkd_fast.data.language_tokens import tokenize_language_rows
from mixkd_fast.data.loading import load_evaluation
from mixkd_fast.data.prompts import PromptStyle
from mixkd_fast.data.tokenization import default_cache_dir, tokenize_rows
from mixkd_fast.encoder import Encoder
from mixkd_fast.errors import MixKDError, ModelError
from mixkd_fast.evaluation import Evaluation, EvaluationPlan, evaluate
from mixkd_fast.generation import Answers
from mixkd_fast.language_preparation import references_of
from mixkd_fast.models import check_max_length, check_num_labels, check_vocabulary
from mixkd_fast.pretrained import with_padding
from mixkd_fast.saving import load_model

Labels = NDArray[Any]


def evaluate_saved(
    model_folder: Path, task: Task, batch_size: int = 64, seed: int = 0
) -> dict[str, tuple[Evaluation, Labels]]:
    """Score the model saved in a folder: evaluation split -> (figures and logits, labels).

    Args: seed = of answers that are drawn: training.seed for those of the run.

    Raises: DataError or ModelError where rows, model and task do not fit together.
    """
    device = distributed.choose_device()
    if not any((model_folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise ModelError(f"{str(model_folder)!r} holds no saved model: config.json is missing")
    if task.kind == "causal_lm":
        return _evaluate_language(model_folder, task, batch_size, device, seed)
    model, tokenizer = load_model(model_folder)
    spec, splits = load_evaluation(task)
    check_num_labels(model.config, spec.num_labels, spec.label_names)
    check_vocabulary(model, tokenizer, "model")
    check_max_length(model.config, task.max_length, "model")
    encoder = Encoder(model.requires_grad_(False)).to(device)
    cache_dir = Path(task.cache_dir) if task.cache_dir else default_cache_dir()
    plan = EvaluationPlan(batch_size, Padding.of(tokenizer), device, list(spec.metrics))

    @torch.no_grad()
    def forward(batch: Batch) -> torch.Tensor:
        logits: torch.Tensor = encoder.clean(batch).logits
        return logits

    results = {}
    for split, rows in splits.items():
        tokens = tokenize_rows(rows, tokenizer, task.max_length, cache_dir)
        results[split] = (evaluate(split, tokens, plan, forward, None), np.asarray(tokens.labels))
    return results


def _evaluate_language(
    model_folder: Path, task: Task, batch_size: int, device: torch.device, seed: int
) -> dict[str, tuple[Evaluation, Labels]]:
    """The same for a causal language model, with ROUGE-L of its answers to instructions; logits are [N, 3]."""
    model, tokenizer = load_model(model_folder, causal_lm=True)
    spec, splits = load_evaluation(task)
    check_vocabulary(model, tokenizer, "model")
    check_max_length(model.config, task.max_length, "model")
    lm = CausalLM(model.requires_grad_(False))
    check_head(lm)
    lm = lm.to(device)
    tokenizer = with_padding(tokenizer)
    cache_dir = Path(task.cache_dir) if task.cache_dir else default_cache_dir()
    padding = replace(Padding.of(tokenizer), side="right")
    plan = EvaluationPlan(batch_size, padding, device, list(spec.metrics), language=True)
    style = PromptStyle.of(task)
    tokens = {
        split: tokenize_language_rows(rows, tokenizer, task.max_length, cache_dir, style)
        for split, rows in splits.items()
    }
    references = references_of(task, splits, tokens)
    answers = Answers.of_splits(task.generation, seed, tokens, references, plan, tokenizer)

    @torch.no_grad()
    def forward(batch: Batch) -> torch.Tensor:
        return lm.answers(batch)

    results = {}
    for split, rows in tokens.items():
        result = evaluate(split, rows, plan, forward, None)
        if split in answers:
            answers[split].judge(lm.generate, result.metrics)
        results[split] = (result, np.asarray(rows.labels))
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Run from command-line arguments; prints one JSON object. Returns 1 for an error."""
    parser = argparse.ArgumentParser(prog="mixkd-fast evaluate", description=__doc__)
    parser.add_argument("model", metavar="FOLDER", help="a saved model, such as runs/mnli/student")
    parser.add_argument(
        "--config", metavar="FILE", help="take the task from this configuration (default: FOLDER/../config.json)"
    )
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="task.b=VALUE")
    parser.add_argument("--batch-size", type=int, default=64, metavar="ROWS")
    options = parser.parse_args(argv)
    folder = Path(options.model)
    try:
        path = Path(options.config) if options.config else folder.parent / "config.json"
        config = load_config(path, options.overrides)
        results = evaluate_saved(folder, config.task, options.batch_size, config.training.seed)
        print(json.dumps({split: result.metrics for split, (result, _) in results.items()}, indent=2))
    except MixKDError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
