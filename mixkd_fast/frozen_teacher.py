"""The teacher as the methods see it: frozen, in its own precision, its logits of clean rows kept for later epochs."""

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.profiler import record_function

from mixkd_fast import distributed
from mixkd_fast.causal_lm import CausalLM, Head
from mixkd_fast.configuration import Config
from mixkd_fast.console import Progress
from mixkd_fast.data.batching import Batch, EvaluationBatches
from mixkd_fast.data.tokenization import TokenRows, default_cache_dir
from mixkd_fast.errors import MixKDError, ModelError
from mixkd_fast.evaluation import EvaluationPlan
from mixkd_fast.fused_encoder import Logits
from mixkd_fast.language_task import Sampling
from mixkd_fast.mixing import Mixing
from mixkd_fast.models import Encoder
from mixkd_fast.offline.reading import OfflineStore
from mixkd_fast.ops import TopK
from mixkd_fast.teacher import ShardedTeacher
from mixkd_fast.teacher_store import TeacherStore

_FORMAT = 1  # of what is kept; to be raised when the same weights come to mean other logits


class FrozenTeacher:
    """An `Encoder`, `CausalLM` or `ShardedTeacher` that is only asked."""

    def __init__(
        self,
        teacher: Encoder | CausalLM | ShardedTeacher | None,
        digest: Callable[[], str],
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        """Args: teacher = None for one that only an offline store knows (see `use_offline`); digest = gives the hash of
        the weights, if it comes to that; stream = where its forward runs.
        """
        self._live = teacher
        self._offline: OfflineStore | None = None
        self._offline_head: Head | None = None
        self._digest, self._stream = digest, stream
        self._store: TeacherStore | None = None
        self.kept: dict[str, float] | None = None
        """How many rows' logits are kept, how many of them this run computed, and in how many seconds."""

    @property
    def _teacher(self) -> Any:
        """Anything with a model's face: which of them it is decides which questions make sense."""
        if self._live is None:
            raise ModelError(
                "teacher.model is missing: teacher.offline answers for the clean training rows alone, and what it has "
                "kept of them; add teacher.model"
            )
        return self._live

    @property
    def has_model(self) -> bool:
        """Whether there is a model that can be asked, and not an offline store alone."""
        return self._live is not None

    def use_offline(self, store: OfflineStore, device: torch.device) -> None:
        """From now on `attach` puts a store's answers into training batches, and `distribution` gives those."""
        self._offline = store
        self._offline_head = store.head(device) if store.origin.kind == "hidden" else None

    @property
    def offline(self) -> OfflineStore | None:
        """The store that answers for training rows."""
        return self._offline

    def distribution(self, batch: Batch, mixing: Mixing | None, temperature: float) -> Tensor | TopK:
        """What a loss over tokens compares with: hidden states for the head of `head_of`, or a `TopK`.

        Of batches that came with an offline store's answers those, else what the model computes.
        """
        if mixing is None and batch.teacher_hidden is not None:
            return batch.teacher_hidden
        if mixing is None and batch.teacher_indices is not None:
            assert batch.teacher_logprobs is not None and self._offline is not None
            kept = self._offline.origin.temperature
            if kept != temperature:
                raise ModelError(
                    f"teacher.offline holds log-probabilities at temperature {kept}, and {temperature} is asked for"
                )
            return TopK(batch.teacher_indices, batch.teacher_logprobs)
        return self.hidden(batch, mixing)

    @contextmanager
    def head_of(self, answers: Tensor | TopK, batch: Batch) -> Iterator[Head | None]:
        """The head that belongs to what `distribution` gave, whole; None for a `TopK`. Collective if partitioned."""
        if isinstance(answers, TopK):
            yield None
        elif answers is batch.teacher_hidden:
            yield self._offline_head
        else:
            with self.gathered_head():
                yield self.head()

    @property
    def model(self) -> nn.Module:
        """The transformers model."""
        model: nn.Module = self._teacher.model
        return model

    def clean(self, batch: Batch, **options: Any) -> Any:
        """The plain forward of the batch's clean rows, or the logits that came with it; see `Encoder.clean`."""
        if batch.teacher_logits is not None and not options:
            return Logits(batch.teacher_logits)
        return self._run("clean", batch, **options)

    def mixed(self, batch: Batch, mixing: Mixing, **options: Any) -> Any:
        """The forward of the batch's mixed rows; see `Encoder.mixed`."""
        return self._run("mixed", batch, mixing, **options)

    def both(self, batch: Batch, mixing: Mixing, **options: Any) -> tuple[Any, Any]:
        """Clean and mixed rows; see `Encoder.both`."""
        if batch.teacher_logits is not None and not options:
            return Logits(batch.teacher_logits), self.mixed(batch, mixing)
        clean, mixed = self._run("both", batch, mixing, **options)
        return clean, mixed

    def read(self, batch: Batch, mixing: Mixing | None = None, **options: Any) -> Any:
        """A forward with every layer's hidden states and some layers' projections; see `Encoder.read`."""
        with self._alone(batch):
            return self._teacher.read(batch, mixing, **options)

    def sampled(self, batch: Batch, passes: int, mixing: Mixing | None = None) -> Tensor:
        """Logits [passes, B, C] of the clean rows with the teacher's dropout at work (Monte-Carlo dropout).

        With mixing those of the mixed rows: [passes, M, C].
        """
        if self.num_dropouts == 0:
            raise ModelError("teacher: has no dropout, so all its passes would be the same; use a teacher with dropout")
        model = self.model
        model.train()
        try:
            with self._alone(batch):
                outputs = [
                    self._teacher.clean(batch) if mixing is None else self._teacher.mixed(batch, mixing)
                    for _ in range(passes)
                ]
                return torch.stack([output.logits.float() for output in outputs])
        finally:
            model.eval()

    def hidden(self, batch: Batch, mixing: Mixing | None = None) -> Tensor:
        """A language model's last hidden states [B, L, H], or [M, L, H] of mixed rows; see `CausalLM.hidden`."""
        with self._alone(batch):
            hidden: Tensor = self._teacher.hidden(batch, mixing)
            return hidden

    def head(self) -> Head:
        """A language model's output layer; of a partitioned one inside `gathered_head` only."""
        head: Head = self._teacher.head()
        return head

    @contextmanager
    def gathered_head(self) -> Iterator[None]:
        """Here `head` is whole on every rank. Collective if the teacher is partitioned."""
        with self._teacher.gathered_head():
            yield

    def answers(self, batch: Batch) -> Tensor:
        """A language model's figures per row [B, 3]; see `CausalLM.answers`."""
        with self._alone(batch):
            answers: Tensor = self._teacher.answers(batch)
            return answers

    def generate(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        options: Sampling,
        seed: int,
        eos_ids: Tensor,
        pad_id: int,
        num_tokens: int | None = None,
    ) -> Tensor:
        """A language model's continuations [R, T]; see `CausalLM.generate`. Collective if partitioned."""
        with torch.no_grad(), torch.autocast(prompt_ids.device.type, enabled=False):
            generated: Tensor = self._teacher.generate(
                prompt_ids, prompt_mask, options, seed, eos_ids, pad_id, num_tokens
            )
            return generated

    def next_logits(self, new_ids: Tensor, mask: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        """A language model's logits of the next token, and its cache; see `CausalLM.next_logits`. Collective if
        partitioned."""
        with torch.no_grad(), torch.autocast(new_ids.device.type, enabled=False):
            logits, cache = self._teacher.next_logits(new_ids, mask, cache)
            return logits, cache

    @property
    def num_dropouts(self) -> int:
        """Layers whose dropout is not 0, also where it is a number beside the module that attends."""
        rates = [m.p for m in self.model.modules() if isinstance(m, nn.Dropout)]
        return sum(rate > 0 for rate in rates)

    def embedded(self, batch: Batch, word_embeddings: Tensor, **options: Any) -> Any:
        """The forward with other word embeddings, to which gradients go; see `Encoder.embedded`. Whole teachers only.

        Raises: ModelError if the teacher is partitioned.
        """
        teacher = self._whole
        with record_function("mixkd_fast::teacher"), torch.autocast(batch.input_ids.device.type, enabled=False):
            dtype = next(self.model.parameters()).dtype
            return teacher.embedded(batch, word_embeddings.to(dtype), **options)

    @property
    def word_table(self) -> nn.Module:
        """The module whose rows are the word embeddings. Raises: ModelError if the teacher is partitioned."""
        return self._whole.word_table

    @property
    def _whole(self) -> Encoder:
        if isinstance(self._teacher, ShardedTeacher):
            raise ModelError("teacher.zero_stage = 3: gradients do not pass through a partitioned teacher; allowed: 0")
        assert isinstance(self._teacher, Encoder)
        return self._teacher

    def attach(self, batch: Batch) -> None:
        """Put the kept logits of a training batch's clean rows beside them, on the CPU, if they are kept.

        Likewise what an offline store has. Raises: DataError if that is damaged.
        """
        if self._offline is not None:
            self._offline.attach(batch)
        if self._store is not None:
            logits = self._store.read(batch.row_ids[: batch.num_rows].numpy())
            if logits is not None:
                batch.teacher_logits = torch.from_numpy(logits)
            elif isinstance(self._live, ShardedTeacher):
                # The other ranks would not take part in its forward.
                raise MixKDError("teacher.store: kept logits have become unreadable; run again with --resume")

    def keep_logits(
        self, config: Config, rows: TokenRows, plan: EvaluationPlan, num_classes: int, progress: bool = True
    ) -> None:
        """Compute and keep the logits of all training rows that are not kept yet; `attach` gives them out. Collective.

        Whatever keeps them from being kept costs one line, and the teacher then runs in every epoch.
        """
        section = config.teacher
        assert section is not None
        limit, needed = section.store_mib << 20, len(rows) * (4 * num_classes + 4)
        if needed > limit:
            distributed.say(
                f"teacher.store_mib = {section.store_mib}: the logits of {len(rows):,} rows would take "
                f"{needed >> 20:,} MiB, so the teacher runs in every epoch"
            )
            return
        folder = Path(section.store_dir) if section.store_dir else _cache_dir(config) / "teacher_logits"
        started = time.perf_counter()
        key = self._key(config, rows, plan)
        store = TeacherStore.open(folder, key, len(rows), num_classes, limit)
        if store is None:
            return
        missing = self._fill(store, rows, plan, progress)
        # The disk may have lost rows, or another program removed them, since they were written.
        if _missing(store).size:
            distributed.say(f"The teacher's logits cannot be kept in {folder}: the teacher runs in every epoch")
            store.close()
            return
        how = f"{missing:,} of them computed now" if missing else "all of them kept already"
        distributed.say(f"teacher's logits of {len(rows):,} training rows: {how}; {folder / key}")
        self._store = store
        self.kept = {"rows": len(rows), "computed": missing, "seconds": time.perf_counter() - started}

    def _key(self, config: Config, rows: TokenRows, plan: EvaluationPlan) -> str:
        """What the logits depend on: weights, rows, and how they are computed."""
        section, training = config.teacher, config.training
        assert section is not None
        how = (section.precision or training.precision, section.quantization, training.fused_encoder)
        # On which side padding is decides which token a model without a mask of its own answers from.
        facts = (self._digest(), rows.content_hash, *how, section.attention, plan.padding.side)
        return hashlib.sha256(repr((_FORMAT, *facts)).encode()).hexdigest()

    def _fill(self, store: TeacherStore, rows: TokenRows, plan: EvaluationPlan, progress: bool) -> int:
        """Write the rows that are missing on any machine. Returns how many those were."""
        missing = _missing(store)
        rank, ranks = distributed.rank(), distributed.world_size()
        bar = Progress(-(-len(missing) // (plan.batch_size * ranks)), 0, progress and len(missing) > 0, "batch")
        for batch in (
            EvaluationBatches(rows, plan.batch_size, rank, ranks, plan.padding, missing) if len(missing) else ()
        ):
            logits = self._run("clean", batch.to(plan.device)).logits.float().cpu().numpy()
            valid = batch.valid.numpy()
            store.write(batch.row_ids.numpy()[valid], logits[valid])
            bar.advance()
        bar.close()
        store.share()
        distributed.barrier()  # ranks of one machine see each other's rows, once they are written
        return len(missing)

    @contextmanager
    def _alone(self, batch: Batch) -> Iterator[None]:
        """Without gradients and in the teacher's own precision."""
        device = batch.input_ids.device.type
        # Its own precision, also where the student around it runs under autocast.
        with record_function("mixkd_fast::teacher"), torch.no_grad(), torch.autocast(device, enabled=False):
            yield

    def _run(self, name: str, batch: Batch, *arguments: Any, **options: Any) -> Any:
        forward = getattr(self._teacher, name)
        with self._alone(batch):
            if options or isinstance(self._live, ShardedTeacher):
                return forward(batch, *arguments, **options)
            if self._stream is None:
                return _logits_of(forward, batch, arguments)
            # The batch is copied on the student's stream; what is made here is waited for where it is read.
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                outputs = _logits_of(forward, batch, arguments)
                done = self._stream.record_event()
        if isinstance(outputs, tuple):
            return tuple(PendingLogits(output.logits, done) for output in outputs)
        return PendingLogits(outputs.logits, done)


class PendingLogits:
    """Logits that another stream is still making: whoever reads them makes its stream wait, not the host."""

    def __init__(self, logits: Tensor, done: torch.cuda.Event) -> None:
        self._logits, self._done = logits, done

    @property
    def logits(self) -> Tensor:
        """[rows, C]"""
        stream = torch.cuda.current_stream()
        stream.wait_event(self._done)
        self._logits.record_stream(stream)
        return self._logits


def _logits_of(forward: Callable[..., Any], batch: Batch, arguments: tuple[Any, ...]) -> Any:
    with torch.inference_mode():
        outputs = forward(batch, *arguments)
    # Copies, outside: what is made in inference mode may take no part in a loss.
    if isinstance(outputs, tuple):
        return tuple(Logits(output.logits.clone()) for output in outputs)
    return Logits(outputs.logits.clone())


def _missing(store: TeacherStore) -> NDArray[np.int64]:
    """Row numbers that any rank lacks; the same on every rank."""
    lacking = torch.from_numpy((~store.filled()).astype(np.uint8))
    return np.flatnonzero(distributed.maximum_over_ranks(lacking).numpy())


def _cache_dir(config: Config) -> Path:
    return Path(config.task.cache_dir) if config.task.cache_dir else default_cache_dir()
