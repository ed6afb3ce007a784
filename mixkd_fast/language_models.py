"""Causal language models as teachers and students: loaded, cut to layers, described, checked."""

import copy
from typing import Any

import torch
from torch import nn

from mixkd_fast.causal_lm import CausalLM, check_head
from mixkd_fast.configuration import Precision, Student, Teacher
from mixkd_fast.errors import ModelError
from mixkd_fast.model_checks import check_vocabulary
from mixkd_fast.models import DTYPES, chosen_state, described_config, set_dropout, student_source, teacher_source
from mixkd_fast.pretrained import new_model, seeded
from mixkd_fast.student_layers import chosen_layers, num_layers


def load_teacher_lm(section: Teacher, precision: Precision = "fp32") -> CausalLM:
    """The whole teacher in memory, on the CPU: eval mode, no gradients, safetensors weights.

    Args: precision = training.precision, for a section that has none of its own.
    Raises: ModelError if it cannot be loaded, lacks weights, or does something to its logits that is not known.
    """
    source = teacher_source(section, "causal_lm")
    state = {name: read() for name, read in source.stored_tensors()}
    model, missing, misfits = source.build(source.config, state, DTYPES[section.precision or precision])
    _check_whole(source.what, missing + misfits)
    lm = CausalLM(model.eval().requires_grad_(False))
    check_head(lm)
    return lm


def load_student_lm(
    section: Student, teacher: Teacher | nn.Module | None, tokenizer: Any, seed: int = 0
) -> tuple[CausalLM, list[str]]:
    """The student in fp32 on the CPU, and notes on what a user should know.

    With random weights from `section.config`, else from the layers of `section.model`, else from the teacher's. Word
    embeddings and output embedding are copied, and stay one where they are tied.
    Raises: ModelError if a source cannot be read, or the layers or the tokenizer do not fit.
    """
    if section.config is not None:
        config, notes = described_config(section, tokenizer)
        with seeded(seed):
            model = new_model(config, section.attention, section.trust_remote_code, "causal_lm").float().eval()
    else:
        source = student_source(section, teacher, "causal_lm")
        config = copy.deepcopy(source.config)
        set_dropout(config, section.dropout)
        layers = chosen_layers(num_layers(config), section.num_layers, section.layers)
        state, notes = chosen_state(source, config, layers)
        model, missing, misfits = source.build(config, state, torch.float32, seed)
        _check_whole(source.what, missing + misfits)
    check_vocabulary(model, tokenizer, "student")
    lm = CausalLM(model)
    check_head(lm)
    return lm, notes


def _check_whole(what: str, lacking: list[str]) -> None:
    if lacking:
        raise ModelError(
            f"{what}: the weights do not make a causal language model: {len(lacking)} tensors are missing or of "
            f"another shape, {lacking[0]} first"
        )
