"""What the forward of a causal language model keeps for its backward, and what `linear_kd_loss` holds, in bytes.

Symbols: h hidden width, A width of all queries, K of all keys (less with grouped queries), i feed-forward width.
"""

from mixkd_fast.configuration import Precision
from mixkd_fast.planning.decoders import DecoderShape
from mixkd_fast.planning.models import PlannedModel
from mixkd_fast.planning.workload import BYTES, Workload


def decoder_activation_bytes(
    model: PlannedModel,
    rows: int,
    width: int,
    precision: Precision,
    *,
    autocast: bool,
    is_gpu: bool,
    checkpointing: bool = False,
) -> int:
    """Bytes kept of `rows` rows of `width` positions, from the embeddings to the last hidden states.

    Per position and layer: inputs and outputs of the normalisations (root mean squares: in fp32, and once more
    normalised), queries, keys, values (as many heads as they have) and attended values, `kept_inner` tensors of the
    feed-forward part, the insides of adapters. Attention keeps no scores unless it is explicit.
    """
    shape, element = _decoder(model), BYTES[precision]
    hidden, keys = shape.hidden_size, shape.attention_size + shape.key_value_size
    wide = 4 if shape.is_rms or autocast else element
    # Frozen gains need no normalised values; LayerNorm keeps its input alone.
    normalised = 0 if not shape.is_rms or model.num_frozen else 4 if autocast else element
    outputs = shape.readers if autocast else min(2, shape.hidden_norms)
    norm = shape.hidden_norms * hidden * (wide + normalised)
    head_norms = 0
    if shape.head_norms:
        head_norms = keys * (4 + element)
    layer = norm + outputs * hidden * element + head_norms + 2 * keys * element
    layer += shape.kept_inner * shape.intermediate_size * element + model.adapter_width * element
    if model.has_dropout:
        layer += 2 * hidden * (1 if is_gpu else element)
    if model.explicit_attention or (model.has_attention_dropout and not is_gpu):
        layer += 3 * shape.num_heads * width * element
    last = hidden * (wide + normalised + element)
    positions = rows * width
    if checkpointing:
        return positions * (shape.num_layers * hidden * (4 if autocast else element) + layer + last)
    return positions * (shape.num_layers * layer + last)


def decoder_working_width(shape: DecoderShape) -> int:
    """Elements per position of a layer's widest moment: attention's tensors, or those of the feed-forward part."""
    attention = 2 * (shape.attention_size + shape.key_value_size)
    return 2 * shape.hidden_size + max(attention, 3 * shape.intermediate_size)


def loss_bytes(
    student: PlannedModel, teacher: PlannedModel | None, work: Workload, student_stage: int, teacher_stage: int | None
) -> tuple[int, int]:
    """(logits of both heads at once, heads and hidden states beside them) while the loss is computed.

    Logits of student, teacher and gradient are bounded by max_logits_mib. Beside them are the heads as far as ZeRO-3
    keeps them in parts, the gradient of a trained head in fp32, and the hidden states with the student's gradient; of
    a teacher store its answers, and the output layer that it has kept.
    """
    shape, positions = _decoder(student), work.student_rows * work.widest
    limit = work.max_logits_mib * 2**20
    is_asked = teacher is not None and work.teacher_rows > 0
    has_logits = is_asked or (work.stored is not None and work.stored.num_classes > 0)
    logits = min(limit, 4 * positions * shape.vocab_size * (2 if has_logits else 1))
    element = BYTES[work.student_precision]
    heads = 2 * positions * shape.hidden_size * element
    heads += element * shape.head_parameters if student_stage == 3 else 0
    heads += 0 if student.num_frozen else 4 * shape.head_parameters
    if work.stored is not None:
        heads += work.stored.head_bytes + work.micro_batch_size * work.widest * work.stored.position_bytes
    if teacher is not None and is_asked:
        theirs, element = _decoder(teacher), BYTES[work.teacher_precision]
        heads += work.teacher_rows * work.widest * theirs.hidden_size * element
        heads += element * theirs.head_parameters if teacher_stage == 3 else 0
    return logits, heads


def _decoder(model: PlannedModel) -> DecoderShape:
    assert isinstance(model.shape, DecoderShape)
    return model.shape
