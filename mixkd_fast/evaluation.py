"""Evaluation over all ranks: each takes its share of the rows, rank 0's figures are everybody's."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mixkd_fast import distributed
from mixkd_fast.data.batching import Batch, EvaluationBatches, Padding
from mixkd_fast.data.tokenization import TokenRows
from mixkd_fast.metrics import evaluate_language, evaluate_predictions

Logits = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Evaluation:
    """The outcome of one split."""

    split: str
    metrics: dict[str, float]
    seconds: float
    logits: Logits


@dataclass(frozen=True)
class EvaluationPlan:
    """How evaluation rows are cut into batches."""

    batch_size: int
    padding: Padding
    device: torch.device
    metric_names: list[str]
    language: bool = False
    """Whether logits are the answers of a causal language model, [N, 3]: see `CausalLM.answers`."""


def predict(rows: TokenRows, plan: EvaluationPlan, forward: Callable[[Batch], Tensor]) -> tuple[Logits, float]:
    """Logits [N, C] of all rows in order, on every rank, and the seconds it took. Collective."""
    started = time.perf_counter()
    numbers: list[NDArray[np.int64]] = []
    logits: list[Logits] = []
    for batch in EvaluationBatches(rows, plan.batch_size, distributed.rank(), distributed.world_size(), plan.padding):
        out = forward(batch.to(plan.device)).float().cpu().numpy()
        valid = batch.valid.numpy()
        numbers.append(batch.row_ids.numpy()[valid])
        logits.append(out[valid])
    gathered = distributed.gather_objects((np.concatenate(numbers), np.concatenate(logits)))
    width = gathered[0][1].shape[1]
    result = np.full((len(rows), width), np.nan, dtype=np.float32)
    for row_numbers, values in gathered:
        result[row_numbers] = values
    return result, time.perf_counter() - started


def evaluate(
    split: str,
    rows: TokenRows,
    plan: EvaluationPlan,
    forward: Callable[[Batch], Tensor],
    teacher_logits: Logits | None,
) -> Evaluation:
    """Predict and score one split. Collective."""
    logits, seconds = predict(rows, plan, forward)
    return Evaluation(split, score(rows, plan, logits, teacher_logits), seconds, logits)


def score(
    rows: TokenRows, plan: EvaluationPlan, logits: Logits, teacher_logits: Logits | None = None
) -> dict[str, float]:
    """Figures of logits that are already there; see `evaluate_predictions` and `evaluate_language`."""
    if plan.language:
        return evaluate_language(logits, plan.metric_names)
    return evaluate_predictions(logits, np.asarray(rows.labels), plan.metric_names, teacher_logits)
