"""From a configuration to the parts of a run: tokenizer, rows, teacher, student, DeepSpeed's configuration."""

import json
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from datasets import Dataset

from mixkd_fast import distributed
from mixkd_fast.causal_lm import CausalLM
from mixkd_fast.configuration import BatchArithmetic, Config, batch_arithmetic
from mixkd_fast.console import human_count, print_summary
from mixkd_fast.data.batching import Padding
from mixkd_fast.data.extra_rows import ExtraRows
from mixkd_fast.data.language_tokens import tokenize_language_rows
from mixkd_fast.data.loading import Splits, load_evaluation, load_splits
from mixkd_fast.data.prompts import PromptStyle
from mixkd_fast.data.stream_loading import check_streaming, open_stream
from mixkd_fast.data.streaming import StreamedRows
from mixkd_fast.data.tasks import TaskSpec
from mixkd_fast.data.tokenization import TokenRows, default_cache_dir, tokenize_rows
from mixkd_fast.deepspeed_config import student_deepspeed_config
from mixkd_fast.engine import Engine
from mixkd_fast.errors import ConfigurationError, DataError, MixKDError
from mixkd_fast.extra_labelling import with_chosen_extra_rows
from mixkd_fast.facts import device_name, used_backends
from mixkd_fast.frozen_teacher import FrozenTeacher
from mixkd_fast.language_preparation import load_language_student, load_language_teacher, references_of
from mixkd_fast.model_checks import largest_layer_numel
from mixkd_fast.model_preparation import Loaded, checkpoint_activations, load_student, load_teacher
from mixkd_fast.models import (
    Encoder,
    check_same_tokenizer,
    count_parameters,
    describe_model,
    load_tokenizer,
    teacher_source,
)
from mixkd_fast.offline_preparation import open_offline, with_chosen_rows
from mixkd_fast.pretrained import Purpose, with_padding
from mixkd_fast.teacher import require_memory_for_layer

T = TypeVar("T")


@dataclass(frozen=True)
class Prepared:
    """Everything the loop needs."""

    spec: TaskSpec
    tokenizer: Any
    padding: Padding
    train: TokenRows | StreamedRows
    evaluation: dict[str, TokenRows]
    num_extra_rows: int
    extra_rows: ExtraRows | None
    teacher: FrozenTeacher | None
    student: Encoder | CausalLM
    num_student_parameters: int
    notes: list[str]
    deepspeed_config: dict[str, Any]
    rows_hash: str
    """Of the training rows, by which a resumed run knows them; "" where they may differ a little."""
    chosen_rows: dict[str, int] | None
    """Of a method that chooses its training rows: how many of how many."""
    references: dict[str, list[str]]
    """The responses of the first rows of every evaluation split of instructions, for answers to be compared with."""

    def data_summary(self) -> dict[str, Any]:
        """What reports say about the rows."""
        return {
            "train_rows": len(self.train),
            "extra_rows": self.num_extra_rows,
            **(self.extra_rows.facts() if self.extra_rows is not None else {}),
            "evaluation_rows": {split: len(rows) for split, rows in self.evaluation.items()},
            "max_length": self.train.max_length,
            "mean_length": self.train.mean_length,
            "truncated_rows": self.train.num_truncated,
            **(self.chosen_rows or {}),
            **({"dropped_rows": self.train.num_dropped} if self.train.num_dropped else {}),
            "content_hash": self.train.content_hash,
        }


def prepare(config: Config, loaded: Loaded, device: torch.device) -> Prepared:
    """Load and check everything. Collective.

    Raises: ConfigurationError, DataError or ModelError for what does not exist or does not fit together.
    """
    training, teacher_section = config.training, config.teacher
    if config.method.needs_teacher and teacher_section is None:
        raise ConfigurationError(
            f'teacher is missing: method "{config.method.name}" imitates one; add a teacher section, '
            'or use method "finetune"'
        )
    arithmetic = batch_arithmetic(training, distributed.world_size())
    deepspeed_config = student_deepspeed_config(config, arithmetic)
    if training.precision == "fp16" and device.type == "cpu":
        raise ConfigurationError('training.precision = "fp16" needs a GPU; on the CPU use "fp32" or "bf16"')
    tokenizer = load_shared_tokenizer(config, loaded)
    splits = _splits(config, loaded)
    spec = splits.spec
    config.method.check_kind(spec.kind)
    splits, chosen = with_chosen_rows(config.method, splits)
    cache_dir = Path(config.task.cache_dir) if config.task.cache_dir else default_cache_dir()

    def tokenise(rows: Dataset) -> TokenRows:
        if spec.kind == "causal_lm":
            style = PromptStyle.of(config.task)
            return first_on_rank_zero(
                lambda: tokenize_language_rows(rows, tokenizer, config.task.max_length, cache_dir, style)
            )
        return first_on_rank_zero(lambda: tokenize_rows(rows, tokenizer, config.task.max_length, cache_dir))

    evaluation = {split: tokenise(rows) for split, rows in splits.evaluation.items()}
    language = spec.kind == "causal_lm"
    if teacher_section is not None and teacher_section.zero_stage == 3 and loaded.teacher is None:
        largest = largest_layer_numel(teacher_source(teacher_section, _purpose(config)).skeleton())
        require_memory_for_layer("teacher.zero_stage", largest, teacher_section.precision or training.precision, device)
    # The student first: it may copy layers of a loaded teacher, which ZeRO-3 then partitions.
    student: Encoder | CausalLM
    if language:
        student, notes = load_language_student(config, loaded, tokenizer, deepspeed_config)
    else:
        student, notes = load_student(config, loaded, spec, tokenizer, deepspeed_config, device)
    teacher = None
    if teacher_section is not None:
        if language:
            teacher = load_language_teacher(config, loaded, tokenizer, arithmetic, device)
        else:
            teacher = load_teacher(config, loaded, spec, tokenizer, arithmetic, device)
    padding = Padding.of(tokenizer)
    if language:
        # Then no position sees padding, whichever side the tokenizer pads on for generation.
        padding = replace(padding, side="right")
    splits, extra_rows = with_chosen_extra_rows(config, splits, teacher, tokenise, padding, device)
    train: Any  # rows, or a stream of them
    train = _stream(config, spec, tokenizer, arithmetic, cache_dir) if config.task.streaming else tokenise(splits.train)
    # What a teacher said of extra rows may differ in the last bits between machines.
    rows_hash = "" if config.task.asks_teacher_about_extra_rows else train.content_hash
    _require_same_rows(rows_hash)
    if teacher is not None and teacher_section is not None and teacher_section.offline is not None:
        store = open_offline(config, loaded, train, splits.train, tokenizer)
        teacher.use_offline(store, device)
    num_parameters = count_parameters(student.model)
    checkpoint_activations(student, training)
    if deepspeed_config.get("zero_optimization", {}).get("stage", 0) == 3:
        require_memory_for_layer(
            "deepspeed.zero_optimization.stage", largest_layer_numel(student.model), training.precision, device
        )
    return Prepared(
        spec=spec,
        tokenizer=tokenizer,
        padding=padding,
        train=train,
        evaluation=evaluation,
        num_extra_rows=splits.num_extra_rows,
        extra_rows=extra_rows,
        teacher=teacher,
        student=student,
        num_student_parameters=num_parameters,
        notes=notes,
        deepspeed_config=deepspeed_config,
        rows_hash=rows_hash,
        chosen_rows=chosen,
        references=references_of(config.task, splits.evaluation, evaluation) if language else {},
    )


def _purpose(config: Config) -> Purpose:
    return "causal_lm" if config.task.kind == "causal_lm" else "classification"


def _splits(config: Config, loaded: Loaded) -> Splits:
    """The rows of the task; none to train on if they are streamed."""
    if not config.task.streaming:
        return load_splits(config.task, loaded.train, loaded.evaluation)
    check_streaming(config, loaded.train is not None)
    spec, evaluation = load_evaluation(config.task, loaded.evaluation)
    return Splits(spec, Dataset.from_dict({}), evaluation, 0)


def _stream(
    config: Config, spec: TaskSpec, tokenizer: Any, arithmetic: BatchArithmetic, cache_dir: Path
) -> StreamedRows:
    """The streamed rows; rank 0 leaves the index of the files for the others."""
    return first_on_rank_zero(lambda: open_stream(config, spec, tokenizer, arithmetic.micro_batch_size, cache_dir))


def _require_same_rows(content_hash: str) -> None:
    """Raise DataError where the ranks have different training rows. Collective."""
    found = distributed.gather_objects((content_hash, socket.gethostname()))
    other = next((number for number, (its_hash, _) in enumerate(found) if its_hash != found[0][0]), None)
    if other is not None:
        raise DataError(
            f"the task's training rows on {found[other][1]} (rank {other}) are not those on {found[0][1]} (rank 0); "
            "give every machine the same files"
        )


def first_on_rank_zero(work: Callable[[], T]) -> T:
    """Let rank 0 do cacheable work first; the others then find it done. An error of rank 0 is everybody's."""
    result, error = None, None
    if distributed.rank() == 0:
        try:
            result = work()
        except (MixKDError, OSError) as caught:
            error = caught
    message = distributed.first_error(error)
    if error is not None:
        raise error
    if message is not None:
        raise MixKDError(f"rank 0 failed: {message}")
    return work() if result is None else result


def load_shared_tokenizer(config: Config, loaded: Loaded) -> Any:
    """The tokenizer both models share."""
    section, teacher = config.student, config.teacher
    purpose = _purpose(config)
    if loaded.tokenizer is not None:
        return with_padding(loaded.tokenizer) if purpose == "causal_lm" else loaded.tokenizer
    student_name, field = section.tokenizer, "student.tokenizer"
    if student_name is None:
        student_name, field = section.model, "student.model"
        if loaded.student is not None:
            student_name, field = _name_or_path(loaded.student, "student"), "student"
    teacher_name = teacher.model if teacher is not None else None
    if loaded.teacher is not None:
        teacher_name = _name_or_path(loaded.teacher, "teacher")
    if student_name is None and teacher_name is None:
        if config.task.name == "demo":
            from mixkd_fast.data.demo import train_demo_tokenizer

            return train_demo_tokenizer()
        raise ConfigurationError("student.tokenizer is missing: neither student.model nor a teacher brings a tokenizer")
    remote = section.trust_remote_code or (teacher is not None and teacher.trust_remote_code)
    student_tokenizer = None
    if student_name is not None:
        revision = section.revision if field == "student.model" else None
        student_tokenizer = load_tokenizer(student_name, revision, remote, field, purpose)
    if teacher_name is None:
        return student_tokenizer
    revision = teacher.revision if teacher is not None and loaded.teacher is None else None
    teacher_tokenizer = load_tokenizer(teacher_name, revision, remote, "teacher.model", purpose)
    if student_tokenizer is None:
        return teacher_tokenizer
    check_same_tokenizer(teacher_tokenizer, student_tokenizer)
    return student_tokenizer


def _name_or_path(model: torch.nn.Module, which: str) -> str:
    name = getattr(model, "name_or_path", "")
    if not name:
        raise ConfigurationError(
            f"tokenizer is missing: the loaded {which} does not know where it came from; pass tokenizer="
        )
    return str(name)


def print_start(config: Config, parts: Prepared, engine: Engine, arithmetic: BatchArithmetic, steps: int) -> None:
    """The start-up summary: models, parameters, data, batch arithmetic, ZeRO stages, backends and why."""
    training, data = config.training, parts.data_summary()
    outputs = f", {parts.spec.num_labels} outputs" if parts.spec.num_labels else ""
    facts = {"task": f"{parts.spec.name}, {parts.spec.kind}{outputs}"}
    if parts.teacher is not None and config.teacher is not None:
        facts["teacher"] = "not loaded"
        if parts.teacher.has_model:
            described = _describe(parts.teacher.model)
            facts["teacher"] = f"{config.teacher.model}: {described}; ZeRO {config.teacher.zero_stage}"
        if parts.teacher.offline is not None:
            facts["teacher"] += f"\n{'':<12}{parts.teacher.offline.describe()}"
    facts["student"] = f"{_describe(parts.student.model)}; ZeRO {engine.zero_stage}; {training.precision}"
    for note in parts.notes:
        facts["student"] += f"\n{'':<12}{note}"
    options = config.method.model_dump(exclude={"name"})
    facts["method"] = f"{config.method.name} {json.dumps(options)}" if options else config.method.name
    for option in config.method.without_effect:
        facts["method"] += f"\n{'':<12}without effect: {option}"
    rows = ", ".join(f"{split} {count:,}" for split, count in data["evaluation_rows"].items())
    truncated = f"; {data['truncated_rows']:,} rows cut at {data['max_length']}" if data["truncated_rows"] else ""
    for split, tokens in {"train": parts.train, **parts.evaluation}.items():
        if tokens.num_dropped:
            truncated += f"; {tokens.num_dropped:,} of {split} left out, whose prompts fill {data['max_length']}"
    facts["data"] = f"train {data['train_rows']:,}, {rows}; {data['mean_length']:.1f} tokens a row{truncated}"
    if parts.chosen_rows is not None:
        facts["data"] += (
            f"\n{'':<12}{parts.chosen_rows['chosen_rows']:,} of {parts.chosen_rows['scored_rows']:,} rows chosen"
        )
    if parts.extra_rows is not None:
        facts["data"] += f"\n{'':<12}{parts.extra_rows.describe()}"
    facts["batch"] = (
        f"{arithmetic.batch_size} rows = {arithmetic.micro_batch_size} a micro-batch x {arithmetic.accumulation} "
        f"accumulated x {arithmetic.ranks} ranks; {steps:,} steps"
    )
    facts["device"] = f"{device_name(engine.device)}, {distributed.world_size()} ranks"
    for op, selection in used_backends(engine.device, parts.spec.kind == "causal_lm").items():
        facts[op] = f"{selection['name']}: {selection['reason']}"
    facts["folder"] = config.output.directory
    print_summary("mixkd_fast", facts)


def _describe(model: torch.nn.Module) -> str:
    kind = describe_model(model)
    return (
        f"{kind['model_type']}, {kind['layers']} layers x {kind['hidden_size']}, "
        f"{human_count(count_parameters(model))} parameters"
    )
