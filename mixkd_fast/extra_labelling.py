"""The pass of the frozen teacher over extra training rows, before the first step."""

from collections.abc import Callable

import torch
from datasets import Dataset

from mixkd_fast.configuration import Config
from mixkd_fast.data.batching import Padding
from mixkd_fast.data.extra_rows import ExtraRows, select_extra_rows
from mixkd_fast.data.loading import Splits
from mixkd_fast.data.tokenization import TokenRows
from mixkd_fast.evaluation import EvaluationPlan, predict
from mixkd_fast.frozen_teacher import FrozenTeacher


def with_chosen_extra_rows(
    config: Config,
    splits: Splits,
    teacher: FrozenTeacher | None,
    tokenise: Callable[[Dataset], TokenRows],
    padding: Padding,
    device: torch.device,
) -> tuple[Splits, ExtraRows | None]:
    """Ask the teacher about the extra rows if the task says so, and keep those that pass. Collective.

    Every rank computes its share of the logits (a ZeRO-3 teacher takes part in step) and all of them get the whole, so
    that they go on with the same rows. The logits do not depend on the number of ranks.
    Returns: the splits, and what became of the extra rows (None if the task names none).
    """
    task = config.task
    if not task.extra_train_files:
        return splits, None
    logits = None
    if task.asks_teacher_about_extra_rows:
        assert teacher is not None
        num_main = len(splits.train) - splits.num_extra_rows
        extra = tokenise(splits.train.select(range(num_main, len(splits.train))))
        plan = EvaluationPlan(config.training.evaluation_batch_size, padding, device, list(splits.spec.metrics))
        logits, _ = predict(extra, plan, lambda batch: teacher.clean(batch).logits)
    return select_extra_rows(task, splits, logits)
