"""Seconds of the forwards and backwards of causal language models, and of fetching an offloaded teacher."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixkd_fast.planning.decoders import DecoderShape, decoder_attention_flops, decoder_flops, head_flops
from mixkd_fast.planning.hardware import (
    DEVICES_PER_NODE,
    HOST_LINK_BYTES_PER_S,
    NVME_BYTES_PER_S,
    Rates,
    decoder_elementwise_widths,
)
from mixkd_fast.planning.memory import Placement
from mixkd_fast.planning.models import PlannedModel
from mixkd_fast.planning.parts import Part
from mixkd_fast.planning.stored_answers import StoredAnswers
from mixkd_fast.planning.workload import BYTES, Workload

_FORWARD_KERNELS = 30
_TRAINING_KERNELS = 90
"""GPU kernels of a layer of transformers' own forward, alone and with backward."""
_LOGITS_PASSES = 4
"""Times that a logit in fp32 is written or read: by the product, the loss (twice) and the products of its gradient."""


@dataclass(frozen=True)
class _Passes:
    """How often each product of a forward is computed, with its backward."""

    linear: float
    attention: float
    head: float

    @property
    def is_training(self) -> bool:
        return self.linear > 1


def language_parts(
    student: PlannedModel,
    teacher: PlannedModel | None,
    work: Workload,
    placement: Placement,
    rates: Callable[[PlannedModel], Rates],
) -> list[Part]:
    """The parts of one step of one rank that the models' forwards and backwards take."""
    again = 1.0 if work.gradient_checkpointing else 0.0
    # Frozen weights have no gradient: of the backward's two products only that of the inputs is left.
    weights = 0.0 if student.num_frozen else 1.0
    passes = _Passes(2.0 + weights + again, 3.0 + again, 2.0 + weights)
    student_shares = {"clean": float(work.student_clean), "mixed": float(work.student_mixed)}
    parts = _model_parts(
        "student", student, work, student_shares, passes, rates(student), BYTES[work.student_precision]
    )
    if work.stored is not None and work.stored.num_classes:
        parts.append(_kept_head_part(work.stored, work, rates(student), BYTES[work.student_precision]))
    if teacher is None:
        return parts
    shares = {"clean": work.teacher_clean_share, "mixed": float(work.teacher_mixed)}
    once = _Passes(1.0, 1.0, 1.0)
    parts += _model_parts("teacher", teacher, work, shares, once, rates(teacher), BYTES[work.teacher_precision])
    if placement.teacher_offload != "none":
        forwards = work.accumulation * sum(shares.values())
        parts.append(_fetching_part(teacher, work, placement, forwards))
    return parts


def _model_parts(
    who: str,
    model: PlannedModel,
    work: Workload,
    shares: dict[str, float],
    passes: _Passes,
    rates: Rates,
    element: int,
) -> list[Part]:
    parts = []
    for name, lengths_BN in (("clean", work.lengths.clean), ("mixed", work.lengths.mixed)):
        repeats = work.accumulation * shares[name]
        if repeats:
            parts.append(_body_part(f"{who}, {name} rows", model, lengths_BN, passes, rates, element, repeats))
            tokens = lengths_BN.shape[1] * work.lengths.real_tokens * work.target_share
            shape, head = _decoder(model), f"{who}, {name} rows, head"
            sizes = shape.head_parameters, shape.vocab_size
            parts.append(_head_part(head, *sizes, tokens, passes, rates, element, repeats))
    return parts


def _body_part(
    name: str,
    model: PlannedModel,
    lengths_BN: NDArray[np.int64],
    passes: _Passes,
    rates: Rates,
    element: int,
    repeats: float,
) -> Part:
    """`repeats` times embeddings to last hidden states, with the backward in training."""
    shape, training = _decoder(model), passes.is_training
    attention = float(np.mean([decoder_attention_flops(shape, row) for row in lengths_BN]))
    linear = float(np.mean([decoder_flops(shape, row) for row in lengths_BN])) - attention
    linear, attention = passes.linear * linear, passes.attention * attention
    positions = float(lengths_BN.sum(axis=1).mean())
    moved = positions * shape.num_layers * decoder_elementwise_widths(shape)[1 if training else 0] * element
    weights_read = passes.linear * shape.linear_parameters * element
    seconds = max(linear / (rates.linear_training if training else rates.linear_forward), weights_read / rates.copy)
    seconds += attention / (rates.attention_training if training else rates.attention_forward)
    seconds += moved / (rates.elementwise_training if training else rates.elementwise_forward)
    kernels = (_TRAINING_KERNELS if training else _FORWARD_KERNELS) * (shape.num_layers + 1)
    seconds = max(seconds, kernels * rates.launch_s)
    return Part(name, repeats * (linear + attention), repeats * (moved + weights_read), repeats * seconds)


def _kept_head_part(stored: StoredAnswers, work: Workload, rates: Rates, element: int) -> Part:
    """The output layer that a teacher store has kept, over its hidden states."""
    tokens = work.lengths.clean.shape[1] * work.lengths.real_tokens * work.target_share
    sizes = stored.num_classes * stored.width, stored.num_classes
    return _head_part("teacher, kept head", *sizes, tokens, _Passes(1.0, 1.0, 1.0), rates, element, work.accumulation)


def _head_part(
    name: str,
    head_parameters: int,
    num_classes: int,
    tokens: float,
    passes: _Passes,
    rates: Rates,
    element: int,
    repeats: float,
) -> Part:
    """The output layer over the learnt positions, chunk by chunk, and what the loss reads and writes of its logits."""
    flops = passes.head * head_flops(head_parameters, tokens)
    moved = _LOGITS_PASSES * 4 * tokens * num_classes + passes.head * head_parameters * element
    seconds = flops / (rates.linear_training if passes.is_training else rates.linear_forward) + moved / rates.copy
    return Part(name, repeats * flops, repeats * moved, repeats * seconds)


def _fetching_part(teacher: PlannedModel, work: Workload, placement: Placement, forwards: float) -> Part:
    """Every forward each rank brings its share of the teacher to its device; a node's ranks share its NVMe."""
    share = teacher.num_parameters * BYTES[work.teacher_precision] / work.ranks
    seconds = share / HOST_LINK_BYTES_PER_S
    if placement.teacher_offload == "nvme":
        seconds = max(seconds, share * min(work.ranks, DEVICES_PER_NODE) / NVME_BYTES_PER_S)
    return Part(f"teacher, from {placement.teacher_offload}", 0.0, forwards * share, forwards * seconds)


def _decoder(model: PlannedModel) -> DecoderShape:
    assert isinstance(model.shape, DecoderShape)
    return model.shape
