"""Teacher and student of a run, loaded, checked and made ready for their forwards."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from datasets import Dataset

from mixkd_fast import distributed
from mixkd_fast.causal_lm import CausalLM
from mixkd_fast.configuration import BatchArithmetic, Config, Precision, Teacher, Training
from mixkd_fast.data.tasks import TaskSpec
from mixkd_fast.deepspeed_config import autocasts
from mixkd_fast.errors import ConfigurationError, ModelError
from mixkd_fast.frozen_teacher import FrozenTeacher
from mixkd_fast.models import (
    DTYPES,
    Encoder,
    check_max_length,
    check_num_labels,
    check_same_tokenizer,
    check_vocabulary,
    load_student_encoder,
    load_teacher_encoder,
    load_tokenizer,
    teacher_source,
)
from mixkd_fast.quantized_teacher import quantize, why_not
from mixkd_fast.teacher import load_sharded_teacher, shard_loaded_teacher
from mixkd_fast.teacher_store import store_key, store_key_of_files


@dataclass(frozen=True)
class Loaded:
    """Objects that a caller of the Python API hands over in place of names."""

    teacher: torch.nn.Module | None = None
    student: torch.nn.Module | None = None
    tokenizer: Any | None = None
    train: Dataset | None = None
    evaluation: Dataset | Mapping[str, Dataset] | None = None


def load_teacher(
    config: Config, loaded: Loaded, spec: TaskSpec, tokenizer: Any, arithmetic: BatchArithmetic, device: torch.device
) -> FrozenTeacher:
    section = config.teacher
    assert section is not None
    if not config.method.trains_classifier:
        # Only what the teacher's layers compute is imitated: its labels may be another task's.
        known: Any = teacher_source(section).config if loaded.teacher is None else loaded.teacher.config
        names = tuple(known.id2label.values())
        spec = replace(spec, label_names=names, kind="regression" if len(names) == 1 else "classification")
    # Quantisation starts from fp32 weights.
    precision = "fp32" if section.quantization else section.precision or config.training.precision
    if loaded.teacher is not None:
        check_num_labels(loaded.teacher.config, spec.num_labels, spec.label_names)
        encoder = Encoder(in_precision(loaded.teacher, precision).eval().requires_grad_(False))
        check_vocabulary(encoder.model, tokenizer, "teacher")
        check_max_length(encoder.config, config.task.max_length, "teacher")
        if section.zero_stage == 3:
            digest = store_key(encoder.model, "") if section.store else ""  # while it is whole
            sharded = shard_loaded_teacher(section, encoder, precision, arithmetic.micro_batch_size)
            return FrozenTeacher(sharded, lambda: digest)
        return _whole_teacher(config, encoder, device)
    source = teacher_source(section)
    check_max_length(source.config, config.task.max_length, "teacher")
    check_num_labels(source.config, spec.num_labels, spec.label_names)
    if section.zero_stage == 3:
        if section.stream:
            distributed.say("teacher.stream has no effect: it is for a teacher of zero_stage 0")
        check_vocabulary(source.skeleton(), tokenizer, "teacher")
        sharded = load_sharded_teacher(section, source, precision, arithmetic.micro_batch_size, device)
        return FrozenTeacher(sharded, lambda: store_key_of_files(source.files, source.config.to_json_string()))
    encoder = load_teacher_encoder(section, spec.num_labels, spec.kind, spec.label_names, precision)
    check_vocabulary(encoder.model, tokenizer, "teacher")
    return _whole_teacher(config, encoder, device)


def in_precision(model: torch.nn.Module, precision: Precision) -> torch.nn.Module:
    """The caller's model, or a copy of it in another precision."""
    wanted = DTYPES[precision]
    if all(p.dtype == wanted for p in model.parameters() if p.is_floating_point()):
        return model
    return copy.deepcopy(model).to(wanted)


def further_teacher(
    config: Config, spec: TaskSpec, tokenizer: Any, device: torch.device, name: str, field: str
) -> FrozenTeacher:
    """One more frozen model for the task, whole on every rank, in the first one's precision."""
    section = config.teacher or Teacher(model=name)
    plain = {"model": name, "revision": None, "zero_stage": 0, "offload": None, "quantization": None, "stream": False}
    section = section.model_copy(update=plain)
    try:
        encoder = load_teacher_encoder(
            section, spec.num_labels, spec.kind, spec.label_names, section.precision or config.training.precision
        )
        check_same_tokenizer(load_tokenizer(name, None, section.trust_remote_code, field), tokenizer)
        check_vocabulary(encoder.model, tokenizer, "teacher")
    except ModelError as error:
        raise ModelError(f"{field}: {error}") from error
    return _whole_teacher(config.model_copy(update={"teacher": section}), encoder, device)


def further_student(
    config: Config,
    loaded: Loaded,
    spec: TaskSpec,
    tokenizer: Any,
    deepspeed_config: dict[str, Any],
    device: torch.device,
    seed: int,
) -> Encoder:
    """One more student as the configuration describes it, with new weights drawn from another seed."""
    if loaded.student is not None:
        raise ConfigurationError("student: several students need one that is described, not a loaded model")
    training = config.training.model_copy(update={"seed": seed})
    config = config.model_copy(update={"training": training})
    student = load_student(config, loaded, spec, tokenizer, deepspeed_config, device)[0]
    checkpoint_activations(student, training)
    return student


def checkpoint_activations(student: Encoder | CausalLM, training: Training) -> None:
    if training.gradient_checkpointing:
        model: Any = student.model
        model.gradient_checkpointing_enable()


def _whole_teacher(config: Config, encoder: Encoder, device: torch.device) -> FrozenTeacher:
    quantization = config.teacher.quantization if config.teacher is not None else None
    if quantization is not None:
        reason = why_not(quantization, device)
        if reason:
            raise ConfigurationError(f'teacher.quantization = "{quantization}" {reason}; leave it out')
        encoder = Encoder(quantize(encoder.model, quantization))
    encoder = encoder.to(device)
    reason = fuse(encoder, config.training, device)
    if reason and config.training.compile != "off":
        distributed.say(f"training.compile leaves the teacher as it is: {reason}")
    if config.training.unpadded and device.type == "cuda":
        why = reason
        if encoder.fused is not None:
            dtype = next(encoder.parameters()).dtype
            why = encoder.fused.why_padded(device, dtype, training=False)
        if why:
            distributed.say(f"training.unpadded leaves the teacher's padding where it is: {why}")
    wanted = config.teacher is not None and config.teacher.stream
    beside = wanted and device.type == "cuda"
    if wanted and not beside:
        distributed.say("teacher.stream has no effect: it is for a GPU")
    return FrozenTeacher(encoder, lambda: store_key(encoder.model, ""), torch.cuda.Stream(device) if beside else None)


def fuse(encoder: Encoder, training: Training, device: torch.device) -> str:
    """Compute the model's logits in fewer operations if that is wanted and possible; returns why not, or ""."""
    if not training.fused_encoder:
        return "training.fused_encoder is false"
    attention = getattr(encoder.config, "_attn_implementation", None)
    if attention not in (None, "sdpa"):
        # Somebody chose it, and the fused layers know no other than their own.
        return f'its attention is "{attention}"'
    reason = encoder.fuse()
    if encoder.fused is not None:
        encoder.fused.unpadded = training.unpadded
    if encoder.fused is not None and training.compile != "off":
        shapes = training.compile == "shapes"
        graphs = shapes and device.type == "cuda"
        encoder.fused.compile(dynamic=not shapes, mode="reduce-overhead" if graphs else None)
    return reason


def _keeps_own_forward(training: Training, deepspeed_config: dict[str, Any]) -> str:
    """What makes the student run its own forward whatever it is, or ""."""
    if training.gradient_checkpointing:
        return "training.gradient_checkpointing is on"
    return "ZeRO-3" if deepspeed_config.get("zero_optimization", {}).get("stage", 0) == 3 else ""


def load_student(
    config: Config,
    loaded: Loaded,
    spec: TaskSpec,
    tokenizer: Any,
    deepspeed_config: dict[str, Any],
    device: torch.device,
) -> tuple[Encoder, list[str]]:
    if config.student.lora is not None:
        raise ConfigurationError('student.lora is for task.kind "causal_lm", and this is a classifier; leave it out')
    if loaded.student is not None:
        if autocasts(config.training, deepspeed_config):
            loaded.student.float()  # autocast trains fp32 weights
        student, notes = Encoder(loaded.student), ["student: the loaded model, trained in place"]
        width = student.config.num_labels
        if width != spec.num_labels:
            raise ModelError(f"the loaded student has {width} labels; the task has {spec.num_labels}")
        check_vocabulary(student.model, tokenizer, "student")
    else:
        student, notes = load_student_encoder(
            config.student,
            loaded.teacher if loaded.teacher is not None else config.teacher,
            tokenizer,
            spec.num_labels,
            spec.kind,
            spec.label_names,
            config.training.seed,
        )
    check_max_length(student.config, config.task.max_length, "student")
    reason = _keeps_own_forward(config.training, deepspeed_config) or fuse(student, config.training, device)
    if reason and config.training.compile != "off":
        raise ConfigurationError(
            f'training.compile = "{config.training.compile}" compiles the fused layers, and the student has none: '
            f'{reason}; set training.compile to "off"'
        )
    notes.append(f"forward: {'its own, ' + reason if reason else 'fused'}")
    if config.training.unpadded:
        notes += _unpadded_notes(student, DTYPES[config.training.precision], device, tokenizer, reason)
    return student, notes


def _unpadded_notes(
    student: Encoder, dtype: torch.dtype, device: torch.device, tokenizer: Any, reason: str
) -> list[str]:
    """What there is to say where `training.unpadded` does not help. Args: reason = why there are no fused layers."""
    if device.type == "cpu" and not reason:
        return ["training.unpadded is for a GPU; on a CPU it makes nothing faster"]
    if not reason and student.fused is not None:
        reason = student.fused.why_padded(device, dtype, training=True)
    if not reason and tokenizer.padding_side == "left":
        reason = "the tokenizer pads on the left"
    return [f"training.unpadded leaves the student's padding where it is: {reason}"] if reason else []
