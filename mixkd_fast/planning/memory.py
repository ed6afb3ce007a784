"""Memory of one rank: what DeepSpeed keeps per parameter at each ZeRO stage, and what a forward keeps per token.

Bytes per parameter follow DeepSpeed's code: P parameters over N ranks, e = 2 bytes (bf16, fp16) or 4 (fp32). bf16 at
stage 0 is autocast, so its weights, gradients and optimizer states are those of fp32.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mixkd_fast.configuration import Precision
from mixkd_fast.planning.decoders import DecoderShape
from mixkd_fast.planning.language_memory import decoder_activation_bytes, decoder_working_width, loss_bytes
from mixkd_fast.planning.models import PlannedModel
from mixkd_fast.planning.workload import BYTES, Workload

Stage = Literal[0, 1, 2, 3]
Offload = Literal["none", "optimizer", "optimizer+parameters"]
TeacherOffload = Literal["none", "cpu", "nvme"]
_ADAM_STATES = 8
_MASTER = 4
_BUCKET_ELEMENTS = 500_000_000  # DeepSpeed's default reduce_bucket_size
_LIVE_PARAMETERS = 1_000_000_000  # DeepSpeed's default stage3_max_live_parameters


@dataclass(frozen=True)
class Placement:
    """Where the models' states lie."""

    student_stage: Stage
    offload: Offload
    teacher_stage: Literal[0, 3] | None
    """None without a teacher."""
    teacher_offload: TeacherOffload = "none"
    """Where the parameters of a ZeRO-3 teacher rest."""

    def describe(self) -> str:
        """Student's stage and offload, teacher's stage and offload."""
        offload = "" if self.offload == "none" else f", {self.offload} on the CPU"
        teacher = "" if self.teacher_stage is None else f"; teacher ZeRO {self.teacher_stage}"
        teacher += {"none": "", "cpu": " on the CPU", "nvme": " on NVMe"}[self.teacher_offload]
        return f"ZeRO {self.student_stage}{offload}{teacher}"


def placements(has_teacher: bool, teacher_offload: TeacherOffload = "none") -> list[Placement]:
    """Every choice that DeepSpeed allows: optimizer offload from stage 1 on, parameters at stage 3 only.

    Args: teacher_offload = also a teacher that rests there.
    """
    choices: list[tuple[Stage, Offload]] = [(0, "none")]
    stages: tuple[Stage, ...] = (1, 2, 3)
    offloads: tuple[Offload, ...] = ("none", "optimizer")
    choices += [(stage, offload) for stage in stages for offload in offloads]
    choices.append((3, "optimizer+parameters"))
    teachers: list[tuple[Literal[0, 3] | None, TeacherOffload]] = [(0, "none"), (3, "none")]
    if teacher_offload != "none":
        teachers.append((3, teacher_offload))
    if not has_teacher:
        teachers = [(None, "none")]
    return [Placement(stage, offload, *teacher) for teacher in teachers for stage, offload in choices]


@dataclass(frozen=True)
class ModelStates:
    """The student's states on one rank, in bytes."""

    weights_bytes: int
    copies_bytes: int
    """Weights cast or stacked for the forward, alive until the backward is done; gathered ones at stage 3."""
    gradients_backward_bytes: int
    """While the backward runs."""
    gradients_update_bytes: int
    """While the optimizer runs, when the activations are gone."""
    buckets_bytes: int
    """DeepSpeed's buffers for the exchange of gradients."""
    optimizer_bytes: int
    host_bytes: int
    """In the memory of the CPU, of states that are offloaded."""


@dataclass(frozen=True)
class RankMemory:
    """The most that one rank's device holds, in bytes, by what it is for."""

    teacher_weights_bytes: int
    student: ModelStates
    activations_bytes: int
    """What the student's forward keeps for its backward, at the widest micro-batch."""
    student_working_bytes: int
    teacher_working_bytes: int
    logits_bytes: int
    heads_bytes: int = 0
    """Of a language model: output layers and hidden states beside the logits."""
    teacher_host_bytes: int = 0
    """The part of an offloaded teacher that rests in the memory of the CPU."""
    teacher_nvme_bytes: int = 0
    """The part of an offloaded teacher that rests on NVMe."""
    is_language: bool = False

    @property
    def host_bytes(self) -> int:
        """In the memory of the CPU, of student and teacher."""
        return self.student.host_bytes + self.teacher_host_bytes

    @property
    def gradients_bytes(self) -> int:
        """The larger of both moments."""
        return max(self.student.gradients_backward_bytes, self.student.gradients_update_bytes)

    @property
    def total_bytes(self) -> int:
        """The larger of two moments: the backward, with its activations, and the optimizer's update."""
        student = self.student
        if self.is_language:
            # The teacher is asked before the student's forward, and the loss leaves no logits to the backward.
            kept = student.copies_bytes + self.activations_bytes
            at_once = max(self.student_working_bytes, self.logits_bytes + self.heads_bytes)
            backward = student.gradients_backward_bytes + max(self.teacher_working_bytes, kept + at_once)
        else:
            working = max(self.student_working_bytes, self.teacher_working_bytes) + self.logits_bytes
            backward = student.gradients_backward_bytes + student.copies_bytes + self.activations_bytes + working
        moment = max(backward + student.buckets_bytes, student.gradients_update_bytes)
        return self.teacher_weights_bytes + student.weights_bytes + student.optimizer_bytes + moment


def rank_memory(
    student: PlannedModel,
    teacher: PlannedModel | None,
    placement: Placement,
    work: Workload,
    zero: Mapping[str, Any],
    is_gpu: bool,
) -> RankMemory:
    """Memory of each of `work.ranks` ranks. Args: zero = deepspeed.zero_optimization of the configuration."""
    positions = work.student_rows * work.widest
    element = BYTES[work.student_precision]
    teacher_weights = teacher_working = host = nvme = 0
    if teacher is not None:
        teacher_element = BYTES[work.teacher_precision]
        teacher_weights = teacher_element * teacher.num_parameters
        teacher_working = teacher_element * _working_width(teacher) * work.teacher_rows * work.widest
        if placement.teacher_stage == 3:
            # The engine lets two layers be whole at once (deepspeed_config.teacher_zero3_config).
            teacher_working += teacher_element * min(teacher.num_parameters, 2 * teacher.largest_layer)
            teacher_weights = _share(teacher_weights, work.ranks)
            if placement.teacher_offload != "none":
                resting, teacher_weights = teacher_weights, 0
                host, nvme = (resting, 0) if placement.teacher_offload == "cpu" else (0, resting)
        elif work.is_fused(teacher, 0):
            teacher_weights += teacher_element * _stacked_parameters(teacher)
    language = isinstance(student.shape, DecoderShape)
    heads = 0
    if language:
        logits, heads = loss_bytes(student, teacher, work, placement.student_stage, placement.teacher_stage)
    else:
        rows = (work.student_rows + work.micro_batch_size + work.mixed_rows) * student.shape.num_labels
        logits = 2 * 4 * rows
    return RankMemory(
        teacher_weights_bytes=teacher_weights,
        student=student_states(student, placement, work, zero, is_gpu),
        activations_bytes=activation_bytes(
            student,
            work.student_rows,
            work.widest,
            work.student_precision,
            autocast=work.student_precision == "bf16" and placement.student_stage == 0,
            fused=work.is_fused(student, placement.student_stage),
            is_gpu=is_gpu,
            checkpointing=work.gradient_checkpointing,
        ),
        student_working_bytes=element * 2 * _working_width(student) * positions,
        teacher_working_bytes=teacher_working,
        logits_bytes=logits,
        heads_bytes=heads,
        teacher_host_bytes=host,
        teacher_nvme_bytes=nvme,
        is_language=language,
    )


def student_states(
    student: PlannedModel, placement: Placement, work: Workload, zero: Mapping[str, Any], is_gpu: bool
) -> ModelStates:
    """Weights, gradients and optimizer states of the trained model; AdamW with two fp32 states.

    Frozen weights, beside adapters, have neither gradients nor states, and are in half precision under autocast.
    """
    count, ranks, precision, stage = student.num_trained, work.ranks, work.student_precision, placement.student_stage
    element = 4 if precision == "bf16" and stage == 0 else BYTES[precision]
    frozen = BYTES[precision] * student.num_frozen
    copies = _copied_bytes(student, precision, stage, work.is_fused(student, stage))
    if stage == 0:
        # fp16 keeps an fp32 master and casts its gradients for the update.
        master = _MASTER if precision == "fp16" else 0
        update = (element + 4 if precision == "fp16" else element) * count
        optimizer = (_ADAM_STATES + master) * count
        return ModelStates(element * count + frozen, copies, element * count, update, 0, optimizer, 0)
    part = _share(count, ranks)
    bucket = int(zero.get("reduce_bucket_size", _BUCKET_ELEMENTS))
    # Memory of the CPU is taken when it is first written to.
    bucket = bucket if is_gpu else min(bucket, count)
    buckets = element * bucket * (2 if stage < 3 and zero.get("overlap_comm") else 1)
    weights = element * count + frozen if stage < 3 else element * part + _share(frozen, ranks)
    accumulated = element * part if work.accumulation > 1 else 0
    backward = {1: element * count + accumulated, 2: element * part + accumulated, 3: element * part}[stage]
    update = (element + 4) * part
    optimizer, host = (_MASTER + _ADAM_STATES) * part, 0
    if stage == 3:
        live = int(zero.get("stage3_max_live_parameters", _LIVE_PARAMETERS))
        copies += element * min(student.num_parameters, max(live, student.largest_layer))
    if placement.offload != "none":
        # fp32 gradients lie beside the states; the device keeps what is in the bucket.
        host = optimizer + (4 + element) * part
        optimizer, update = 0, 0
        backward = element * count if stage == 1 else 0
        if placement.offload == "optimizer+parameters":
            host += weights
            weights = 0
    return ModelStates(weights, copies, backward, update, buckets, optimizer, host)


def activation_bytes(
    model: PlannedModel,
    rows: int,
    width: int,
    precision: Precision,
    *,
    autocast: bool,
    fused: bool,
    is_gpu: bool,
    checkpointing: bool = False,
) -> int:
    """Bytes that the forward of `rows` rows of `width` positions keeps for the backward, copies of weights excluded.

    Per position and layer, in elements of the forward's precision: the layer's input, its queries, keys, values and
    attended values, the inputs of both normalisations and the output of the first, and both sides of the activation.
    Args: autocast = the model's weights are fp32 and `precision` is that of its products; fused = the engine's own
    forward, which casts once and computes the last layer for the first token.
    """
    if isinstance(model.shape, DecoderShape):
        return decoder_activation_bytes(
            model, rows, width, precision, autocast=autocast, is_gpu=is_gpu, checkpointing=checkpointing
        )
    shape, element = model.shape, BYTES[precision]
    # Autocast of the model's own forward normalises in fp32 and casts the input anew for queries, keys and values.
    recasts = autocast and not fused
    norm_element = 4 if recasts else element
    hidden = shape.hidden_size
    # The fused dropout of the CPU makes its mask again from a seed.
    mask = 0 if not model.has_dropout or (fused and not is_gpu) else 1 if is_gpu else element
    # PyTorch's fused attention with dropout runs in fp32 on the CPU, whatever autocast says.
    in_fp32 = recasts and model.has_attention_dropout and not model.explicit_attention and not is_gpu
    attention_element = 4 if in_fp32 else element
    scores = _kept_scores(model, fused, is_gpu) * width + shape.relative_terms * 2 * shape.relative_span
    # ModernBERT, the gated family, keeps its rotated queries and keys beside the ones that came from the product.
    attention = (5 if shape.is_gated else 3) * hidden + shape.num_heads * scores
    inner = shape.intermediate_size * (4 if shape.is_gated else 2)
    layer = (2 + 2 * recasts) * hidden * element + attention * attention_element + hidden * element
    layer += inner * element + 2 * hidden * (norm_element + mask)
    embedding = (shape.embedding_size or hidden) * (norm_element + mask)
    positions = rows * width
    # DeBERTa repeats its projected distances for every row.
    distances = shape.relative_terms * 2 * shape.relative_span * hidden * element * rows
    if checkpointing:
        return positions * (embedding + shape.num_layers * hidden * element + layer) + distances
    num_whole = shape.num_layers - int(fused)
    # Of the last layer the fused forward keeps input, keys and values of all tokens; the rest is of one token a row.
    last = 3 * hidden * element * positions + layer * rows if fused else 0
    return positions * (embedding + num_whole * layer) + num_whole * distances + last


def _kept_scores(model: PlannedModel, fused: bool, is_gpu: bool) -> int:
    """Tensors of attention scores that are kept for the backward, per head and pair of positions."""
    if fused:
        return 0 if is_gpu else 1 + model.has_attention_dropout
    if model.explicit_attention:
        return 1 + 2 * model.has_attention_dropout
    # PyTorch's CPU kernel of fused attention has no dropout.
    return 3 if model.has_attention_dropout and not is_gpu else 0


def _working_width(model: PlannedModel) -> int:
    """Elements per position that a layer's widest moment holds: queries, keys, values; or both sides of activation."""
    shape = model.shape
    if isinstance(shape, DecoderShape):
        return decoder_working_width(shape)
    inner = shape.intermediate_size * (3 if shape.is_gated else 2)
    return max(5 * shape.hidden_size, 2 * shape.hidden_size + inner)


def _copied_bytes(model: PlannedModel, precision: Precision, stage: int, fused: bool) -> int:
    if precision == "bf16" and stage == 0:
        return 2 * (model.num_trained if model.num_frozen else model.num_linear_parameters)
    return BYTES[precision] * _stacked_parameters(model) if fused else 0


def _stacked_parameters(model: PlannedModel) -> int:
    """Queries', keys' and values' weights, which the engine's own forward stacks."""
    return 3 * model.shape.num_layers * model.shape.hidden_size**2


def _share(count: int, ranks: int) -> int:
    return -(-count // ranks)
