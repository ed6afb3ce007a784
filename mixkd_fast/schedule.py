"""How long a run is, what the learning rate is at each step, and when it evaluates: pure functions of the step."""

import math
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mixkd_fast.configuration import DEFAULT_EPOCHS, BatchArithmetic, Config, Training
from mixkd_fast.data.batching import Draw, GlobalBatches
from mixkd_fast.data.planned_batches import PlannedBatches
from mixkd_fast.errors import ConfigurationError, DataError
from mixkd_fast.mixing import Mixing


class Stream(Protocol):
    """Where the steps of a run stand in its rows: `GlobalBatches`, `PlannedBatches` or `StreamedRows`."""

    def rows_seen(self, step: int) -> int:
        """Rows of all steps before this one."""

    def epoch(self, step: int) -> float:
        """Epochs that are over when this step begins."""

    def steps_in(self, epochs: float) -> int:
        """Optimizer steps of so many epochs."""


class DrawnStream(Stream, Protocol):
    """One whose rows can be had by number: `GlobalBatches` or `PlannedBatches`."""

    def draw(self, step: int) -> Draw:
        """Rows, partners and lam of a step."""


def stream_of(
    training: Training, lengths: NDArray[np.int64], arithmetic: BatchArithmetic, mixing: Mixing | None, multiple: int
) -> DrawnStream:
    """The batches that the training section asks for. Args: lengths in tokens; multiple that widths are rounded to."""
    if training.batching == "random":
        return GlobalBatches(len(lengths), training.batch_size, training.seed, mixing)
    return PlannedBatches(
        lengths,
        training.batch_size,
        training.seed,
        mixing,
        window=training.window,
        pad_multiple=multiple,
        tokens_per_micro_batch=training.tokens_per_micro_batch,
        micro_batches=arithmetic.accumulation * arithmetic.ranks,
    )


def check_micro_batches(config: Config, before: int, now: BatchArithmetic) -> None:
    """Where rows are streamed, or a token budget fills them, a step's rows depend on its number of micro-batches.

    Args: before = of the steps of a checkpoint, over all ranks; 0 if it is not known.
    Raises: ConfigurationError when a resumed run would have another number of them.
    """
    training, number = config.training, now.accumulation * now.ranks
    reasons = {
        "task.streaming": config.task.streaming,
        "training.tokens_per_micro_batch": training.tokens_per_micro_batch is not None,
    }
    for field in (name for name, applies in reasons.items() if applies and before not in (0, number)):
        raise ConfigurationError(
            f"{field}: the checkpoint's steps had {before} micro-batches, and now they have {number}; set "
            f"training.micro_batch_size = {training.batch_size // before} and let the number of ranks divide {before}"
        )


def check_same_rows(before: str, now: str) -> None:
    """The rows of a step are drawn by number, so a resumed run must have those that its checkpoint had.

    Args: hashes of the training rows; before = a checkpoint's, "" if it is not known.
    Raises: DataError.
    """
    if before not in ("", now):
        raise DataError(
            "--resume needs the training rows that the run was started with, and those of the task are others "
            f"({before[:12]} then, {now[:12]} now): a file was changed, added or taken away. Bring the files back, or "
            "start a new run in another output.directory"
        )


def total_steps(training: Training, stream: Stream) -> int:
    """Optimizer steps of the run: `steps`, or those of `epochs`."""
    if training.steps is not None:
        return training.steps
    return stream.steps_in(DEFAULT_EPOCHS if training.epochs is None else training.epochs)


def learning_rate(training: Training, step: int, steps: int) -> float:
    """Learning rate of step `step` (0-based): linear warm-up from 0, then linear or cosine decay to 0, or constant."""
    warmup = round(training.warmup * steps)
    if step < warmup:
        return training.learning_rate * (step + 1) / warmup
    if training.schedule == "constant":
        return training.learning_rate
    left = (steps - step) / max(1, steps - warmup)
    if training.schedule == "linear":
        return training.learning_rate * left
    return training.learning_rate * 0.5 * (1 - math.cos(math.pi * left))


def is_evaluation_step(training: Training, done: int, steps: int, stream: Stream) -> bool:
    """Whether to evaluate after `done` steps: every `evaluate_every`, or where an epoch ends; always at the end."""
    if done == steps:
        return True
    if training.evaluate_every is not None:
        return done % training.evaluate_every == 0
    return math.floor(stream.epoch(done)) > math.floor(stream.epoch(done - 1))


def is_checkpoint_step(training: Training, done: int, steps: int, evaluated: bool) -> bool:
    """Whether to write a checkpoint after `done` steps; always at the end."""
    if training.checkpoint_every is None or done == steps:
        return evaluated
    return done % training.checkpoint_every == 0
