"""What a run hands to its method before the first step."""

from typing import Any

import torch

from mixkd_fast import distributed
from mixkd_fast.configuration import Config
from mixkd_fast.errors import ModelError
from mixkd_fast.evaluation import EvaluationPlan, predict
from mixkd_fast.frozen_teacher import FrozenTeacher
from mixkd_fast.language_preparation import further_language_student, further_language_teacher
from mixkd_fast.language_texts import load_texts
from mixkd_fast.methods import Setting
from mixkd_fast.model_preparation import Loaded, further_student, further_teacher
from mixkd_fast.models import Encoder, check_max_length, check_same_tokenizer, check_vocabulary
from mixkd_fast.preparation import Prepared
from mixkd_fast.pretrained import load_masked_lm, load_tokenizer


def setting_of(config: Config, loaded: Loaded, parts: Prepared, device: torch.device) -> Setting:
    """The parts of a run, and what more can be loaded for its task."""
    spec, tokenizer = parts.spec, parts.tokenizer
    rows: Any = parts.train  # streamed ones refuse what a method cannot have of them
    plan = EvaluationPlan(config.training.evaluation_batch_size, parts.padding, device, list(spec.metrics))

    def teacher_of(name: str, field: str) -> FrozenTeacher:
        if spec.kind == "causal_lm":
            return further_language_teacher(config, tokenizer, device, name, field)
        return further_teacher(config, spec, tokenizer, device, name, field)

    def student_of(seed: int) -> Any:
        if spec.kind == "causal_lm":
            return further_language_student(config, loaded, tokenizer, parts.deepspeed_config, seed)
        return further_student(config, loaded, spec, tokenizer, parts.deepspeed_config, device, seed)

    student: Any = parts.student
    return Setting(
        student=student.to(device),
        teacher=parts.teacher,
        rows=rows,
        num_labels=spec.num_labels,
        kind=spec.kind,
        tokenizer=tokenizer,
        seed=config.training.seed,
        device=device,
        collect=lambda forward: predict(rows, plan, forward)[0],
        load_teacher=teacher_of,
        load_masked_lm=lambda name, field: _masked_lm(config, tokenizer, name, field),
        load_texts=lambda files, field: load_texts(config, parts, files, field),
        new_student=student_of,
        share=distributed.broadcast_object,
        sum_over_ranks=distributed.sum_over_ranks,
        gather=distributed.gather_objects,
    )


def _masked_lm(config: Config, tokenizer: Any, name: str, field: str) -> Encoder:
    """A masked language model whose ids, positions and words fit the run's rows."""
    remote = config.student.trust_remote_code
    model = load_masked_lm(name, field, remote)
    try:
        check_same_tokenizer(load_tokenizer(name, None, remote, field), tokenizer)
        check_vocabulary(model, tokenizer, "masked language model")
        check_max_length(model.config, config.task.max_length, "masked language model")
        return Encoder(model)
    except ModelError as error:
        raise ModelError(f"{field}: {error}") from error
