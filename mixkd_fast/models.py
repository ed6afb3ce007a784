"""Teachers and students: loading, layer initialisation, and whether they fit the task and each other.

A student starts from the layers of another model, read straight from its safetensors files (or copied from a loaded
model), or from random weights.
"""

import copy
import difflib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mixkd_fast.causal_lm import CausalLM
from mixkd_fast.configuration import Precision, Student, Teacher
from mixkd_fast.encoder import Encoder
from mixkd_fast.errors import ModelError
from mixkd_fast.language_task import vocabulary_size
from mixkd_fast.model_checks import (
    check_max_length,
    check_mixing,
    check_num_labels,
    check_same_tokenizer,
    check_vocabulary,
    count_parameters,
    labels_permuted,
    max_positions,
    word_embedding_size,
)
from mixkd_fast.pretrained import (
    LoadedSource,
    ModelSource,
    Purpose,
    load_tokenizer,
    new_config,
    new_model,
    seeded,
)
from mixkd_fast.student_layers import (
    check_layers_fit,
    chosen_layers,
    num_layers,
    pick_layers,
    select_in_config,
)

__all__ = [
    "DTYPES",
    "Encoder",
    "LoadedSource",
    "ModelSource",
    "check_max_length",
    "check_mixing",
    "check_num_labels",
    "check_same_tokenizer",
    "check_vocabulary",
    "count_parameters",
    "describe_model",
    "load_student_encoder",
    "load_teacher_encoder",
    "load_tokenizer",
    "max_positions",
    "num_layers",
    "student_source",
    "teacher_source",
    "word_embedding_size",
]

Kind = Literal["classification", "regression", "causal_lm"]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def teacher_source(section: Teacher, purpose: Purpose = "classification") -> ModelSource:
    """Where the configuration says the teacher is. Raises: ModelError if it names an offline store alone."""
    if section.model is None:
        raise ModelError("teacher.model is missing: the model is needed, and teacher.offline has none")
    return _named_source(section.model, section, "teacher.model", purpose)


def student_source(
    section: Student, teacher: Teacher | nn.Module | None, purpose: Purpose = "classification"
) -> ModelSource | LoadedSource:
    """Where the student's layers come from: its own model, else its teacher (a section, or already loaded).

    Raises: ModelError where there is neither.
    """
    if section.model is not None:
        return _named_source(section.model, section, "student.model", purpose)
    if teacher is None:
        raise ModelError("student.model or student.config is needed: there is no teacher whose layers could be copied")
    remote = section.trust_remote_code
    if isinstance(teacher, nn.Module):
        model = teacher.model if isinstance(teacher, Encoder | CausalLM) else teacher
        return LoadedSource(
            model, attention=section.attention, trust_remote_code=remote, field="teacher", purpose=purpose
        )
    source = teacher_source(teacher, purpose)
    return replace(source, attention=section.attention, trust_remote_code=remote or teacher.trust_remote_code)


def _named_source(model: str, section: Teacher | Student, field: str, purpose: Purpose) -> ModelSource:
    return ModelSource(
        model,
        revision=section.revision,
        trust_remote_code=section.trust_remote_code,
        attention=section.attention,
        field=field,
        purpose=purpose,
    )


def load_teacher_encoder(
    section: Teacher,
    num_labels: int,
    kind: Kind,
    label_names: Sequence[str] | None = None,
    precision: Precision = "fp32",
) -> Encoder:
    """The whole teacher in memory, on the CPU: eval mode, no gradients, safetensors weights.

    Args: num_labels = the task's, 1 for regression; label_names in label order, if known; precision =
    training.precision, for a section that has none of its own.
    Raises: ModelError if the model cannot be loaded, has no trained classification head, or does not fit the task.
    """
    source = teacher_source(section)
    check_num_labels(source.config, 1 if kind == "regression" else num_labels, label_names)
    state = {name: read() for name, read in source.stored_tensors()}
    model, missing, misfits = source.build(source.config, state, DTYPES[section.precision or precision])
    _check_body_is_whole(source, model, missing, misfits)
    if missing or misfits:
        raise ModelError(
            f"{source.what} has no trained classification head (no weights for {', '.join(missing + misfits)}); "
            "fine-tune a teacher for this task first (method finetune)"
        )
    encoder = Encoder(model.eval().requires_grad_(False))
    check_mixing(encoder)
    return encoder


def load_student_encoder(
    section: Student,
    teacher: Teacher | nn.Module | None,
    tokenizer: Any,
    num_labels: int,
    kind: Kind,
    label_names: Sequence[str] | None = None,
    seed: int = 0,
) -> tuple[Encoder, list[str]]:
    """The student in fp32 on the CPU, and notes on what a user should know (layers copied, heads that are new).

    With random weights from `section.config`, else from the layers of `section.model`, else from the teacher's. The
    classification head is copied where the source has one for the same labels.

    Args: teacher = the teacher's section, its loaded transformers model (or Encoder), or None; num_labels = the
    task's, 1 for regression; label_names are kept in the student's configuration; seed = of all new weights.
    Raises: ModelError if a source cannot be read, or the layers or the tokenizer do not fit.
    """
    num_labels = 1 if kind == "regression" else num_labels
    if kind == "regression":
        label_names = None
    if label_names is not None and len(label_names) != num_labels:
        raise ModelError(f"task.label_names has {len(label_names)} names ({list(label_names)}), the task {num_labels}")
    if section.config is not None:
        model, notes = _random_student(section, tokenizer, num_labels, kind, label_names, seed)
    else:
        source = student_source(section, teacher)
        model, notes = _copied_student(section, source, num_labels, kind, label_names, seed)
    check_vocabulary(model, tokenizer, "student")
    encoder = Encoder(model)
    check_mixing(encoder)
    return encoder, notes


def chosen_state(
    source: ModelSource | LoadedSource, config: Any, layers: Sequence[int]
) -> tuple[dict[str, Tensor], list[str]]:
    """The source's tensors with these of its layers, `config` (changed in place) to hold them, and notes."""
    tensors, available = source.stored_tensors(), num_layers(config)
    notes: list[str] = []
    if list(layers) != list(range(available)):
        original = source.skeleton()
        select_in_config(config, layers)
        check_layers_fit(original, source.structure(config), layers)
        tensors = pick_layers(tensors, original, layers)
        notes.append(f"the student's layers are {list(layers)} of the {available} of {source.what}")
    return {name: read() for name, read in tensors}, notes


def describe_model(model: nn.Module) -> dict[str, Any]:
    """What reports say about a transformers model: its family, number of layers and width."""
    config: Any = model.config
    return {"model_type": config.model_type, "layers": num_layers(config), "hidden_size": config.hidden_size}


def _copied_student(
    section: Student,
    source: ModelSource | LoadedSource,
    num_labels: int,
    kind: Kind,
    label_names: Sequence[str] | None,
    seed: int,
) -> tuple[nn.Module, list[str]]:
    config = copy.deepcopy(source.config)
    available, labels_before = num_layers(config), config.num_labels
    permuted = label_names is not None and labels_permuted(config, label_names)
    layers = chosen_layers(available, section.num_layers, section.layers)
    _set_task(config, num_labels, kind, label_names)
    set_dropout(config, section.dropout)
    state, notes = chosen_state(source, config, layers)
    if permuted:
        for name in _label_tensors(source.structure(config)):
            state.pop(name, None)
    model, missing, misfits = source.build(config, state, torch.float32, seed)
    _check_body_is_whole(source, model, missing, misfits)
    if missing:
        why = "whose labels are in another order" if permuted else "which does not have them"
        notes.append(f"the student's {', '.join(missing)} are new, not from {source.what}, {why}")
    if misfits:
        notes.append(
            f"the student's {', '.join(misfits)} are new: {labels_before} labels in {source.what}, "
            f"{num_labels} in the task"
        )
    return model, notes


def _random_student(
    section: Student,
    tokenizer: Any,
    num_labels: int,
    kind: Kind,
    label_names: Sequence[str] | None,
    seed: int,
) -> tuple[nn.Module, list[str]]:
    config, notes = described_config(section, tokenizer)
    _set_task(config, num_labels, kind, label_names)
    with seeded(seed):
        model = new_model(config, section.attention, section.trust_remote_code)
    return model.float().eval(), notes


def described_config(section: Student, tokenizer: Any) -> tuple[Any, list[str]]:
    """The transformers configuration that `student.config` describes, and notes on it."""
    given = dict(section.config or {})
    model_type = given.pop("model_type")
    standard = new_config(model_type, {})
    # A family's own ids of special tokens may lie outside this vocabulary.
    ids = {f"{token}_token_id": getattr(tokenizer, f"{token}_token_id", None) for token in _SPECIAL_TOKENS}
    ids = {name: value for name, value in ids.items() if hasattr(standard, name)}
    if ids.get("pad_token_id") is not None and ids["pad_token_id"] == ids.get("eos_token_id"):
        ids["pad_token_id"] = None  # else the word embedding of the end of a text would be a padding row: always 0
    config = new_config(model_type, {"vocab_size": vocabulary_size(tokenizer), **ids, **given})
    set_dropout(config, section.dropout)
    notes = ["the student's weights are random (student.config)"]
    known = {*standard.to_dict(), *type(config).attribute_map}
    for name in sorted(set(given) - known):
        close = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        notes.append(f"student.config: {name!r} is not a standard field of {model_type}{hint}")
    return config, notes


_SPECIAL_TOKENS = ("pad", "bos", "eos", "cls", "sep", "mask")


def _check_body_is_whole(
    source: ModelSource | LoadedSource, model: Any, missing: Sequence[str], misfits: Sequence[str]
) -> None:
    """Only a head may be new: what stands outside the base model, and a pooler."""
    prefix = f"{model.base_model_prefix}."
    body = [name for name in missing if name.startswith(prefix) and ".pooler." not in name]
    body += [name for name in misfits if name.startswith(prefix)]
    if body:
        raise ModelError(
            f"{source.what}: the weights do not fit config.json: {len(body)} tensors are missing or of another shape, "
            f"{body[0]} first"
        )


def _label_tensors(model: Any) -> list[str]:
    """Names of the head's tensors that have one entry per label."""
    prefix, num_labels = f"{model.base_model_prefix}.", model.config.num_labels
    head = ((name, parameter) for name, parameter in model.named_parameters() if not name.startswith(prefix))
    return [name for name, parameter in head if parameter.shape[0] == num_labels]


def _set_task(config: Any, num_labels: int, kind: Kind, label_names: Sequence[str] | None) -> None:
    names = label_names or [f"LABEL_{index}" for index in range(num_labels)]
    config.num_labels = num_labels
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}
    config.problem_type = "regression" if kind == "regression" else "single_label_classification"


def set_dropout(config: Any, dropout: float | None) -> None:
    """Replace every dropout probability, under whichever name the family keeps it."""
    if dropout is None:
        return
    for name in config.to_dict():
        value = getattr(config, name, None)
        is_probability = value is None or (isinstance(value, int | float) and not isinstance(value, bool))
        if ("dropout" in name or name.endswith("pdrop")) and is_probability:
            setattr(config, name, dropout)
