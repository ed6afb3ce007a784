"""One run from start to end: prepare, step, evaluate, checkpoint, finish. `distillation.distill` is its face."""

import resource
import sys
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from mixkd_fast import distributed
from mixkd_fast.checkpoint import replace_folder, write_on_rank_zero
from mixkd_fast.configuration import Config, batch_arithmetic
from mixkd_fast.console import Progress
from mixkd_fast.data.batching import Batch, micro_batches
from mixkd_fast.data.prefetch import Prefetcher, pin_batch
from mixkd_fast.data.streaming import StreamedRows, share_means
from mixkd_fast.engine import Engine
from mixkd_fast.errors import Interrupted
from mixkd_fast.evaluation import Evaluation, EvaluationPlan, Logits, evaluate, predict, score
from mixkd_fast.generation import Answers
from mixkd_fast.interrupt import StopRequest
from mixkd_fast.language_task import LOWER_IS_BETTER
from mixkd_fast.methods import Moment
from mixkd_fast.preparation import Prepared
from mixkd_fast.run_folder import MetricsLog, RunFolder
from mixkd_fast.saving import save_model
from mixkd_fast.schedule import (
    DrawnStream,
    Stream,
    check_micro_batches,
    check_same_rows,
    is_checkpoint_step,
    is_evaluation_step,
    learning_rate,
    stream_of,
    total_steps,
)

_STEPS_BETWEEN_SIGNALS = 10
"""With several ranks and late reports: how often they ask each other whether one was told to stop."""


@dataclass
class RunState:
    """What a checkpoint remembers beside weights and optimizer; everything else is a function of the step."""

    step: int = 0
    ranks: int = 0
    """Number of ranks that wrote it; 0 if it is not known."""
    micro_batches: int = 0
    """Of one step, over all ranks; 0 if it is not known."""
    rows_hash: str = ""
    """Of the training rows; "" if it is not known."""
    metrics_bytes: int = 0
    best: dict[str, Any] | None = None
    evaluations_without_gain: int = 0
    skipped_steps: int = 0
    samples: int = 0
    tokens: int = 0
    training_seconds: float = 0.0
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    texts: dict[str, list[str]] = field(default_factory=dict)
    evaluation_rows_per_s: float | None = None
    stopped_early: bool = False
    finished: bool = False


class Run:
    """The loop over optimizer steps, with evaluation and checkpoints at their steps."""

    def __init__(self, config: Config, folder: RunFolder, parts: Prepared, engine: Engine) -> None:
        self.config, self.folder, self.parts, self.engine = config, folder, parts, engine
        training = config.training
        self.ranks = distributed.world_size()
        self.arithmetic = batch_arithmetic(training, self.ranks)
        self._drawn: DrawnStream | None = None
        if isinstance(parts.train, StreamedRows):
            self.stream: Stream = parts.train
        else:
            lengths, multiple = parts.train.lengths, parts.padding.multiple
            self._drawn = stream_of(training, lengths, self.arithmetic, config.method.mixing(), multiple)
            self.stream = self._drawn
        self.steps = total_steps(training, self.stream)
        self.plan = EvaluationPlan(
            training.evaluation_batch_size,
            parts.padding,
            engine.device,
            list(parts.spec.metrics),
            parts.spec.kind == "causal_lm",
        )
        self.answers = Answers.of_splits(
            config.task.generation, training.seed, parts.evaluation, parts.references, self.plan, parts.tokenizer
        )
        number = self.arithmetic.accumulation * self.ranks
        self.state = RunState(ranks=self.ranks, micro_batches=number, rows_hash=parts.rows_hash)
        self.teacher_logits: dict[str, Logits] = {}
        self.teacher_metrics: dict[str, dict[str, float]] = {}
        self.teacher_rows_per_s: float | None = None
        self.started = datetime.now(timezone.utc)
        # Since the last report:
        self._samples = self._tokens = self._steps = 0
        self._clock = time.perf_counter()

    def resume(self) -> None:
        """Go on from the newest good checkpoint, if there is one."""
        checkpoint = self.folder.store.latest()
        if checkpoint is None:
            distributed.say(f"No checkpoint in {self.folder.store.directory}: starting from the beginning")
            return
        state = RunState(**checkpoint.state)
        check_micro_batches(self.config, state.micro_batches, self.arithmetic)
        check_same_rows(state.rows_hash, self.state.rows_hash)
        self.engine.load(checkpoint.path)
        self.state = state
        before = f", written by {state.ranks} ranks" if state.ranks not in (0, self.ranks) else ""
        distributed.say(f"Resuming from {checkpoint.path} after step {state.step} of {self.steps}{before}")
        state.ranks, state.micro_batches = self.ranks, self.arithmetic.accumulation * self.ranks
        state.rows_hash = self.parts.rows_hash

    def train(self, progress: bool) -> None:
        """Train to the last step (or an early stop).

        Raises: Interrupted after a stop signal, once a checkpoint is written.
        """
        self._judge_teacher()
        self._keep_teacher_logits(progress)
        log = MetricsLog(self.folder.path / "metrics.jsonl", self.state.metrics_bytes)
        bar = Progress(self.steps, self.state.step, progress)
        depth = self.config.training.prefetch
        try:
            with StopRequest() as stop, Prefetcher(self._batches, self.state.step, self.steps, depth) as ahead:
                self._clock = time.perf_counter()
                while self.state.step < self.steps and not self.state.finished:
                    self._one_step(ahead.get(self.state.step), log, bar, stop)
        finally:
            bar.close()
            log.close()

    def _batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step, on the CPU."""
        micro_batch_size, padding = self.arithmetic.micro_batch_size, self.parts.padding
        rows, rank = self.parts.train, distributed.rank()
        if isinstance(rows, StreamedRows):
            batches = rows.batches(step, rank, self.ranks, padding)
        else:
            assert self._drawn is not None
            batches = micro_batches(rows, self._drawn.draw(step), rank, self.ranks, micro_batch_size, padding)
        teacher = self.parts.teacher
        if teacher is not None:
            for batch in batches:
                teacher.attach(batch)
        return [pin_batch(batch) for batch in batches]

    def _one_step(self, batches: list[Batch], log: MetricsLog, bar: Progress, stop: StopRequest) -> None:
        state, training = self.state, self.config.training
        step = state.step
        rows = self.stream.rows_seen(step + 1) - self.stream.rows_seen(step)
        moment = Moment(step, self.steps, self.stream.epoch(step))
        rate = learning_rate(training, step, self.steps)
        seed_step(training.seed, step, distributed.rank())
        if isinstance(self.parts.train, StreamedRows):
            share_means(batches)
        batches = [batch.to(self.engine.device, non_blocking=True) for batch in batches]
        batches = self.engine.prepare(batches, moment, rows)
        self.engine.step(batches, moment, rate, rows)
        state.step += 1
        self._samples += rows
        self._tokens += sum(batch.num_tokens for batch in batches)
        self._steps += 1
        if state.step % training.log_every and not self._is_stop_point(state.step) and not self._must_stop(stop):
            return
        self._report(log, bar, rate)
        self._pause(log, bar, stop)
        self._clock = time.perf_counter()

    def _must_stop(self, stop: StopRequest) -> bool:
        """Whether a stop signal is to be obeyed between two reports; several ranks agree on it every few steps.

        Their hosts do: no GPU is waited for.
        """
        if self.ranks > 1 and self.state.step % _STEPS_BETWEEN_SIGNALS:
            return False
        return self._agreed_signal(stop) != 0

    def _is_stop_point(self, done: int) -> bool:
        """Whether something is due after `done` steps for which everything before must be known."""
        evaluated = is_evaluation_step(self.config.training, done, self.steps, self.stream)
        return evaluated or is_checkpoint_step(self.config.training, done, self.steps, evaluated)

    def _report(self, log: MetricsLog, bar: Progress, rate: float) -> None:
        """Wait for the device, write the line of the last step, and count the steps since the line before."""
        state, training = self.state, self.config.training
        result = self.engine.report()
        tokens = torch.tensor(self._tokens, dtype=torch.int64, device=self.engine.device)
        num_tokens = int(distributed.sum_over_ranks(tokens)) if self.ranks > 1 else self._tokens
        seconds = time.perf_counter() - self._clock
        state.skipped_steps += result.num_skipped
        state.samples += self._samples
        state.tokens += num_tokens
        state.training_seconds += seconds
        samples_per_s, tokens_per_s = self._samples / seconds, num_tokens / seconds
        step_ms = seconds * 1e3 / self._steps
        bar.step(result.loss, result.terms, samples_per_s, tokens_per_s, self._steps)
        self._samples = self._tokens = self._steps = 0
        done = state.step
        if done % training.log_every == 0 or done == self.steps:
            log.write(
                {
                    "kind": "train",
                    "step": done,
                    "epoch": self.stream.epoch(done),
                    "loss": result.loss,
                    "terms": result.terms,
                    "learning_rate": rate,
                    "grad_norm": result.grad_norm,
                    "samples_per_s": samples_per_s,
                    "tokens_per_s": tokens_per_s,
                    "step_ms": step_ms,
                    "memory_mib": memory_mib(self.engine.device),
                    "skipped_steps": state.skipped_steps,
                }
            )
            events = {"loss": result.loss, "learning_rate": rate, "samples_per_s": samples_per_s}
            events |= {f"terms/{name}": value for name, value in result.terms.items()}
            self._tell_monitor("train", events, done)

    def _pause(self, log: MetricsLog, bar: Progress, stop: StopRequest) -> None:
        """Evaluate, write a checkpoint, obey a stop signal: whatever is due at this step.

        Raises: Interrupted.
        """
        state, training, done = self.state, self.config.training, self.state.step
        evaluated = is_evaluation_step(training, done, self.steps, self.stream)
        if evaluated:
            self._evaluate(log, bar)
        signal_number = self._agreed_signal(stop)
        if signal_number or is_checkpoint_step(training, done, self.steps, evaluated) or state.finished:
            self.write_checkpoint(log)
        if signal_number and done < self.steps and not state.finished:
            raise Interrupted(
                f"Stopped by signal {signal_number} after step {done} of {self.steps}; everything is saved in "
                f"{self.folder.path}. Run the same command with --resume to go on.",
                signal_number,
            )

    def _agreed_signal(self, stop: StopRequest) -> int:
        """The signal that any rank received, 0 if none: all ranks must stop at the same step."""
        return distributed.maximum_on_host(stop.requested() or 0)

    def _judge_teacher(self) -> None:
        """The teacher's own figures and logits on every evaluation split, once: the yardstick of the student."""
        teacher = self.parts.teacher
        if teacher is None or not teacher.has_model or not self.config.method.trains_classifier:
            return
        rows, seconds = 0, 0.0
        for split, tokens in self.parts.evaluation.items():
            # Passes with dropout draw the same in a resumed run.
            seed_step(self.config.training.seed, 0, distributed.rank())
            logits, took = predict(tokens, self.plan, lambda batch: self.engine.teacher_logits(batch, teacher))
            self.teacher_logits[split] = logits
            self.teacher_metrics[split] = score(tokens, self.plan, logits)
            if split in self.answers:
                self.answers[split].judge_teacher(teacher.generate, self.teacher_metrics[split])
            rows, seconds = rows + len(tokens), seconds + took
            shown = "  ".join(f"{name} {value:.4f}" for name, value in self.teacher_metrics[split].items())
            distributed.say(f"teacher on {split}: {shown}")
        self.teacher_rows_per_s = rows / seconds if seconds else None

    def _keep_teacher_logits(self, progress: bool) -> None:
        """Compute the teacher's logits of all training rows once, where several epochs will ask for them."""
        parts, config = self.parts, self.config
        if parts.teacher is None or config.teacher is None or not config.method.needs_clean_teacher:
            return
        # A few rows beyond one epoch are not worth a pass of their own.
        if isinstance(parts.train, StreamedRows):
            distributed.say("The teacher's logits are not kept: rows are streamed, so it runs in every step")
        elif config.teacher.store and self.stream.epoch(self.steps) > 1.05:
            parts.teacher.keep_logits(config, parts.train, self.plan, parts.spec.num_labels, progress)

    def _evaluate(self, log: MetricsLog, bar: Progress) -> None:
        state = self.state
        results: list[Evaluation] = []
        texts: dict[str, list[str]] = {}
        for split, tokens in self.parts.evaluation.items():
            result = evaluate(split, tokens, self.plan, self.engine.logits, self.teacher_logits.get(split))
            if split in self.answers:
                texts[split] = self.answers[split].judge(self.engine.generate, result.metrics)
            results.append(result)
            log.write(
                {
                    "kind": "evaluation",
                    "step": state.step,
                    "epoch": self.stream.epoch(state.step),
                    "split": split,
                    "metrics": result.metrics,
                    "seconds": result.seconds,
                }
            )
            bar.evaluated(state.step, split, result.metrics)
            self._tell_monitor(f"evaluation/{split}", result.metrics, state.step)
        metrics: dict[str, dict[str, float]] = distributed.broadcast_object({r.split: r.metrics for r in results})
        state.metrics, state.texts = metrics, texts
        self.engine.after_evaluation(metrics)
        state.evaluation_rows_per_s = sum(len(r.logits) for r in results) / sum(r.seconds for r in results)
        split, name = results[0].split, self.plan.metric_names[0]
        value = metrics[split][name]
        sign = -1 if name in LOWER_IS_BETTER else 1
        if state.best is None or sign * value > sign * state.best["value"]:
            state.best = {"step": state.step, "split": split, "metric": name, "value": value, "metrics": metrics}
            state.best["texts"] = texts
            state.evaluations_without_gain = 0
            if self.keeps_best:
                self.save_student(self.best_folder(state.step))
        else:
            state.evaluations_without_gain += 1
            patience = self.config.training.early_stopping
            if patience is not None and state.evaluations_without_gain >= patience:
                state.stopped_early = state.finished = True
                distributed.say(f"Early stop at step {state.step}: {patience} evaluations without a better {name}")

    def write_checkpoint(self, log: MetricsLog) -> Path:
        """Write the run's state at this step boundary. Collective."""
        self.state.metrics_bytes = log.size()
        path = self.folder.store.write(self.state.step, vars(self.state), self.engine.save)
        if distributed.rank() == 0:
            self.folder.drop_unused_best(self.state.best)
        return path

    def best_folder(self, step: int) -> Path:
        """Where the best student of a step is kept."""
        return self.folder.path / "best" / f"step-{step:08d}"

    @property
    def keeps_best(self) -> bool:
        """Whether the saved student is the best evaluation's and not the last step's."""
        return self.config.training.keep_best and self.config.method.trains_classifier

    def evaluate_further(self, number: int) -> dict[str, dict[str, float]]:
        """Split -> metrics of another student that the method trains (1, 2, ...). Collective."""
        results = {
            split: evaluate(
                split,
                tokens,
                self.plan,
                lambda batch: self.engine.logits(batch, number),
                self.teacher_logits.get(split),
            ).metrics
            for split, tokens in self.parts.evaluation.items()
        }
        metrics: dict[str, dict[str, float]] = distributed.broadcast_object(results)
        return metrics

    def save_student(self, path: Path, number: int = 0) -> None:
        """Save a student as transformers does, with its tokenizer, aside and renamed. Collective."""
        lora = self.config.student.lora
        merge = lora is not None and lora.merge
        weights = self.engine.student_state(number, trained_only=lora is not None and not merge)

        def write() -> None:
            assert weights is not None
            model, tokenizer = self.engine.student_model(number), self.parts.tokenizer
            replace_folder(path, lambda aside: save_model(model, weights, tokenizer, aside, merge))

        write_on_rank_zero(path, write)

    def _tell_monitor(self, group: str, values: dict[str, float], step: int) -> None:
        if self.engine.monitor.enabled:
            self.engine.monitor.write_events([(f"{group}/{name}", value, step) for name, value in values.items()])


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch (dropout) from (seed, step, rank) alone, so that a resumed run draws what the first one drew."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1))


def memory_mib(device: torch.device) -> float:
    """Memory in use now: the GPU's allocations, or this process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**20
    return int(psutil.Process().memory_info().rss) / 2**20


def peak_memory_mib(device: torch.device) -> float:
    """The most memory of this process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
