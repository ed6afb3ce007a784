"""Teacher and student of a plan: their shapes and parameter counts, from configurations alone (no weights)."""

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from mixkd_fast.configuration import Config, Student, Teacher
from mixkd_fast.data.tasks import resolve
from mixkd_fast.errors import ConfigurationError, MixKDError, ModelError
from mixkd_fast.language_task import vocabulary_size
from mixkd_fast.model_checks import count_parameters, largest_layer_numel
from mixkd_fast.models import student_source, teacher_source
from mixkd_fast.planning.decoders import DecoderShape, adapter_parameters
from mixkd_fast.planning.flops import EncoderShape
from mixkd_fast.pretrained import Purpose, load_tokenizer, new_config, new_model
from mixkd_fast.student_layers import chosen_layers, num_layers, select_in_config

_DROPOUTS = ("hidden_dropout_prob", "dropout", "embedding_dropout", "mlp_dropout", "resid_pdrop")
_ATTENTION_DROPOUTS = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop")
_EXPLICIT_ATTENTION = ("deberta", "deberta-v2", "gemma2")
_FUSED_ATTENTION = (None, "sdpa")


@dataclass(frozen=True)
class PlannedModel:
    """What a plan needs to know of one model."""

    family: str
    """transformers' model_type."""
    shape: EncoderShape | DecoderShape
    num_parameters: int
    """All of them, adapters included."""
    num_linear_parameters: int
    """Parameters of linear layers, of which autocast keeps a copy in the lower precision."""
    largest_layer: int
    """Parameters of the largest part that ZeRO-3 gathers at once."""
    has_dropout: bool
    has_attention_dropout: bool
    explicit_attention: bool
    """Whether attention scores are kept as tensors, not inside a fused kernel."""
    own_forward: bool = False
    """Whether something keeps it from the fused forward: quantised layers, checkpointing, a chosen attention."""
    num_frozen: int = 0
    """Of a student with adapters: parameters that have no gradient and no optimizer states."""
    adapter_width: int = 0
    """Sum of the ranks of a layer's adapters: elements per position that they keep beside their inputs."""

    @property
    def num_trained(self) -> int:
        """Parameters with gradients and optimizer states."""
        return self.num_parameters - self.num_frozen

    def describe(self) -> str:
        """A line for people."""
        shape = self.shape
        trained = f", {self.num_trained:,} of them trained" if self.num_frozen else ""
        return (
            f"{self.family}, {shape.num_layers} layers x {shape.hidden_size}, feed-forward {shape.intermediate_size}, "
            f"{self.num_parameters:,} parameters{trained}"
        )


def planned_teacher(config: Config) -> PlannedModel | None:
    """The teacher of a run; None without one, or where a store answers in its place.

    Raises: ModelError if its configuration cannot be read.
    """
    if config.teacher is None:
        return None
    section = config.teacher
    if config.plan.teacher is not None:
        described, model = _described(config.plan.teacher, section, config, "plan.teacher")
        return planned_model(described, model, section.attention)
    if section.model is None:
        return None
    source = teacher_source(section, _purpose(config))
    planned = planned_model(source.config, source.skeleton(), section.attention)
    return replace(planned, own_forward=section.quantization is not None or section.attention not in _FUSED_ATTENTION)


def planned_student(config: Config) -> PlannedModel:
    """The student of a run, its layers chosen as the configuration says. Raises: ModelError."""
    own_forward = config.training.gradient_checkpointing or config.student.attention not in _FUSED_ATTENTION
    return replace(_student(config), own_forward=own_forward)


def _purpose(config: Config) -> Purpose:
    return "causal_lm" if config.task.kind == "causal_lm" else "classification"


def _described(fields: dict[str, Any], section: Student | Teacher, config: Config, where: str) -> tuple[Any, nn.Module]:
    """A configuration and its model on the meta device."""
    given = dict(fields)
    described = new_config(given.pop("model_type"), given, where)
    return described, _on_meta(described, section, config)


def _on_meta(described: Any, section: Student | Teacher, config: Config) -> nn.Module:
    with torch.device("meta"):
        return new_model(described, section.attention, section.trust_remote_code, _purpose(config))


def _student(config: Config) -> PlannedModel:
    """Raises: ModelError."""
    section = config.student
    described, model = _student_model(config)
    planned = planned_model(described, model, section.attention)
    if section.lora is None:
        return planned
    trained, width = adapter_parameters(model, section.lora)
    whole = planned.num_parameters
    return replace(planned, num_parameters=whole + trained, num_frozen=whole, adapter_width=width)


def _student_model(config: Config) -> tuple[Any, nn.Module]:
    """The student's configuration and its model on the meta device."""
    section = config.student
    if config.plan.student is not None:
        return _described(config.plan.student, section, config, "plan.student")
    if section.config is not None:
        fields = dict(section.config)
        model_type = fields.pop("model_type")
        fields.setdefault("vocab_size", None)
        if fields["vocab_size"] is None:
            fields["vocab_size"] = _tokenizer_rows(config)
        described = new_config(model_type, fields)
        if _purpose(config) == "classification":
            described.num_labels = _num_labels(config) or described.num_labels
        _set_dropout(described, section)
        return described, _on_meta(described, section, config)
    if section.model is None and config.plan.teacher is not None:
        described = _described(config.plan.teacher, section, config, "plan.teacher")[0]
        select_in_config(described, chosen_layers(num_layers(described), section.num_layers, section.layers))
        return described, _on_meta(described, section, config)
    source = student_source(section, config.teacher, _purpose(config))
    described = copy.deepcopy(source.config)
    select_in_config(described, chosen_layers(num_layers(described), section.num_layers, section.layers))
    if _purpose(config) == "classification":
        described.num_labels = _num_labels(config) or described.num_labels
    _set_dropout(described, section)
    return described, source.structure(described)


def planned_model(config: Any, model: nn.Module, attention: str | None = None) -> PlannedModel:
    """What a plan needs to know of a model. Args: config = its transformers configuration; model may be on meta."""
    if "ForCausalLM" in type(model).__name__ or hasattr(model, "lm_head"):
        return _planned_decoder(config, model, attention)
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return PlannedModel(
        family=config.model_type,
        shape=EncoderShape.of(config),
        num_parameters=count_parameters(model),
        num_linear_parameters=sum(parameter.numel() for module in linear for parameter in module.parameters()),
        largest_layer=largest_layer_numel(model),
        has_dropout=_any_dropout(config, _DROPOUTS),
        has_attention_dropout=_any_dropout(config, _ATTENTION_DROPOUTS),
        explicit_attention=attention == "eager" or config.model_type in _EXPLICIT_ATTENTION,
    )


def _planned_decoder(config: Any, model: nn.Module, attention: str | None) -> PlannedModel:
    shape = DecoderShape.of(config, model)
    return PlannedModel(
        family=config.model_type,
        shape=shape,
        num_parameters=count_parameters(model),
        num_linear_parameters=shape.linear_parameters + shape.head_parameters,
        largest_layer=largest_layer_numel(model),
        has_dropout=_any_dropout(config, _DROPOUTS),
        has_attention_dropout=_any_dropout(config, _ATTENTION_DROPOUTS),
        explicit_attention=attention == "eager" or config.model_type in _EXPLICIT_ATTENTION,
        own_forward=True,
    )


def _any_dropout(config: Any, names: tuple[str, ...]) -> bool:
    return any(isinstance(value := getattr(config, name, 0), float) and value > 0 for name in names)


def _set_dropout(config: Any, section: Student) -> None:
    if section.dropout is None:
        return
    for name in (*_DROPOUTS, *_ATTENTION_DROPOUTS):
        if hasattr(config, name):
            setattr(config, name, float(section.dropout))


def _num_labels(config: Config) -> int | None:
    """The task's number of outputs, as far as it is known without its data; else the teacher's."""
    spec = resolve(config.task)
    if spec.kind == "regression" or spec.label_names is not None:
        return spec.num_labels
    return int(teacher_source(config.teacher).config.num_labels) if config.teacher is not None else None


def _tokenizer_rows(config: Config) -> int:
    """Rows of the word table of a student that is described without vocab_size."""
    try:
        tokenizer = plan_tokenizer(config)
    except MixKDError as error:
        raise ModelError(f"student.config has no vocab_size, and no tokenizer to count: {error}") from error
    return vocabulary_size(tokenizer)


def plan_tokenizer(config: Config) -> Any:
    """The tokenizer of the run. Raises: ConfigurationError or ModelError if there is none here."""
    section, teacher, purpose = config.student, config.teacher, _purpose(config)
    if section.tokenizer is not None:
        return load_tokenizer(section.tokenizer, None, section.trust_remote_code, "student.tokenizer", purpose)
    if section.model is not None:
        return load_tokenizer(section.model, section.revision, section.trust_remote_code, "student.model", purpose)
    if teacher is not None and teacher.model is not None:
        return load_tokenizer(teacher.model, teacher.revision, teacher.trust_remote_code, "teacher.model", purpose)
    if config.task.name == "demo":
        from mixkd_fast.data.demo import train_demo_tokenizer

        return train_demo_tokenizer()
    raise ConfigurationError("student.tokenizer is missing: neither student.model nor a teacher brings a tokenizer")
