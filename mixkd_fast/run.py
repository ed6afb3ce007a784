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
from mixkd_fast.data.batching import GlobalBatches, micro_batches
from mixkd_fast.engine import Engine
from mixkd_fast.errors import Interrupted
from mixkd_fast.evaluation import Evaluation, EvaluationPlan, Logits, evaluate, predict, score
from mixkd_fast.interrupt import StopRequest
from mixkd_fast.methods import Moment
from mixkd_fast.preparation import Prepared
from mixkd_fast.run_folder import MetricsLog, RunFolder
from mixkd_fast.saving import save_model
from mixkd_fast.schedule import is_checkpoint_step, is_evaluation_step, learning_rate, total_steps


@dataclass
class RunState:
    """What a checkpoint remembers beside weights and optimizer; everything else is a function of the step."""

    step: int = 0
    metrics_bytes: int = 0
    best: dict[str, Any] | None = None
    evaluations_without_gain: int = 0
    skipped_steps: int = 0
    samples: int = 0
    tokens: int = 0
    training_seconds: float = 0.0
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
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
        num_rows = len(parts.train)
        self.steps = total_steps(training, num_rows)
        self.batches = GlobalBatches(num_rows, training.batch_size, training.seed, config.method.mixing())
        self.plan = EvaluationPlan(
            training.evaluation_batch_size, parts.padding, engine.device, list(parts.spec.metrics)
        )
        self.state = RunState()
        self.teacher_logits: dict[str, Logits] = {}
        self.teacher_metrics: dict[str, dict[str, float]] = {}
        self.teacher_rows_per_s: float | None = None
        self.started = datetime.now(timezone.utc)

    def resume(self) -> None:
        """Go on from the newest good checkpoint, if there is one."""
        checkpoint = self.folder.store.latest()
        if checkpoint is None:
            distributed.say(f"No checkpoint in {self.folder.store.directory}: starting from the beginning")
            return
        self.engine.load(checkpoint.path / "state")
        self.state = RunState(**checkpoint.state)
        distributed.say(f"Resuming from {checkpoint.path} after step {self.state.step} of {self.steps}")

    def train(self, progress: bool) -> None:
        """Train to the last step (or an early stop).

        Raises: Interrupted after a stop signal, once a checkpoint is written.
        """
        self._judge_teacher()
        log = MetricsLog(self.folder.path / "metrics.jsonl", self.state.metrics_bytes)
        bar = Progress(self.steps, self.state.step, progress)
        try:
            with StopRequest() as stop:
                while self.state.step < self.steps and not self.state.finished:
                    self._one_step(log, bar, stop)
        finally:
            bar.close()
            log.close()

    def _one_step(self, log: MetricsLog, bar: Progress, stop: StopRequest) -> None:
        state, training = self.state, self.config.training
        started = time.perf_counter()
        seen_rows = state.step * training.batch_size
        moment = Moment(state.step, self.steps, seen_rows / len(self.parts.train))
        rate = learning_rate(training, state.step, self.steps)
        batches = micro_batches(
            self.parts.train,
            self.batches.draw(state.step),
            distributed.rank(),
            self.ranks,
            self.arithmetic.micro_batch_size,
            self.parts.padding,
        )
        seed_step(training.seed, state.step, distributed.rank())
        result = self.engine.step([b.to(self.engine.device) for b in batches], moment, rate, training.batch_size)
        seconds = time.perf_counter() - started
        state.step += 1
        state.skipped_steps += result.skipped
        state.samples += training.batch_size
        state.tokens += result.num_tokens
        state.training_seconds += seconds
        samples_per_s, tokens_per_s = training.batch_size / seconds, result.num_tokens / seconds
        bar.step(result.loss, result.terms, samples_per_s, tokens_per_s)
        done = state.step
        if done % training.log_every == 0 or done == self.steps:
            log.write(
                {
                    "kind": "train",
                    "step": done,
                    "epoch": done * training.batch_size / len(self.parts.train),
                    "loss": result.loss,
                    "terms": result.terms,
                    "learning_rate": rate,
                    "grad_norm": result.grad_norm,
                    "samples_per_s": samples_per_s,
                    "tokens_per_s": tokens_per_s,
                    "step_ms": seconds * 1e3,
                    "memory_mib": memory_mib(self.engine.device),
                    "skipped_steps": state.skipped_steps,
                }
            )
            events = {"loss": result.loss, "learning_rate": rate, "samples_per_s": samples_per_s}
            events |= {f"terms/{name}": value for name, value in result.terms.items()}
            self._tell_monitor("train", events, done)
        evaluated = is_evaluation_step(training, done, self.steps, len(self.parts.train))
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
        here = torch.tensor([stop.requested() or 0], device=self.engine.device)
        if self.ranks > 1:
            torch.distributed.all_reduce(here, op=torch.distributed.ReduceOp.MAX)
        return int(here.item())

    def _judge_teacher(self) -> None:
        """The teacher's own figures and logits on every evaluation split, once: the yardstick of the student."""
        if self.parts.teacher is None:
            return
        teacher, rows, seconds = self.parts.teacher, 0, 0.0
        for split, tokens in self.parts.evaluation.items():
            logits, took = predict(tokens, self.plan, lambda batch: teacher.clean(batch).logits)
            self.teacher_logits[split] = logits
            self.teacher_metrics[split] = score(tokens, self.plan, logits)
            rows, seconds = rows + len(tokens), seconds + took
            shown = "  ".join(f"{name} {value:.4f}" for name, value in self.teacher_metrics[split].items())
            distributed.say(f"teacher on {split}: {shown}")
        self.teacher_rows_per_s = rows / seconds if seconds else None

    def _evaluate(self, log: MetricsLog, bar: Progress) -> None:
        state = self.state
        results: list[Evaluation] = []
        for split, tokens in self.parts.evaluation.items():
            result = evaluate(split, tokens, self.plan, self.engine.logits, self.teacher_logits.get(split))
            results.append(result)
            log.write(
                {
                    "kind": "evaluation",
                    "step": state.step,
                    "epoch": state.step * self.config.training.batch_size / len(self.parts.train),
                    "split": split,
                    "metrics": result.metrics,
                    "seconds": result.seconds,
                }
            )
            bar.evaluated(state.step, split, result.metrics)
            self._tell_monitor(f"evaluation/{split}", result.metrics, state.step)
        metrics: dict[str, dict[str, float]] = distributed.broadcast_object({r.split: r.metrics for r in results})
        state.metrics = metrics
        state.evaluation_rows_per_s = sum(len(r.logits) for r in results) / sum(r.seconds for r in results)
        split, name = results[0].split, self.plan.metric_names[0]
        value = metrics[split][name]
        if state.best is None or value > state.best["value"]:
            state.best = {"step": state.step, "split": split, "metric": name, "value": value, "metrics": metrics}
            state.evaluations_without_gain = 0
            if self.config.training.keep_best:
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

    def save_student(self, path: Path) -> None:
        """Save the student as transformers does, with its tokenizer, aside and renamed. Collective."""
        weights = self.engine.student_state()

        def write() -> None:
            assert weights is not None
            model, tokenizer = self.parts.student.model, self.parts.tokenizer
            replace_folder(path, lambda aside: save_model(model, weights, tokenizer, aside))

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
