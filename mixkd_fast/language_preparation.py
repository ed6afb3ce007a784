"""Teacher and student of a causal_lm run, loaded, checked and made ready."""

from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset

from mixkd_fast import distributed
from mixkd_fast.causal_lm import CausalLM, check_head
from mixkd_fast.configuration import BatchArithmetic, Config, Task, Teacher, Training
from mixkd_fast.data.tokenization import TokenRows
from mixkd_fast.deepspeed_config import autocasts
from mixkd_fast.errors import ConfigurationError, ModelError
from mixkd_fast.frozen_teacher import FrozenTeacher
from mixkd_fast.language_models import load_student_lm, load_teacher_lm
from mixkd_fast.model_preparation import Loaded, checkpoint_activations, in_precision
from mixkd_fast.models import (
    check_max_length,
    check_same_tokenizer,
    check_vocabulary,
    count_parameters,
    load_tokenizer,
    teacher_source,
)
from mixkd_fast.teacher import load_sharded_teacher, shard_loaded_teacher
from mixkd_fast.teacher_store import store_key


def load_language_teacher(
    config: Config, loaded: Loaded, tokenizer: Any, arithmetic: BatchArithmetic, device: torch.device
) -> FrozenTeacher:
    """The frozen teacher, whole or partitioned by ZeRO-3. Collective."""
    section = config.teacher
    assert section is not None
    if section.quantization is not None:
        raise ConfigurationError(
            f'teacher.quantization = "{section.quantization}" is for classifiers, and task.kind is "causal_lm"; '
            "leave it out"
        )
    if section.stream:
        distributed.say('teacher.stream has no effect: it is for classifiers, and task.kind is "causal_lm"')
    if section.model is None and loaded.teacher is None:
        return FrozenTeacher(None, _no_digest)
    precision = section.precision or config.training.precision
    if loaded.teacher is not None:
        lm = CausalLM(in_precision(loaded.teacher, precision).eval().requires_grad_(False))
        check_vocabulary(lm.model, tokenizer, "teacher")
        check_max_length(lm.config, config.task.max_length, "teacher")
        check_head(lm)
        if section.zero_stage == 3:
            return FrozenTeacher(shard_loaded_teacher(section, lm, precision, arithmetic.micro_batch_size), _no_digest)
        return FrozenTeacher(lm.to(device), lambda: store_key(lm.model, ""))
    source = teacher_source(section, "causal_lm")
    check_max_length(source.config, config.task.max_length, "teacher")
    if section.zero_stage == 3:
        check_vocabulary(source.skeleton(), tokenizer, "teacher")
        sharded = load_sharded_teacher(section, source, precision, arithmetic.micro_batch_size, device)
        sharded.check_head()
        return FrozenTeacher(sharded, _no_digest)
    lm = load_teacher_lm(section, precision)
    check_vocabulary(lm.model, tokenizer, "teacher")
    return FrozenTeacher(lm.to(device), lambda: store_key(lm.model, ""))


def _no_digest() -> str:
    raise ModelError("teacher: the hash of a partitioned or missing language model is not known")


def further_language_teacher(
    config: Config, tokenizer: Any, device: torch.device, name: str, field: str
) -> FrozenTeacher:
    """One more frozen causal language model with the run's tokenizer, whole on every rank."""
    section = (config.teacher or Teacher(model=name)).model_copy(
        update={"model": name, "revision": None, "zero_stage": 0, "offload": None, "quantization": None}
    )
    try:
        lm = load_teacher_lm(section, section.precision or config.training.precision)
        theirs = load_tokenizer(name, None, section.trust_remote_code, field, "causal_lm")
        check_same_tokenizer(theirs, tokenizer)
        check_vocabulary(lm.model, tokenizer, "teacher")
        check_max_length(lm.config, config.task.max_length, "teacher")
    except ModelError as error:
        raise ModelError(f"{field}: {error}") from error
    return FrozenTeacher(lm.to(device), lambda: store_key(lm.model, ""))


def load_language_student(
    config: Config, loaded: Loaded, tokenizer: Any, deepspeed_config: dict[str, Any]
) -> tuple[CausalLM, list[str]]:
    """The student on the CPU, in fp32 but for a loaded model that keeps its own precision, and notes."""
    training = config.training
    if loaded.student is not None:
        if autocasts(training, deepspeed_config):
            loaded.student.float()  # autocast trains fp32 weights
        student, notes = CausalLM(loaded.student), ["student: the loaded model, trained in place"]
        check_vocabulary(student.model, tokenizer, "student")
        check_head(student)
    else:
        teacher = loaded.teacher if loaded.teacher is not None else config.teacher
        student, notes = load_student_lm(config.student, teacher, tokenizer, training.seed)
    check_max_length(student.config, config.task.max_length, "student")
    if config.student.lora is not None:
        notes = [*notes, _with_adapters(student, config, loaded, deepspeed_config)]
    return student, [*notes, *_idle_options(training)]


def _with_adapters(student: CausalLM, config: Config, loaded: Loaded, deepspeed_config: dict[str, Any]) -> str:
    """Put adapters into the student; returns a note."""
    try:
        from mixkd_fast.adapters import add_adapters, base_of, count_trained
    except ModuleNotFoundError as error:
        raise ConfigurationError(f'student.lora needs "{error.name}": pip install "mixkd-fast[lora]"') from error

    section, lora = config.student, config.student.lora
    assert lora is not None
    origin = section if section.model else config.teacher
    name, revision = (None, None) if origin is None else (origin.model, origin.revision)
    if loaded.student is not None or (section.model is None and loaded.teacher is not None):
        name, revision = getattr(loaded.student or loaded.teacher, "name_or_path", None), None
    if not name and not lora.merge:
        raise ModelError(
            "student.lora saves adapters for a model that is somewhere, and the loaded model does not know where it "
            "came from; set student.lora.merge to true to save it whole"
        )
    # Frozen weights need no fp32 copy: autocast would multiply in bf16 anyway.
    frozen_dtype = torch.bfloat16 if autocasts(config.training, deepspeed_config) else None
    base = None if lora.merge or not name else base_of(name)
    add_adapters(student.model, lora, base, config.training.seed, frozen_dtype, revision)
    trained, whole = count_trained(student.model), count_parameters(student.model)
    return f"LoRA of rank {lora.r}: {trained:,} of {whole:,} parameters are trained"


def further_language_student(
    config: Config, loaded: Loaded, tokenizer: Any, deepspeed_config: dict[str, Any], seed: int
) -> CausalLM:
    """One more student as the configuration describes it, with new weights drawn from another seed."""
    if loaded.student is not None:
        raise ConfigurationError("student: several students need one that is described, not a loaded model")
    training = config.training.model_copy(update={"seed": seed})
    config = config.model_copy(update={"training": training})
    student = load_language_student(config, loaded, tokenizer, deepspeed_config)[0]
    checkpoint_activations(student, training)
    return student


def _idle_options(training: Training) -> list[str]:
    """Notes on options that mean nothing here. Raises: ConfigurationError for one that asks for something else."""
    if training.compile != "off":
        raise ConfigurationError(
            f'training.compile = "{training.compile}" compiles the fused layers of encoders, and task.kind is '
            '"causal_lm"; set training.compile to "off"'
        )
    if training.unpadded:
        return ["training.unpadded has no effect here: it is for the fused layers of encoders"]
    return []


def references_of(task: Task, splits: Mapping[str, Dataset], rows: Mapping[str, TokenRows]) -> dict[str, list[str]]:
    """The whole responses of the first generation_rows tokenised rows of every split of instructions.

    None of plain text. Raises: ConfigurationError where the metrics need some.
    """
    found: dict[str, list[str]] = {}
    count = task.generation_rows
    for split, dataset in splits.items():
        if "response" not in dataset.column_names or count == 0:
            continue
        # Tokenised rows may lack some, and end where max_length ends.
        place = {number: index for index, number in enumerate(dataset["row"])}
        found[split] = [dataset[place[int(number)]]["response"] for number in rows[split].source_rows[:count]]
    if "rouge_l" in (task.metrics or []) and len(found) < len(splits):
        raise ConfigurationError(
            'task.metrics holds "rouge_l", which compares answers to instructions; this is plain text'
        )
    return found
