"""How long a run is, what the learning rate is at each step, and when it evaluates: pure functions of the step."""

import math

from mixkd_fast.configuration import Training


def total_steps(training: Training, num_rows: int) -> int:
    """Optimizer steps of the run: `steps`, or enough to see `epochs` * num_rows rows."""
    if training.steps is not None:
        return training.steps
    epochs = 3.0 if training.epochs is None else training.epochs
    return max(1, math.ceil(epochs * num_rows / training.batch_size))


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


def is_evaluation_step(training: Training, done: int, steps: int, num_rows: int) -> bool:
    """Whether to evaluate after `done` steps: every `evaluate_every`, or where an epoch ends; always at the end."""
    if done == steps:
        return True
    if training.evaluate_every is not None:
        return done % training.evaluate_every == 0
    seen = done * training.batch_size
    return seen // num_rows > (seen - training.batch_size) // num_rows


def is_checkpoint_step(training: Training, done: int, steps: int, evaluated: bool) -> bool:
    """Whether to write a checkpoint after `done` steps; always at the end."""
    if training.checkpoint_every is None or done == steps:
        return evaluated
    return done % training.checkpoint_every == 0
