"""Seconds of one optimizer step, part by part: products at their rate, everything else at the memory's."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mixkd_fast.planning.decoders import DecoderShape
from mixkd_fast.planning.flops import attention_flops, forward_flops
from mixkd_fast.planning.hardware import (
    ADAM_BYTES,
    COLLECTIVE_S,
    DEVICES_PER_NODE,
    NETWORK_BYTES_PER_S,
    Device,
    Rates,
    elementwise_widths,
)
from mixkd_fast.planning.language_throughput import language_parts
from mixkd_fast.planning.memory import Placement
from mixkd_fast.planning.models import PlannedModel
from mixkd_fast.planning.parts import Part
from mixkd_fast.planning.workload import BYTES, Workload

_FORWARD_KERNELS = 16
_TRAINING_KERNELS = 50
"""GPU kernels of a layer, forward alone and with backward."""
_NEW_PAGES_BYTES = 32 * 2**20
"""glibc takes larger blocks from the system every time, page by page; smaller ones are used again."""
_CAST_BYTES = 12
"""Under autocast each weight is cast and its gradient cast back."""
_NORM_BYTES = 16
"""Gradients are read for the engine's norm and for DeepSpeed's, then read and written to be clipped."""
_BUFFER_BYTES = 8
"""Gradients are copied into a buffer for the exchange, and as many bytes back."""


@dataclass(frozen=True)
class Throughput:
    """A run's speed over all ranks."""

    parts: list[Part]
    step_s: float
    rows_per_s: float
    tokens_per_s: float
    """Tokens of the clean rows, padding not counted."""
    hours: float | None
    """All steps, without evaluation; None where their number is not known."""


def throughput(
    student: PlannedModel,
    teacher: PlannedModel | None,
    work: Workload,
    placement: Placement,
    device: Device,
    rates: Callable[[PlannedModel], Rates],
) -> Throughput:
    """The mean step of a run. Args: rates = of the teacher or the student on `device`, in its precision."""
    if isinstance(student.shape, DecoderShape):
        parts = language_parts(student, teacher, work, placement, rates)
    else:
        parts = _student_parts(student, work, placement, rates(student))
    if teacher is not None and not isinstance(teacher.shape, DecoderShape):
        parts += _teacher_parts(teacher, work, placement, rates(teacher))
    parts.append(_optimizer_part(student, work, placement, rates(student)))
    if work.ranks > 1:
        parts.append(_exchange_part(student, teacher, work, placement, device))
    step_s = sum(part.seconds for part in parts)
    rows_per_s = work.batch_size / step_s
    hours = None if work.steps is None else work.steps * step_s / 3600
    return Throughput(parts, step_s, rows_per_s, rows_per_s * work.lengths.real_tokens, hours)


def _student_parts(student: PlannedModel, work: Workload, placement: Placement, rates: Rates) -> list[Part]:
    element, fused = BYTES[work.student_precision], work.is_fused(student, placement.student_stage)
    shares = {"clean": float(work.student_clean), "mixed": float(work.student_mixed)}
    # Every product of the forward has two in the backward, and one more where activations are computed again.
    passes = 4.0 if work.gradient_checkpointing else 3.0
    return [
        _forward_part(f"student, {name} rows", student, lengths, rates, element, fused, passes, repeats)
        for name, lengths, repeats in _forwards(work, shares, fused)
    ]


def _teacher_parts(teacher: PlannedModel, work: Workload, placement: Placement, rates: Rates) -> list[Part]:
    element, fused = BYTES[work.teacher_precision], work.is_fused(teacher, placement.teacher_stage or 0)
    shares = {"clean": work.teacher_clean_share, "mixed": float(work.teacher_mixed)}
    return [
        _forward_part(f"teacher, {name} rows", teacher, lengths, rates, element, fused, 1.0, repeats)
        for name, lengths, repeats in _forwards(work, shares, fused)
    ]


def _forwards(work: Workload, shares: dict[str, float], fused: bool) -> list[tuple[str, NDArray[np.int64], float]]:
    """Which rows pass a model together: (name, their lengths [batches, rows], times per step)."""
    clean, mixed = work.lengths.clean, work.lengths.mixed
    if fused and shares["clean"] == shares["mixed"] == 1.0:
        return [("clean and mixed", np.concatenate([clean, mixed], axis=1), float(work.accumulation))]
    separate = [
        ("clean", clean, work.accumulation * shares["clean"]),
        ("mixed", mixed, work.accumulation * shares["mixed"]),
    ]
    return [(name, lengths, repeats) for name, lengths, repeats in separate if repeats]


def _forward_part(
    name: str,
    model: PlannedModel,
    lengths_BN: NDArray[np.int64],
    rates: Rates,
    element: int,
    fused: bool,
    passes: float,
    repeats: float,
) -> Part:
    """`repeats` forwards (with backwards, as so many passes) of a mean micro-batch of the sample."""
    shape, training = model.shape, passes > 1
    all_flops = passes * float(np.mean([forward_flops(shape, row, fused) for row in lengths_BN]))
    attention = passes * float(np.mean([attention_flops(shape, row, fused) for row in lengths_BN]))
    positions = float(lengths_BN.sum(axis=1).mean())
    widths = elementwise_widths(model)
    # Of the fused forward's last layer little more than the normalisation before its keys and values is left.
    layers = shape.num_layers - 0.9 * fused
    moved = positions * layers * widths[1 if training else 0] * element
    weights_read = passes * model.num_linear_parameters * element
    linear_rate = rates.linear_training if training else rates.linear_forward
    seconds = max((all_flops - attention) / linear_rate, weights_read / rates.copy)
    seconds += attention / (rates.attention_training if training else rates.attention_forward)
    seconds += moved / (rates.elementwise_training if training else rates.elementwise_forward)
    kernels = (_TRAINING_KERNELS if training else _FORWARD_KERNELS) * (shape.num_layers + 1)
    seconds = max(seconds, kernels * rates.launch_s)
    return Part(name, repeats * all_flops, repeats * (moved + weights_read), repeats * seconds)


def _optimizer_part(student: PlannedModel, work: Workload, placement: Placement, rates: Rates) -> Part:
    """AdamW's update, the norm of the gradients, and what each parameter costs beside the products."""
    shape, count, stage = student.shape, student.num_trained, placement.student_stage
    fused = work.is_fused(student, stage)
    own = count / (work.ranks if stage else 1)
    update, copied = own * ADAM_BYTES, own * _NORM_BYTES + count * _BUFFER_BYTES
    into_new = float(count * _BUFFER_BYTES)
    if work.student_precision == "bf16" and stage == 0:
        cast = student.num_trained if student.num_frozen else student.num_linear_parameters
        copied += work.accumulation * cast * _CAST_BYTES
    # Every look-up's backward fills a table of its own with zeros; all but the first are then added to it.
    table = 0 if student.num_frozen else 4 * shape.vocab_size * (shape.embedding_size or shape.hidden_size)
    uses = work.accumulation * (2 if work.student_clean and work.student_mixed and not fused else 1)
    copied += 3.0 * table * (uses - 1)
    # The engine's own look-up takes large pages.
    if fused:
        copied += table * uses
    else:
        into_new += table * uses
    fresh = rates.fresh if 4 * count > _NEW_PAGES_BYTES else rates.copy
    seconds = update / rates.update + copied / rates.copy + into_new / fresh
    return Part("optimizer", 0.0, update + copied + into_new, seconds)


def _exchange_part(
    student: PlannedModel, teacher: PlannedModel | None, work: Workload, placement: Placement, device: Device
) -> Part:
    """Gradients to all ranks; at ZeRO-3 also the weights, before forward and backward. Nothing overlaps."""
    element, stage = BYTES[work.student_precision], placement.student_stage
    if stage == 0:
        # Under autocast gradients are fp32.
        passes, size = 2.0, student.num_trained * (2 if work.student_precision == "fp16" else 4)
        collectives = 1
    elif stage < 3:
        passes = 1.0 + (work.accumulation if stage == 2 else 1)
        size, collectives = student.num_trained * element, 2
    else:
        # Weights before forward and backward, gradients of what is trained.
        passes, size = float(work.accumulation), (2 * student.num_parameters + student.num_trained) * element
        collectives = 3 * student.shape.num_layers * work.accumulation
    sent, seconds = _ring(passes * size, work.ranks, device)
    if teacher is not None and placement.teacher_stage == 3:
        forwards = work.accumulation * (work.teacher_clean_share + work.teacher_mixed)
        gathered = teacher.num_parameters
        if isinstance(teacher.shape, DecoderShape):
            gathered = max(gathered, teacher.shape.linear_parameters + 2 * teacher.shape.head_parameters)
        more, more_s = _ring(forwards * gathered * BYTES[work.teacher_precision], work.ranks, device)
        sent, seconds = sent + more, seconds + more_s
        collectives += round(forwards * teacher.shape.num_layers)
    return Part("exchange", 0.0, sent, seconds + collectives * COLLECTIVE_S * math.log2(work.ranks))


def _ring(size_bytes: float, ranks: int, device: Device) -> tuple[float, float]:
    """Bytes that each rank sends, and seconds, to gather or reduce `size_bytes` over all ranks: node by node first."""
    inside = min(ranks, DEVICES_PER_NODE)
    nodes = -(-ranks // DEVICES_PER_NODE)
    local = size_bytes * (inside - 1) / inside
    between = size_bytes / inside * (nodes - 1) / nodes
    return local + between, local / device.link_bytes_per_s + between / NETWORK_BYTES_PER_S
