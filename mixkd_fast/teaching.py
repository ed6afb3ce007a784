"""One pass of a teacher over the training rows of a configuration, into a store on disk.

Legend of shape suffixes: B rows of a batch, L positions, P targets, H width.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from mixkd_fast import distributed
from mixkd_fast.configuration import BatchArithmetic, Config, Teacher
from mixkd_fast.console import Progress
from mixkd_fast.data.batching import Batch, EvaluationBatches, Padding
from mixkd_fast.data.documents import corpus_hash, tokenize_documents
from mixkd_fast.data.language_tokens import tokenize_language_rows
from mixkd_fast.data.loading import load_splits
from mixkd_fast.data.next_tokens import IGNORED
from mixkd_fast.data.prompts import PromptStyle
from mixkd_fast.data.tokenization import TokenRows, default_cache_dir, fingerprint
from mixkd_fast.engine import start_distributed
from mixkd_fast.errors import ConfigurationError, MixKDError, ModelError
from mixkd_fast.frozen_teacher import FrozenTeacher
from mixkd_fast.language_preparation import load_language_teacher
from mixkd_fast.language_task import vocabulary_size
from mixkd_fast.model_checks import largest_layer_numel
from mixkd_fast.model_preparation import Loaded
from mixkd_fast.models import load_tokenizer, teacher_source
from mixkd_fast.offline.manifest import Origin, StoreDtype, StoreKind
from mixkd_fast.offline.reading import OfflineStore
from mixkd_fast.offline.records import (
    bytes_per_token,
    hidden_records,
    shard_cuts,
    token_nll,
    top_k_records,
)
from mixkd_fast.offline.writing import StoreWriter
from mixkd_fast.offline_preparation import teacher_hash
from mixkd_fast.preparation import first_on_rank_zero, load_shared_tokenizer
from mixkd_fast.teacher import require_memory_for_layer
from mixkd_fast.watching import watched_ranks

_DTYPES: dict[StoreKind, tuple[StoreDtype, ...]] = {
    "top_k": ("fp16", "fp32"),
    "hidden": ("bf16", "fp16", "fp32"),
    "nll": ("fp32",),
}


@dataclass(frozen=True)
class TeachOptions:
    """What is kept, and how."""

    kind: StoreKind
    folder: Path
    k: int = 64
    temperature: float = 1.0
    dtype: StoreDtype | None = None
    """None: fp16 log-probabilities, bf16 hidden states."""
    shard_mib: float = 256.0


@dataclass(frozen=True)
class Taught:
    """What came of it."""

    store: OfflineStore
    num_written: int
    """Targets that this call computed; the rest was there."""
    seconds: float

    def describe(self) -> str:
        """A few lines for people."""
        origin, size = self.store.origin, self.store.num_bytes
        per_token = self.store.record_bytes / origin.num_tokens
        speed = f"{self.num_written / self.seconds:,.0f} tokens/s" if self.num_written else "nothing was missing"
        return (
            f"{origin.kind} of {origin.num_rows:,} rows, {origin.num_tokens:,} tokens: {origin.num_shards} shards, "
            f"{size / 2**20:,.1f} MiB, {per_token:,.1f} bytes a token\n"
            f"written: {self.num_written:,} tokens, {speed}; {self.store.folder}"
        )


def teach(config: Config, options: TeachOptions, progress: bool = True) -> Taught:
    """Write the store of a configuration's training rows, or what is missing of it. Collective.

    Raises: ConfigurationError, DataError, ModelError for what does not fit; MixKDError if the disk refuses.
    """
    section, dtype = _checked(config, options)
    device = distributed.choose_device()
    start_distributed(device)
    distributed.share_cores(config.training.threads)
    with watched_ranks(config.training.rank_timeout_s, "run the same command again; finished shards stay"):
        return _teach(config, options, section, dtype, device, progress)


def _teach(
    config: Config, options: TeachOptions, section: Teacher, dtype: StoreDtype, device: torch.device, progress: bool
) -> Taught:
    tokenizer = _tokenizer(config, section, options.kind)
    train = load_splits(config.task).train
    rows = first_on_rank_zero(lambda: _rows(config, train, tokenizer, options.kind))
    if not rows.num_targets.all():
        raise ConfigurationError(
            "task: some training rows have no token to predict; kind top_k, hidden and nll need one"
        )
    teacher = _load(config, section, tokenizer, device)
    with teacher.gathered_head():
        head = teacher.head()
        num_classes, width = head.weight.shape
    candidates = min(num_classes, vocabulary_size(tokenizer))
    if options.kind == "top_k" and options.k > candidates:
        raise ConfigurationError(f"--k is {options.k}; allowed: 1..{candidates}, the tokenizer's vocabulary")
    k, keeps_width = (options.k if options.kind == "top_k" else None), options.kind == "hidden"
    origin = Origin(
        kind=options.kind,
        dtype=dtype,
        teacher=str(section.model),
        teacher_hash=teacher_hash(teacher_source(section, "causal_lm")),
        precision=section.precision or config.training.precision,
        tokenizer_hash=fingerprint(tokenizer),
        corpus_hash=corpus_hash(train),
        rows_hash=rows.content_hash,
        max_length=rows.max_length,
        num_rows=len(rows),
        num_tokens=int(rows.num_targets.sum()),
        num_classes=num_classes,
        shard_rows=shard_cuts(
            rows.num_targets, bytes_per_token(options.kind, dtype, k, width), options.shard_mib * 2**20
        ),
        k=k,
        temperature=options.temperature if k else None,
        width=width if keeps_width else None,
        softcap=head.softcap if keeps_width else None,
        scale=head.scale if keeps_width else 1.0,
    )
    if rows.num_truncated or rows.num_dropped:
        distributed.say(
            f"{rows.num_truncated:,} rows are cut at {rows.max_length} tokens, {rows.num_dropped:,} are left out"
        )
    padding = replace(Padding.of(tokenizer), side="right")
    work = _Pass(config, rows, padding, teacher, origin, candidates, device)
    written, seconds = work.write(StoreWriter(options.folder, origin), progress)
    return Taught(OfflineStore(options.folder, "--output"), written, seconds)


def _checked(config: Config, options: TeachOptions) -> tuple[Teacher, StoreDtype]:
    """The teacher's section and the dtype of what is kept. Raises: ConfigurationError."""
    if config.task.kind != "causal_lm":
        raise ConfigurationError(f'task.kind is "{config.task.kind}"; a teacher store is for "causal_lm"')
    if config.teacher is None or config.teacher.model is None:
        raise ConfigurationError(
            "teacher.model is missing: it is what fills the store; name it in the file or by --model"
        )
    allowed = _DTYPES[options.kind]
    dtype = options.dtype or allowed[0]
    if dtype not in allowed:
        raise ConfigurationError(f'--dtype is "{dtype}"; allowed for {options.kind}: {", ".join(allowed)}')
    for name, value in (("--temperature", options.temperature), ("--k", options.k), ("--shard-mib", options.shard_mib)):
        if not 0 < value < float("inf"):
            raise ConfigurationError(f"{name} is {value}; allowed: above 0")
    if config.training.precision == "fp16" and not torch.cuda.is_available():
        raise ConfigurationError('training.precision = "fp16" needs a GPU; on the CPU use "fp32" or "bf16"')
    return config.teacher, dtype


def _tokenizer(config: Config, section: Teacher, kind: StoreKind) -> Any:
    """The run's own; for scores of texts, which a student of any tokenizer may use, the teacher's."""
    if kind != "nll":
        return load_shared_tokenizer(config, Loaded())
    assert section.model is not None
    return load_tokenizer(section.model, section.revision, section.trust_remote_code, "teacher.model", "causal_lm")


def _rows(config: Config, train: Dataset, tokenizer: Any, kind: StoreKind) -> TokenRows:
    cache_dir = Path(config.task.cache_dir) if config.task.cache_dir else default_cache_dir()
    tokenize = tokenize_documents if kind == "nll" else tokenize_language_rows
    return tokenize(train, tokenizer, config.task.max_length, cache_dir, PromptStyle.of(config.task))


def _load(config: Config, section: Teacher, tokenizer: Any, device: torch.device) -> FrozenTeacher:
    batch, ranks = config.training.evaluation_batch_size, distributed.world_size()
    if section.zero_stage == 3:
        largest = largest_layer_numel(teacher_source(section, "causal_lm").skeleton())
        precision = section.precision or config.training.precision
        require_memory_for_layer("teacher.zero_stage", largest, precision, device)
    config = config.model_copy(update={"teacher": section})
    return load_language_teacher(config, Loaded(), tokenizer, BatchArithmetic(batch * ranks, batch, 1, ranks), device)


class _Pass:
    """The teacher's pass over the rows: shards are dealt out to the ranks in turn, each is computed by one rank."""

    def __init__(
        self,
        config: Config,
        rows: TokenRows,
        padding: Padding,
        teacher: FrozenTeacher,
        origin: Origin,
        candidates: int,
        device: torch.device,
    ) -> None:
        assert config.teacher is not None
        self.batch_size, self.rows, self.padding = config.training.evaluation_batch_size, rows, padding
        self.teacher, self.origin, self.candidates, self.device = teacher, origin, candidates, device
        # The other ranks take part in every forward of a partitioned teacher.
        self.together = config.teacher.zero_stage == 3 and distributed.world_size() > 1

    def write(self, writer: StoreWriter, progress: bool) -> tuple[int, float]:
        """Make the missing shards. Returns how many targets those hold, and in how many seconds."""
        pending = writer.begin()
        rank, ranks = distributed.rank(), distributed.world_size()
        started, written = time.perf_counter(), 0
        bar = Progress(len(pending), 0, progress and len(pending) > 0, "shard")
        for first in range(0, len(pending), ranks):
            here = pending[first : first + ranks]
            error: Exception | None = None
            number = here[rank] if rank < len(here) else None
            try:
                self._make(writer, number)
            except (OSError, MixKDError) as caught:
                error = caught
            writer.agree(error)
            for done in here:
                written += int(self.rows.num_targets[self._span(done)].sum())
                bar.advance()
        bar.close()
        writer.finish(self._head() if self.origin.kind == "hidden" else None)
        return written, time.perf_counter() - started

    def _span(self, number: int) -> slice:
        return slice(self.origin.shard_rows[number], self.origin.shard_rows[number + 1])

    def _make(self, writer: StoreWriter, number: int | None) -> None:
        """Compute and write one shard; None only helps the other ranks."""
        chosen = np.arange(0) if number is None else np.arange(len(self.rows))[self._span(number)]
        batches: Any = ()
        if len(chosen):
            batches = EvaluationBatches(self.rows, self.batch_size, 0, 1, self.padding, chosen)
        records: dict[str, Tensor] = {}
        offsets = np.concatenate([[0], np.cumsum(self.rows.num_targets[chosen])]).astype(np.int64)
        error: MixKDError | None = None
        for batch in self._in_step(batches):
            is_own = int(batch.row_ids[0]) >= 0
            try:
                found = self._records(batch)
            except MixKDError as caught:
                if not self.together:
                    raise
                # The other ranks' forwards need this one's share of the teacher to the end.
                error = error or (caught if is_own else None)
                continue
            for name, values in self._by_row(found, batch) if is_own else ():
                _place(records, name, values, batch, chosen, offsets, self.origin.kind)
        if error is not None:
            raise error
        if number is not None:
            writer.write(number, offsets, records | self._row_facts(chosen))

    def _in_step(self, batches: Any) -> Iterator[Batch]:
        """The batches, and idle ones (row -1) until every rank has had as many."""
        # Asked before the first forward: in between, another rank may be in a collective of its own forward.
        most = max(distributed.gather_objects(len(batches))) if self.together else len(batches)
        yield from batches
        for _ in range(most - len(batches)):
            idle = next(iter(EvaluationBatches(self.rows, 1, 0, 1, self.padding, np.zeros(1, dtype=np.int64))))
            idle.row_ids.fill_(-1)
            yield idle

    def _records(self, batch: Batch) -> dict[str, Tensor]:
        """What is kept of the batch's targets, in their order, on the CPU."""
        batch = batch.to(self.device)
        targets_BL = batch.labels != IGNORED
        hidden_PH = self.teacher.hidden(batch)[targets_BL]
        origin = self.origin
        with torch.no_grad(), self.teacher.gathered_head():
            head = self.teacher.head()
            if origin.kind == "hidden":
                found = hidden_records(hidden_PH, origin.dtype)
            elif origin.kind == "nll":
                found = {"nll": token_nll(hidden_PH, head, batch.labels[targets_BL])}
            else:
                assert origin.k is not None and origin.temperature is not None
                found = top_k_records(hidden_PH, head, origin.k, self.candidates, origin.temperature, origin.dtype)
        found = {name: values.cpu() for name, values in found.items()}
        for name in ("nll", "log_mass", "logprobs"):
            if name in found and not bool(torch.isfinite(found[name]).all()):
                raise ModelError(
                    f"teacher.model = {origin.teacher!r} gives {name} that are not finite in {origin.dtype} for one of "
                    f"the rows {batch.row_ids.tolist()[:8]}"
                )
        return found

    def _by_row(self, found: dict[str, Tensor], batch: Batch) -> Iterator[tuple[str, list[Tensor]]]:
        counts = self.rows.num_targets[batch.row_ids.numpy()].tolist()
        for name, values in found.items():
            yield name, list(values.split(counts))

    def _row_facts(self, chosen: Any) -> dict[str, Tensor]:
        """Beside the sums of kind "nll": how many targets they are of, and which texts."""
        if self.origin.kind != "nll":
            return {}
        facts = {"tokens": self.rows.num_targets[chosen], "source_rows": self.rows.source_rows[chosen]}
        return {name: torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64)) for name, values in facts.items()}

    def _head(self) -> dict[str, Tensor] | None:
        """The teacher's output layer, on rank 0."""
        with self.teacher.gathered_head():
            head = self.teacher.head()
            if distributed.rank() != 0:
                return None
            tensors = {"weight": head.weight} | ({} if head.bias is None else {"bias": head.bias})
            return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def _place(
    records: dict[str, Tensor], name: str, values: list[Tensor], batch: Batch, chosen: Any, offsets: Any, kind: str
) -> None:
    """Copy each row's values to where they belong in the shard, whose tensors are made when the first ones come."""
    if name not in records:
        size = len(chosen) if kind == "nll" else int(offsets[-1])
        records[name] = torch.empty(size, *values[0].shape[1:], dtype=values[0].dtype)
    for row_id, of_row in zip(batch.row_ids.tolist(), values, strict=True):
        local = row_id - int(chosen[0])
        if kind == "nll":
            records[name][local] = of_row.sum()
        else:
            records[name][int(offsets[local]) : int(offsets[local + 1])] = of_row
