"""What a run hands to its method before the first step."""

import torch

from mixkd_fast import distributed
from mixkd_fast.configuration import Config
from mixkd_fast.evaluation import EvaluationPlan, predict
from mixkd_fast.methods import Setting
from mixkd_fast.preparation import Loaded, Prepared, further_student, further_teacher
from mixkd_fast.pretrained import load_masked_lm


def setting_of(config: Config, loaded: Loaded, parts: Prepared, device: torch.device) -> Setting:
    """The parts of a run, and what more can be loaded for its task."""
    spec, tokenizer = parts.spec, parts.tokenizer
    plan = EvaluationPlan(config.training.evaluation_batch_size, parts.padding, device, list(spec.metrics))
    return Setting(
        student=parts.student.to(device),
        teacher=parts.teacher,
        rows=parts.train,
        num_labels=1 if spec.kind == "regression" else spec.num_labels,
        kind=spec.kind,
        tokenizer=tokenizer,
        seed=config.training.seed,
        device=device,
        collect=lambda forward: predict(parts.train, plan, forward)[0],
        load_teacher=lambda name, field: further_teacher(config, spec, tokenizer, device, name, field),
        load_masked_lm=lambda name, field: load_masked_lm(name, field, config.student.trust_remote_code),
        new_student=lambda seed: further_student(config, loaded, spec, tokenizer, parts.deepspeed_config, device, seed),
        sum_over_ranks=distributed.sum_over_ranks,
    )
